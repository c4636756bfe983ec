"""The README: its numbers come from committed tables, its code runs, its links lead somewhere."""

import json
import re
import runpy

import pandas as pd
import pytest
import torch

from dreamer.model import ModelConfig
from dreamer.page import WORDS, filled

MARKED = re.compile(r"<!-- (\w+) -->(.*?)<!-- /\1 -->", re.S)


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def test_numbers_are_those_of_the_committed_tables(root, readme, monkeypatch):
    monkeypatch.chdir(root)
    assert filled(readme, "figures") == readme, "run python -m dreamer.page README.md figures"


def test_marked_parts_are_filled_from_tables(tmp_path, verdicts, readme):
    claims = WORDS["statements"]["accuracy"]["claims"]
    verdicts(("accuracy", claims[0], 0.5, "mm", "contradicted"),
             ("accuracy", claims[1], 1.25, "deg", "contradicted"),
             ).to_csv(tmp_path / "verdicts.csv", index=False)  # fmt: skip
    took = pd.DataFrame({"command": ["make x"], "minutes": [3], "machine": ["a clock"]})
    took.to_csv(tmp_path / "00_commands.csv", index=False)
    parts = dict(MARKED.findall(filled(readme, tmp_path)))
    assert "patch tokens are less accurate (+0.50 mm and +1.25 deg, patch minus" in parts["answer"]
    row = "| Patch tokens are as accurate on a single frame | error, patch minus channel: 0.50 mm "
    assert row + "(0.25 to 0.75); 1.25 deg (1.00 to 1.50) | contradicted |" in parts["claims"]
    assert parts["times"] == " Measured: `make x` 3 minutes on a clock. "
    assert "![" not in parts["claims"]
    (tmp_path / "10_answer.json").write_text(json.dumps({"alt": "dots"}))
    assert f"![dots]({tmp_path}/10_answer.png)" in filled(readme, tmp_path)
    with pytest.raises(ValueError, match="no place marked <!-- answer -->"):
        filled("no marks", tmp_path)


def test_marks_within_a_paragraph_begin_no_line(readme):
    # A line that begins with a comment is HTML to its end, and its Markdown is not rendered.
    for name in ("origin", "times"):
        assert re.search(rf"^.+<!-- {name} -->.*<!-- /{name} -->", readme, re.M)


def test_no_other_number_is_claimed(readme):
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", MARKED.sub("", readme), flags=re.S)
    assert set(re.findall(r"\d+\.\d+", prose)) <= {"3.11", "3.13"}, "versions of Python"
    assert not re.findall(r"\d+ ?%", prose)


def test_the_drawing_is_drawn_and_small(root, untrained, tmp_path):
    config = ModelConfig(backbone="compact", image_size=112, d_model=16, num_heads=2, num_layers=1)
    draw = runpy.run_path(str(root / "benchmarks" / "tokens_drawing.py"))
    draw["main"](untrained(tmp_path / "run", config), tmp_path)
    for folder in (tmp_path, root / "figures"):
        assert 50_000 < (folder / "00_tokens.png").stat().st_size < 300_000


def test_claims_have_five_rows_and_the_readme_is_short(readme):
    rows = [r for r in dict(MARKED.findall(readme))["claims"].splitlines() if r.startswith("|")]
    assert len(rows) == 2 + 5
    assert len(readme.splitlines()) <= 150


@pytest.mark.parametrize("name", ["README.md", "docs/usage.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(root, name):
    text = re.sub(r"```.*?```", "", (root / name).read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, part = link.partition("#")
        if "://" in link:
            continue
        file = (root / name).parent / place
        assert file.exists() or place.startswith("notebooks/out"), link
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if part else []
        assert not part or part in [h.lower().replace(" ", "-") for h in headings], link


def test_the_code_runs(readme, untrained, tmp_path, monkeypatch):
    config = ModelConfig(backbone="compact", image_size=112, channels=64, d_model=16, num_heads=2,
                         num_layers=1, guidance=(32, 16))  # fmt: skip
    untrained(tmp_path / "data" / "weights" / "patch", config)
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M):
        exec(block, space)
    assert space["imagined"].shape == (1, 6) and space["frame"].shape == (1, 112, 112)
    assert torch.equal(space["probe"], torch.tensor([[4.0, -6, 2, 10, -5, 20]]).double())
    assert len(list((tmp_path / "my_patients").glob("patient_*"))) == 2


def test_wheels_for_a_bare_machine_are_those_declared(root, readme):
    text = (root / "docs" / "usage.md").read_text()
    command = text.split("-d wheels")[1].split("pip install")[0]
    named = set(re.findall(r"[a-z-]+", command))
    assert named == set(re.findall(r"\| ([a-z-]+) \| [\d.]+", text))
    pinned = (root / "requirements.txt").read_text()
    assert all(re.search(f"^{name}==", pinned, re.M) for name in named)
    sizes = [float(size) for size in re.findall(r"\| [a-z-]+ \| ([\d.]+)", text)]
    assert len(named) == len(sizes) == 11 and "eleven small wheels more, 8 MB" in readme
    assert round(sum(sizes)) == 8
