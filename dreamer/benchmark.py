"""What both variants cost on this machine, measured: how the published claim arose, what is true.

The claim's times came from one unwarmed pass each, channel tokens first, read off the wall clock
without waiting for the device: the first variant paid for starting it. Here that protocol stands
beside its mirror image, single passes in fresh processes, and warm rounds in which all variants
take turns (by the clock of torch.utils.benchmark). Every result is one row of COLUMNS: median,
quartiles and number n of its values, in s, FLOP/s, MiB or as a ratio.
"""

import json
import logging
import math
import platform
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.benchmark import timer as clock

from dreamer import cold
from dreamer.cold import DTYPES, build, stepper
from dreamer.costs import (
    BATCH,
    CLAIMED,
    COLUMNS,
    FRESH,
    MIRRORED,
    VARIANTS,
    Rows,
    configs,
    flops,
    inputs,
    modules,
    row,
)
from dreamer.fast import Packed, difference, fast, packs
from dreamer.model import Backbone, CardiacDreamer, ModelConfig, WorldModel
from dreamer.training import has_bf16, versions, write_whole

log = logging.getLogger(__name__)

PASSES = {  # protocol: what runs in each fresh process, and which clock of cold.single counts
    CLAIMED: ([("channel", "patch")], "clock"),
    MIRRORED: ([("patch", "channel")], "clock"),
    FRESH: ([("channel",), ("patch",)], "waited"),
}
Call = Callable[[], Any]


def choose(device: str, dtypes: Iterable[str]) -> tuple[torch.device, list[str]]:
    """The device ("auto": CUDA where there is one) and those `dtypes` that it computes itself.

    Raises ValueError for a device or dtype that is unknown or absent.
    """
    names = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "cpu": "cpu", "cuda": "cuda"}
    if device not in names or (names[device] == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: {device} is not here; use cpu, auto, or cuda where there is one")
    if (unknown := set(dtypes) - set(DTYPES)) or not dtypes:
        raise ValueError(
            f"dtypes: {', '.join(sorted(unknown))}; at least one of {', '.join(DTYPES)}"
        )
    kept = [name for name in dtypes if name != "bfloat16" or has_bf16()]
    if kept != list(dtypes):
        log.warning("bfloat16 is left out: this machine has no bf16 arithmetic")
    return torch.device(names[device]), kept


# ---- warm: all in turn ---------------------------------------------------------------------------


def warm(calls: Mapping[Any, Call], repeats: int, least: float = 0.02) -> dict[Any, NDArray]:
    """Seconds of each call in `repeats` rounds, all calls in turn within a round.

    The clock is torch.utils.benchmark's, which waits for the device; a call shorter than `least`
    seconds is repeated within its turn. Two unmeasured rounds warm everything up.
    """
    timers = {key: timeit.Timer(call, timer=clock) for key, call in calls.items()}
    for timer in timers.values():
        timer.timeit(1)
    number = {k: max(1, math.ceil(least / max(t.timeit(1), 1e-6))) for k, t in timers.items()}
    rounds = [
        {k: t.timeit(number[k]) / number[k] for k, t in timers.items()} for _ in range(repeats)
    ]
    return {key: np.array([r[key] for r in rounds]) for key in calls}


def products(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Call, float]]:
    """Large matrix products: what to call and its FLOP. The fastest is the machine's limit."""
    found = {}
    for side in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[f"{side}"] = (lambda a=a, out=out: torch.mm(a, a, out=out)), 2.0 * side**3
    if packs(device, dtype):  # oneDNN in its own order can be faster than the BLAS behind torch.mm
        layer, x = Packed(nn.Linear(1024, 1024), dtype), torch.randn(2048, 1024).to(dtype)
        found["packed"] = (lambda: layer(x)), 2.0 * 2048 * 1024**2
    return found


