"""Figures of the benchmark, from the table that benchmark.table or benchmark.load returns.

Bars and points are medians; lines across them the quartiles over the rounds.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from dreamer.study.costs import BATCH, CLAIMED, FRESH, MIRRORED, PARTS, VARIANTS, crossing, select
from dreamer.plots import COLOURS, above, whiskers

STYLES = {"plain": "-", "fast": "--", "compiled": ":"}
SHADES = ("#4d4d4d", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#cccccc")  # parts, rest


def _bars(
    ax: Axes, rows: pd.DataFrame, by: str | list[str], keys: list, labels: Iterable[str],
    scale: float = 1.0,
) -> None:  # fmt: skip
    """Horizontal bars of both variants, one pair for each of `keys` in the columns `by`."""
    for shift, variant in zip((-0.2, 0.2), VARIANTS, strict=True):
        own = rows[rows["variant"] == variant].set_index(by)
        own = own[~own.index.duplicated()].loc[keys]
        ax.barh(np.arange(len(keys)) + shift, scale * own["value"], 0.38,
                xerr=whiskers(own, scale=scale), color=COLOURS[variant], label=f"{variant} tokens",
                error_kw={"lw": 1})  # fmt: skip
    ax.set(yticks=range(len(keys)), yticklabels=labels)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    above(ax)


def cold_and_warm(results: pd.DataFrame) -> Figure:
    """Seconds of both variants by protocol; how much faster patch tokens look in each."""
    fig, ax = plt.subplots(figsize=(8, 4))
    warm = select(results, "latency", path="plain", batch=BATCH)
    names = {CLAIMED: "as published:\nchannel first, one pass", MIRRORED: "mirrored:\npatch first",
             FRESH: "a fresh process\nfor each pass", "warm": "warm,\nin turn"}  # fmt: skip
    rows = pd.concat([select(results, "cold"), warm])
    _bars(ax, rows, "protocol", list(names), names.values())
    less = select(results, "reduction", path="plain", dtype="float32")
    less = less[less["batch"] == BATCH].set_index("protocol")["value"]
    tops = rows.groupby("protocol")["high"].max()
    for place, name in enumerate(names):
        word = "faster" if less[name] >= 0 else "slower"
        ax.text(tops[name], place, f"  patch {abs(less[name]):.1%} {word}", va="center")
    ax.set(xlabel="time of a forward pass, batch 4 (s)", xlim=(0, 1.4 * max(tops)))
    return fig


def against_batch(results: pd.DataFrame) -> Figure:
    """Time of a pass, and frames per second, against the batch."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    rows = select(results, "latency")
    rows = rows[rows["path"].isin(STYLES)]
    for (variant, path, dtype), own in rows.groupby(["variant", "path", "dtype"]):
        own = own.sort_values("batch")
        if len(own) < 2:
            continue
        look = {"color": COLOURS[variant], "ls": STYLES[path], "marker": "o", "ms": 4,
                "label": f"{variant}, {path} {dtype}"}  # fmt: skip
        axes[0].errorbar(own["batch"], own["value"], whiskers(own), **look)
        axes[1].plot(own["batch"], own["batch"] / own["value"], **look)
    axes[0].set(ylabel="time of a forward pass (s)", yscale="log")
    axes[1].set(ylabel="frames per second", yscale="log")
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set(xlabel="batch", xticks=sorted(rows["batch"].unique()))
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")  # 0.2, not 2 times a power of ten
        ax.yaxis.set_minor_locator(NullLocator())
    axes[1].legend(fontsize=8)
    return fig


def share(results: pd.DataFrame) -> Figure:
    """The share of the machine's largest matrix product rate that each variant reaches."""
    fig, ax = plt.subplots(figsize=(7, 3.4))
    rows = select(results, "share").sort_values(["path", "dtype"], ascending=False)
    limit = select(results, "limit").set_index("dtype")["value"]
    ways = list(dict.fromkeys(zip(rows["path"], rows["dtype"], strict=True)))
    labels = [f"{p} {d}\n(limit {limit[d] / 1e9:,.0f} GFLOP/s)" for p, d in ways]
    _bars(ax, rows, ["path", "dtype"], ways, labels, 100)
    ax.axvline(100, color=COLOURS["neutral"], lw=1)
    ax.set_xlabel("share of the largest matrix product rate, same dtype and run (%)")
    return fig


def parts(results: pd.DataFrame) -> Figure:
    """Where the time of a forward pass goes, for each variant and path."""
    rows = select(results, "part")
    ways = list(dict.fromkeys(zip(rows["variant"], rows["path"], rows["dtype"], strict=True)))
    ways.sort(key=lambda way: (VARIANTS.index(way[0]), way[1] == "fast", way[2] == "bfloat16"))
    fig, ax = plt.subplots(figsize=(8, 0.5 * len(ways) + 1.4))
    table = rows.pivot_table(index=["variant", "path", "dtype"], columns="part", values="value")
    left = np.zeros(len(ways))
    for part, shade in zip((*PARTS, "rest"), SHADES, strict=True):
        width = table.loc[ways, part].to_numpy()
        ax.barh(range(len(ways)), width, 0.7, left=left, color=shade, label=part)
        left += width
    labels = [f"{variant}, {path} {dtype}" for variant, path, dtype in ways]
    ax.set(yticks=range(len(ways)), yticklabels=labels, xlabel="time, batch 4 (s)")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=6, fontsize=8)
    return fig


