"""figures/index.html: one page that opens from disk, without scripts or outside requests.

It says nothing of its own: verdicts, captions, sample sizes and tables are read from the files
that the notebooks wrote, and the executed notebooks stand beside it as HTML.
"""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import pandas as pd
import psutil
from nbconvert import HTMLExporter
from PIL import Image
from pygments.formatters import HtmlFormatter

from dreamer.training import versions, write_whole

LAST = "How long each step took"  # the section of what belongs to no notebook
SHOWN_ROWS = 24  # a longer table is only linked


def _machine() -> dict[str, str]:
    """What the page was made on: versions, commit and date, and how large the machine is."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = named[1] if named else processor
    size = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB"
    return versions() | {"processor": processor, "size": size}


def _title(book: nbformat.NotebookNode, otherwise: str) -> str:
    heads = [c.source.lstrip("# ").splitlines()[0] for c in book.cells if c.source.startswith("# ")]
    return heads[0] if heads else otherwise


def _smaller(png: str) -> str:
    """A base64 PNG as an <img> of at most 600 px in WebP: the figures themselves lie beside."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((600, 4000))
    webp = io.BytesIO()
    picture.save(webp, "WEBP", quality=50)
    inside = base64.b64encode(webp.getvalue()).decode()
    return f'<img alt="output of the cell above" src="data:image/webp;base64,{inside}">'


def notebook_html(file: Path) -> tuple[str, str]:
    """An executed notebook's title and body as HTML, without scripts, widgets and progress bars."""
    book = nbformat.read(file, as_version=4)
    for cell in book.cells:
        kept = []
        for output in cell.get("outputs", []):
            if "data" in output:
                widget = any("widget" in kind for kind in output.data)
                kinds = ("image/png", "text/html", "text/plain")
                output.data = {k: output.data[k] for k in kinds if k in output.data}
                if widget or not output.data:
                    continue
                if png := output.data.pop("image/png", None):
                    output.data = {"text/html": _smaller(png)}
            if output.get("name") == "stderr":
                continue
            kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(book)
    return _title(book, file.stem), re.sub(r"<script.*?</script>", "", body, flags=re.S)


def _tables(output: Path) -> list[dict[str, Any]]:
    """Every CSV but the verdicts: its name, number, and its HTML where it is short enough."""
    tables = []
    for file in sorted(output.glob("[0-9][0-9]_*.csv")):
        if not file.stem.endswith("_verdicts"):
            frame = pd.read_csv(file)
            show = frame.to_html(index=False, border=0, float_format="%.4g", na_rep="")
            html = show if len(frame) <= SHOWN_ROWS else None
            tables.append({"file": file.name, "number": file.name[:2], "html": html})
    return tables


def steps(notebooks: str | Path) -> pd.DataFrame:
    """How long each executed notebook in a folder took: columns step, started, minutes."""
    rows = []
    for file in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb")):
        ran = nbformat.read(file, as_version=4).metadata.get("papermill", {})
        if ran.get("duration"):
            rows.append((file.stem, ran["start_time"][:16], round(ran["duration"] / 60, 2)))
    return pd.DataFrame(rows, columns=["step", "started", "minutes"])


def fill(text: str, output: str | Path) -> str:
    """A Markdown text with its tables brought up to what the pipeline wrote into `output`.

    A table stands between `<!-- NAME.csv: column, column -->` (or `NAME.csv` alone, for all) and
    `<!-- end -->`. Raises FileNotFoundError where the file is missing, KeyError for a column.
    """

    def table(found: re.Match) -> str:
        frame = pd.read_csv(Path(output, found["file"]))
        columns = [c.strip() for c in (found["columns"] or "").split(",") if c.strip()]
        lines = [list(frame[columns or list(frame)]), ["---"] * len(columns or list(frame))]
        for row in frame[columns or list(frame)].itertuples(index=False):
            lines.append(
                ["" if v != v else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
            )
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"{found['head']}\n{body}\n<!-- end -->"

    block = r"(?P<head><!-- (?P<file>[\w/]+\.csv)(?::(?P<columns>[^>]*?))? -->)\n.*?<!-- end -->"
    return re.sub(block, table, text, flags=re.S)


def write_page(output: str | Path, notebooks: str | Path, readme: str | Path | None = None) -> Path:
    """Write `output`/index.html and `output`/notebooks/*.html; return the page's path.

    `output` holds the figures (PNG, SVG, JSON with caption, alt text and sample size) and tables
    (CSV; `*_verdicts.csv` comes first), `notebooks` the executed notebooks; the tables in `readme`
    are brought up to date. Raises FileNotFoundError for a caption without its picture.
    """
    output = Path(output)
    ran = steps(notebooks)
    write_whole(output / "00_steps.csv", ran.to_csv(index=False).encode())
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    template = jinja2.Template(text, autoescape=True)
    common = {
        "light": HtmlFormatter().get_style_defs(".highlight"),
        "dark": HtmlFormatter(style="github-dark").get_style_defs(".highlight"),
    }
    books = []
    for file in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb")):
        if re.search(r"-seed[1-9]", file.stem):
            continue  # one training of each kind shows them all, and keeps the page small
        title, body = notebook_html(file)
        text = template.render(title=title, body=body, **common)
        (output / "notebooks").mkdir(parents=True, exist_ok=True)
        write_whole(output / "notebooks" / f"{file.stem}.html", text.encode())
        books.append({"file": f"notebooks/{file.stem}.html", "title": title, "stem": file.stem})
    figures = []
    for file in sorted(output.glob("[0-9][0-9]_*.json")):
        notes = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(notes, dict) or "caption" not in notes:
            continue  # a notebook's own data, not a figure's caption
        with Image.open(file.with_suffix(".png")) as picture:
            size = picture.size
        figures.append({**notes, "name": file.stem, "width": size[0], "height": size[1]})
    tables = _tables(output)
    numbers = {f["name"][:2] for f in figures} | {t["number"] for t in tables}
    numbers = sorted(numbers, key=lambda number: (number == "00", number))
    sections = [
        {
            "title": next((b["title"] for b in books if b["stem"][:2] == number), LAST),
            "books": [b for b in books if b["stem"][:2] == number],
            "figures": [f for f in figures if f["name"][:2] == number],
            "tables": [t for t in tables if t["number"] == number],
        }
        for number in numbers
    ]
    verdicts = [pd.read_csv(f, dtype=str).fillna("") for f in sorted(output.glob("*_verdicts.csv"))]
    rows = [row for frame in verdicts for row in frame.to_dict("records")]
    page = template.render(
        title="Cardiac Dreamer: patch or channel tokens?", verdicts=rows, sections=sections,
        books=[b for b in books if b["stem"][:2] not in numbers], facts=_machine(), **common,
    )  # fmt: skip
    write_whole(output / "index.html", page.encode())
    if readme is not None:
        text = Path(readme).read_text(encoding="utf-8")
        write_whole(Path(readme), fill(text, output).encode())
    return output / "index.html"
