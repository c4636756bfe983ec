"""figures/index.html: the results as one page that opens from disk, without scripts or requests.

It tells them in order: the answer, how the variants differ, cost, accuracy, and so on. Numbers,
verdicts, captions and sample sizes are read from the files that the notebooks wrote; a section with
nothing to show is left out. The README quotes the same answer:

    python -m dreamer.page README.md figures        write the README's numbers anew
"""

import base64
import html
import io
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
import psutil
import yaml
from PIL import Image
from pygments.formatters import HtmlFormatter

from dreamer.files import write_whole
from dreamer.runs import versions

SHOWN_ROWS = 24  # a longer table is only linked
REFERENCE = "verdicts.csv"  # of the reference study, beside the `NN_verdicts.csv` of notebooks
VERDICTS = ("confirmed", "contradicted", "equivalent", "inconclusive", "untested")
COLUMNS = (
    "family claim published estimate unit low high margin seeds patients power seeds_needed verdict"
).split()


class Section(NamedTuple):
    """A part of the page; the fields stand in page.yaml."""

    title: str
    text: str = ""
    families: Sequence[str] = ()
    key: Sequence[str] = ()
    words: Sequence[str] = ()
    notebooks: Sequence[str] = ()
    always: bool = False


WORDS = yaml.safe_load(Path(__file__).with_name("page.yaml").read_text(encoding="utf-8"))
SECTIONS = {key: Section(**fields) for key, fields in WORDS["sections"].items()}
FAMILIES = {family: key for key, section in SECTIONS.items() for family in section.families}
CONTENT = ("first", "films", "verdicts", "tables", "books")  # a section without any is left out


# Verdicts


def read_verdicts(output: str | Path) -> pd.DataFrame:
    """The verdict tables of a folder as one, with the `file` of each row: the reference study's,
    then those of notebooks for families that it lacks.

    Raises ValueError naming file and columns where a table lacks some.
    """
    tables = []
    for file in [Path(output, REFERENCE), *sorted(Path(output).glob("[0-9][0-9]_verdicts.csv"))]:
        if file.is_file():
            table = pd.read_csv(file)
            if lacking := set(COLUMNS) - set(table):
                raise ValueError(f"{file}: lacks the columns {', '.join(sorted(lacking))}")
            table["family"] = table["family"].str.replace(" ", "_")
            text = table[["published", "unit"]].astype(object).fillna("").astype(str)
            tables.append(table.assign(file=file.name, **text))
    found = pd.concat(tables) if tables else pd.DataFrame(columns=[*COLUMNS, "file"])
    study = set(found.loc[found["file"] == REFERENCE, "family"])
    return found[(found["file"] == REFERENCE) | ~found["family"].isin(study)]


def _claim(verdicts: pd.DataFrame, claim: str) -> dict[str, Any]:
    """The row of a claim; one that is in no table is untested."""
    rows = verdicts[verdicts["claim"] == claim].to_dict("records")
    empty = dict.fromkeys(COLUMNS, float("nan")) | {"published": "", "unit": ""}
    return rows[0] if rows else empty | {"claim": claim, "verdict": "untested"}


def _number(value: float) -> str:
    if pd.isna(value):
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.3g}".replace("-", "−")


def measured(row: Mapping[str, Any]) -> str:
    """Estimate, unit and interval of a verdict in words, to two digits of the interval's width;
    nothing where nothing was measured."""
    if pd.isna(row["estimate"]):
        return ""
    values, width = [row["estimate"], row["low"], row["high"]], row["high"] - row["low"]
    words = list(map(_number, values))
    if 0 < width < math.inf:
        places = max(1 - math.floor(math.log10(width)), 0)
        words = [f"{value:,.{places}f}".replace("-", "−") for value in values]
    span = f" ({words[1]} to {words[2]})" if words[1] else ""
    return f"{words[0]} {row['unit']}".strip().replace(" %", "%") + span


def sentence(name: str, verdicts: pd.DataFrame) -> str:
    """A statement of page.yaml without its full stop: a clause for each verdict of its claims."""
    words, clauses = WORDS["statements"][name], []
    rows = [_claim(verdicts, claim) for claim in words["claims"]]
    for kind in dict.fromkeys(row["verdict"] for row in rows):
        own = [row for row in rows if row["verdict"] == kind]
        change = " and ".join(f"{row['estimate']:+.2f} {row['unit']}" for row in own)
        clause = words[kind].format(
            estimate=own[0]["estimate"],
            times=100 / (100 - own[0]["estimate"]),
            published=own[0]["published"],
            change=change.replace("-", "−"),
            amount=change.replace("+", "").replace("-", ""),
        )
        clauses.append(clause)
    return words["about"] + "; ".join(clauses)