def _crossed(ax: Axes, results: pd.DataFrame, measure: str, unit: str, per: float) -> float:
    rows = select(results, measure, part="world").sort_values("image")
    lines = {}
    for variant in VARIANTS:
        own = rows[rows["variant"] == variant]
        lines[variant] = own["value"].to_numpy()
        ax.errorbar(own["image"], own["value"] / per, whiskers(own, scale=1 / per), marker="o",
                    ms=4, color=COLOURS[variant], label=f"{variant} tokens")  # fmt: skip
    sizes = rows["image"].unique()
    backbone = select(results, measure, part="backbone").sort_values("image")
    ax.plot(backbone["image"], backbone["value"] / per, color=COLOURS["neutral"], ls="--",
            label="backbone (shared)")  # fmt: skip
    where = crossing(list(sizes), lines["patch"], lines["channel"])
    if np.isfinite(where):
        ax.axvline(where, color=COLOURS["neutral"], lw=1, ls=":")
        ax.text(where, 0, f" equal at {where:.0f} px", transform=ax.get_xaxis_transform(),
                rotation=90, va="bottom", ha="right", fontsize=8)  # fmt: skip
    ax.set(xlabel="image size (px)", ylabel=f"{unit}, one frame", ylim=(0, None))
    return where


def scaling(results: pd.DataFrame) -> tuple[Figure, dict[str, float]]:
    """The transformer's cost against the image size, and the sizes of equal cost in px:
    `predicted` from operations and `measured`; NaN where the lines do not cross."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True)
    predicted = _crossed(axes[0], results, "scaling flop", "GFLOP", 1e9)
    measured = _crossed(axes[1], results, "scaling", "time (s)", 1.0)
    axes[0].set_title("predicted")
    axes[1].set_title("measured, warm, fp32")
    axes[0].legend(fontsize=8)
    return fig, {"predicted": predicted, "measured": measured}


def memory(results: pd.DataFrame) -> Figure:
    """Peaks of both variants, and of one attention layer against the number of tokens."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    rows = select(results, "memory")  # fp32 comes before bf16
    kinds = {
        "at rest": ("plain", "weights"), "forward": ("plain", "peak"),
        "forward, fast": ("fast", "peak"), "training step": ("training", "peak"),
    }  # fmt: skip
    _bars(axes[0], rows, ["path", "protocol"], list(kinds.values()), kinds)
    axes[0].set_xlabel("peak memory, batch 4 (MiB)")
    shades = {"fused": COLOURS["truth"], "in parts": SHADES[1], "explicit": COLOURS["direct"]}
    for way, own in select(results, "attention memory").groupby("path"):
        tokens = own["part"].astype(int)
        axes[1].plot(tokens, own["value"], marker="o", ms=4, color=shades[way], label=way)
    axes[1].set(xlabel="tokens", ylabel="peak of one attention layer,\nbatch 16 (MiB)",
                xlim=(0, None), ylim=(0, None))  # fmt: skip
    axes[1].legend(title="attention")
    return fig


def machines(results: pd.DataFrame) -> Figure:
    """Several machines together: how much faster patch tokens are, and the fast path's gain."""
    rows = select(results, "reduction", path="plain", batch=BATCH)
    names = list(dict.fromkeys(results["machine"]))
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 0.7 * len(names) + 1.8), sharey=True)
    marks = {
        CLAIMED: ("X", "as published, one pass"),
        FRESH: ("s", "fresh process"),
        "warm": ("o", "warm"),
    }
    for protocol, (mark, label) in marks.items():
        own = rows[rows["protocol"] == protocol].drop_duplicates("machine", keep="last")
        axes[0].errorbar(100 * own["value"], [names.index(m) for m in own["machine"]],
                         xerr=whiskers(own, scale=100), fmt=mark, color=COLOURS["neutral"],
                         mfc="none" if mark == "s" else None, label=label)  # fmt: skip
    axes[0].axvline(95.7, color="black", lw=1, ls=":", label="published")
    axes[0].set(xlabel="patch tokens faster by (%)", yticks=range(len(names)), yticklabels=names)
    gain = select(results, "speedup", path="fast", batch=BATCH)
    for variant in VARIANTS:
        own = gain[gain["variant"] == variant].drop_duplicates("machine", keep="last")
        axes[1].errorbar(own["value"], [names.index(m) for m in own["machine"]],
                         xerr=whiskers(own), fmt="o", color=COLOURS[variant],
                         label=f"{variant} tokens")  # fmt: skip
    axes[1].set(xlabel="fast path / plain fp32 (times as fast)")
    axes[1].set_xlim(0, 1.1 * gain["value"].max())
    for ax in axes:
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=2)
    return fig


def rounds(results: pd.DataFrame, measure: str) -> str:
    """How many rounds the rows of a measure come from, in words."""
    few, many = np.percentile(select(results, measure)["n"], (0, 100)).astype(int)
    return f"{few} rounds" if few == many else f"{few} to {many} rounds"


def caption(results: pd.DataFrame, shapes: str) -> str:
    """What every caption ends with: shapes, machine, threads and date."""
    last = results.iloc[-1]
    return f"{shapes}; {last['machine']}, torch {last['torch']}, {last['date']}."
