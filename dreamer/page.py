"""figures/index.html: one page that opens from disk, without scripts or external requests.

Verdicts, captions, sample sizes and tables are read from the files that the notebooks wrote; the
executed notebooks lie beside it as HTML.
"""

import base64
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import psutil
from PIL import Image
from pygments.formatters import HtmlFormatter

from dreamer.files import write_whole
from dreamer.runs import versions

SHOWN_ROWS = 24  # a longer table is only linked
VERDICT = "claim published estimate unit low high seeds patients verdict".split()


def _small(image: str) -> str:
    """A base64 image as an <img> of at most 480 px in WebP: the figures themselves lie beside."""
    small, webp = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"), io.BytesIO()
    small.thumbnail((480, 4000))
    small.save(webp, "WEBP", quality=45)
    content = base64.b64encode(webp.getvalue()).decode()
    return f'<img alt="output of the cell above" src="data:image/webp;base64,{content}">'


def _kept(output) -> bool:
    """Whether an output stays on the page: no widgets, no progress bars. Shrinks its image."""
    if "data" not in output:
        return output.get("name") != "stderr"
    data = output.data
    images = [_small(data[kind]) for kind in ("image/png", "image/gif") if kind in data]
    text = {k: data[k] for k in ("text/html", "text/markdown", "text/plain") if k in data}
    output.data = {"text/html": images[0]} if images else text
    return bool(output.data) and not any("widget" in kind for kind in data)


def notebook_html(file: Path) -> tuple[str, str]:
    """Title and body (HTML without scripts, widgets and progress bars) of an executed notebook."""
    sys.modules.setdefault("rfc3987_syntax", None)  # see dreamer.pipeline
    import nbformat
    from nbconvert import HTMLExporter

    book = nbformat.read(file, as_version=4)
    for cell in book.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if _kept(output)]
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(book)
    titles = [c.source.lstrip("# ").splitlines()[0] for c in book.cells if c.source[:2] == "# "]
    return (titles or [file.stem])[0], re.sub(r"<script.*?</script>", "", body, flags=re.S)


def steps(notebooks: str | Path) -> pd.DataFrame:
    """Duration of each executed notebook of a folder: columns step, minutes."""
    rows = []
    for file in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb")):
        ran = json.loads(file.read_text(encoding="utf-8"))["metadata"].get("papermill", {})
        if ran.get("duration"):
            rows.append((file.stem, round(ran["duration"] / 60, 2)))
    return pd.DataFrame(rows, columns=["step", "minutes"])


def _found(output: Path, ending: str) -> list[tuple[str, str, Path]]:
    """Files of one kind as (notebook's number, name, file), also in subfolders."""
    files = output.rglob(f"[0-9][0-9]_*{ending}")
    found = [(f.name[:2], f.relative_to(output).with_suffix("").as_posix(), f) for f in files]
    return sorted(found, key=lambda each: (each[0], "/" in each[1], each[1]))


def _html(frame: pd.DataFrame) -> str:
    def number(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"

    return frame.to_html(index=False, border=0, float_format=number, na_rep="")


def write_page(output: str | Path, notebooks: str | Path) -> Path:
    """Write `output`/index.html and `output`/notebooks/*.html; return the page's path.

    `output` holds figures (PNG, SVG, PDF, JSON with caption, alt text and sample size) and tables
    (CSV; `*_verdicts.csv` come first), `notebooks` the executed notebooks. Raises
    FileNotFoundError for a caption without its figure.
    """
    output = Path(output)
    (output / "notebooks").mkdir(parents=True, exist_ok=True)
    steps_table = steps(notebooks)
    write_whole(output / "00_steps.csv", steps_table.to_csv(index=False).encode())
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    template = jinja2.Template(text, autoescape=True, trim_blocks=True)
    styles = {
        "light": HtmlFormatter().get_style_defs(".highlight"),
        "dark": HtmlFormatter(style="github-dark").get_style_defs(".highlight"),
    }
    sections: dict[str, dict[str, Any]] = {}

    def section(number: str) -> dict[str, Any]:
        empty = {"title": f"Notebook {number}", "books": [], "figures": [], "tables": []}
        return sections.setdefault(number, {**empty, "films": []})

    for file in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb")):
        if re.search(r"-seed[1-9]", file.stem):
            continue  # one training of each variant shows them all, and keeps the page small
        title, body = notebook_html(file)
        page = template.render(title=title, body=body, **styles)
        write_whole(output / "notebooks" / f"{file.stem}.html", page.encode())
        section(file.name[:2])["title"] = title
        section(file.name[:2])["books"].append(file.stem)
    for number, name, file in _found(output, ".json"):
        notes = json.loads(file.read_text(encoding="utf-8"))
        with Image.open(file.with_suffix(".png")) as image:
            width, height = image.size
        figure = {**notes, "name": name, "width": width, "height": height}
        section(number)["figures"].append(figure)
    verdicts = []
    for number, name, file in _found(output, ".csv"):
        frame = pd.read_csv(file)
        if name.endswith("_verdicts"):
            shown = frame[VERDICT] if set(VERDICT) <= set(frame) else frame  # the rest is linked
            verdicts.append({"name": name, "html": _html(shown)})
        elif number != "00":
            shown = _html(frame) if len(frame) <= SHOWN_ROWS else None
            section(number)["tables"].append({"file": f"{name}.csv", "html": shown})
    for number, name, _ in _found(output, ".gif"):
        section(number)["films"].append(f"{name}.gif")
    memory = psutil.virtual_memory().total / 2**30
    facts = versions() | {"size": f"{os.cpu_count()} cores, {memory:.0f} GB"}
    page = template.render(
        title="Cardiac Dreamer: patch or channel tokens?",
        verdicts=verdicts,
        sections=sorted(sections.items()),
        steps=_html(steps_table),
        facts=facts,
        **styles,
    )
    write_whole(output / "index.html", page.encode())
    return output / "index.html"