def encoder(world: WorldModel, config: ModelConfig) -> nn.TransformerEncoder:
    """PyTorch's own encoder with the weights of `world`'s blocks: the yardstick."""
    layer = nn.TransformerEncoderLayer(
        config.d_model, config.num_heads, config.feedforward * config.d_model, config.dropout,
        activation="gelu", batch_first=True, norm_first=config.norm_first,
    )  # fmt: skip
    reference = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False).eval()
    for theirs, ours in zip(reference.layers, world.blocks, strict=True):
        theirs.self_attn.in_proj_weight = ours.attention.qkv.weight
        theirs.self_attn.in_proj_bias = ours.attention.qkv.bias
        theirs.self_attn.out_proj.load_state_dict(ours.attention.out.state_dict())
        theirs.linear1, theirs.linear2 = ours.feedforward[0], ours.feedforward[3]
        theirs.norm1, theirs.norm2 = ours.norm1, ours.norm2
    return reference.to(ours.norm1.weight.device)


def through(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
    """Tokens [B, N, D] through our blocks, as the encoder takes them through its layers."""
    for block in blocks:
        tokens = block(tokens)
    return tokens


Paths = dict[tuple[str, str], dict[str, nn.Module]]


def paths(models: Mapping[str, nn.Module], dtypes: Sequence[str], compiled: bool) -> Paths:
    """Every way to run the variants, by (path, dtype): plain, fast, and if asked for, compiled."""
    ways: Paths = {("plain", "float32"): dict(models)}
    for name in dtypes:
        ways["fast", name] = {v: fast(m, DTYPES[name]) for v, m in models.items()}
    if compiled:
        name = dtypes[-1]
        ways["compiled", name] = {v: fast(m, DTYPES[name], True) for v, m in models.items()}
    return ways


@torch.no_grad()
def latency(ways: Paths, batches: Sequence[int], repeats: int) -> Rows:
    """Forward passes, warm, of all `ways` (see `paths`) at the claim's batch, plain fp32 and the
    last of them at other `batches` (from 16 on, three rounds at most).

    At the claim's batch the machine's limit and PyTorch's encoder take their turns too. Rows:
    `latency`; from the times within a round `reduction` (1 - patch / channel), `speedup` (plain /
    path), `overhead` (our blocks / PyTorch's encoder); `share` of `limit`.
    """
    models, last = ways["plain", "float32"], list(ways)[-1]
    config = {v: m.config for v, m in models.items()}
    device, rows = models["patch"].pose_std.device, []
    for batch in batches:
        calls: dict[tuple, Call] = {}
        amount: dict[tuple, float] = {}
        for way, variants in ways.items():
            if batch != BATCH and way not in (("plain", "float32"), last):
                continue
            for variant, model in variants.items():
                key, given = (variant, *way), inputs(config[variant], batch, device)
                calls[key] = lambda model=model, given=given: model(*given)
                amount[key] = sum(flops(config[variant], batch).values())
        for variant, model in models.items() if batch == BATCH else ():
            shape = (batch, 1 + config[variant].tokens, config[variant].d_model)
            tokens = torch.randn(shape, device=device)
            library, blocks = encoder(model.world, config[variant]), model.world.blocks
            calls[variant, "blocks", "float32"] = lambda b=blocks, t=tokens: through(b, t)
            calls[variant, "encoder", "float32"] = lambda e=library, t=tokens: e(t)
        for name in dict.fromkeys(dtype for _, dtype in ways) if batch == BATCH else ():
            for size, (call, work) in products(DTYPES[name], device).items():
                calls[size, "limit", name], amount[size, "limit", name] = call, work
        seconds = warm(calls, repeats if batch < 16 else min(repeats, 3))
        where = {"batch": batch, "image": config["patch"].image_size, "protocol": "warm"}
        rows += _compared(seconds, amount, where)
    return rows


def _compared(seconds: dict[tuple, NDArray], amount: dict[tuple, float], where: dict) -> Rows:
    """Rows of one batch from the times of its rounds."""
    rows, limit = [], {}
    for name in dict.fromkeys(dtype for _, path, dtype in seconds if path == "limit"):
        rates = [amount[k] / s for k, s in seconds.items() if k[1:] == ("limit", name)]
        limit[name] = np.median(rates, axis=1).max()
        rows.append(row("limit", max(rates, key=np.median), "FLOP/s", dtype=name, protocol="warm"))
    for (variant, path, dtype), values in seconds.items():
        if path == "limit":
            continue
        at = {"variant": variant, "path": path, "dtype": dtype, **where}
        rows.append(row("latency", values, "s", **at))
        if path == "encoder":
            rows.append(row("overhead", seconds[variant, "blocks", dtype] / values, "", **at))
        elif path != "blocks":
            if path != "plain":
                plain = seconds[variant, "plain", "float32"]
                rows.append(row("speedup", plain / values, "", **at))
            if dtype in limit:
                share = amount[variant, path, dtype] / values / limit[dtype]
                rows.append(row("share", share, "", **at))
            if variant == "patch":
                reduction = 1 - values / seconds["channel", path, dtype]
                rows.append(row("reduction", reduction, "", **{**at, "variant": ""}))
    return rows


def training(
    shapes: Mapping[str, Any], device: torch.device, dtypes: Sequence[str], repeats: int
) -> Rows:
    """Training steps at the claim's batch, warm, in turn: rows `training` and `reduction`."""
    keys = [(v, name) for name in dtypes for v in VARIANTS]
    steps = {(v, n): stepper(build(configs(shapes)[v], device), BATCH, n) for v, n in keys}
    seconds, rows = warm(steps, repeats), []
    for variant, dtype in keys:
        at = {"path": "training", "dtype": dtype, "protocol": "warm", "batch": BATCH}
        rows.append(row("training", seconds[variant, dtype], "s", variant=variant, **at))
        if variant == "patch":
            less = 1 - seconds[variant, dtype] / seconds["channel", dtype]
            rows.append(row("reduction", less, "", **at))
    return rows


@torch.no_grad()
def parts(ways: Paths, repeats: int) -> Rows:
    """Where the time of a forward pass goes, at the claim's batch: rows `part`.

    Hooks read the clock around every module of costs.PARTS, after waiting for the device; `rest`
    is what lies between the modules.
    """
    plain, rows = ways["plain", "float32"], []
    device = plain["patch"].pose_std.device
    for (path, dtype), variants in ways.items():
        for variant, model in variants.items() if path != "compiled" else ():
            given, spent, hooks = (
                inputs(plain[variant].config, BATCH, device),
                defaultdict(float),
                [],
            )

            def start(_module, _given, part="", spent=spent):
                spent[part] -= clock()

            def stop(_module, _given, _result, part="", spent=spent):
                spent[part] += clock()

            for part, members in modules(getattr(model, "model", model)).items():
                for module in members:
                    hooks.append(module.register_forward_pre_hook(partial(start, part=part)))
                    hooks.append(module.register_forward_hook(partial(stop, part=part)))
            rounds = []
            for _ in range(repeats + 1):
                spent.clear()
                begun = clock()
                model(*given)
                whole = clock() - begun
                rounds.append({**spent, "rest": whole - sum(spent.values())})
            for hook in hooks:
                hook.remove()
            for part in rounds[0]:
                values, at = [r[part] for r in rounds[1:]], {"path": path, "dtype": dtype}
                rows.append(row("part", values, "s", variant=variant, part=part, batch=BATCH, **at))
    return rows


@torch.no_grad()
def scaling(
    shapes: Mapping[str, Any], device: torch.device, sizes: Sequence[int], repeats: int
) -> Rows:
    """One frame of growing size: patch tokens grow in number, channel tokens in width only.

    Rows `scaling` (part backbone, and world of each variant): seconds of plain fp32, and the FLOP
    expected by formula as rows `scaling flop`.
    """
    rows = []
    for size in sizes:
        both = configs({**shapes, "image_size": size})
        image, action = inputs(both["patch"], 1, device)
        torch.manual_seed(0)
        backbone = Backbone(both["patch"]).eval().to(device)
        features = backbone(image)
        worlds = {v: WorldModel(c).eval().to(device) for v, c in both.items()}
        calls = {v: partial(world, features, action) for v, world in worlds.items()}
        seconds = warm(calls, repeats)
        seconds["both"] = warm({"both": partial(backbone, image)}, min(repeats, 2))["both"]
        for variant, values in seconds.items():
            part = "backbone" if variant == "both" else "world"
            work = flops(both[VARIANTS[0] if variant == "both" else variant])
            work = sum(w for p, w in work.items() if (p == "backbone") == (part == "backbone"))
            at = {"variant": variant, "part": part, "image": size, "batch": 1}
            rows.append(row("scaling", values, "s", protocol="warm", **at))
            rows.append(row("scaling flop", work, "FLOP", protocol="formula", **at))
    return rows


def lesson(config: ModelConfig, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Speckled discs [B, 1, S, S] whose place, width, angle and brightness are the pose [B, 6]."""
    pose = torch.rand(count, 6, generator=draw) * 2 - 1
    axis = torch.linspace(-1, 1, config.image_size)
    x, y, width, angle, shape, bright = pose[:, :, None, None].unbind(1)
    dx, dy = axis - x / 2, axis[:, None] - y / 2
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    disc = torch.exp(-((u**2) * (2 + shape) + v**2 * 6) / (0.35 + 0.15 * width) ** 2)
    speckle = torch.rand(disc.shape, generator=draw)
    return (disc * (0.7 + 0.3 * bright) * (0.5 + speckle / 2))[:, None], pose * 3**0.5


def taught(config: ModelConfig, steps: int = 80) -> CardiacDreamer:
    """A model that has learnt to tell frames apart: after `steps` of `lesson` on the CPU.

    Random weights give every frame nearly the same pose, against which any difference is large.
    """
    torch.manual_seed(0)
    model, draw = CardiacDreamer(config).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, steps)
    for _ in range(steps):
        image, pose = lesson(config, 16, draw)
        loss = F.smooth_l1_loss(model(image, torch.zeros_like(pose)).pose, pose)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(device: torch.device, dtypes: Sequence[str], **fields: Any) -> Rows:
    """How far the fast path moves the pose: rows `pose difference`, largest over 64 frames.

    Of small `taught` models: ResNet34 at 64 px, or as `fields` (of ModelConfig) say.
    """
    small = {"image_size": 64, "d_model": 96, "num_heads": 4, "num_layers": 2, **fields}
    rows = []
    for variant, config in configs(small).items():
        model = taught(config).to(device)
        image, pose = lesson(config, 64, torch.Generator().manual_seed(1))
        given = image.to(device), torch.zeros_like(pose).to(device)
        for name in dtypes:
            gap = difference(model, fast(model, DTYPES[name]), *given)
            at = {"variant": variant, "path": "fast", "dtype": name, "batch": len(pose)}
            rows.append(row("pose difference", gap, "", **at))
    return rows


# ---- in processes of their own -------------------------------------------------------------------


def passes(shapes: Mapping[str, Any], device: torch.device, repeats: int) -> Rows:
    """Single unwarmed passes at the claim's batch: every protocol of PASSES in `repeats` processes.

    Rows `cold`: seconds by protocol and variant; `reduction`: 1 - patch / channel of each protocol;
    `claim memory`: what CUDA's allocator holds after the claim's pass.
    """
    both, rows = configs(shapes), []
    found = defaultdict(list)  # (protocol, variant) -> one value per process
    memory = defaultdict(list)
    for _ in range(repeats):
        for protocol, (orders, which) in PASSES.items():
            for order in orders:
                got = cold.apart(cold.single, [both[v] for v in order], device.type)
                for variant, measured in got.items():
                    found[protocol, variant].append(measured[which])
                    if protocol == CLAIMED:
                        memory[variant].append(measured["memory"])
    at = {"path": "plain", "dtype": "float32", "batch": BATCH, "image": both["patch"].image_size}
    for (protocol, variant), values in found.items():
        rows.append(row("cold", values, "s", variant=variant, protocol=protocol, **at))
    for protocol in PASSES:
        less = 1 - np.divide(found[protocol, "patch"], found[protocol, "channel"])
        rows.append(row("reduction", less, "", protocol=protocol, **at))
    if device.type == "cuda":
        rows += [row("claim memory", v, "MiB", variant=k, **at) for k, v in memory.items()]
    return rows


def memory(shapes: Mapping[str, Any], device: torch.device, dtypes: Sequence[str]) -> Rows:
    """Peaks at the claim's batch, each in a process of its own: rows `memory`, MiB above what the
    imported libraries take, at rest (`weights`), in a forward pass and in a training step."""
    ways = [("plain", "float32"), *(("fast", d) for d in dtypes[-1:]), ("training", "float32")]
    rows = []
    for variant, config in configs(shapes).items():
        for path, dtype in ways:
            got = cold.apart(cold.peak, config, device.type, path, dtype)
            at = {"variant": variant, "path": path, "dtype": dtype, "batch": BATCH}
            rows += [row("memory", v, "MiB", protocol=kind, **at) for kind, v in got.items()]
    return rows


def attention_memory(
    shapes: Mapping[str, Any], device: torch.device, tokens: Sequence[int] = (50, 513, 785)
) -> Rows:
    """Peak of one attention layer by number of tokens, batch 16: rows `attention memory` (MiB)
    above weights and input: fused, in parts (the fast path's) and explicit, which keeps maps."""
    config = configs(shapes)["patch"]
    rows = []
    for way in ("fused", "in parts", "explicit"):
        for count in tokens:
            got = cold.apart(cold.attention_peak, config, count, way, device.type)
            rows.append(row("attention memory", got, "MiB", path=way, part=str(count), batch=16))
    return rows


# ---- what was found ------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, str]:
    """The machine's name, what it has, versions, commit and date."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    return {
        "machine": name,
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        **versions(),
        "device": device.type,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores"
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores}"


def table(rows: Iterable[dict[str, Any]], about: Mapping[str, str]) -> pd.DataFrame:
    """Rows as a tidy table: COLUMNS, then `about` the machine, the same in every row."""
    frame = pd.DataFrame(list(rows)).reindex(columns=COLUMNS)
    texts = [c for c in COLUMNS if c not in ("batch", "image", "value", "low", "high", "n")]
    frame[texts] = frame[texts].fillna("")
    return frame.assign(**{k: about[k] for k in ("machine", "device", "torch", "commit", "date")})


def save(frame: pd.DataFrame, about: Mapping[str, str], output: str | Path, name: str) -> None:
    """`name`.csv, and `name`.json with the machine, versions and date beside the same rows."""
    save_table(frame, output, name)
    rows = json.loads(frame[list(COLUMNS)].to_json(orient="records"))
    text = json.dumps({"machine": dict(about), "rows": rows}, indent=1)
    write_whole(Path(output) / f"{name}.json", text.encode())


def save_table(frame: pd.DataFrame, output: str | Path, name: str) -> None:
    """A table as `name`.csv, written whole."""
    Path(output).mkdir(parents=True, exist_ok=True)
    write_whole(Path(output) / f"{name}.csv", frame.to_csv(index=False).encode())


def load(files: Iterable[str | Path]) -> pd.DataFrame:
    """Tables of several machines as one. ValueError names a file that is no result of `save`."""
    frames = []
    for file in files:
        frame = pd.read_csv(file, keep_default_na=False, na_values={"batch": "", "image": ""})
        if absent := [c for c in (*COLUMNS, "machine", "date") if c not in frame.columns]:
            raise ValueError(f"{file}: no column {', '.join(absent)}; give a 03_benchmark.csv")
        frames.append(frame)
    if not frames:
        raise ValueError("no results: give at least one 03_benchmark.csv")
    return pd.concat(frames, ignore_index=True)
