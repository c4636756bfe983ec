"""The page: shows what the files contain, opens from disk, requests nothing from outside."""

import html
import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml

from dreamer import page as pages
from dreamer.page import SECTIONS, WORDS, notebook_html, place, read_verdicts, steps, write_page


def test_page_shows_what_the_files_contain(page):
    text = re.sub(r"\s+", " ", page.read_text())
    for word in ("A line &amp; more.", 'alt="a rising line"', "3 patients", "patch &lt;is&gt;",
                 "04 Compare: which?", "1.23", "04_long.csv", "torch", "commit",
                 "0.10 mm (−0.15 to 0.35)", '<img src="08_search.gif"', "Verdicts: 1 confirmed",
                 "<td>0.5</td>", "<td>0.8</td>"):  # fmt: skip
        assert word in text, word
    assert "<td>99</td>" not in text, "a long table is only linked"
    images = re.findall("<img [^>]*>", text)
    assert len(images) == 2 and all('loading="lazy"' in image for image in images)


def test_sections_come_in_order_and_empty_ones_are_left_out(page):
    shown = re.findall(r'<section id="(\w+)">', page.read_text())
    assert shown == ["answer", "variants", "accuracy", "maps", "loop", "origin", "details"]
    links = re.findall(r'<a href="#(\w+)">', page.read_text())
    assert links == shown


def test_a_name_belongs_to_one_section():
    names = {"10_answer": "answer", "00_tokens": "variants", "04_imagination": "imagination",
             "04_runs": "accuracy", "medium/08_search": "loop", "04_layers": "maps",
             "10_seeds": "evidence", "02_train-none": "accuracy", "99_new": "details"}  # fmt: skip
    assert {name: place(name) for name in names} == names


def test_key_figures_come_first_and_the_others_are_folded():
    figures = [{"name": f"04_{name}"} for name in ("axes", "convergence", "accuracy")]
    empty = pd.DataFrame(columns=[*pages.COLUMNS, "file"])
    part = pages._section("accuracy", empty, figures, [], [], [])
    assert [f["name"] for f in part["first"]] == ["04_accuracy", "04_convergence"]
    assert [f["name"] for f in part["more"]] == ["04_axes"]
    alone = pages._section("accuracy", empty, figures[:1], [], [], [])
    assert alone["first"] == figures[:1] and not alone["more"]


def test_a_new_family_of_verdicts_is_shown_among_the_details(verdicts):
    table = verdicts(("origin", "a", 1, "mm", "confirmed"), ("new", "b", 2, "mm", "untested"))
    table = table.assign(file="04_verdicts.csv")
    shown = {key: pages._section(key, table, [], [], [], [])["verdicts"] for key in SECTIONS}
    claims = {key: [row["claim"] for row in rows] for key, rows in shown.items() if rows}
    assert claims == {"origin": ["a"], "details": ["b"]}


def test_page_is_one_file_without_scripts_or_outside_requests(page):
    for file in (page, page.parent / "notebooks" / "04_compare.html"):
        text = file.read_text()
        assert "<script" not in text and "@import" not in text
        wanted = re.findall(r'(?:src|<link[^>]*href)="([^"]*)"', text)
        assert not [w for w in wanted if re.match(r"(https?:)?//", w)]
        for link in re.findall(r'href="([^"#]+)"', text):
            assert "://" in link or link == "data:," or (file.parent / link).exists(), link


def test_the_reference_study_answers_where_it_is_there(tmp_path, verdicts):
    verdicts(("closed loop", "own", 1, "share", "untested"), ("cost", "time", 76, "%", "confirmed"),
             ).to_csv(tmp_path / "08_verdicts.csv", index=False)  # fmt: skip
    assert list(read_verdicts(tmp_path)["claim"]) == ["own", "time"]
    verdicts(("closed_loop", "study", 2, "share", "confirmed")).to_csv(
        tmp_path / "verdicts.csv", index=False
    )
    table = read_verdicts(tmp_path)
    assert list(table["claim"]) == ["study", "time"]
    assert list(table["file"]) == ["verdicts.csv", "08_verdicts.csv"]
    assert read_verdicts(tmp_path / "none").empty


def test_a_table_without_its_columns_is_refused(tmp_path):
    pd.DataFrame({"claim": ["a"], "family": ["cost"]}).to_csv(tmp_path / "03_verdicts.csv")
    with pytest.raises(ValueError, match=r"03_verdicts.csv: lacks the columns estimate, high"):
        read_verdicts(tmp_path)


ACCURATE, NONE, GAIN, GEOMETRY = (
    WORDS["statements"][k]["claims"] for k in ("accuracy", "transformer", "imagination", "geometry")
)


