"""Figures of the options: what changes against the default, and at what price."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from dreamer.plots import COLOURS, above, name_lines, points

PRICES = {"parameters": "parameters", "flop": "FLOP", "step_ms": "time of a step",
          "peak_mib": "peak memory"}  # fmt: skip


def changes(table: pd.DataFrame) -> Figure:
    """Error of every option minus the default, mm and degrees apart, with 95% intervals.

    `table`: columns base, option, measure, unit, estimate, low, high, p_holm, margin. Filled where
    the corrected p is below 0.05; the band is what counts as equal.
    """
    options = list(dict.fromkeys(table["option"]))
    height = 1.2 + 0.34 * len(options)
    fig, axes = plt.subplots(1, 2, figsize=(8.5, height), sharey=True)
    for ax, (measure, part) in zip(axes, table.groupby("measure", sort=False), strict=True):
        margin, unit = part["margin"].iloc[0], part["unit"].iloc[0]
        ax.axvspan(-margin, margin, color=COLOURS["truth"], alpha=0.12)
        ax.axvline(0, color=COLOURS["neutral"], lw=0.8)
        for number, (base, own) in enumerate(part.groupby("base", sort=False)):
            for shown, rows in own.groupby(own["p_holm"] < 0.05):
                at = [options.index(o) + (number - 0.5) * 0.25 for o in rows["option"]]
                points(ax, rows, "estimate", at, ms=5, lw=1.2, color=COLOURS[base],
                       mfc=COLOURS[base] if shown else "white")  # fmt: skip
            ax.plot([], [], "o", color=COLOURS[base], label=base)
        ax.set(xlabel=f"change in {measure} error ({unit})")
    name_lines(axes[0], options)
    above(axes[1])
    return fig


def prices(table: pd.DataFrame) -> Figure:
    """Parameters, FLOP, time of a training step and peak memory over the default's.

    `table`: columns base, option and for each of PRICES a `_ratio`.
    """
    table = table[table["option"] != "default"]
    options = list(dict.fromkeys(table["option"]))
    fig, axes = plt.subplots(1, 4, figsize=(10, 1.2 + 0.3 * len(options)), sharey=True)
    for ax, (name, words) in zip(axes, PRICES.items(), strict=True):
        for number, (base, own) in enumerate(table.groupby("base", sort=False)):
            at = [options.index(o) + (number - 0.5) * 0.25 for o in own["option"]]
            ax.plot(own[f"{name}_ratio"], at, "o", ms=5, color=COLOURS[base], label=base)
        ax.axvline(1, color=COLOURS["neutral"], lw=0.8)
        ax.set(xlabel=f"{words} over default's")
    name_lines(axes[0], options)
    above(axes[-1])
    return fig
