"""figures/index.html: one page that opens from disk, without scripts or outside requests.

It says nothing of its own: verdicts, captions, sample sizes and tables are read from the files
that the notebooks wrote, and the executed notebooks stand beside it as HTML.
"""

import base64
import functools
import io
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import psutil
from PIL import Image
from pygments.formatters import HtmlFormatter

from dreamer.runs import versions, write_whole

LAST = "How long each step took"  # the section of what belongs to no notebook
SHOWN_ROWS = 24  # a longer table is only linked
CLAIM = ["claim", "published", "measured", "interval", "verdict"]


def _machine() -> dict[str, str]:
    """What the page was made on: versions, commit and date, and how large the machine is."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = named[1] if named else processor
    size = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB"
    return versions() | {"processor": processor, "size": size}


def _smaller(picture: str) -> str:
    """A base64 PNG or GIF as an <img> of at most 480 px in WebP: the figures lie beside."""
    image, webp = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), io.BytesIO()
    image.thumbnail((480, 4000))
    image.save(webp, "WEBP", quality=45)
    inside = base64.b64encode(webp.getvalue()).decode()
    return f'<img alt="output of the cell above" src="data:image/webp;base64,{inside}">'


def _shown(output) -> bool:
    """Whether a cell's output stays: no widgets, no progress bars. Its picture is made smaller."""
    if "data" not in output:
        return output.get("name") != "stderr"
    data = output.data
    pictures = [_smaller(data[kind]) for kind in ("image/png", "image/gif") if kind in data]
    words = {k: data[k] for k in ("text/html", "text/markdown", "text/plain") if k in data}
    output.data = {"text/html": pictures[0]} if pictures else words
    return bool(output.data) and not any("widget" in kind for kind in data)


@functools.cache
def _jupyter() -> tuple:
    """The library that reads notebooks, and what makes HTML of them."""
    # Compiling this grammar of web addresses takes seconds, and no notebook's schema asks for it.
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbformat
    from nbconvert import HTMLExporter

    return nbformat, HTMLExporter(template_name="basic")


def notebook_html(file: Path) -> tuple[str, str]:
    """An executed notebook's title and body as HTML, without scripts, widgets and progress bars."""
    nbformat, exporter = _jupyter()
    book = nbformat.read(file, as_version=4)
    for cell in book.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if _shown(output)]
    body, _ = exporter.from_notebook_node(book)
    heads = [c.source.lstrip("# ").splitlines()[0] for c in book.cells if c.source.startswith("# ")]
    return (heads or [file.stem])[0], re.sub(r"<script.*?</script>", "", body, flags=re.S)


def steps(notebooks: str | Path) -> pd.DataFrame:
    """How long each executed notebook in a folder took: columns step, started, minutes.

    The last row is the time in which at least one of them ran.
    """
    ran = []
    for file in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb")):
        told = json.loads(file.read_text(encoding="utf-8"))["metadata"].get("papermill", {})
        if told.get("duration"):
            when = pd.to_datetime([told["start_time"], told["end_time"]])
            ran.append((file.stem, *when))
    table = pd.DataFrame(ran, columns=["step", "started", "ended"])
    if ran:
        order = table.sort_values("started")
        free = order["ended"].cummax().shift().fillna(order["started"])
        alone = order["ended"] - order["started"].where(order["started"] > free, free)
        busy = alone.clip(lower=pd.Timedelta(0)).sum()
        first = order["started"].iloc[0]
        table.loc[len(table)] = ("all, side by side where they can", first, first + busy)
    minutes = (table["ended"] - table["started"]) / pd.Timedelta(minutes=1)
    started = table["started"].map(lambda when: f"{when:%Y-%m-%dT%H:%M}")
    return pd.DataFrame({"step": table["step"], "started": started, "minutes": minutes.round(2)})


