"""Figures of closed-loop searches: paths about the heart, error by step, success by distance."""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dreamer.plots import COLOURS, LIMIT, whiskers

STYLES = {"follow": ":", "average": "-", "plan": "--"}
CONTROL = {"stay": "#999999", "random": "#E69F00", "mean": "#000000", "oracle": COLOURS["truth"]}
MARKS = {"follow": "o", "average": "s", "plan": "^"}


def _looks(variant: str, policy: str) -> dict:
    if variant == "control":
        return {"color": CONTROL[policy], "ls": "-.", "label": policy}
    return {"color": COLOURS[variant], "ls": STYLES[policy], "label": f"{variant}, {policy}"}


def _lines(table: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """(variant, policy) and their rows; variants as they come, controls last."""
    lines = list(table.groupby(["variant", "policy"], sort=False))
    return sorted(lines, key=lambda line: line[0][0] == "control")


def _legend(fig: Figure, ax: plt.Axes) -> None:
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncol=5, fontsize=9)


def paths(surface: NDArray, walks: Sequence[tuple[NDArray, str, str]]) -> Figure:
    """Ways of the probe over the heart: `surface` [N, 3] mm, drawn as points, in its frame.

    `walks`: (points [steps, 3] mm, variant, policy); a cross is the start, a dot the end. Left the
    whole scene, right the ways alone, seen along the heart's axis.
    """
    fig = plt.figure(figsize=(9, 4.4))
    scene, near = fig.add_subplot(1, 2, 1, projection="3d"), fig.add_subplot(1, 2, 2)
    scene.scatter(*surface.T, s=4, color="#c0504d", alpha=0.35, lw=0, rasterized=True)
    for points, variant, policy in sorted(walks, key=lambda walk: walk[1] == "control"):
        looks = _looks(variant, policy)
        scene.plot(*points.T, lw=1.3, **looks)
        near.plot(*points[:, :2].T, lw=1.3, **looks)
        near.plot(*points[-1, :2], "o", color=looks["color"])
    near.plot(*walks[0][0][0, :2], "kx", ms=8, label="start")
    scene.view_init(15, -70)
    scene.set(xlabel="lateral (mm)", ylabel="inferior (mm)", zlabel="to the base (mm)")
    scene.set_aspect("equal")
    for axis in (scene.xaxis, scene.yaxis, scene.zaxis):
        axis.set_major_locator(MultipleLocator(40))
    near.set(xlabel="lateral (mm)", ylabel="inferior (mm)", aspect="equal", anchor="C")
    _legend(fig, near)
    return fig


def by_step(table: pd.DataFrame) -> Figure:
    """Error left against step, mm and degrees; bands are 95% intervals over patients.

    `table`: variant, policy, step, measure (translation, rotation), value, low, high.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for ax, measure, unit in zip(axes, ("translation", "rotation"), ("mm", "deg"), strict=True):
        part = table[table["measure"] == measure]
        for key, line in _lines(part):
            looks = _looks(*key)
            ax.plot(line["step"], line["value"], lw=1.4, **looks)
            ax.fill_between(line["step"], line["low"], line["high"], color=looks["color"],
                            alpha=0.08, lw=0)  # fmt: skip
        shown = part[~part["policy"].isin(["random", "mean"])]  # these leave the picture
        ax.set(xlabel="step", ylabel=f"{measure} left ({unit})", xlim=(0, part["step"].max()),
               ylim=(0, 1.1 * shown["high"].max()))  # fmt: skip
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(fig, axes[0])
    return fig


def _bars(ax: plt.Axes, x, y, line: pd.DataFrame, axis: str, **looks) -> None:
    """Shares in per cent with their intervals along `axis`."""
    ax.errorbar(x, y, **{f"{axis}err": whiskers(line, scale=100)}, ms=5, **looks)


def arrivals(table: pd.DataFrame) -> Figure:
    """Share that arrives, by policy and variant, within 5 and within 10, with intervals.

    `table`: of `arrivals.summarise`.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, limit in zip(axes, (5, 10), strict=True):
        lines = _lines(table[table["measure"] == f"arrived_{limit}"])
        for place, (key, line) in enumerate(lines):
            looks = {"color": _looks(*key)["color"], "marker": MARKS.get(key[1], "D")}
            _bars(ax, 100 * line["value"], [place], line, "x", **looks)
        ax.set(xlabel=f"arrived within {limit} mm and {limit}° (%)", xlim=(-3, 103),
               ylim=(len(lines) - 0.5, -0.5))  # fmt: skip
    axes[0].set_yticks(range(len(lines)), [_looks(*key)["label"] for key, _ in lines])
    return fig


