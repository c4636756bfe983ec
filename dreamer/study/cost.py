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

from dreamer.study import cold
from dreamer.study.cold import DTYPES
from dreamer.study.costs import (
    BATCH,
    CLAIMED,
    COLUMNS,
    FRESH,
    MIRRORED,
    Rows,
    configs,
    flops,
    inputs,
    modules,
    row,
)
from dreamer.study.fast import Packed, difference, fast, packs
from dreamer.model import CardiacDreamer, ModelConfig, WorldModel
from dreamer.runs import has_bf16, versions, write_whole

log = logging.getLogger(__name__)

ORDERS = {CLAIMED: ("channel", "patch"), MIRRORED: ("patch", "channel")}
BATCHES = {"cpu": (1, 4, 8), "cuda": (1, 4, 16, 64)}
LAYERS = 2  # of the blocks, all alike, that are compared with PyTorch's
ENOUGH = 30.0  # seconds of rounds at the claim's batch after which no further one begins
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


def warm(
    calls: Mapping[Any, Call], repeats: int, least: float = 0.1, enough: float = math.inf
) -> dict[Any, NDArray]:
    """Seconds of each call in `repeats` rounds, all calls in turn within a round; no further round
    begins after `enough` seconds.

    The clock is torch.utils.benchmark's, which waits for the device; a call shorter than `least`
    seconds is repeated within its turn. An unmeasured round warms everything up.
    """
    timers = {key: timeit.Timer(call, timer=clock) for key, call in calls.items()}
    last = {key: timer.timeit(1) for key, timer in timers.items()}
    rounds, begun = [], clock()
    while len(rounds) < repeats and (not rounds or clock() - begun < enough):
        number = {key: max(1, math.ceil(least / max(last[key], 1e-6))) for key in timers}
        last = {key: timer.timeit(number[key]) / number[key] for key, timer in timers.items()}
        rounds.append(last)
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


def encoder(blocks: Sequence[nn.Module], config: ModelConfig) -> nn.TransformerEncoder:
    """PyTorch's own encoder with the weights of `blocks`: the yardstick."""
    layer = nn.TransformerEncoderLayer(
        config.d_model, config.num_heads, config.feedforward * config.d_model, config.dropout,
        activation="gelu", batch_first=True, norm_first=config.norm_first,
    )  # fmt: skip
    reference = nn.TransformerEncoder(layer, len(blocks), enable_nested_tensor=False).eval()
    for theirs, ours in zip(reference.layers, blocks, strict=True):
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
    """Forward passes, warm, of all `ways` (see `paths`) at the claim's batch, the last of them at
    other `batches`, plain fp32 at smaller ones and on a GPU at all.

    At the claim's batch the machine's limit and PyTorch's encoder take their turns too. Rows:
    `latency`; from the times within a round `reduction` (1 - patch / channel), `speedup` (plain /
    path), `overhead` (our first `LAYERS` blocks / PyTorch's encoder); `share` of `limit`.
    """
    models, last = ways["plain", "float32"], list(ways)[-1]
    config = {v: m.config for v, m in models.items()}
    device, rows = models["patch"].pose_std.device, []
    for batch in batches:
        calls: dict[tuple, Call] = {}
        amount: dict[tuple, float] = {}
        for way, variants in ways.items():
            plain = way == ("plain", "float32") and (batch < BATCH or device.type == "cuda")
            if batch != BATCH and way != last and not plain:
                continue
            for variant, model in variants.items():
                key, given = (variant, *way), inputs(config[variant], batch, device)
                calls[key] = lambda model=model, given=given: model(*given)
                amount[key] = sum(flops(config[variant], batch).values())
        for variant, model in models.items() if batch == BATCH else ():
            shape = (batch, 1 + config[variant].tokens, config[variant].d_model)
            tokens = torch.randn(shape, device=device)
            blocks = model.world.blocks[:LAYERS]
            library = encoder(blocks, config[variant])
            calls[variant, "blocks", "float32"] = lambda b=blocks, t=tokens: through(b, t)
            calls[variant, "encoder", "float32"] = lambda e=library, t=tokens: e(t)
        for name in dict.fromkeys(dtype for _, dtype in ways) if batch == BATCH else ():
            for size, (call, work) in products(DTYPES[name], device).items():
                calls[size, "limit", name], amount[size, "limit", name] = call, work
        seconds = warm(calls, repeats, enough=ENOUGH if batch == BATCH else ENOUGH / 4)
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
            if path != "plain" and (variant, "plain", "float32") in seconds:
                plain = seconds[variant, "plain", "float32"]
                rows.append(row("speedup", plain / values, "", **at))
            if dtype in limit:
                share = amount[variant, path, dtype] / values / limit[dtype]
                rows.append(row("share", share, "", **at))
            if variant == "patch":
                reduction = 1 - values / seconds["channel", path, dtype]
                rows.append(row("reduction", reduction, "", **{**at, "variant": ""}))
    return rows


