"""CONTRIBUTING.md: its examples run as they stand. CITATION.cff is complete."""

import re
import tomllib

import pytest
import yaml

from dreamer.model import ModelConfig
from dreamer.runs import load_run


def sections(root):
    text = (root / "CONTRIBUTING.md").read_text()
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        if blocks := re.findall(r"^```python\n(.*?)^```", part, re.S | re.M):
            yield part.splitlines()[0], "\n".join(blocks)


def run(root, name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    space = {}
    exec(dict(sections(root))[name], space)
    return space


def test_a_run_is_added_to_the_store(root, tmp_path, monkeypatch):
    space = run(root, "Add a run to the results store", tmp_path, monkeypatch)
    assert len(space["store"].runs) == 6
    assert space["patch"].shape == space["channel"].shape == (3, 20)
    assert space["found"].estimate == pytest.approx(10.0 - 10.5, abs=0.15)
    assert space["found"].verdict == "confirmed"


def test_a_token_type_is_added(root, tmp_path, monkeypatch):
    space = run(root, "Add a token type", tmp_path, monkeypatch)
    assert space["tokens"].token_length == 3584


def test_an_attribution_method_is_added(root, tmp_path, monkeypatch):
    run(root, "Add an attribution method", tmp_path, monkeypatch)


def test_a_trained_model_is_shared(root, untrained, tmp_path, monkeypatch):
    for variant in ("patch", "channel"):
        config = ModelConfig(token_type=variant, backbone="compact", image_size=112, channels=16,
                             width=4, d_model=16, num_heads=2, num_layers=1,
                             guidance=(32, 16))  # fmt: skip
        untrained(tmp_path / "data" / "runs" / "laptop" / f"{variant}-seed0", config)
    run(root, "Share a trained model", tmp_path, monkeypatch)
    for variant in ("patch", "channel"):
        assert load_run(tmp_path / "data" / "weights" / variant).config.token_type == variant


def test_every_example_has_its_test(root):
    assert len(list(sections(root))) == 4


def test_citation_is_complete_and_of_this_version(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = {"cff-version", "message", "title", "abstract", "authors", "version", "date-released",
              "license", "keywords", "references"}  # fmt: skip
    assert needed <= set(citation)
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
    assert all({"type", "title", "authors", "year"} <= set(r) for r in citation["references"])
    assert f"## {project['version']}" in (root / "CHANGELOG.md").read_text()