def test_the_answer_is_worded_by_the_verdicts(verdicts):
    table = verdicts(
        ("cost", *WORDS["statements"]["cost"]["claims"], 75.7, "%", "contradicted"),
        ("accuracy", ACCURATE[0], -0.0686, "mm", "confirmed"),
        ("accuracy", ACCURATE[1], 0.24, "deg", "confirmed"),
        ("accuracy", NONE[0], -0.03, "mm", "equivalent"),
        ("accuracy", NONE[1], 0.08, "deg", "inconclusive"),
        ("imagination", GAIN[0], -0.526, "mm", "confirmed"),
        ("imagination", GAIN[1], -0.995, "deg", "confirmed"),
        ("imagination", GEOMETRY[0], 0.4, "mm", "contradicted"),
        ("imagination", GEOMETRY[1], 1.3, "deg", "contradicted"),
    )
    assert pages.answer(table) == [
        "A forward pass with patch tokens takes 76% less time than with channel tokens (4.1 times "
        "as fast), not the published 95.7%.",
        "On a single frame, patch tokens are not less accurate (−0.07 mm and +0.24 deg, patch "
        "minus channel), and no transformer at all is as good (within 0.03 mm); it is open "
        "whether a world model helps (+0.08 deg against no transformer).",
        "When a motion is imagined, patch tokens gain 0.53 mm and 0.99 deg more over ignoring it "
        "than channel tokens, but exact geometry, which needs no imagination, is better by 0.40 mm "
        "and 1.30 deg.",
    ]
    assert pages.basis(table).startswith("10 trainings of each variant, 200 unseen virtual")
    rows = {row["claim"]: row for row in pages.claims(table)}
    assert rows["Patch tokens take 95.7% less forward time"] == {
        "claim": "Patch tokens take 95.7% less forward time",
        "measured": "75.70% (75.45 to 75.95) less time",
        "verdict": "contradicted",
    }
    assert rows["Patch tokens converge faster"]["measured"] == "not measured yet"
    assert rows["Patch tokens converge faster"]["verdict"] == "untested"


def test_numbers_have_two_digits_of_the_interval():
    def words(estimate, low, high, unit="mm"):
        return pages.measured({"estimate": estimate, "low": low, "high": high, "unit": unit})

    assert words(0.0288, -0.0185, 0.0766) == "0.029 mm (−0.018 to 0.077)"
    assert words(-13.81, -20.2, -7.5, "deg") == "−14 deg (−20 to −8)"
    assert words(0.5, 0.5, 0.5) == "0.5 mm (0.5 to 0.5)"  # a control without spread
    assert words(0.5, -np.inf, np.inf) == "0.5 mm (−∞ to ∞)"
    assert words(3.0, np.nan, np.nan, "%") == "3%"
    assert words(np.nan, np.nan, np.nan) == ""


@pytest.mark.parametrize("name", WORDS["statements"])
@pytest.mark.parametrize("verdict", pages.VERDICTS)
def test_every_verdict_has_its_words(verdicts, name, verdict):
    claims = WORDS["statements"][name]["claims"]
    if verdict == "equivalent" and name in ("cost", "accuracy"):
        return  # "not worse" has no such verdict
    table = verdicts(*(("", claim, 1.5, "mm", verdict) for claim in claims))
    assert ("1.50" in pages.sentence(name, table)) == (verdict != "untested" and name != "cost")


def test_the_words_ask_for_claims_of_the_plan(root):
    plan = yaml.safe_load((root / "data" / "results" / "plan.yaml").read_text())
    known = {claim["claim"] for claim in plan["claims"]}
    asked = {c for s in WORDS["statements"].values() for c in s["claims"]}
    asked |= {c for entry in WORDS["claims"] for c in entry["rows"]}
    assert asked - known == set(WORDS["statements"]["cost"]["claims"]), "of notebook 03"
    assert {claim["family"] for claim in plan["claims"]} <= set(pages.FAMILIES)


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


def test_notebooks_that_did_not_run_again_stay(page, tmp_path):
    folder = page.parent
    early = folder / "notebooks" / "01_data.html"
    early.write_text((folder / "notebooks" / "04_compare.html").read_text())
    pd.DataFrame({"step": ["01_data", "04_compare"], "minutes": [9.0, 8.0]}).to_csv(
        folder / "00_steps.csv", index=False
    )
    text = write_page(folder, tmp_path).read_text()  # no notebook ran
    assert 'href="notebooks/01_data.html"' in text and 'href="notebooks/04_compare.html"' in text
    new = pd.DataFrame({"step": ["04_compare"], "minutes": [1.0]})
    pages.write_steps(folder / "00_steps.csv", new)
    kept = pd.read_csv(folder / "00_steps.csv")
    assert kept.to_dict("list") == {"step": ["01_data", "04_compare"], "minutes": [9.0, 1.0]}


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
        assert f'src="{file.stem}.png"' in text, "write the page anew"
        assert file.with_suffix(".png").stat().st_size < 700_000
        assert file.with_suffix(".svg").exists() and file.with_suffix(".pdf").exists()


def test_a_longer_training_stands_beside_the_answer_where_both_tokens_have_one(tmp_path):
    assert pages.longer(tmp_path) == ""
    rows = [
        (steps, variant, "rotation_deg", "imagined / ignoring the motion", 1 - gain, seeds)
        for steps, variant, gain, seeds in [
            (320, "patch", 0.1, 14), (320, "channel", 0.03, 14), (1280, "patch", 0.26, 3),
            (1280, "channel", 0.23, 1), (2560, "patch", 0.3, 1),
        ]
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["steps", "variant", "of", "ratio", "estimate", "seeds"])
    table.to_csv(tmp_path / "04_length.csv", index=False)
    words = pages.longer(tmp_path)
    assert words.startswith("Trained longer, 1,280 steps in place of 320 (trainings: 3 patch, 1 ch")
    assert "26% (patch) and 23% (channel)" in words and "10% (patch) and 3% (channel)" in words
    table[table["steps"] == 320].to_csv(tmp_path / "04_length.csv", index=False)
    assert pages.longer(tmp_path) == ""