def answer(verdicts: pd.DataFrame) -> list[str]:
    """The answer in three sentences."""
    cost, accuracy, transformer, imagination, geometry = (
        sentence(name, verdicts)
        for name in ("cost", "accuracy", "transformer", "imagination", "geometry")
    )
    return [f"{cost}.", f"{accuracy}, and {transformer}.", f"{imagination}, {geometry}."]


def basis(verdicts: pd.DataFrame) -> str:
    """What the verdicts on token types rest on."""
    row = _claim(verdicts, WORDS["statements"]["accuracy"]["claims"][0])
    if pd.isna(row["estimate"]):
        return "The reference study is not in these tables yet: comparisons are untested."
    trainings = "1 training" if row["seeds"] == 1 else f"{row['seeds']:.0f} trainings"
    return (
        f"{trainings} of each variant, {row['patients']:.0f} unseen virtual "
        f"patients, {row['tokens']} tokens, a small model; 95% intervals over seeds and patients."
    )


def longer(figures: str | Path) -> str:
    """What both kinds of tokens imagine after the longest training that both have, and after the
    shortest, from notebook 04's table; "" where there are not two."""
    file = Path(figures, "04_length.csv")
    if not file.is_file():
        return ""
    rows = pd.read_csv(file).query("of == 'rotation_deg' and ratio.str.startswith('imagined')")
    rows = rows[rows["variant"].isin(["patch", "channel"])]
    both = rows.pivot(index="steps", columns="variant", values="estimate").dropna()
    if len(both) < 2:
        return ""
    short, long = both.index[[0, -1]]
    words = {
        steps: " and ".join(f"{1 - both.at[steps, v]:.0%} ({v})" for v in ("patch", "channel"))
        for steps in (short, long)
    }
    seeds = rows[rows["steps"] == long].set_index("variant")["seeds"]
    return (
        f"Trained longer, {long:,} steps in place of {short:,} (trainings: {seeds['patch']:.0f} "
        f"patch, {seeds['channel']:.0f} channel), rotation is imagined {words[long]} better than "
        f"ignoring the motion, in place of {words[short]}."
    )


def claims(verdicts: pd.DataFrame) -> list[dict[str, str]]:
    """The claims of page.yaml: claim, what was measured, verdict."""
    table = []
    for entry in WORDS["claims"]:
        rows = [_claim(verdicts, name) for name in entry["rows"]]
        found = "; ".join(filter(None, map(measured, rows)))
        kinds: dict[str, list[str]] = {}
        for row in rows:
            kinds.setdefault(row["verdict"], []).append(row["unit"])
        each = ", ".join(f"{kind} ({', '.join(units)})" for kind, units in kinds.items())
        table.append({
            "claim": entry["claim"],
            "measured": entry["measured"].format(found) if found else "not measured yet",
            "verdict": each if len(kinds) > 1 else next(iter(kinds)),
        })  # fmt: skip
    return table


# The README


def filled(text: str, figures: str | Path) -> str:
    """A README with the parts between `<!-- name -->` and `<!-- /name -->` written anew from the
    tables in `figures`. Raises ValueError where a part has no mark."""
    verdicts = read_verdicts(figures)
    rows = ["| claim | what we measured | verdict |", "|---|---|---|"]
    rows += [f"| {' | '.join(row.values())} |" for row in claims(verdicts)]
    took = pd.read_csv(Path(figures, "00_commands.csv")).to_dict("records")
    image, notes = "", Path(figures, "10_answer.json")
    if notes.is_file():
        image = f"\n\n![{json.loads(notes.read_text())['alt']}]({notes.with_suffix('.png')})"
    under = f"{basis(verdicts)} {longer(figures)}".strip()
    parts = {
        "answer": "\n".join(f"- {line}" for line in answer(verdicts)) + f"\n\n{under}",
        "claims": "\n".join(rows) + image,
        "origin": f"{sentence('origin', verdicts)}.",
        "times": "Measured: "
        + "; ".join(f"`{c['command']}` {c['minutes']} minutes on {c['machine']}" for c in took)
        + ".",
    }
    for name, part in parts.items():
        mark = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.S)
        if not mark.search(text):
            raise ValueError(f"README: no place marked <!-- {name} --> ... <!-- /{name} -->")
        gap = " " if name in ("origin", "times") else "\n\n"  # within a paragraph, or a block
        new = f"<!-- {name} -->{gap}{part}{gap}<!-- /{name} -->"
        text = mark.sub(lambda _, new=new: new, text)
    return text


# Executed notebooks


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


def write_steps(file: Path, new: pd.DataFrame) -> None:
    """Write the durations to a table; notebooks that did not run again keep theirs."""
    if file.is_file():
        old = pd.read_csv(file)
        new = pd.concat([old[~old["step"].isin(new["step"])], new]).sort_values("step")
    write_whole(file, new.to_csv(index=False).encode())


# The page