@torch.no_grad()
def parts(ways: Paths, repeats: int) -> Rows:
    """Where the time of a forward pass goes, at the claim's batch, after `latency`: rows `part`.

    Hooks read the clock around every module of costs.PARTS, after waiting for the device; `rest`
    is what lies between the modules.
    """
    plain, rows = ways["plain", "float32"], []
    device = plain["patch"].pose_std.device
    for (path, dtype), variants in ways.items():
        for variant, model in variants.items() if path != "compiled" else ():
            given, hooks = inputs(plain[variant].config, BATCH, device), []
            spent: dict[str, float] = defaultdict(float)

            def start(_module, _given, part="", spent=spent):
                spent[part] -= clock()

            def stop(_module, _given, _result, part="", spent=spent):
                spent[part] += clock()

            for part, members in modules(getattr(model, "model", model)).items():
                for module in members:
                    hooks.append(module.register_forward_pre_hook(partial(start, part=part)))
                    hooks.append(module.register_forward_hook(partial(stop, part=part)))
            rounds = []
            for _ in range(repeats):  # warm: `latency` has run them
                spent.clear()
                begun = clock()
                model(*given)
                whole = clock() - begun
                rounds.append({**spent, "rest": whole - sum(spent.values())})
            for hook in hooks:
                hook.remove()
            for part in rounds[0]:
                values, at = [r[part] for r in rounds], {"path": path, "dtype": dtype}
                rows.append(row("part", values, "s", variant=variant, part=part, batch=BATCH, **at))
    return rows


@torch.no_grad()
def scaling(models: Mapping[str, CardiacDreamer], sizes: Sequence[int], repeats: int) -> Rows:
    """One frame of growing size: patch tokens grow in number, channel tokens in width only.

    Rows `scaling` (part backbone, one pass, and world of each variant): seconds of plain fp32, and
    the FLOP expected by formula as rows `scaling flop`. The weights are those of `models`: only the
    layers that make tokens know the size.
    """
    rows, device = [], models["patch"].pose_std.device
    for size in sizes:
        both = {v: m.config.model_copy(update={"image_size": size}) for v, m in models.items()}
        image, action = inputs(both["patch"], 1, device)
        calls = {}
        for variant, config in both.items():
            world = WorldModel(config.model_copy(update={"num_layers": 0})).eval().to(device)
            world.blocks = models[variant].world.blocks
            features = torch.randn(1, config.channels, *config.grid, device=device)
            calls[variant] = partial(world, features, action)
        seconds = warm(calls, repeats)
        begun = clock()
        models["patch"].backbone(image)
        seconds["both"] = np.array([clock() - begun])
        for variant, values in seconds.items():
            part = "backbone" if variant == "both" else "world"
            work = flops(both.get(variant, both["patch"]))
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


