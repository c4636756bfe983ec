"""Every figure of the project: one theme, one colour per variant, one way to save.

Plot functions take tables, arrays and an axis, never a model. Colours are Okabe and Ito's, which
colour-blind readers can tell apart.
"""

import io
import json
import os
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

COLOURS = {
    "patch": "#0072B2",
    "channel": "#D55E00",
    "direct": "#CC79A7",
    "constant": "#666666",
    "truth": "#009E73",
    "neutral": "#666666",
}
LIMIT = 300_000  # bytes of a PNG, so that a page of them opens quickly


def theme() -> None:
    """The project's matplotlib settings; call once, in a notebook's setup cell."""
    matplotlib.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 10,
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


def save(
    fig: Figure, output: str | Path, name: str, caption: str, alt: str, n: str | None = None
) -> Path:
    """Write `name`.png (at most 300 kB), .svg, .pdf and .json (caption, alt text, sample size `n`).

    `name` begins with its notebook's number. Each file is written whole. Returns the PNG's path.
    """
    if not name[:2].isdigit() or not caption or not alt:
        raise ValueError(f"figure {name}: needs its notebook's number, a caption and an alt text")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for dpi in (160, 120, 90, 70):
        png = io.BytesIO()
        fig.savefig(png, format="png", dpi=dpi)
        if png.tell() <= LIMIT:
            break
    svg, pdf = io.BytesIO(), io.BytesIO()
    fig.savefig(svg, format="svg", dpi=110, metadata={"Date": None})
    fig.savefig(pdf, format="pdf", dpi=110, metadata={"CreationDate": None})
    notes = {"caption": caption, "alt": alt, "n": n, "notebook": name[:2]}
    for suffix, content in (
        (".png", png.getvalue()),
        (".svg", svg.getvalue()),
        (".pdf", pdf.getvalue()),
        (".json", json.dumps(notes, indent=1).encode()),
    ):
        part = folder / f".{name}{suffix}.part"
        part.write_bytes(content)
        os.replace(part, folder / f"{name}{suffix}")
    return folder / f"{name}.png"
