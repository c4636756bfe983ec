"""The first notebook: shows the method on one frame, installs what lacks, redraws quickly."""

import importlib.util
import os
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreamer import load_run, poses
from dreamer.model import ModelConfig
from dreamer.phantom import Patient, render

SHAPE = dict(
    backbone="compact", image_size=64, channels=16, width=4, d_model=16, num_heads=2, num_layers=1,
    guidance=(32, 16),
)  # fmt: skip


@pytest.fixture(scope="module")
def cells(root):
    book = nbformat.read(root / "notebooks" / "start_here.ipynb", as_version=4)
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_the_method_stands_in_the_cells(cells):
    text = "\n".join(cell.source for cell in cells)
    for call in ("b c h w -> b (h w) c", "b c h w -> b c (h w)", "model(frame, still)",
                 "model(frame, motion)", "IntegratedGradients(", "Explorer("):  # fmt: skip
        assert call in text


def test_all_cells_run_and_sliders_redraw(cells, untrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = {variant: untrained(tmp_path / variant, ModelConfig(token_type=variant, **SHAPE))
            for variant in ("patch", "channel")}  # fmt: skip
    space = {}
    for cell in cells:
        exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", []):
            space |= {name: str(folder) for name, folder in runs.items()} | {"output": "figures"}
    assert Image.open(tmp_path / "figures" / "00_start_maps.png").size[0] > 500
    assert len(pd.read_csv(tmp_path / "figures" / "00_start.csv")) == len(space["times"]) == 12
    assert space["patches"].shape == (1, 16, 16) and space["channels"].shape == (1, 16, 16)
    exact = space["errors"]["patch tokens", "exact geometry"]
    away = poses.errors(
        poses.compose(space["predicted"]["patch"], space["motion"]), torch.zeros(1, 6)
    )
    assert exact["mm"] == pytest.approx(away.translation.item())
    before, drawn = space["images"]["patch"].value, len(space["times"])
    space["sliders"]["yaw"].value += 5
    assert space["images"]["patch"].value != before and len(space["times"]) == drawn + 1
    space["kind"].value = "attribution"
    assert len(space["times"]) == drawn + 2


def installing(cells, monkeypatch, repository=""):
    """Execute the cell that installs, as if roma were lacking; returns the commands it runs."""
    [source] = [cell.source for cell in cells if "LIBRARIES" in cell.source]
    commands, find = [], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "roma" else find(n))
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(source, {"repository": repository})
    return commands


def test_lacking_libraries_are_installed_within_the_bounds(root, cells, monkeypatch):
    monkeypatch.chdir(root / "notebooks")
    [command] = installing(cells, monkeypatch)
    assert command[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
    names = [bound.split(">")[0] for bound in command[5:]]
    assert names == ["captum", "einops", "gymnasium", "pydantic", "roma", "safetensors"]
    assert sys.path[0] == str(root)


def test_the_repository_is_fetched_where_it_is_not(root, cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="repository: give its address"):
        installing(cells, monkeypatch)
    (tmp_path / "cardiac-dreamer").symlink_to(root)  # as cloned
    fetch, install = installing(cells, monkeypatch, "https://example.org/it")
    assert fetch[:2] == ["git", "clone"] and fetch[-2:] == [
        "https://example.org/it",
        "cardiac-dreamer",
    ]
    assert install[3] == "install"


def test_nothing_is_installed_where_nothing_lacks(cells, monkeypatch):
    [source] = [cell.source for cell in cells if "LIBRARIES" in cell.source]
    monkeypatch.setattr(subprocess, "run", lambda *_: pytest.fail("ran a command"))
    exec(source, {"repository": ""})


def test_binder_installs_the_project(root):
    script = root / "postBuild"
    assert os.access(script, os.X_OK) and "pip install --no-deps -e ." in script.read_text()
    assert (root / "environment.yml").is_file()


def test_committed_weights_are_small_and_guide(root):
    folder = root / "data" / "weights"
    if not folder.is_dir():
        pytest.skip("data/weights is missing: see CONTRIBUTING.md, share a trained model")
    files = [folder / variant / "model.safetensors" for variant in ("patch", "channel")]
    assert sum(file.stat().st_size for file in files) < 10_000_000
    for file in files:
        weights = load_file(file)
        halves = [name for name, value in weights.items() if value.dtype == torch.float16]
        assert len(halves) > len(weights) / 2
    rng = np.random.default_rng(0)
    at = torch.from_numpy(rng.normal(0, [6, 6, 4, 12, 8, 20], (24, 6)))
    frames = torch.cat([
        render(Patient((2_000_000, k)), part, 0.0, size=112).image
        for k, part in enumerate(at.split(6))
    ])[:, None]  # fmt: skip
    for variant in ("patch", "channel"):
        model = load_run(folder / variant)
        assert model.config.token_type == variant
        with torch.no_grad():
            predicted = model(frames, torch.zeros(len(frames), 6)).pose
        mean = poses.errors(model.pose_mean.expand(len(at), 6), at).rotation.mean()
        assert poses.errors(predicted, at).rotation.mean() < 0.8 * mean
