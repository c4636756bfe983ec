"""Every figure of the project: one theme, one colour per variant, one way to save.

Plot functions take tables, arrays and an axis, never a model. Colours are Okabe and Ito's, which
colour-blind readers can tell apart.
"""

import base64
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from PIL.ImageColor import getrgb

COLOURS = {
    "patch": "#0072B2",
    "channel": "#D55E00",
    "direct": "#CC79A7",
    "constant": "#666666",
    "truth": "#009E73",
    "neutral": "#666666",
}
LIMIT = 180_000  # bytes of a PNG, so that a page of them opens quickly


def theme() -> None:
    """The project's matplotlib settings; call once, in a notebook's setup cell."""
    matplotlib.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.titley": 1.0,  # none has ticks above, and looking for them takes half the time
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e5e5e5",
            "legend.frameon": False,
            "image.cmap": "gray",
            "svg.hashsalt": "dreamer",
            "svg.fonttype": "none",
            "pdf.fonttype": 42,
        }
    )


def whiskers(table: pd.DataFrame, value: str = "value", scale: float = 1.0) -> NDArray:
    """Arms [2, N] of the intervals `low` to `high` about a column; none where one is unknown."""
    arms = scale * np.array([table[value] - table["low"], table["high"] - table[value]])
    return np.nan_to_num(arms).clip(0)


def points(ax: Axes, table: pd.DataFrame, value: str, at: ArrayLike, **looks) -> None:
    """A column's values with their intervals, lying across the lines `at`."""
    ax.errorbar(table[value], at, xerr=whiskers(table, value), fmt="o", **{"ms": 4, **looks})


def name_lines(ax: Axes, names: Iterable[str]) -> None:
    """One line of the vertical axis for each name, the first on top."""
    names = list(names)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def above(ax: Axes, columns: int = 2) -> None:
    """The legend above the axis, where it hides nothing."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=columns)


def palette(png: bytes) -> bytes:
    """A PNG with at most 256 colours of its own: a third of the bytes, and no eye tells."""
    picture, small = Image.open(io.BytesIO(png)).convert("RGBA"), io.BytesIO()
    if picture.getextrema()[3][0] < 255:
        picture = picture.quantize(256)
    else:  # opaque: colours are chosen by how many pixels want them, and few want a word's
        picture, ours = picture.convert("RGB"), Image.new("P", (1, 1))
        greys = {f"#{level:02x}{level:02x}{level:02x}" for level in range(0, 256, 15)}
        kept = [getrgb(colour) for colour in sorted({*greys, *COLOURS.values()})]
        words = np.array([65536, 256, 1], np.uint32)  # a colour as one number
        chosen = picture.quantize(256 - len(kept)).getpalette()[: 3 * (256 - len(kept))]
        ours.putpalette([*chosen, *np.ravel(kept).tolist()])
        numbers = np.array(picture.quantize(palette=ours, dither=Image.Dither.NONE))
        colours = np.asarray(picture) @ words
        for number, colour in enumerate(kept @ words, len(chosen) // 3):  # exactly, not nearly
            numbers[colours == colour] = number
        picture = Image.fromarray(numbers, "P")
        picture.putpalette(ours.getpalette())
    picture.save(small, "PNG", optimize=True)
    return min(small.getvalue(), png, key=len)


def inside(svg: bytes) -> bytes:
    """An SVG whose embedded pictures are palettes or, opaque ones, JPEG where that is smaller."""

    def smaller(found: re.Match) -> bytes:
        png, jpeg = palette(base64.b64decode(found[1])), io.BytesIO()
        picture = Image.open(io.BytesIO(png)).convert("RGBA")
        if picture.getextrema()[3][0] == 255:
            picture.convert("RGB").save(jpeg, "JPEG", quality=80)
        kind, content = b"png", png
        if 0 < jpeg.tell() < len(png):
            kind, content = b"jpeg", jpeg.getvalue()
        return b"data:image/" + kind + b";base64," + base64.b64encode(content)

    return re.sub(rb"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)", smaller, svg)


def save(
    fig: Figure, output: str | Path, name: str, caption: str, alt: str, n: str | None = None
) -> Path:
    """Write `name`.png (at most 180 kB), .svg, .pdf and .json (caption, alt text, sample size `n`).

    `name` begins with its notebook's number. Each file is written whole. Returns the PNG's path.
    """
    if not name[:2].isdigit() or not caption or not alt:
        raise ValueError(f"figure {name}: needs its notebook's number, a caption and an alt text")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    fig.draw_without_rendering()
    tight, svg, pdf = fig.get_tightbbox().padded(0.1), io.BytesIO(), io.BytesIO()
    # Places are found; each format would find them again, twice.
    with matplotlib.rc_context({"figure.constrained_layout.use": False}):
        fig.set_layout_engine(None)
        dpi, picture = 160.0, b""
        while not picture or (len(picture) > LIMIT and dpi > 70):
            dpi = max(70, 0.95 * dpi * (LIMIT / len(picture)) ** 0.5) if picture else dpi
            png = io.BytesIO()
            fig.savefig(png, format="png", dpi=dpi, bbox_inches=tight)
            picture = palette(png.getvalue())
        same = {"dpi": 80, "bbox_inches": tight}
        fig.savefig(svg, format="svg", metadata={"Date": None}, **same)
        fig.savefig(pdf, format="pdf", metadata={"CreationDate": None}, **same)
    notes = {"caption": caption, "alt": alt, "n": n, "notebook": name[:2]}
    for suffix, content in (
        (".png", picture),
        (".svg", inside(svg.getvalue())),
        (".pdf", pdf.getvalue()),
        (".json", json.dumps(notes, indent=1).encode()),
    ):
        part = folder / f".{name}{suffix}.part"
        part.write_bytes(content)
        os.replace(part, folder / f"{name}{suffix}")
    return folder / f"{name}.png"