def place(name: str) -> str:
    """The section of a figure, film, table or notebook by its name, as `medium/04_accuracy`."""
    number, _, words = name.rsplit("/", 1)[-1].partition("_")
    by_words = [k for k, s in SECTIONS.items() if any(word in words for word in s.words)]
    by_number = [k for k, s in SECTIONS.items() if number in s.notebooks]
    return [*by_words, *by_number, "details"][0]


def _found(output: Path, ending: str) -> list[tuple[str, Path]]:
    """Files of one kind as (name, file), also in subfolders; those of the folder itself first."""
    files = output.rglob(f"[0-9][0-9]_*{ending}")
    found = [(f.relative_to(output).with_suffix("").as_posix(), f) for f in files]
    return sorted(found, key=lambda each: ("/" in each[0], each[0]))


def _html(frame: pd.DataFrame) -> str:
    return frame.to_html(index=False, border=0, float_format=_number, na_rep="")


def _figure(name: str, file: Path) -> dict[str, Any]:
    notes = json.loads(file.read_text(encoding="utf-8"))
    with Image.open(file.with_suffix(".png")) as image:
        width, height = image.size
    return {**notes, "name": name, "width": width, "height": height}


def _section(
    key: str, verdicts: pd.DataFrame, figures: list, films: list, tables: list, books: list
) -> dict[str, Any]:
    """What the template shows of a section."""
    section = SECTIONS[key]
    first = [f for name in section.key for f in figures if f["name"] == name] or figures[:1]
    own = verdicts[verdicts["family"].map(FAMILIES).fillna("details").eq(key)]
    counts = own["verdict"].value_counts()
    return {
        "title": section.title,
        "text": section.text,
        "first": first,
        "more": [figure for figure in figures if figure not in first],
        "films": films,
        "verdicts": [row | {"measured": measured(row)} for row in own.to_dict("records")],
        "counts": {word: counts[word] for word in VERDICTS if word in counts},
        "files": list(own["file"].unique()),
        "tables": tables,
        "books": books,
    }


def write_page(output: str | Path, notebooks: str | Path) -> Path:
    """Write `output`/index.html and `output`/notebooks/*.html; return the page's path.

    `output` holds figures (PNG, SVG, PDF, JSON with caption, alt text and sample size), films (GIF)
    and tables (CSV; those of verdicts see `read_verdicts`), `notebooks` the executed notebooks.
    Notebooks of an earlier call stay on the page, with their minutes.
    Raises FileNotFoundError for a caption without its figure.
    """
    output = Path(output)
    (output / "notebooks").mkdir(parents=True, exist_ok=True)
    write_steps(output / "00_steps.csv", steps(notebooks))
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    template = jinja2.Template(text, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    styles = {
        "light": HtmlFormatter().get_style_defs(".highlight"),
        "dark": HtmlFormatter(style="github-dark").get_style_defs(".highlight"),
    }
    parts: dict[str, tuple[list, list, list, list]] = {key: ([], [], [], []) for key in SECTIONS}
    for name, file in _found(output, ".json"):
        parts[place(name)][0].append(_figure(name, file))
    for name, _ in _found(output, ".gif"):
        parts[place(name)][1].append(f"{name}.gif")
    for name, file in _found(output, ".csv"):
        frame = pd.read_csv(file)
        shown = _html(frame) if len(frame) <= SHOWN_ROWS else None
        parts[place(name)][2].append({"file": f"{name}.csv", "html": shown})
    for file in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb")):
        if re.search(r"-seed[1-9]", file.stem):
            continue  # one training of each variant shows them all, and keeps the page small
        title, body = notebook_html(file)
        page = template.render(title=title, body=body, **styles)
        write_whole(output / "notebooks" / f"{file.stem}.html", page.encode())
    for file in sorted((output / "notebooks").glob("[0-9][0-9]_*.html")):  # also of earlier calls
        title = re.search("<title>(.*?)</title>", file.read_text(encoding="utf-8"))[1]
        parts[place(file.stem)][3].append({"name": file.stem, "title": html.unescape(title)})
    verdicts = read_verdicts(output)
    sections = {key: _section(key, verdicts, *part) for key, part in parts.items()}
    memory = psutil.virtual_memory().total / 2**30
    page = template.render(
        title="Patch tokens or channel tokens?",
        answer=answer(verdicts),
        basis=f"{basis(verdicts)} {longer(output)}",
        claims=claims(verdicts),
        origin=sentence("origin", verdicts),
        sections={
            key: section
            for key, section in sections.items()
            if SECTIONS[key].always or any(section[part] for part in CONTENT)
        },
        everything=verdicts.to_dict("records"),
        number=_number,
        facts=versions() | {"size": f"{os.cpu_count()} cores, {memory:.0f} GB"},
        **styles,
    )
    write_whole(output / "index.html", page.encode())
    return output / "index.html"


if __name__ == "__main__":
    readme, figures = map(Path, sys.argv[1:])
    content = filled(readme.read_text(encoding="utf-8"), figures)
    write_whole(readme, content.encode())
