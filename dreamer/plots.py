"""Plots that several notebooks share: one theme, one colour per variant, one way to save a figure.

Everything else is drawn by seaborn and matplotlib calls in the notebooks' cells. Plot functions
take arrays, tables and an axis, never a model, and return the axis. Colours: Okabe and Ito, which
colour-blind readers can tell apart (jfly.uni-koeln.de/color).
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dreamer.files import write_whole

COLOURS = {
    "patch": "#0072B2",
    "channel": "#D55E00",
    "both": "#56B4E9",
    "none": "#CC79A7",  # no transformer
    "mean pose": "#666666",
    "truth": "#009E73",
    "control": "#666666",
}


def _two_sided(low: str, high: str, alpha: float) -> LinearSegmentedColormap:
    """Transparent in the middle, for maps over a frame; `alpha`: opacity at the low end."""
    ends = [(0.0, to_rgba(low, alpha)), (0.5, to_rgba(low, 0.0)), (0.5, to_rgba(high, 0.0))]
    ends.append((1.0, to_rgba(high, 0.7)))
    return LinearSegmentedColormap.from_list("two sided", ends)


# Most cells of a map are below its mean: there the anatomy shines through.
MORE_OR_LESS = _two_sided("#34c3ff", "#ff3b30", 0.4)
# Channel and patch: brighter than COLOURS, on black.
DIFFERENCE = _two_sided("#ff8c1a", "#1a8cff", 0.7)
LABELS = {
    "patch": "patch tokens",
    "channel": "channel tokens",
    "both": "both kinds of tokens",
    "none": "no transformer",
    "mean pose": "mean-pose baseline",
}
AXIS_LABELS = {
    "x": "x (lateral, mm)",
    "y": "y (elevation, mm)",
    "z": "z (depth, mm)",
    "roll": "roll (fan, deg)",
    "pitch": "pitch (rock, deg)",
    "yaw": "yaw (rotate, deg)",
    "translation": "translation (mm)",
    "rotation": "rotation (deg)",
}


def theme() -> None:
    """Set seaborn's theme for the project; called once, in a notebook's setup cell."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        font_scale=0.85,
        rc={
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e5e5e5",
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "image.cmap": "gray",
            "svg.fonttype": "none",
            "svg.hashsalt": "dreamer",
            "pdf.fonttype": 42,
        },
    )


def _smaller(png: io.BytesIO, palette: bool) -> io.BytesIO:
    """A PNG without transparency; with a `palette` of 256 colours where it shows no frames."""
    image, content = Image.open(png).convert("RGB"), io.BytesIO()
    if palette:
        image = image.quantize(256, dither=Image.Dither.NONE)
    image.save(content, "PNG", optimize=True)
    return content


def save(
    fig: Figure, output: str | Path, name: str, caption: str, alt: str, n: str | None = None
) -> None:
    """Write a figure as `name`.png, .svg, .pdf, and .json (caption, alt text, sample size).

    Args:
        fig: the figure; it stays open, so that the notebook shows it.
        output: folder, made if necessary.
        name: begins with the two digits of its notebook, for example `04_accuracy`.
        caption: one or two sentences; states the interval type.
        alt: the figure in words, for readers who cannot see it.
        n: sample size in words, for example "1464 frames of 24 patients".

    Raises ValueError without number, caption or alt text.
    """
    if not name[:2].isdigit() or not caption or not alt:
        raise ValueError(f"figure {name}: needs its notebook's number, a caption and an alt text")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    for kind, dpi in (("png", 120), ("svg", 80), ("pdf", 80)):
        content = io.BytesIO()
        fig.savefig(content, format=kind, dpi=dpi, bbox_inches="tight", metadata=undated.get(kind))
        if kind == "png":
            content = _smaller(content, palette=not any(ax.images for ax in fig.axes))
        write_whole(folder / f"{name}.{kind}", content.getvalue())
    notes = {"caption": caption, "alt": alt, "n": n, "notebook": name[:2]}
    write_whole(folder / f"{name}.json", json.dumps(notes, indent=1).encode())


