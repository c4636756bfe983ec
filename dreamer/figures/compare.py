"""Figures that set variants side by side: convergence, accuracy over seeds, imagination."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dreamer.plots import COLOURS, above, name_lines, points

AGAINST = {
    "epoch": "epochs",
    "images": "images seen",
    "seconds": "seconds of training",
    "tflop": "work (TFLOP)",
}
WAYS = ("imagined", "composed", "no action", "wrong action")


def convergence(metrics: Mapping[str, Sequence[pd.DataFrame]], column: str, label: str) -> Figure:
    """A validation measure against epochs, images, seconds and work; thin lines are runs.

    `metrics` maps a variant to the metrics of its runs. Where runs share the horizontal places,
    the thick line is their mean.
    """
    fig, axes = plt.subplots(1, 4, figsize=(11, 2.9), sharey=True)
    for ax, (against, words) in zip(axes, AGAINST.items(), strict=True):
        for name, tables in metrics.items():
            for table in tables:
                ax.plot(table[against], table[column], color=COLOURS[name], lw=0.7, alpha=0.6)
            length = min(map(len, tables))
            mean = np.mean([table[column].to_numpy()[:length] for table in tables], axis=0)
            place = np.mean([table[against].to_numpy()[:length] for table in tables], axis=0)
            ax.plot(place, mean, color=COLOURS[name], lw=2, label=name)
        ax.set(xlabel=words, xlim=(0, None))
    axes[0].set_ylabel(label)
    axes[0].legend()
    return fig


def differences(table: pd.DataFrame) -> Figure:
    """Patch minus channel per measure, mm and degrees apart, with intervals and margins.

    `table`: columns measure, unit, estimate, low, high, margin.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 2.6))
    for ax, (unit, part) in zip(axes, table.groupby("unit", sort=False), strict=True):
        margin = part["margin"].iloc[0]
        ax.axvspan(-margin, margin, color=COLOURS["truth"], alpha=0.12, label="equivalent")
        points(ax, part, "estimate", range(len(part)), color="k")
        ax.axvline(0, color=COLOURS["neutral"], lw=0.8)
        name_lines(ax, part["measure"])
        ax.set(xlabel=f"error of patch minus channel ({unit})")
    above(axes[0])
    return fig


def distance(errors: Mapping[str, pd.DataFrame], bins: int = 6) -> Figure:
    """Error against distance from the target, in translation and rotation.

    `errors` maps a predictor to a table with columns translation, rotation and the true distances
    away_mm, away_deg.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.9))
    for ax, measure, away, unit in (
        (axes[0], "translation", "away_mm", "mm"),
        (axes[1], "rotation", "away_deg", "deg"),
    ):
        for name, table in errors.items():
            cut = pd.qcut(table[away], bins, duplicates="drop")
            mean = table.groupby(cut, observed=True)[[away, measure]].mean()
            ax.plot(mean[away], mean[measure], "o-", ms=3, color=COLOURS[name], label=name)
        ax.set(xlabel=f"distance from the target ({unit})", ylabel=f"{measure} error ({unit})",
               ylim=(0, None))  # fmt: skip
    axes[0].legend()
    return fig


def imagination(table: pd.DataFrame) -> Figure:
    """Pose and feature error of frame 2 by the way it was told, per variant, with intervals.

    `table`: columns predictor, way, measure (translation, rotation, feature), value, low, high.
    """
    labels = {"translation": "error (mm)", "rotation": "error (deg)", "feature": "relative error"}
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.6), sharey=True)
    for ax, (measure, words) in zip(axes, labels.items(), strict=True):
        for number, (name, own) in enumerate(table.groupby("predictor", sort=False)):
            part = own[own["measure"] == measure].set_index("way").reindex(WAYS)
            at = np.arange(len(WAYS)) + (number - 0.5) * 0.2
            points(ax, part, "value", at, color=COLOURS[name], label=name)
        ax.set(xlabel=f"{measure}, {words}", xlim=(0, None))
    name_lines(axes[0], WAYS)
    above(axes[1])
    return fig
