"""The explorer: guidance in words, maps over frames, what is computed again, and its notebook."""

import io
import re

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from dreamer import poses
from dreamer.model import ModelConfig
from dreamer.plots import AXIS_LABELS
from dreamer.study.explore import WORDS, Explorer, in_words, paint

TINY = ModelConfig(
    backbone="compact", image_size=32, channels=16, width=4, d_model=16, num_heads=2, num_layers=1,
    guidance=(32, 16),
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(untrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    variants = ("patch", "channel", "none")
    return [
        str(untrained(folder / name, TINY.model_copy(update={"token_type": name})))
        for name in variants
    ]


def test_guidance_in_the_words_of_a_hand():
    motion = torch.tensor([6.2, -3, 0.4, 0, 5, -8])
    words = "slide 6 mm right, slide 3 mm away from you, rock 5° right, rotate 8° anticlockwise"
    assert in_words(motion) == words
    assert in_words(torch.tensor([0.9, 0, 0, 1.9, 0, 0])).startswith("hold")
    assert list(WORDS) == list(poses.AXES) and set(WORDS) < set(AXIS_LABELS)
    for axis, word in (("roll", "fan"), ("pitch", "rock"), ("yaw", "rotate")):
        assert word in AXIS_LABELS[axis] and all(text.startswith(word) for text in WORDS[axis])


def test_words_agree_with_geometry():
    # Rocked to the right, the middle beam points to the frame's right; fanned away from you, into
    # the frame, whose y axis points towards you.
    beam = poses.to_matrix(torch.tensor([[0, 0, 0, 0, 5, 0], [0, 0, 0, 5, 0, 0.0]]))[:, :3, 2]
    assert beam[0, 0] > 0 and beam[1, 1] < 0


def test_maps_are_painted_by_sign_and_size():
    frame = np.full((32, 32), 100, np.uint8)
    grid = np.array([[1.0, 0.0], [-0.5, 0.0]])
    page = np.asarray(Image.open(io.BytesIO(paint(frame, grid, side=40)))).astype(int)
    assert page.shape == (40, 40, 3)
    assert page[5, 5].tolist() == [156, 97, 50]  # half grey, half (213, 94, 0)
    assert page[35, 5].tolist() == [75, 103, 119]  # a quarter of (0, 114, 178)
    assert (page[:, 20:] == 100).all()
    even = np.asarray(Image.open(io.BytesIO(paint(frame, np.ones((7, 7))))))
    assert (even == 100).all(), "an even map without sign highlights nothing"


def test_only_what_changed_is_computed_again(runs, tmp_path):
    explorer = Explorer([*runs, "nowhere"], str(tmp_path), people=2)
    assert explorer.missing == ["nowhere"] and list(explorer.models) == ["patch", "channel", "none"]

    def computed():
        return [f.cache_info().misses for f in (explorer.frame, explorer.predict, explorer.map)]

    before = explorer.images("attention")
    assert computed() == [1, 3, 3]
    explorer.images("attribution")
    assert computed() == [1, 3, 6]
    assert explorer.images("attention") == before and computed() == [1, 3, 6]
    explorer.move(explorer.pose + torch.tensor([0, 0, 0, 0, 0, 5.0]))
    assert explorer.images("none")["frame"] != before["frame"] and computed() == [2, 6, 9]


def test_guided_steps_lead_where_the_guidance_says(runs, tmp_path):
    explorer = Explorer(runs[:1], str(tmp_path), people=2)
    explorer.models["patch"].guide = lambda pooled: torch.tensor([[3.0, 0, 0, 0, 0, 0]])
    explorer.move(torch.tensor([3.3, 0, 0, 0, 0, 99.0]))
    assert explorer.pose.tolist() == [3.5, 0, 0, 0, 0, 90], "steps of 0.5, within reach"
    explorer.move(torch.tensor([3.0, 0, 0, 0, 0, 0]))
    explorer.step("patch")
    assert explorer.pose.abs().max() == 0 and explorer.error() == "error: 0.0 mm, 0.0 degrees"
    assert 4 < explorer.go("patch") <= 20


def test_runs_of_different_frames_are_refused(runs, untrained, tmp_path):
    other = untrained(tmp_path / "other", TINY.model_copy(update={"image_size": 64}))
    with pytest.raises(ValueError, match="runs of one size"):
        Explorer([runs[1], str(other)], str(tmp_path))


@pytest.mark.parametrize("count", [2, 0])
def test_notebook_without_a_browser(root, runs, tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    given = {"runs": runs[:count], "data": "none", "output": "figures"}
    space = {}
    for cell in nbformat.read(root / "notebooks" / "09_explore.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, space)
            space |= given if "parameters" in cell.metadata.get("tags", []) else {}
    assert (tmp_path / "figures" / "09_explore.png").stat().st_size > 1000
    report, image = space["report"], space["images"]["frame"]
    if count:
        assert re.match(r"stopped after \d+ steps; error: [\d.]+ mm", report.value)
    before, drawn = image.value, len(space["times"])
    space["sliders"]["yaw"].value -= 5
    assert image.value != before and len(space["times"]) == drawn + 1, "one redraw"
    space["plane"].value = "plax"
    assert report.value.startswith("patient virtual_0000") and len(space["times"]) == drawn + 2
    assert "four-chamber plane only" in space["table"].value
    space["new_patient"]()
    assert report.value.startswith("patient virtual_0001")
    poses_shown = [slider.value for slider in space["sliders"].values()]
    assert poses_shown == space["explorer"].pose.tolist()
