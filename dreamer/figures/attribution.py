"""Maps over frames, and how far they are to be believed. Amber pushes the answer up, blue down.

Where maps are compared they share one scale, symmetric about zero; a map's strength is its opacity,
so that what is not coloured is the frame as it was.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from dreamer.plots import COLOURS, whiskers

UP, DOWN = "#FFC20A", "#1E90FF"
SIGNED = LinearSegmentedColormap.from_list("signed", [DOWN, "#000000", UP])
UNSIGNED = LinearSegmentedColormap.from_list("unsigned", ["#000000", UP])
LONG = {  # words for the tables' names
    "integrated_gradients": "integrated gradients",
    "gradient_x_activation": "gradient × activation",
    "grad_cam": "Grad-CAM",
    "shapley": "Shapley sampling",
    "ablation": "ablation",
    "occlusion": "occlusion",
    "rollout": "attention rollout",
    "action_attention": "action token's attention",
    "random": "control: random",
    "edges": "control: edges",
    "centre": "control: centre",
}
MEASURED = {
    "deletion": "deletion area →",
    "insertion": "← insertion area",
    "infidelity": "← infidelity",
    "sensitivity": "← max-sensitivity",
    "counterfactual": "counterfactual agreement →",
    "decisive": "points at the decisive structure →",
    "pointing": "points at the heart →",
    "mass": "mass on the heart / its area →",
    "rank": "rank accuracy on the heart →",
}


def words(name: str) -> str:
    """A table's name as a reader says it."""
    return LONG.get(name, name.replace("_", " "))


