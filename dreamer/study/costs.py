"""What both variants cost by counting: parameters, FLOP, memory; and what was published.

The published table (Cardiac-Dreamer, patch variant) gives, for batch 4 at 224 px: 1.0947 s with
channel tokens and 0.0474 s with patch tokens, "95.7% faster"; 65,188,584 and 66,256,262 parameters;
260.9 and 263.5 MB on the GPU; 513 and 50 tokens. A FLOP is one multiplication or one addition.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dreamer.model import CardiacDreamer, ModelConfig

VARIANTS = ("channel", "patch")  # in the order of the published measurement
BATCH, FASTER = 4, 0.957  # the claim's batch, and by how much patch was said to be faster
CLAIM = {  # parameters, tokens with the action's, seconds, MB of GPU memory
    "channel": {"parameters": 65_188_584, "tokens": 513, "seconds": 1.0947, "memory": 260.9},
    "patch": {"parameters": 66_256_262, "tokens": 50, "seconds": 0.0474, "memory": 263.5},
}
WORKSPACE = 2 * 4096 + 8 * 16  # KiB that cuBLAS takes by default, except on Hopper (PyTorch notes)
CLAIMED, MIRRORED = "claim: channel, then patch", "mirrored: patch, then channel"
FRESH = "fresh process each"
RESNET34 = ((64, 64, 3, 4), (64, 128, 4, 8), (128, 256, 6, 16), (256, 512, 3, 32))
PARTS = ("backbone", "tokens", "attention", "feed-forward", "head")
COLUMNS = (
    "measure", "variant", "path", "dtype", "protocol", "batch", "image", "part",
    "value", "low", "high", "n", "unit",
)  # fmt: skip
Rows = list[dict[str, Any]]


def row(measure: str, values: float | Sequence[float], unit: str, **where: Any) -> dict[str, Any]:
    """One result: median, quartiles and number of `values`; `where` fills the other COLUMNS."""
    if unknown := set(where) - set(COLUMNS):
        raise ValueError(f"no column {', '.join(sorted(unknown))}; there are {', '.join(COLUMNS)}")
    low, value, high = np.percentile(np.atleast_1d(np.asarray(values, float)), (25, 50, 75))
    found = {"value": value, "low": low, "high": high, "n": int(np.size(values)), "unit": unit}
    return {"measure": measure, **where, **found}


def select(results: pd.DataFrame, measure: str, **where: Any) -> pd.DataFrame:
    """The rows of a measure that have these values in other columns."""
    rows = results[results["measure"] == measure]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


def configs(shapes: Mapping[str, Any]) -> dict[str, ModelConfig]:
    """Both variants' configurations; empty `shapes` are the published sizes. ValidationError."""
    return {v: ModelConfig(**{**shapes, "token_type": v}) for v in VARIANTS}


