"""The page: shows what the files contain, opens from disk, requests nothing from outside."""

import html
import json
import re

import pytest

from dreamer.page import notebook_html, steps, write_page


def test_page_shows_what_the_files_contain(page):
    text = page.read_text()
    for word in ("A line &amp; more.", 'alt="a rising line"', "3 patients", "patch &lt;is&gt;",
                 "04 Compare: which?", "1.235", "04_long.csv", "torch", "commit", "laptop",
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


def test_steps_have_their_minutes(page, tmp_path):
    book = json.loads((page.parent / "books" / "04_compare.ipynb").read_text())
    for name, seconds in (("01_a", 180.0), ("02_b", 30.0)):
        book["metadata"]["papermill"] = {"duration": seconds}
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(book))
    assert steps(tmp_path).to_dict("list") == {"step": ["01_a", "02_b"], "minutes": [3, 0.5]}
    assert steps(tmp_path / "none").empty


def test_caption_without_figure_is_refused(page, tmp_path):
    (tmp_path / "05_lost.json").write_text(json.dumps({"caption": "c", "alt": "a"}))
    with pytest.raises(FileNotFoundError, match="05_lost"):
        write_page(tmp_path, tmp_path)


def test_committed_figures_are_complete_and_small(root):
    folder = root / "figures"
    if not (folder / "index.html").exists():
        pytest.skip("figures/index.html is missing: make figures CONFIG=output=figures")
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix not in (".pdf", ".svg")]
    assert sum(f.stat().st_size for f in files) < 10_000_000
    text = html.unescape((folder / "index.html").read_text())
    for file in folder.glob("[0-9][0-9]_*.json"):
        assert f'src="{file.stem}.png"' in text
        assert file.with_suffix(".png").stat().st_size < 700_000
        assert file.with_suffix(".svg").exists() and file.with_suffix(".pdf").exists()
