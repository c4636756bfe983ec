"""The page: it says what the files say, opens from disk, asks nothing of anybody."""

import html
import json
import re

import pandas as pd
import pytest

from dreamer.report import fill, notebook_html, steps, write_page


def test_page_says_what_the_files_say(page):
    text = page.read_text()
    for word in ("A line &amp; more.", 'alt="a rising line"', "3 patients", "patch &lt;is&gt;",
                 "04 Compare: which?", "1.235", "04_long.csv", "torch", "commit", "config: laptop",
                 "medium/04_verdicts", "elsewhere not"):  # fmt: skip
        assert word in text, word
    assert "<td>99</td>" not in text


def test_page_is_one_file_without_scripts_or_outside_requests(page):
    for file in (page, page.parent / "notebooks" / "04_compare.html"):
        text = file.read_text()
        assert "<script" not in text and "@import" not in text
        wanted = re.findall(r'(?:src|<link[^>]*href)="([^"]*)"', text)
        assert not [w for w in wanted if re.match(r"(https?:)?//", w)]
        for link in re.findall(r'href="([^"#]+)"', text):
            assert "://" in link or link == "data:," or (file.parent / link).exists(), link


def test_notebook_loses_widgets_and_progress_bars(page):
    title, body = notebook_html(page.parent / "books" / "04_compare.ipynb")
    assert title == "04 Compare: which?"
    assert "two" in body and "spinning" not in body and "alert" not in body
    assert "it is <strong>so</strong>" in body and "Markdown object" not in body


def test_steps_that_run_side_by_side_count_once(page, tmp_path):
    book = json.loads((page.parent / "books" / "04_compare.ipynb").read_text())
    for name, start, end in (("01_a", "10:00", "10:03"), ("02_b", "10:02", "10:04"),
                             ("03_c", "10:10", "10:11")):  # fmt: skip
        book["metadata"]["papermill"] = {
            "start_time": f"2026-01-01T{start}:00", "end_time": f"2026-01-01T{end}:00",
            "duration": 1.0}  # fmt: skip
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(book))
    assert list(steps(tmp_path)["minutes"]) == [3, 2, 1, 5]
    assert steps(tmp_path / "none").empty


def test_tables_of_a_text_follow_the_files(tmp_path):
    frame = pd.DataFrame({"claim": ["a", "b"], "value": [1.23456, None], "n": [3, 4]})
    frame.to_csv(tmp_path / "04_rows.csv", index=False)
    text = "Before.\n<!-- 04_rows.csv: claim, value -->\nold\n<!-- end -->\nAfter.\n"
    filled = fill(text, tmp_path)
    assert "| claim | value |\n| --- | --- |\n| a | 1.235 |\n| b |  |\n<!-- end -->" in filled
    assert filled.startswith("Before.\n") and filled.endswith("After.\n")
    assert fill(filled, tmp_path) == filled
    assert "| a | 1.235 | 3 |" in fill(text.replace(": claim, value", ""), tmp_path)
    with pytest.raises(FileNotFoundError):
        fill(text.replace("04", "05"), tmp_path)
    assert "| b |  |" in fill(text.replace(":", ' where claim == "b":', 1), tmp_path)
    assert "| a | 1.235 |" not in fill(text.replace(":", ' where claim == "b":', 1), tmp_path)
    frame.assign(claim="c").to_csv(tmp_path / "05_rows.csv", index=False)
    both = fill(text.replace("04_rows", "0[45]_rows"), tmp_path)
    assert "| a | 1.235 |" in both and "| c | 1.235 |" in both
    later = text.replace("04_rows.csv", "07_rows.csv if there")
    assert "-->\nNot measured yet.\n<!-- end -->" in fill(later, tmp_path)
    with pytest.raises(KeyError, match="verdict"):
        fill(text.replace("value", "verdict"), tmp_path)


def test_the_readme_says_what_the_pipeline_wrote(root):
    text = (root / "README.md").read_text()
    tables = text.count("<!-- end -->")
    assert tables >= 3 and fill(text, root / "figures") == text
    # Outside of those blocks no table has numbers, and no text any that is in no file.
    free = re.sub(r"<!-- [^\n]*\.csv.*?<!-- end -->", "", text, flags=re.S)
    assert not [row for row in free.splitlines() if re.match(r"\|.*\d\.\d", row)]
    free = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", free, flags=re.S)
    known = numbers("".join(f.read_text() for f in (root / "figures").rglob("*.csv")))
    known |= numbers((root / "Makefile").read_text())  # the versions of Python
    assert numbers(free) <= known


def numbers(text):
    """The decimal fractions in a text."""
    return set(re.findall(r"\d+\.\d+", text))


def test_every_number_of_the_page_is_in_a_file(root):
    folder = root / "figures"
    text = (folder / "index.html").read_text()
    shown = text[text.index("<body>") : text.index("How this was made")]
    shown = html.unescape(re.sub(r"<[^>]*>", " ", shown))
    known = numbers(shown) & numbers("".join(f.read_text() for f in folder.rglob("*.json")))
    for file in folder.rglob("*.csv"):
        known |= numbers(file.read_text())
        known |= numbers(pd.read_csv(file).to_string(index=False, float_format="%.4g"))
        known |= numbers(pd.read_csv(file).to_html(index=False, float_format="%.4g"))
    assert numbers(shown) <= known, numbers(shown) - known


def test_caption_without_picture_is_refused(page, tmp_path):
    (tmp_path / "05_lost.json").write_text(json.dumps({"caption": "c", "alt": "a"}))
    with pytest.raises(FileNotFoundError, match="05_lost"):
        write_page(tmp_path, tmp_path)


def test_committed_figures_are_complete_and_small(root):
    folder = root / "figures"
    if not (folder / "index.html").exists():
        pytest.skip("figures/index.html is not there yet: make figures")
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".pdf"]
    assert sum(f.stat().st_size for f in files) < 8_000_000  # what a reader of the page may open
    text = html.unescape((folder / "index.html").read_text())
    for file in folder.glob("[0-9][0-9]_*.json"):
        if "caption" not in json.loads(file.read_text()):
            continue  # a notebook's own data
        assert f'src="{file.stem}.png"' in text
        assert file.with_suffix(".png").stat().st_size < 300_000
        assert file.with_suffix(".svg").exists() and file.with_suffix(".pdf").exists()
    for file in folder.glob("*_verdicts.csv"):
        for cell in pd.read_csv(file, dtype=str).fillna("").to_numpy().ravel():
            assert cell in text