def inputs(
    config: ModelConfig, batch: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random image [B, 1, S, S] and action [B, 6]."""
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 1, config.image_size, config.image_size, generator=draw)
    return image.to(device), torch.randn(batch, 6, generator=draw).to(device)


def modules(model: CardiacDreamer) -> dict[str, list[nn.Module]]:
    """The modules of each of PARTS; a block's norms go with the branch that they follow."""
    world = model.world
    return {
        "backbone": [model.backbone],
        "tokens": [world.action, world.positions, world.norm]
        + [m for m in world.tokens.modules() if isinstance(m, nn.Linear)],
        "attention": [m for b in world.blocks for m in (b.attention, b.norm1)],
        "feed-forward": [m for b in world.blocks for m in (b.feedforward, b.norm2)],
        "head": [model.pooling, model.head],
    }


def parameters(model: CardiacDreamer) -> dict[str, int]:
    """Number of parameters of each of PARTS."""
    return {
        part: sum(p.numel() for m in modules for p in m.parameters())
        for part, modules in modules(model).items()
    }


def flops(config: ModelConfig, batch: int = 1) -> dict[str, float]:
    """FLOP of a forward pass by formula, for each of PARTS: matrix products and convolutions.

    Blocks: 2 N (4 + 2 f) d^2 in linear layers and 4 N^2 d in attention, N tokens of width d;
    windows hide, but are computed. In evaluation: token dropout takes its share off N in training.
    """
    side, c, w, d = config.image_size, config.channels, config.width, config.d_model
    if config.backbone == "resnet34":
        macs = 49 * 64 * (side / 2) ** 2
        for i, o, blocks, stride in RESNET34:
            shortcut = i * o if i != o else 0
            macs += (9 * i * o + 9 * o * o * (2 * blocks - 1) + shortcut) * (side / stride) ** 2
    else:
        macs = 49 * w * (side / 4) ** 2
        for i, o, stride in ((w, 2 * w, 8), (2 * w, c, 16)):
            macs += (9 * i * o + 9 * o * o + i * o) * (side / stride) ** 2
    cells = math.prod(config.grid)
    n, values = config.tokens, cells * (c + 4 * config.fine)  # of the map
    linear = (6 if config.token_type == "both" else 3) * values * d
    pooling = {"attention": 9 * c * cells, "action": d * c}.get(config.pooling, 0)
    first, second = config.guidance
    found = {
        "backbone": macs,
        "tokens": linear + 6 * 64 + 64 * 256 + 256 * d,
        "attention": config.num_layers * (4 * (n + 1) * d * d + 2 * (n + 1) ** 2 * d),
        "feed-forward": config.num_layers * 2 * config.feedforward * (n + 1) * d * d,
        "head": pooling + c * first + first * second + 6 * second,
    }
    return {part: 2.0 * batch * value for part, value in found.items()}


def counted(config: ModelConfig, batch: int = 1) -> int:
    """FLOP of a forward pass as torch.utils.flop_counter sees them; nothing is computed."""
    with torch.device("meta"):
        model = CardiacDreamer(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs(config, batch, "meta"))
    return counter.get_total_flops()


def predicted_memory(config: ModelConfig, batch: int = BATCH) -> dict[str, float]:
    """MiB that CUDA's allocator holds after the claim's pass, by arithmetic, by kind.

    Blocks of 512 bytes; weights and buffers, the input, the five outputs, cuBLAS's workspace.
    """
    with torch.device("meta"):
        model = CardiacDreamer(config)
    c = config.channels
    maps = (batch, c + 4 * config.fine, *config.grid)
    outputs = [torch.empty(s, device="meta") for s in (maps, maps, maps, (batch, c), (batch, 6))]
    arriving = [torch.empty(batch, 1, *[config.image_size] * 2, device="meta")]
    arriving.append(torch.empty(batch, 6, device="meta"))
    kinds = {
        "parameters": model.parameters(), "buffers": model.buffers(),
        "input": arriving, "outputs": outputs,
    }  # fmt: skip
    found = {
        kind: sum(-(-t.nbytes // 512) * 512 for t in tensors) / 2**20
        for kind, tensors in kinds.items()
    }
    return found | {"cuBLAS workspace": WORKSPACE / 1024}


def crossing(sizes: Sequence[float], patch: Sequence[float], channel: Sequence[float]) -> float:
    """Where the costs of both variants are equal: image size in px, log-linear between `sizes`.

    NaN where patch tokens do not begin cheaper and end dearer within them.
    """
    gap = [math.log(p / c) for p, c in zip(patch, channel, strict=True)]
    for i in range(1, len(gap)):
        if gap[i - 1] < 0 <= gap[i]:
            return sizes[i - 1] + (sizes[i] - sizes[i - 1]) * gap[i - 1] / (gap[i - 1] - gap[i])
    return math.nan


def counts(shapes: Mapping[str, Any]) -> Rows:
    """Rows that need no clock: `parameters`, `tokens`, `flop` by formula and by the counter, the
    `reduction` that FLOP predict, and the `predicted memory` of the claim's protocol."""
    both, rows, total = configs(shapes), [], {}
    for variant, config in both.items():
        with torch.device("meta"):
            model = CardiacDreamer(config)
        at = {"variant": variant, "image": config.image_size}
        rows += [row("parameters", n, "", part=p, **at) for p, n in parameters(model).items()]
        rows.append(row("tokens", 1 + model.world.tokens.count, "", **at))
        work, total[variant] = flops(config), counted(config)
        for part, amount in work.items():
            rows.append(row("flop", amount, "FLOP", part=part, protocol="formula", batch=1, **at))
        rows.append(row("flop", total[variant], "FLOP", protocol="counter", batch=1, **at))
        for kind, mib in predicted_memory(config).items():
            rows.append(row("predicted memory", mib, "MiB", part=kind, batch=BATCH, **at))
    less = 1 - total["patch"] / total["channel"]
    return [*rows, row("reduction", less, "", protocol="operations counted")]


def describe(shapes: Mapping[str, Any]) -> str:
    """The configuration in words, as verdicts and captions give it."""
    c = configs(shapes)["patch"]
    return (
        f"{c.backbone} {c.image_size} px, width {c.d_model}, {c.num_layers} layers, batch {BATCH}"
    )


# ---- verdicts ------------------------------------------------------------------------------------


def _verdict(found: pd.Series, published: float, near: float) -> str:
    inside = found.low - near <= published <= found.high + near
    return "reproduced" if inside else "not reproduced"


def verdicts(results: pd.DataFrame, config: str, full: bool) -> pd.DataFrame:
    """The published table, row by row, beside what `results` (see benchmark.table) hold.

    Columns claim, published, measured, interval, verdict, config, n. Counts must be equal, memory
    agree to 1%, the reduction in time to 2 points beyond the quartiles. Seconds on other hardware
    get no verdict; nothing does where the shapes are not the published ones (`full` False).
    """
    found, pick = [], partial(select, results)

    def add(claim: str, published: str, got: pd.Series, text: str, verdict: str, how: str = ""):
        interval = f"{text} to {text}".format(got.low, got.high) if got.n > 1 else ""
        verdict = verdict if full else "no verdict: other shapes"
        found.append([claim, published, text.format(got.value), interval, verdict,
                      f"{config}{', ' if how else ''}{how}", int(got.n)])  # fmt: skip

    for variant, claim in CLAIM.items():
        name = f"{variant} tokens"
        for what in ("parameters", "tokens"):
            got = pd.Series(row(what, pick(what, variant=variant).value.sum(), ""))
            verdict = "confirmed" if got.value == claim[what] else "differs"
            add(f"{name}: {what}", f"{claim[what]:,}", got, "{:,.0f}", verdict)
        measured = pick("claim memory", variant=variant)
        got = pd.Series(row("", pick("predicted memory", variant=variant).value.sum(), ""))
        got, how = (measured.iloc[0], "") if len(measured) else (got, "predicted by arithmetic")
        close = abs(got.value / claim["memory"] - 1) <= 0.01
        add(f"{name}: memory on the GPU, MB of 2^20 bytes", f"{claim['memory']}", got, "{:.1f}",
            "confirmed to 1%" if close else "differs", how)  # fmt: skip
        for got in pick("cold", variant=variant, protocol=CLAIMED).iloc:
            add(f"{name}: one pass, s", f"{claim['seconds']}", got, "{:.4f}",
                "no verdict: other hardware", "as published: one unwarmed pass")  # fmt: skip
    for protocol, how in (
        (CLAIMED, "as published: one unwarmed pass each, channel first"),
        (MIRRORED, "the same, patch first"),
        (FRESH, "one unwarmed pass, each in a fresh process"),
        ("warm", "warm, in turn, fp32"),
        ("operations counted", "operations counted"),
    ):
        warm = {"path": "plain", "batch": BATCH} if protocol == "warm" else {}
        for got in pick("reduction", protocol=protocol, **warm).iloc:
            verdict = _verdict(got, FASTER, 0.02)
            add("patch tokens are faster", f"{FASTER:.1%}", got, "{:.1%}", verdict, how)
    columns = ["claim", "published", "measured", "interval", "verdict", "config", "n"]
    return pd.DataFrame(found, columns=columns)


GOALS = (  # measure, path, what is asked, at least or at most, threshold
    ("overhead", "encoder", "plain fp32 blocks / PyTorch's encoder, time", "at most", 1.05),
    ("speedup", "fast", "fast path / plain fp32, speed", "at least", 2.0),
    ("share", "fast", "share of the machine's matrix limit", "at least", 0.7),
    ("pose difference", "fast", "largest pose difference / spread of poses", "at most", 0.01),
)


def goals(results: pd.DataFrame) -> pd.DataFrame:
    """What the project asks of itself, warm at the claim's batch: measured, interval, met."""
    found = []
    for measure, path, what, bound, threshold in GOALS:
        rows = select(results, measure, path=path)
        if path == "fast":
            rows = rows[rows.dtype == rows.dtype.iloc[-1]] if len(rows) else rows
        rows = rows[(rows.batch == BATCH) | (measure == "pose difference")]
        for got in rows.iloc:
            met = got.value >= threshold if bound == "at least" else got.value <= threshold
            found.append([what, got.variant, got['dtype'], f"{bound} {threshold}", got.value,
                          f"{got.low:.3g} to {got.high:.3g}", "yes" if met else "no"])  # fmt: skip
    return pd.DataFrame(found, columns=["goal", "variant", "dtype", "asked", "measured",
                                        "interval", "met"])  # fmt: skip


def conclusion(results: pd.DataFrame, equal: Mapping[str, float]) -> str:
    """What a run shows, in Markdown, from its numbers; `equal`: see figures.benchmark.scaling."""
    less = results[(results.measure == "reduction") & (results.path.isin(["plain", ""]))]
    less = less[less.batch.isna() | (less.batch == BATCH)].set_index("protocol").value
    cold = select(results, "cold").set_index(["protocol", "variant"]).value
    warm = select(results, "latency", path="plain", batch=BATCH).set_index("variant").value
    first = cold[CLAIMED, "channel"] - warm["channel"], cold[MIRRORED, "patch"] - warm["patch"]
    crossing = [f"{name} at {px:.0f} px" for name, px in equal.items() if math.isfinite(px)]
    return f"""
- By the published protocol (one unwarmed pass each, channel tokens first) patch tokens look
  **{less[CLAIMED]:.1%}** faster here; in the opposite order **{less[MIRRORED]:.1%}**. The first
  pass of a process costs {first[0]:.2f} s more than a warm one when channel tokens run first, and
  {first[1]:.2f} s more when patch tokens do: whoever runs first pays. A single cold pass measures
  the order as well as the model.
- Warm, in turn, patch tokens are **{less["warm"]:.1%}** faster; operations counted say
  **{less["operations counted"]:.1%}**. The published 95.7% would need a ratio of
  {1 / (1 - FASTER):.0f}; warm it is {warm["channel"] / warm["patch"]:.1f}.
- Equal cost of both transformers: {" and ".join(crossing) or "not within these image sizes"}.
  Below, patch tokens are cheaper; above, channel tokens.
- Not shown: accuracy (that is for the evaluation), and other hardware: a GPU's start costs more,
  a processor without bf16 gains less. Run this notebook there and plot the results together.
"""
