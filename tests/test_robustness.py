"""Robustness: the same patients and poses under each change, errors by hand, frames kept."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from dreamer import poses
from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.phantom import Factors, generate
from dreamer.study.closed_loop import Person
from dreamer.study.robustness import CHANGES, measure, plan, render

PEOPLE = [Person("a", (5, 0)), Person("b", (5, 1))]
TINY = ModelConfig(
    backbone="compact", image_size=32, channels=16, width=4, token_type="none", guidance=(32, 16)
)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """frames(condition): images [2 patients x 4, 1, 32, 32], kept in one folder."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda condition: render(PEOPLE, CHANGES[condition], "a4c", 32, 4, cache)


def test_frames_as_usual_are_those_of_a_generated_patient(frames, tmp_path):
    generate(tmp_path / "made", patients=2, frames=4, size=32, seed=5, device="cpu")
    files = [sorted(tmp_path.glob(f"made/patient_000{n}/ft1/*.png")) for n in range(2)]
    made = np.stack([np.asarray(Image.open(file)) for one in files for file in one])
    difference = np.abs(frames("as usual")[:, 0].numpy().astype(int) - made)
    assert difference.max() <= 1  # frames drawn together or apart


def test_changes_change_the_frames_and_not_the_poses(frames):
    usual = frames("as usual").float()
    for condition, brighter in (("gain +6 dB", True), ("gain -6 dB", False), ("no heart", False)):
        assert (frames(condition).float().mean() > usual.mean()) == brighter
    poses_, phases = zip(
        *(
            plan(PEOPLE[0], 4, CHANGES[c])[1:]
            for c in ("as usual", "heart rate +30", "end systole")
        ),
        strict=True,
    )
    assert torch.equal(poses_[0], poses_[1]) and torch.equal(poses_[0], poses_[2])
    assert not torch.equal(phases[0], phases[1]) and (phases[2] == 0.36).all()


def test_every_factor_of_variation_is_changed():
    varied = {name for change in CHANGES.values() for name in change.get("vary", {})}
    assert varied | {"heart_phase"} == {field.name for field in fields(Factors)}
    gone = CHANGES["no heart"]["without"]
    assert "left_ventricle" in gone and "ribs" not in gone


def test_errors_by_hand():
    model = CardiacDreamer(TINY).eval()
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    model.pose_mean += torch.tensor([3.0, 0, 4, 0, 0, 10])  # the prediction for every frame
    rows = measure(model, PEOPLE, frames=4, changes={"as usual": {}})
    assert list(rows) == ["measure", "condition", "patient", "value"]
    assert set(rows["condition"]) == {"mean pose", "as usual"}
    for person in PEOPLE:
        error = poses.errors(model.pose_mean.double().expand(4, 6), plan(person, 4, {})[1])
        own = rows[rows["patient"] == person.name].groupby("measure")["value"].unique()
        assert own["translation_mm"] == pytest.approx(float(error.translation.mean()))
        assert own["rotation_deg"] == pytest.approx(float(error.rotation.mean()))


def test_frames_are_drawn_once(frames, monkeypatch):
    first = frames("end systole")
    monkeypatch.setattr("dreamer.phantom.render", None)
    assert torch.equal(frames("end systole"), first)
    with pytest.raises(TypeError):
        frames("end diastole")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"vary": {"gein": 6}}, "gein"), ({"without": ("spleen",)}, "spleen"), ({"fase": 0}, "fase")],
)
def test_unknown_changes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        render(PEOPLE, change, "a4c", 32, 4)