def fill(text: str, output: str | Path) -> str:
    """A Markdown text with its tables brought up to what the pipeline wrote into `output`.

    A table stands between `<!-- FILES.csv if there where ROWS: column, column -->` and
    `<!-- end -->`. FILES is a name or a pattern; ROWS a query of pandas; all but FILES may be left
    out. Raises FileNotFoundError for a missing file, unless `if there` says that it may be
    missing; KeyError for a column.
    """

    def table(found: re.Match) -> str:
        files = sorted(Path(output).glob(found["files"]))
        if not files and not found["maybe"]:
            raise FileNotFoundError(Path(output, found["files"]))
        if not files:
            return f"{found['head']}\nNot measured yet.\n<!-- end -->"
        frame = pd.concat(map(pd.read_csv, files))
        if found["rows"]:
            frame = frame.query(found["rows"], engine="python")
        columns = [c.strip() for c in (found["columns"] or "").split(",") if c.strip()]
        frame = frame[columns or list(frame)]
        lines = [list(frame), ["---"] * len(frame.columns)]
        for row in frame.itertuples(index=False):
            lines.append(
                ["" if v != v else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
            )
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"{found['head']}\n{body}\n<!-- end -->"

    block = (
        r"(?P<head><!-- (?P<files>[\w/*\[\]-]+\.csv)(?P<maybe> if there)?"
        r"(?: where (?P<rows>[^:>]+))?(?::(?P<columns>[^>]*?))? -->)\n.*?<!-- end -->"
    )
    return re.sub(block, table, text, flags=re.S)


def _found(output: Path, ending: str) -> list[tuple[str, str, Path]]:
    """The notebooks' files of one kind as (number, name, file); other sizes lie in subfolders."""
    files = output.rglob(f"[0-9][0-9]_*{ending}")
    found = [(f.name[:2], f.relative_to(output).with_suffix("").as_posix(), f) for f in files]
    return sorted(found, key=lambda each: (each[0] == "00", each[0], "/" in each[1], each[1]))


def _verdicts(output: Path) -> list[dict[str, Any]]:
    """Each table of verdicts: what all its rows share once, as notes, and the rows."""
    tables = []
    for _, name, file in _found(output, "verdicts.csv"):
        frame = pd.read_csv(file, dtype=str).fillna("")
        shared = [c for c in frame if c not in CLAIM and frame[c].nunique() == 1]
        notes = [f"{c}: {frame[c].iloc[0]}" for c in shared]
        rows = frame.drop(columns=shared).to_dict("records")
        tables.append({"name": name, "notes": notes, "rows": rows})
    return tables


def write_page(output: str | Path, notebooks: str | Path, readme: str | Path | None = None) -> Path:
    """Write `output`/index.html and `output`/notebooks/*.html; return the page's path.

    `output` holds the figures (PNG, SVG, PDF, JSON with caption, alt text and sample size) and
    tables (CSV; `*_verdicts.csv` comes first), `notebooks` the executed notebooks; the tables in
    `readme` are brought up to date. Raises FileNotFoundError for a caption without its picture.
    """
    output = Path(output)
    (output / "notebooks").mkdir(parents=True, exist_ok=True)
    write_whole(output / "00_steps.csv", steps(notebooks).to_csv(index=False).encode())
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    template = jinja2.Template(text, autoescape=True, trim_blocks=True)
    common = {
        "light": HtmlFormatter().get_style_defs(".highlight"),
        "dark": HtmlFormatter(style="github-dark").get_style_defs(".highlight"),
    }
    sections: dict[str, dict[str, Any]] = {}

    def section(number: str) -> dict[str, Any]:
        title = LAST if number == "00" else f"Notebook {number}"
        empty = {"title": title, "books": [], "figures": [], "tables": [], "films": []}
        return sections.setdefault(number, empty)

    for file in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb")):
        if re.search(r"-seed[1-9]", file.stem):
            continue  # one training of each kind shows them all, and keeps the page small
        title, body = notebook_html(file)
        page = template.render(title=title, body=body, **common)
        write_whole(output / "notebooks" / f"{file.stem}.html", page.encode())
        section(file.name[:2])["title"] = title
        section(file.name[:2])["books"].append(file.stem)
    for number, name, file in _found(output, ".json"):
        notes = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(notes, dict) or "caption" not in notes:
            continue  # a notebook's own data, not a figure's caption
        with Image.open(file.with_suffix(".png")) as picture:
            size = dict(zip(("width", "height"), picture.size, strict=True))
        section(number)["figures"].append({**notes, "name": name, **size})
    for number, name, file in _found(output, ".csv"):
        if not name.endswith("_verdicts"):
            frame = pd.read_csv(file)
            html = frame.to_html(index=False, border=0, float_format="%.4g", na_rep="")
            shown = html if len(frame) <= SHOWN_ROWS else None
            section(number)["tables"].append({"file": f"{name}.csv", "html": shown})
    for number, name, _ in _found(output, ".gif"):
        section(number)["films"].append(f"{name}.gif")
    page = template.render(
        title="Cardiac Dreamer: patch or channel tokens?", verdicts=_verdicts(output),
        sections=sorted(sections.items(), key=lambda pair: (pair[0] == "00", pair[0])),
        facts=_machine(), **common,
    )  # fmt: skip
    write_whole(output / "index.html", page.encode())
    if readme is not None:
        text = Path(readme).read_text(encoding="utf-8")
        write_whole(Path(readme), fill(text, output).encode())
    return output / "index.html"