def forest(
    table: pd.DataFrame,
    value: str,
    y: str,
    hue: str | None = None,
    ax: Axes | None = None,
    zero: float | None = 0.0,
    each: pd.DataFrame | None = None,
    own: pd.DataFrame | None = None,
    **style,
) -> Axes:
    """Draw one point with its interval (columns `low`, `high`) per row, categories `y` downwards.

    Rows that share a category are dodged by `hue`, whose values take their colour from COLOURS.
    An interval of NaN is left out. `zero` draws a reference line. Rows of `each` (single seeds) are
    small dots below, those of `own` (the reader's runs) diamonds.
    """
    ax = ax or plt.gca()
    layers = {"mean": table, "seed": each, "own": own}
    every = pd.concat(
        part.assign(layer=layer, kind=part[hue] if hue else "")
        for layer, part in layers.items()
        if part is not None and len(part)
    )
    names, kinds = (list(dict.fromkeys(every[column])) for column in (y, "kind"))
    beside = {n: [k for k in kinds if k in set(own["kind"])] for n, own in every.groupby(y)}
    every["at"] = np.where(every["layer"] == "mean", 0, 0.08) + [
        names.index(n) + (y != hue) * 0.22 * (beside[n].index(k) - (len(beside[n]) - 1) / 2)
        for n, k in zip(every[y], every["kind"], strict=True)
    ]
    for kind, part in every.groupby("kind", sort=False):
        colour = COLOURS.get(kind, COLOURS["control"])
        mean, seed, mine = (part[part["layer"] == layer] for layer in layers)
        ax.scatter(seed[value], seed["at"], s=9, color=colour, alpha=0.4, lw=0)
        ax.scatter(mine[value], mine["at"], s=30, marker="D", fc="white", ec=colour, zorder=3)
        arms = np.array([mean[value] - mean["low"], mean["high"] - mean[value]], float)
        looks = {"color": colour, "label": LABELS.get(kind, kind), "fmt": "o", "ms": 5} | style
        ax.errorbar(mean[value], mean["at"], xerr=np.nan_to_num(arms).clip(0), **looks)
    ax.set_yticks(range(len(names)), [(AXIS_LABELS | LABELS).get(name, name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    if zero is not None:
        ax.axvline(zero, color="#444444", lw=0.8)
    if hue:
        ax.legend()
    return ax


def show_frame(ax: Axes, image: ArrayLike, title: str = "") -> Axes:
    """Show one ultrasound frame [S, S] of grey levels 0 to 255, without ticks."""
    ax.imshow(image, vmin=0, vmax=255, cmap="gray", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize="small", loc="center")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def show_frames(images: ArrayLike, titles: Sequence[str], columns: int = 6, size: float = 1.5):
    """Return a figure of frames [N, S, S] in a grid of `columns`, with a short title each."""
    rows = -(-len(images) // columns)
    shape = (size * columns, (size + 0.25) * rows)
    fig, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in zip(axes.flat, images, titles, strict=False):
        show_frame(ax, image, title)
    return fig


def overlay(
    ax: Axes,
    image: ArrayLike,
    grid: ArrayLike,
    limit: float,
    title: str = "",
    centre: float = 0.0,
    cmap: Colormap = MORE_OR_LESS,
) -> Axes:
    """Show a map [h, w] over its frame [S, S]: colour by sign, opacity by distance from `centre`.

    The range is symmetric, `centre` ± `limit`, and cells near `centre` leave the anatomy visible.
    """
    show_frame(ax, image, title)
    height, width = np.shape(image)
    ax.imshow(
        np.asarray(grid, dtype=float), cmap, vmin=centre - limit, vmax=centre + limit,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    return ax


def outline(ax: Axes, labels: NDArray, structures: Sequence[int]) -> Axes:
    """Draw the border of structures (numbers in a label map [S, S]) in the colour of the truth."""
    for number in structures:
        inside = labels == number
        if inside.any() and not inside.all():
            ax.contour(inside, levels=[0.5], colors=COLOURS["truth"], linewidths=0.9)
    return ax


def relative(grid: ArrayLike) -> NDArray:
    """The magnitude of a map [..., h, w] relative to its mean: 1 is an even map."""
    size = np.abs(np.asarray(grid, dtype=float))
    return size / size.mean((-2, -1), keepdims=True).clip(1e-12)


def beside(
    axes: Sequence[Axes],
    image: ArrayLike,
    grids: Mapping[str, ArrayLike],
    limit: float = 2.0,
    labels: NDArray | None = None,
    structures: Sequence[int] = (),
    titles: bool = True,
) -> None:
    """One row of axes: a frame [S, S], each variant's map [h, w] relative to an even one, and, with
    patch and channel among `grids`, their difference. Structures are outlined."""
    maps = {name: relative(grid) for name, grid in grids.items()}
    show_frame(axes[0], image, "frame" if titles else "")
    for ax, (name, ratio) in zip(axes[1:], maps.items(), strict=False):
        overlay(ax, image, ratio, limit, LABELS.get(name, name) if titles else "", 1.0)
    if {"patch", "channel"} <= set(maps):
        gap, title = maps["patch"] - maps["channel"], "patch - channel" if titles else ""
        overlay(axes[len(maps) + 1], image, gap, limit, title, 0.0, DIFFERENCE)
    if labels is not None and labels.shape == np.shape(image):
        for ax in axes:
            outline(ax, labels, structures)


def colour_bars(fig: Figure, axes: NDArray, limit: float = 2.0, difference: bool = True) -> None:
    """The colour scales of `beside`, below the axes."""
    scales = [
        (1.0, MORE_OR_LESS, "relative to an even map", axes[:, 1 : -1 if difference else None])
    ]
    if difference:
        scales.append((0.0, DIFFERENCE, "difference (blue: patch)", axes[:, -1]))
    for centre, cmap, label, under in scales:
        norm = Normalize(centre - limit, centre + limit)
        bar = fig.colorbar(
            ScalarMappable(norm, cmap), ax=under, location="bottom", label=label,
            shrink=0.8, aspect=30, pad=0.01,
        )  # fmt: skip
        bar.ax.set_facecolor("black")
        if centre:
            bar.ax.set_xlim(max(0, centre - limit), centre + limit)  # no map is negative
