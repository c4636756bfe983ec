"""Figures of a training: curves while it runs, predictions against the truth, accuracy."""

import io
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure

from dreamer.plots import COLOURS, above, name_lines, points
from dreamer.poses import AXES, UNITS


def curves(table: pd.DataFrame, name: str = "") -> Figure:
    """Loss, translation and rotation error on validation against epochs, of one run's metrics."""
    fig, axes = plt.subplots(1, 3, figsize=(9, 2.7))
    colour = COLOURS.get(name, COLOURS["neutral"])
    for part, style in (("train", ":"), ("val", "-")):
        pose = table[f"{part}_composed"] + table[f"{part}_imagined"]
        axes[0].plot(table["epoch"], pose, style, color=colour, label=part)
    axes[0].set(ylabel="pose loss", xlabel="epoch")
    axes[0].legend()
    for ax, column, label in (
        (axes[1], "val_translation_mm", "translation error (mm)"),
        (axes[2], "val_rotation_deg", "rotation error (deg)"),
    ):
        ax.plot(table["epoch"], table[column], color=colour)
        ax.set(ylabel=f"{label}, validation", xlabel="epoch", ylim=(0, None))
    return fig


def live(name: str = "") -> Callable[[pd.DataFrame], None]:
    """A callback for `fit` that draws the curves anew after every epoch, in one place."""
    handle = display(display_id=True)

    def draw(table: pd.DataFrame) -> None:
        fig, png = curves(table, name), io.BytesIO()
        fig.canvas.print_png(png)  # laid out once, not again to crop
        plt.close(fig)
        if handle is not None:
            handle.update(Image(png.getvalue()))

    return draw


def predicted(table: pd.DataFrame, constant: pd.DataFrame, name: str) -> Figure:
    """Predicted against true pose per axis, with the constant predictor's spread as a bar.

    `table`, `constant`: predictions of `evaluation.predict` and `predict_constant`.
    """
    fig, axes = plt.subplots(2, 3, figsize=(8.5, 5.4))
    for ax, axis, unit in zip(axes.flat, AXES, UNITS, strict=True):
        true, said = table[f"true_{axis}"], table[f"predicted_{axis}"]
        ends = [min(true.min(), said.min()), max(true.max(), said.max())]
        ax.plot(ends, ends, color=COLOURS["truth"], lw=1, label="exact")
        ax.scatter(true, said, s=5, alpha=0.35, lw=0, rasterized=True, label=name,
                   color=COLOURS.get(name, "k"))  # fmt: skip
        mean = constant[f"predicted_{axis}"].iloc[0]
        miss = (constant[f"true_{axis}"] - mean).abs().mean()
        ax.errorbar(true.mean(), mean, yerr=miss, fmt="s", ms=4, capsize=4,
                    color=COLOURS["constant"], label="constant ± its mean error")  # fmt: skip
        own = (true - said).abs().mean()
        ax.set_title(f"{axis}: {own:.2f} {unit}, constant {miss:.2f} {unit}")
        ax.set(xlabel=f"true {axis} ({unit})", ylabel=f"predicted ({unit})")
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return fig


def accuracy(table: pd.DataFrame) -> Figure:
    """Error over the constant predictor's, per measure and predictor, with intervals.

    `table`: of `evaluation.accuracy`, with a constant predictor in it.
    """
    fig, ax = plt.subplots(figsize=(7, 3.6))
    names = [n for n in dict.fromkeys(table["predictor"]) if n != "constant"]
    base = table[table["predictor"] == "constant"].set_index("measure")["error"]
    for number, name in enumerate(names):
        part = table[table["predictor"] == name].set_index("measure").loc[base.index]
        at = np.arange(len(part)) + (number - (len(names) - 1) / 2) * 0.2
        colour = COLOURS.get(name.split()[0], COLOURS["neutral"])
        ratio = part[["error", "low", "high"]].div(base, axis=0)
        points(ax, ratio, "error", at, color=colour, label=name)
    name_lines(ax, base.index)
    ax.axvline(1, color=COLOURS["constant"], lw=1)
    ax.set(xlabel="error / error of the constant predictor", xlim=(0, None))
    above(ax, len(names))
    return fig