def by_distance(table: pd.DataFrame) -> Figure:
    """Share that arrives against the distance at the start. `table`: `arrivals.by_distance`."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, measure, unit in ((axes[0], "start_mm", "mm"), (axes[1], "start_deg", "deg")):
        part = table[(table["measure"] == measure) & (table["variant"] != "control")]
        lines = _lines(part)
        for place, (key, line) in enumerate(lines):
            line = line.sort_values("middle")
            aside = (place - (len(lines) - 1) / 2) * 0.25  # or their intervals hide one another
            _bars(ax, line["middle"].astype(float) + aside, 100 * line["value"], line, "y", lw=1,
                  marker=MARKS[key[1]], **_looks(*key))  # fmt: skip
        ax.set(xlabel=f"distance at the start ({unit})", ylim=(-3, 103))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[0].set_ylabel("arrived within 10 mm and 10° (%)")
    _legend(fig, axes[0])
    return fig


def strips(rows: dict[str, tuple[NDArray, Sequence[str]]], count: int = 7) -> Figure:
    """Film strips: title -> (frames [K, S, S], a caption for each), `count` of them in one row."""
    size = (1.5 * count, 1.8 * len(rows))
    fig, axes = plt.subplots(len(rows), count, squeeze=False, figsize=size)
    for line, (title, (images, words)) in zip(axes, rows.items(), strict=True):
        shown = np.linspace(0, len(images) - 1, count).round().astype(int)
        for ax, k in zip(line, shown, strict=True):
            ax.imshow(images[k], vmin=0, vmax=255)
            ax.set_title(words[k], fontsize=8)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(title, fontsize=9)
    return fig


def film(images: NDArray, words: Sequence[str], scale: int = 3) -> bytes:
    """Frames [K, S, S] with a line of text each as an animated GIF under `LIMIT` bytes."""
    for every in (1, 2, 3):
        pages = []
        for image, word in list(zip(images, words, strict=True))[::every]:
            page = Image.fromarray(image).resize([scale * image.shape[0]] * 2)
            ImageDraw.Draw(page).text((6, 4), word, fill=255, font_size=5 * scale)
            pages.append(page.quantize(48))
        stream = io.BytesIO()
        pages[0].save(stream, "GIF", save_all=True, append_images=pages[1:], loop=0,
                      duration=[350] * (len(pages) - 1) + [1500])  # fmt: skip
        if stream.tell() <= LIMIT or scale == 1:
            break
        scale -= 1
    return stream.getvalue()


def _guide(draw: ImageDraw.ImageDraw, motion: Sequence[float], x: int, y: int, r: int = 26) -> None:
    """The probe from behind: an arrow for the slide, an arc for the rotation, about (x, y)."""
    amber = "#E69F00"
    draw.ellipse((x - r, y - r, x + r, y + r), outline="#888888")
    dx, dy = (float(np.clip(v / 12, -1, 1)) * r for v in motion[:2])
    if (long := np.hypot(dx, dy)) > 2:
        draw.line((x, y, x + dx, y + dy), fill=amber, width=3)
        ux, uy = dx / long, dy / long
        tip = [(4, 0), (-4, 4), (-4, -4)]  # along the arrow and across it
        tip = [(x + dx + a * ux - b * uy, y + dy + a * uy + b * ux) for a, b in tip]
        draw.polygon(tip, fill=amber)
    # Clockwise on the screen is clockwise for the hand; three times as far, to be seen.
    if abs(turn := float(np.clip(3 * motion[5], -170, 170))) > 6:
        ends = sorted((-90.0, -90.0 + turn))
        box = (x - r - 5, y - r - 5, x + r + 5, y + r + 5)
        draw.arc(box, *ends, fill=amber, width=3)
        at = np.radians(-90 + turn)
        end = x + (r + 4) * np.cos(at), y + (r + 4) * np.sin(at)
        draw.ellipse((end[0] - 3, end[1] - 3, end[0] + 3, end[1] + 3), fill=amber)


def panels(
    image: NDArray, views: Sequence[tuple[str, NDArray | None, Sequence[float]]], side: int = 300
) -> bytes:
    """One frame [S, S] side by side as PNG bytes: title, map [h, w] or None, motion [6] to make.

    Cells are as opaque as |value| over the map's largest, amber above zero and blue below; of a map
    without a sign, as the value over its least. The motion is drawn in the upper right corner as
    the probe is seen from behind.
    """
    sheet = Image.new("RGB", (side * len(views), side), "black")
    grey = np.asarray(Image.fromarray(image).resize((side, side)), dtype=np.float32)
    draw = ImageDraw.Draw(sheet)
    for place, (title, grid, motion) in enumerate(views):
        page = np.repeat(grey[..., None], 3, axis=2)
        if grid is not None:
            value = np.asarray(grid, np.float32) - max(float(grid.min()), 0)
            value = Image.fromarray(value / max(float(np.abs(value).max()), 1e-9))
            cells = np.asarray(value.resize((side, side), Image.Resampling.NEAREST))[..., None]
            alpha = 0.5 * np.abs(cells)
            page = page * (1 - alpha) + np.where(cells >= 0, (230, 159, 0), (0, 114, 178)) * alpha
        sheet.paste(Image.fromarray(page.astype(np.uint8)), (place * side, 0))
        draw.text((place * side + 6, 4), title, fill="white", font_size=15)
        _guide(draw, list(map(float, motion)), (place + 1) * side - 42, 44)
    stream = io.BytesIO()
    sheet.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