def taught(config: ModelConfig, steps: int) -> CardiacDreamer:
    """A model that has learnt to tell frames apart: after `steps` of `lesson` on the CPU.

    Random weights give every frame nearly the same pose, against which any difference is large.
    """
    torch.manual_seed(0)
    model, draw = CardiacDreamer(config).train(), torch.Generator().manual_seed(0)
    if not steps:
        return model.eval()
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

    Of small models: ResNet34 at 64 px, or as `fields` (of ModelConfig) say; `taught`, but in fp32
    alone, whose rounding random weights pass as well: they are the harder test.
    """
    steps = 0 if set(dtypes) == {"float32"} else 80
    small = {"image_size": 64, "d_model": 96, "num_heads": 4, "num_layers": 2, **fields}
    rows = []
    for variant, config in configs(small).items():
        model = taught(config, steps).to(device)
        image, pose = lesson(config, 64, torch.Generator().manual_seed(1))
        given = image.to(device), torch.zeros_like(pose).to(device)
        for name in dtypes:
            gap = difference(model, fast(model, DTYPES[name]), *given)
            at = {"variant": variant, "path": "fast", "dtype": name, "batch": len(pose)}
            rows.append(row("pose difference", gap, "", **at))
    return rows


# ---- in processes of their own -------------------------------------------------------------------


def passes(shapes: Mapping[str, Any], device: torch.device, repeats: int) -> Rows:
    """Single unwarmed passes at the claim's batch: both ORDERS, each in `repeats` processes.

    Rows `cold`: seconds by protocol and variant (whoever comes first has a fresh process for
    itself: FRESH, until the result is there); `reduction`: 1 - patch / channel of each protocol;
    `memory` of a fresh process; `claim memory`: what CUDA's allocator holds after the claim's pass.
    """
    both = configs(shapes)
    found = defaultdict(list)  # (measure, protocol, variant) -> one value per process
    for _ in range(repeats):
        for protocol, order in ORDERS.items():
            got = cold.apart(cold.single, [both[v] for v in order], device.type)
            for variant, measured in got.items():
                found["cold", protocol, variant].append(measured["clock"])
                if protocol == CLAIMED and device.type == "cuda":
                    found["claim memory", protocol, variant].append(measured["memory"])
            found["cold", FRESH, order[0]].append(got[order[0]]["waited"])
            for kind in ("weights", "peak"):
                found["memory", kind, order[0]].append(got[order[0]][kind])
    at = {"path": "plain", "dtype": "float32", "batch": BATCH, "image": both["patch"].image_size}
    rows = [
        row(m, values, "s" if m == "cold" else "MiB", variant=v, protocol=p, **at)
        for (m, p, v), values in found.items()
    ]
    for protocol in (*ORDERS, FRESH):
        less = 1 - np.divide(found["cold", protocol, "patch"], found["cold", protocol, "channel"])
        rows.append(row("reduction", less, "", protocol=protocol, **at))
    return rows


def memory(shapes: Mapping[str, Any], device: torch.device, dtypes: Sequence[str]) -> Rows:
    """Peaks at the claim's batch, each in a process of its own: rows `memory`, MiB above what the
    imported libraries take, at rest (`weights`) and in the fast path or a training step; `training`
    and its `reduction` (path training): how long the second step took."""
    rows = []
    for path, names in (("fast", dtypes[-1:]), ("training", dtypes)):
        for dtype in names:
            at = {"path": path, "dtype": dtype, "batch": BATCH}
            seconds = {}
            for variant, config in configs(shapes).items():
                got = cold.apart(cold.peak, config, device.type, path, dtype)
                seconds[variant] = got.pop("seconds")
                for kind, mib in got.items():
                    rows.append(row("memory", mib, "MiB", variant=variant, protocol=kind, **at))
            if path == "training":
                at["protocol"] = "warm"
                rows += [row("training", s, "s", variant=v, **at) for v, s in seconds.items()]
                rows.append(row("reduction", 1 - seconds["patch"] / seconds["channel"], "", **at))
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