def show(ax: Axes, image: NDArray, title: str = "", grid: tuple[int, int] | None = None) -> None:
    """A grey frame [S, S], with the lines of its `grid` of cells where one is given."""
    ax.imshow(image, vmin=0, vmax=255, interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    if grid:
        for lines, count, side in ((ax.axhline, grid[0], 0), (ax.axvline, grid[1], 1)):
            for k in range(1, count):
                lines(k * image.shape[side] / count - 0.5, color="white", lw=0.4, alpha=0.5)


def overlay(ax: Axes, image: NDArray, values: ArrayLike, limit: float, title: str = "") -> None:
    """Frame [S, S] under its map [h, w]: cells as opaque as |value| / limit."""
    show(ax, image, title)
    values = np.asarray(values, dtype=float)
    colours = np.where(values[..., None] >= 0, to_rgb(UP), to_rgb(DOWN))
    alpha = np.clip(np.abs(values) / (limit or 1), 0, 1) * 0.8
    size = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    ax.imshow(np.dstack((colours, alpha)), extent=size, interpolation="nearest")


def outline(ax: Axes, labels: NDArray, number: int) -> None:
    """The border of one structure of a label map [S, S] in the colour of the truth."""
    inside = labels == number
    if inside.any() and not inside.all():
        ax.contour(inside, levels=[0.5], colors=COLOURS["truth"], linewidths=1.1)


def _dots(ax: Axes, rows: pd.DataFrame, places: Sequence[float], colour: str, label: str):
    """Means with their intervals, lying across the lines `places`."""
    error = whiskers(rows, "mean")
    ax.errorbar(rows["mean"], places, xerr=error, fmt="o", ms=4, lw=1.2, color=colour, label=label)


def _variants(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The table's parts by variant, patch before channel everywhere."""
    return sorted(table.groupby("variant"), key=lambda part: part[0], reverse=True)


def _bar(fig: Figure, axes, limit: float, signed: bool, label: str) -> None:
    norm = Normalize(-limit if signed else 0, limit)
    bar = fig.colorbar(ScalarMappable(norm, SIGNED if signed else UNSIGNED), ax=axes, shrink=0.8,
                       pad=0.01, aspect=18)  # fmt: skip
    bar.set_label(label)
    bar.outline.set_visible(False)


def _limit(values: ArrayLike) -> float:
    """Full colour at the 99th percentile of the magnitudes: one cell does not fade all others."""
    return float(np.quantile(np.abs(np.asarray(values, dtype=float)), 0.99)) or 1.0


def atlas(
    images: NDArray,
    maps: Mapping[str, NDArray],
    rows: Sequence[str],
    units: Sequence[str],
    labels: NDArray | None = None,
    outlined: Sequence[int] | None = None,
) -> Figure:
    """Frame | map | map, a row each. All maps of a row share one scale, in the row's unit.

    `images` [R, S, S], `maps` title -> [R, h, w]; `labels` [R, S, S] and `outlined` [R] draw one
    structure's border in each row.
    """
    count, grid = len(images), next(iter(maps.values())).shape[1:]
    fig, axes = plt.subplots(count, 1 + len(maps), squeeze=False,
                             figsize=(2.1 * (1 + len(maps)) + 0.9, 2.1 * count + 0.3))  # fmt: skip
    for r in range(count):
        show(axes[r, 0], images[r], "frame and grid" if r == 0 else "", grid)
        axes[r, 0].set_ylabel(rows[r])
        limit = _limit([values[r] for values in maps.values()])
        signed = any((values[r] < 0).any() for values in maps.values())
        for ax, (title, values) in zip(axes[r, 1:], maps.items(), strict=True):
            overlay(ax, images[r], values[r], limit, title if r == 0 else "")
        if labels is not None:
            for ax in axes[r]:
                outline(ax, labels[r], outlined[r])
        _bar(fig, axes[r], limit, signed, units[r])
    return fig


def across(
    image: NDArray, maps: Mapping[str, NDArray], titles: Sequence[str], units: Sequence[str]
) -> Figure:
    """One frame [S, S], then its maps for many targets: a row for each name of `maps` ([K, h, w]),
    a column for each target, and one scale for each column, in its unit."""
    count, rows = len(titles), len(maps)
    fig, axes = plt.subplots(rows, 1 + count, squeeze=False,
                             figsize=(1.6 * (1 + count), 1.75 * rows + 0.8))  # fmt: skip
    for line, (name, values) in zip(axes, maps.items(), strict=True):
        show(line[0], image, "", values.shape[1:])
        line[0].set_ylabel(name, color=COLOURS.get(name, "black"))
    room = fig.colorbar(
        ScalarMappable(), ax=axes[:, 0], orientation="horizontal", aspect=10, pad=0.02
    )
    room.set_label(" ", fontsize=8)  # keeps the first column's pictures in line with the others
    room.ax.set_axis_off()
    room.solids.set_visible(False)
    for k in range(count):
        column = np.stack([values[k] for values in maps.values()])
        limit, signed = _limit(column), bool((column < 0).any())
        for ax, values in zip(axes[:, 1 + k], column, strict=True):
            overlay(ax, image, values, limit)
        axes[0, 1 + k].set_title(titles[k])
        norm = Normalize(-limit if signed else 0, limit)
        bar = fig.colorbar(ScalarMappable(norm, SIGNED if signed else UNSIGNED),
                           ax=axes[:, 1 + k], orientation="horizontal", aspect=10, pad=0.02,
                           ticks=[-limit, 0, limit] if signed else [0, limit],
                           format="%.2g")  # fmt: skip
        bar.set_label(units[k], fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    return fig


def sheet(
    images: NDArray,
    maps: Mapping[str, Mapping[str, NDArray | None]],
    unit: str,
    limit: float | None = None,
) -> Figure:
    """A row of maps for each name, all on one scale (or `limit`); a map that is None shows the
    frame with its grid. `images`: one frame [S, S] for all, or one for each column [K, S, S]."""
    columns = max(len(row) for row in maps.values())
    size = min(1.9, 11 / columns)
    whole = size * columns + 0.9, (size + 0.2) * len(maps) + 0.3
    fig, axes = plt.subplots(len(maps), columns, squeeze=False, figsize=whole)
    values = [m for row in maps.values() for m in row.values() if m is not None]
    limit, above = limit or _limit(values), []
    for line, (name, row) in zip(axes, maps.items(), strict=True):
        for ax in line[len(row) :]:
            ax.set_visible(False)
        for k, (ax, (title, grid)) in enumerate(zip(line, row.items(), strict=False)):
            image, said = images if images.ndim == 2 else images[k], textwrap.fill(title, 14)
            said = "" if list(row) == above else said
            if grid is None:
                show(ax, image, said, values[0].shape)
            else:
                overlay(ax, image, grid, limit, said)
        line[0].set_ylabel(name, color=COLOURS.get(name, "black"))
        above = list(row)
    _bar(fig, axes, limit, any((m < 0).any() for m in values), unit)
    return fig


def strip(images: NDArray, maps: Mapping[str, NDArray], titles: Sequence[str], unit: str) -> Figure:
    """Frames [K, S, S] from left to right, below each its maps (name -> [K, h, w]); one scale."""
    rows = {name: dict(zip(titles, values, strict=True)) for name, values in maps.items()}
    return sheet(images, {"frame": dict.fromkeys(titles), **rows}, unit)


def channels(image: NDArray, maps: Mapping[str, tuple[NDArray, NDArray, NDArray]]) -> Figure:
    """The strongest channels of each variant, strongest first: their own maps over the frame.

    `maps` variant -> (numbers [K], shares [K], maps [K, h, w]); each map has its own scale, since
    channels have none in common.
    """
    count = len(next(iter(maps.values()))[0])
    fig, axes = plt.subplots(len(maps), count, squeeze=False,
                             figsize=(1.5 * count, 1.85 * len(maps)))  # fmt: skip
    for line, (variant, (numbers, shares, own)) in zip(axes, maps.items(), strict=True):
        for ax, number, share, values in zip(line, numbers, shares, own, strict=True):
            overlay(
                ax, image, values, float(np.abs(values).max()), f"channel {number}: {share:.1%}"
            )
        line[0].set_ylabel(variant, color=COLOURS[variant])
    return fig


def reading(table: pd.DataFrame) -> Figure:
    """What heads read, layer by layer. Table: variant, layer, head, measure, mean, low, high."""
    measures = list(dict.fromkeys(table["measure"]))
    fig, axes = plt.subplots(1, len(measures), figsize=(3.3 * len(measures), 3), squeeze=False)
    for ax, measure in zip(axes[0], measures, strict=True):
        for shift, (variant, part) in zip((-0.1, 0.1), table[table.measure == measure].groupby(
            "variant", sort=False), strict=False):  # fmt: skip
            place = part["layer"] + shift + (part["head"] - part["head"].mean()) * 0.02
            error = whiskers(part, "mean")
            ax.errorbar(place, part["mean"], error, fmt="o", ms=4, lw=1, label=variant,
                        color=COLOURS[variant])  # fmt: skip
        ax.set(xlabel="layer", title=measure, xticks=sorted(set(table["layer"])))
    axes[0, 0].set_ylabel("mean over frames, 95% interval")
    axes[0, 0].legend()
    return fig


def scores(summary: pd.DataFrame, measures: Sequence[str], columns: int = 3) -> Figure:
    """Dot plot: a panel for each measure, a line for each method, controls below in grey ground.

    `summary`: variant, method, measure, mean, low, high. The arrow in a title points to better.
    """
    measures = [m for m in measures if m in set(summary["measure"])]
    methods = list(dict.fromkeys(summary["method"]))
    methods.sort(key=lambda m: LONG.get(m, "").startswith("control"))
    columns = min(columns, len(measures))
    lines = -(-len(measures) // columns)
    size = 2.45 * columns + 1.5, (0.26 * len(methods) + 0.9) * lines
    fig, axes = plt.subplots(lines, columns, squeeze=False, sharey=True, figsize=size)
    own = sum(not words(m).startswith("control") for m in methods)
    for ax, measure in zip(axes.flat, measures, strict=False):
        part = summary[summary.measure == measure]
        for shift, (variant, rows) in zip((-0.14, 0.14), _variants(part), strict=False):
            y = [methods.index(m) + shift for m in rows["method"]]
            _dots(ax, rows, y, COLOURS[variant], variant)
        ax.axhspan(own - 0.5, len(methods) - 0.5, color="#f2f2f2", zorder=0)
        ax.set_title(MEASURED.get(measure, measure), fontsize=9)
        ax.set(yticks=range(len(methods)), yticklabels=[words(m) for m in methods])
        ax.set_ylim(len(methods) - 0.5, -0.5)
    for ax in axes.flat[len(measures) :]:
        ax.set_visible(False)
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower right", ncols=2)
    return fig


def curves(table: pd.DataFrame) -> Figure:
    """Deletion and insertion: columns kind, variant; a line for each method with its interval.

    `table`: variant, kind, method, share, mean, low, high (relative distance of the answer).
    """
    variants, kinds = list(dict.fromkeys(table["variant"])), ("deletion", "insertion")
    fig, axes = plt.subplots(1, 2 * len(variants), figsize=(2.6 * 2 * len(variants), 3.1),
                             sharey=True, squeeze=False)  # fmt: skip
    methods = list(dict.fromkeys(table["method"]))
    palette = _palette(methods)
    panels = [(kind, variant) for kind in kinds for variant in variants]
    for ax, (kind, variant) in zip(axes[0], panels, strict=True):
        part = table[(table.kind == kind) & (table.variant == variant)]
        for method in methods:
            line = part[part.method == method]
            ax.plot(line["share"], line["mean"], color=palette[method][0], ls=palette[method][1],
                    label=words(method))  # fmt: skip
            ax.fill_between(line["share"], line["low"], line["high"], color=palette[method][0],
                            alpha=0.15, lw=0)  # fmt: skip
        ax.set_title(f"{kind}, {variant}", color=COLOURS[variant])
        ax.set_xlabel("share of cells " + ("hidden" if kind == "deletion" else "shown"))
    axes[0, 0].set_ylabel("distance from the answer to\nthe whole frame (relative)")
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=len(names))
    return fig


def _palette(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Okabe and Ito's colours that are no variant's, for methods; grey and dashed for controls."""
    own = ["#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#8C510A", "#5E3C99", "#B2182B"]
    dashes = ["--", ":", "-.", (0, (1, 3))]
    controls = [m for m in methods if words(m).startswith("control")]
    found = {m: (COLOURS["neutral"], dashes[k % 4]) for k, m in enumerate(controls)}
    rest = [m for m in methods if m not in controls]
    return found | {m: (own[k % len(own)], "-") for k, m in enumerate(rest)}


def decay(table: pd.DataFrame, threshold: float) -> Figure:
    """Rank agreement with the trained map while weights are drawn anew from the head down.

    `table`: variant, method, depth, stage, mean, low, high; the dashed line is the `threshold`
    under which a method passes when nothing trained is left.
    """
    variants = list(dict.fromkeys(table["variant"]))
    fig, axes = plt.subplots(1, len(variants), figsize=(4.6 * len(variants), 3.4), sharey=True,
                             squeeze=False)  # fmt: skip
    palette = _palette(list(dict.fromkeys(table["method"])))
    for ax, variant in zip(axes[0], variants, strict=True):
        part = table[table.variant == variant]
        for method, line in part.groupby("method", sort=False):
            ax.plot([0, *line["depth"]], [1, *line["mean"]], marker="o", ms=3,
                    color=palette[method][0], label=words(method))  # fmt: skip
            ax.fill_between(line["depth"], line["low"], line["high"], color=palette[method][0],
                            alpha=0.15, lw=0)  # fmt: skip
        ax.axhline(threshold, color=COLOURS["neutral"], ls="--", lw=1)
        stages = part.drop_duplicates("depth").sort_values("depth")["stage"]
        ax.set_xticks(range(len(stages) + 1), ["trained", *stages], rotation=45, ha="right")
        ax.set_title(variant, color=COLOURS[variant])
    axes[0, 0].set_ylabel("rank correlation with\nthe trained model's map")
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=len(names))
    return fig


def structures(table: pd.DataFrame, unit: str) -> Figure:
    """Structure by structure: relevance over its share of the area, how strong a map is where the
    structure's going changes the picture, and how far the answer moves for that change.

    `table`: variant, structure, measure (mass, told, moved), mean, low, high.
    """
    columns = {
        "mass": "share of the map /\nshare of the visible area",
        "told": "the map where the picture changes\nwithout it / its mean",
        "moved": f"|change of the answer| without it,\n{unit} per grey level of change",
    }
    fig, axes = plt.subplots(1, len(columns), figsize=(10, 4.8), sharey=True)
    means = table[table.measure == "mass"].groupby("structure")["mean"].mean()
    order = means.sort_values().index.tolist()
    for ax, (measure, label) in zip(axes, columns.items(), strict=True):
        part = table[(table.measure == measure) & table.structure.isin(order)]
        for shift, (variant, rows) in zip((-0.16, 0.16), _variants(part), strict=False):
            y = [order.index(s) - shift for s in rows["structure"]]
            _dots(ax, rows, y, COLOURS[variant], variant)
        ax.set_xlabel(label)
        if measure != "moved":
            ax.axvline(1, color=COLOURS["neutral"], ls="--", lw=1)
    axes[0].set_yticks(range(len(order)), [words(s) for s in order])
    axes[0].legend(loc="lower right")
    axes[2].set_xlim(left=0)
    return fig


def agreement(summary: pd.DataFrame) -> Figure:
    """Rank correlation between methods, a matrix for each variant, and between seeds and variants.

    `summary`: kind, variant, method, other, mean, low, high.
    """
    pairs = summary[summary.kind == "methods"]
    variants = list(dict.fromkeys(pairs["variant"]))
    names = list(dict.fromkeys([*pairs["method"], *pairs["other"]]))
    runs = summary[summary.kind != "methods"]
    panels = len(variants) + bool(len(runs))
    fig, axes = plt.subplots(1, panels, squeeze=False, figsize=(3.9 * panels + 1, 4.3))
    for ax, variant in zip(axes[0], variants, strict=False):
        part = pairs[pairs.variant == variant]
        matrix = np.full((len(names), len(names)), np.nan)
        for one, two, mean in zip(part["method"], part["other"], part["mean"], strict=True):
            i, j = sorted((names.index(one), names.index(two)))
            matrix[j, i] = mean
        ax.imshow(matrix, cmap="PuOr_r", vmin=-1, vmax=1)
        for j, i in zip(*np.nonzero(np.isfinite(matrix)), strict=True):
            dark = abs(matrix[j, i]) > 0.6
            ax.text(i, j, f"{matrix[j, i]:.2f}", ha="center", va="center", fontsize=6.5,
                    color="white" if dark else "black")  # fmt: skip
        said = [words(n) for n in names]
        ax.set_xticks(range(len(names) - 1), said[:-1], rotation=60, ha="right")
        ax.set_yticks(range(1, len(names)), said[1:] if ax is axes[0, 0] else [""] * len(said[1:]))
        ax.set(title=variant, xlim=(-0.5, len(names) - 1.5), ylim=(len(names) - 0.5, 0.5))
        ax.grid(False)
    if len(runs):
        ax, own = axes[0, -1], list(dict.fromkeys(runs["method"]))
        looks = {("seeds", v): (COLOURS[v], f"seeds, {v}") for v in variants}
        looks["variants", "both"] = (COLOURS["neutral"], "patch with channel")
        for shift, (key, (colour, label)) in zip((-0.2, 0, 0.2), looks.items(), strict=False):
            kind, variant = key
            rows = runs[(runs.kind == kind) & (runs.variant == variant)]
            if rows.empty:
                continue
            y = [own.index(m) + shift for m in rows["method"]]
            _dots(ax, rows, y, colour, label)
        ax.set_yticks(range(len(own)), [words(m) for m in own])
        ax.invert_yaxis()
        ax.yaxis.tick_right()
        ax.set(title="the same method, two runs", xlabel="rank correlation")
        ax.legend(loc="lower left", bbox_to_anchor=(0, -0.5))
    return fig


def dots(summary: pd.DataFrame, label: str, values: str) -> Figure:
    """Dots with intervals: `summary` has variant, the column `label`, mean, low, high."""
    order = list(dict.fromkeys(summary[label]))
    fig, ax = plt.subplots(figsize=(6, 0.42 * len(order) + 1.2))
    for shift, (variant, rows) in zip((-0.12, 0.12), _variants(summary), strict=False):
        y = [order.index(v) + shift for v in rows[label]]
        _dots(ax, rows, y, COLOURS[variant], variant)
    ax.set_yticks(range(len(order)), [words(v) for v in order])
    ax.invert_yaxis()
    ax.set_xlabel(values)
    ax.legend()
    return fig
