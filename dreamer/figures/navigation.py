"""Figures of closed-loop searches: paths about the heart, error by step, success by distance."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dreamer.figures import COLOURS, LIMIT

STYLES = {"follow": ":", "average": "-", "plan": "--"}
CONTROL = {"stay": "#999999", "random": "#E69F00", "mean": "#000000", "oracle": COLOURS["truth"]}
MARKS = {"follow": "o", "average": "s", "plan": "^"}


def _looks(variant: str, policy: str) -> dict:
    if variant == "control":
        return {"color": CONTROL[policy], "ls": "-.", "label": policy}
    return {"color": COLOURS[variant], "ls": STYLES[policy], "label": f"{variant}, {policy}"}


def paths(surface: NDArray, walks: Sequence[tuple[NDArray, str, str]]) -> Figure:
    """Ways of the probe over the heart: `surface` [N, 3] mm, drawn as points, in its frame.

    `walks`: (points [steps, 3] mm, variant, policy); a cross is the start, a dot the end. Left the
    whole scene, right the ways alone, seen along the heart's axis.
    """
    fig = plt.figure(figsize=(9, 4.4))
    scene, near = fig.add_subplot(1, 2, 1, projection="3d"), fig.add_subplot(1, 2, 2)
    scene.scatter(*surface.T, s=4, color="#c0504d", alpha=0.35, lw=0, rasterized=True)
    for points, variant, policy in walks:
        looks = _looks(variant, policy)
        scene.plot(*points.T, lw=1.3, **looks)
        near.plot(*points[:, :2].T, lw=1.3, **looks)
        near.plot(*points[-1, :2], "o", color=looks["color"])
    near.plot(*walks[0][0][0, :2], "kx", ms=8, label="start")
    scene.view_init(15, -70)
    scene.set(xlabel="lateral (mm)", ylabel="inferior (mm)", zlabel="to the base (mm)")
    scene.set_aspect("equal")
    scene.locator_params(nbins=5)
    near.set(xlabel="lateral (mm)", ylabel="inferior (mm)", aspect="equal")
    near.set_anchor("C")
    fig.legend(*near.get_legend_handles_labels(), loc="outside lower center", ncol=5)
    return fig


def by_step(table: pd.DataFrame) -> Figure:
    """Error left against step, mm and degrees; bands are 95% intervals over patients.

    `table`: variant, policy, step, measure (translation, rotation), value, low, high.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, measure, unit in ((axes[0], "translation", "mm"), (axes[1], "rotation", "deg")):
        part = table[table["measure"] == measure]
        for (variant, policy), line in part.groupby(["variant", "policy"], sort=False):
            looks = _looks(variant, policy)
            ax.plot(line["step"], line["value"], lw=1.4, **looks)
            ax.fill_between(line["step"], line["low"], line["high"], color=looks["color"],
                            alpha=0.12, lw=0)  # fmt: skip
        shown = part[~part["policy"].isin(["random", "mean"])]  # these leave the picture
        ax.set(xlabel="step", ylabel=f"{measure} left ({unit})", xlim=(0, None),
               ylim=(0, 1.1 * shown["high"].max()))  # fmt: skip
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=5)
    return fig


