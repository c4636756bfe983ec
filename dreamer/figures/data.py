"""Figures of what the models are trained on: frames, poses, actions, splits, and the phantom."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dreamer.plots import COLOURS, above, name_lines, points
from dreamer.poses import AXES, UNITS

PARTS = {"train": COLOURS["patch"], "val": "#E69F00", "test": COLOURS["truth"]}


def frames(images: NDArray, titles: Sequence[str], columns: int = 6, inch: float = 1.5) -> Figure:
    """Frames [N, H, W] in a grid, one short title each."""
    rows = -(-len(images) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(inch * columns, (inch + 0.2) * rows))
    for ax in np.ravel(axes):
        ax.axis("off")
    for ax, image, title in zip(np.ravel(axes), images, titles, strict=False):
        ax.imshow(image, vmin=0, vmax=255)
        ax.set_title(title, fontsize=8)
    return fig


def trajectory(pose: NDArray, axes: Sequence[Axes], label: str | None = None, **style) -> None:
    """The six axes of consecutive poses [N, 6] against the frame's number, one axis each."""
    for ax, values, name, unit in zip(axes, pose.T, AXES, UNITS, strict=True):
        ax.plot(values, label=label, lw=1, **style)
        ax.axhline(0, color=COLOURS["neutral"], lw=0.7, ls=":")
        ax.set(ylabel=f"{name} ({unit})", xlabel="frame")


def path(position: NDArray, ax: Axes, surfaces: Mapping[str, NDArray] | None = None) -> None:
    """Probe positions [N, 3] in 3-D (mm), start to target, in front of point clouds [K, 3]."""
    for name, cloud in (surfaces or {}).items():
        ax.scatter(*cloud.T, s=2, alpha=0.3, label=name.replace("_", " "), rasterized=True)
    order = np.arange(len(position))
    ax.plot(*position.T, color=COLOURS["neutral"], lw=0.8, label="probe")
    ax.scatter(*position.T, c=order, cmap="viridis", s=10, depthshade=False)
    ax.plot(0, 0, 0, "*", ms=9, color=COLOURS["truth"], label="target")
    ax.set(xlabel="x (mm)", ylabel="y (mm)", zlabel="z, depth (mm)")
    ax.set_aspect("equal")
    ax.locator_params(axis="y", nbins=3)  # seen from the side: more would lie on one another
    ax.invert_zaxis()
    ax.view_init(elev=12, azim=-70)
    ax.legend(fontsize=8, loc="upper left")


def actions(motion: pd.DataFrame) -> Figure:
    """Distribution of the six action components, a curve per kind of motion (column `motion`)."""
    fig, axes = plt.subplots(2, 3, figsize=(8, 4))
    for ax, name, unit in zip(axes.flat, AXES, UNITS, strict=True):
        sns.kdeplot(
            motion, x=name, hue="motion", common_norm=False, fill=True, alpha=0.2, ax=ax,
            legend=ax is axes.flat[0], palette="colorblind", warn_singular=False,
        )  # fmt: skip
        ax.set(xlabel=f"{name} ({unit})", ylabel="density" if ax in axes[:, 0] else "")
    own = axes.flat[0].get_legend()
    words = [text.get_text() for text in own.get_texts()]
    fig.legend(own.legend_handles, words, loc="outside upper center", ncols=len(words))
    own.remove()
    return fig


def split(parts: Mapping[str, NDArray], owner: NDArray, ax: Axes) -> None:
    """Which transition of which scan trains, validates and tests; dropped ones stay white."""
    scans = list(dict.fromkeys(owner))
    place = {scan: np.flatnonzero(owner == scan) for scan in scans}
    chart = np.full((len(scans), max(map(len, place.values()))), np.nan)
    for row, scan in enumerate(scans):
        for number, part in enumerate(parts.values()):
            chart[row, np.flatnonzero(np.isin(place[scan], part))] = number
    chart = chart[np.argsort(np.nanmax(chart, axis=1), kind="stable")]
    colours = ListedColormap([PARTS[name] for name in parts])
    ax.imshow(chart, cmap=colours, vmin=-0.5, vmax=len(parts) - 0.5, aspect="auto",
              interpolation="nearest")  # fmt: skip
    ax.set(xlabel="transition of the scan", ylabel="scans, sorted by part")
    ax.grid(visible=False)
    handles = [plt.Line2D([], [], marker="s", ls="", color=PARTS[n], label=n) for n in parts]
    ax.legend(handles=handles, ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1))


def brightness(shares: Mapping[str, NDArray], ax: Axes) -> None:
    """Histogram of the frames' mean grey level, one curve per data set."""
    bins = np.linspace(0, 80, 41)
    for name, mean in shares.items():
        share = np.full(len(mean), 100 / len(mean))
        ax.hist(mean, bins, weights=share, histtype="step", label=name)
    ax.set(xlabel="mean grey level of a frame (0 to 255)", ylabel="frames (%)")
    ax.legend()


def greys(levels: Mapping[str, NDArray], ax: Axes) -> None:
    """Share of pixels inside the sector below a grey level, one curve per data set."""
    for name, values in levels.items():
        ax.plot(np.sort(values), np.linspace(0, 100, len(values)), label=name)
    ax.set(xlabel="grey level", ylabel="pixels at or below (%)", xlim=(0, 200))
    ax.legend()


def leak(ratio: pd.DataFrame, ax: Axes) -> None:
    """Error of the action-only control over the constant predictor's; below one, a leak.

    `ratio`: columns measure, motion, ratio, low, high.
    """
    kinds = list(dict.fromkeys(ratio["motion"]))
    for number, kind in enumerate(kinds):
        part = ratio[ratio["motion"] == kind].reset_index()
        at = np.arange(len(part)) + (number - (len(kinds) - 1) / 2) * 0.2
        points(ax, part, "ratio", at, label=kind)
    name_lines(ax, part["measure"])
    ax.axvline(1, color=COLOURS["neutral"], lw=1)
    ax.set_xlabel("error of the action alone / error of a constant")
    above(ax, len(kinds))


def labels(image: NDArray, label: NDArray, names: Sequence[str]) -> Figure:
    """A frame beside its label map (0 is outside, k is `names[k - 1]`), with a legend."""
    colours = [(0, 0, 0), *sns.color_palette("husl", len(names))]
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.4))
    axes[0].imshow(image, vmin=0, vmax=255)
    axes[1].imshow(label, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) + 0.5,
                   interpolation="nearest")  # fmt: skip
    for ax in axes:
        ax.axis("off")
    there = [k for k in range(1, len(names) + 1) if (label == k).any()]
    handles = [plt.Line2D([], [], marker="s", ls="", color=colours[k], label=names[k - 1])
               for k in there]  # fmt: skip
    axes[1].legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