def arrivals(table: pd.DataFrame) -> Figure:
    """Share that arrives, by policy and variant, within 5 and within 10, with intervals.

    `table`: of `arrivals.summarise`.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    keys = list(dict.fromkeys(zip(table["variant"], table["policy"], strict=True)))
    for ax, (measure, words) in zip(
        axes, (("arrived_5", "5 mm and 5°"), ("arrived_10", "10 mm and 10°")), strict=True
    ):
        part = table[table["measure"] == measure].set_index(["variant", "policy"])
        for place, key in enumerate(keys):
            row = part.loc[key]
            spread = np.nan_to_num([[row["value"] - row["low"]], [row["high"] - row["value"]]])
            looks = _looks(*key)
            ax.errorbar(100 * row["value"], place, xerr=100 * spread.clip(0), fmt="o", ms=5,
                        color=looks["color"])  # fmt: skip
        ax.set(xlabel=f"arrived within {words} (%)", xlim=(-3, 103), ylim=(len(keys) - 0.5, -0.5))
    axes[0].set_yticks(range(len(keys)), [_looks(*key)["label"] for key in keys])
    return fig


def by_distance(table: pd.DataFrame) -> Figure:
    """Share that arrives against the distance at the start. `table`: `arrivals.by_distance`."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for ax, measure, unit in ((axes[0], "start_mm", "mm"), (axes[1], "start_deg", "deg")):
        part = table[(table["measure"] == measure) & (table["variant"] != "control")]
        for (variant, policy), line in part.groupby(["variant", "policy"], sort=False):
            line = line.sort_values("middle")
            spread = [line["value"] - line["low"], line["high"] - line["value"]]
            ax.errorbar(line["middle"].astype(float), 100 * line["value"],
                        yerr=100 * np.nan_to_num(spread).clip(0), marker=MARKS[policy], ms=4, lw=1,
                        **_looks(variant, policy))  # fmt: skip
        ax.set(xlabel=f"distance at the start ({unit})", ylim=(-3, 103))
    axes[0].set_ylabel("arrived within 10 mm and 10° (%)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return fig


def strips(rows: dict[str, tuple[NDArray, Sequence[str]]]) -> Figure:
    """Film strips: title -> (frames [K, S, S], a caption for each), one row a search."""
    count = max(len(images) for images, _ in rows.values())
    fig, axes = plt.subplots(
        len(rows), count, squeeze=False, figsize=(1.5 * count, 1.9 * len(rows))
    )
    for line, (title, (images, words)) in zip(axes, rows.items(), strict=True):
        for ax, image, word in zip(line, images, words, strict=False):
            ax.imshow(image, vmin=0, vmax=255)
            ax.set_title(word, fontsize=8)
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(title, fontsize=9)
    return fig


def film(images: NDArray, words: Sequence[str], file: str | Path, scale: int = 3) -> Path:
    """Frames [K, S, S] with a line of text each as an animated GIF, written whole, under 300 kB."""
    for every in (1, 2, 3):
        pages = []
        for image, word in list(zip(images, words, strict=True))[::every]:
            page = Image.fromarray(image).resize([scale * image.shape[0]] * 2)
            ImageDraw.Draw(page).text((6, 4), word, fill=255)
            pages.append(page.quantize(48))
        stream = io.BytesIO()
        pages[0].save(stream, "GIF", save_all=True, append_images=pages[1:], loop=0,
                      duration=[350] * (len(pages) - 1) + [1500])  # fmt: skip
        if stream.tell() <= LIMIT or scale == 1:
            break
        scale = max(1, scale - 1)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(stream.getvalue())
    os.replace(part, file)
    return file


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

    Cells are as opaque as |value| over the map's largest, amber above zero and blue below. The
    motion is drawn in the upper right corner as the probe is seen from behind.
    """
    sheet = Image.new("RGB", (side * len(views), side), "black")
    grey = np.asarray(Image.fromarray(image).resize((side, side)), dtype=np.float32)
    draw = ImageDraw.Draw(sheet)
    for place, (title, grid, motion) in enumerate(views):
        page = np.repeat(grey[..., None], 3, axis=2)
        if grid is not None:
            value = np.asarray(grid, np.float32) / max(float(np.abs(grid).max()), 1e-9)
            cells = np.asarray(
                Image.fromarray(value).resize((side, side), Image.Resampling.NEAREST)
            )
            colour = np.where(cells[..., None] >= 0, (230, 159, 0), (0, 114, 178))
            alpha = 0.6 * np.abs(cells)[..., None]
            page = page * (1 - alpha) + colour * alpha
        sheet.paste(Image.fromarray(page.astype(np.uint8)), (place * side, 0))
        draw.text((place * side + 6, 4), title, fill="white")
        _guide(draw, list(map(float, motion)), (place + 1) * side - 42, 44)
    stream = io.BytesIO()
    sheet.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
