"""What the phantom knows of unseen frames; scores whose value is known by hand."""

import json

import numpy as np
import pytest
import torch

from dreamer.data import Transitions
from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.phantom import STRUCTURES
from dreamer.phantom.generate import generate
from dreamer.runs import TrainingConfig, make_split
from dreamer.study import ground_truth as truth

NAMES = ("left_ventricle", "septum", "mitral_valve", "left_atrium", "lung", "ribs")


@pytest.fixture
def made():
    """One frame of 4 x 4 pixels on a 2 x 2 grid: ventricle, septum above; lung, atrium below."""
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, :2, :2], labels[0, :2, 2:] = 1, 2
    labels[0, 2:, :2], labels[0, 2:, 2:] = 5, 4
    visible = torch.ones_like(labels, dtype=torch.bool)
    return truth.Truth(labels, visible, torch.zeros(1, 6), torch.zeros(1), NAMES, {})


@pytest.fixture
def removed(made):
    """All but the ribs, in no frame, taken away, which changed nothing but themselves."""
    gone = {name: (np.array([0]), 10 * (made.labels == 1 + k)[None].to(torch.uint8))
            for k, name in enumerate(NAMES) if name not in ("mitral_valve", "ribs")}  # fmt: skip
    return truth.Removed(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), gone)


def test_scores_of_a_made_map(made, removed):
    known = truth.anatomy(made, removed, (2, 2))
    assert known.filled[0, 0].tolist() == [[1, 0], [0, 0]]
    assert known.filled[0, 4].tolist() == [[0, 0], [1, 0]]
    assert known.dose[0, 0].tolist() == [[10, 0], [0, 0]] and known.dose[0, 5].isnan().all()
    grid = torch.tensor([[[-4.0, 2.0], [3.0, 1.0]]])
    moved = torch.tensor([[5.0, 2.0, torch.nan, 1.0, 3.0, 99.0]])  # ribs aside
    found = truth.against_truth(grid, known, moved)
    assert found["pointing"] == [1] and found["decisive"] == [1]  # the top cell is the ventricle
    assert np.isnan(found["counterfactual_rank"])  # four structures are too few
    found = truth.against_truth(1 / grid, known, moved)
    assert found["pointing"] == [1] and found["decisive"] == [0]  # the top cell is the atrium


def test_a_flat_map_points_nowhere(made, removed):
    known = truth.anatomy(made, removed, (2, 2))
    found = truth.against_truth(torch.ones(1, 2, 2), known, torch.rand(1, 6))
    assert all(np.isnan(found[m]).all() for m in ("pointing", "decisive"))


def test_partial_rank_by_hand():
    given = np.array([[1.0, 2, 3, 4, 5]])
    one, other = np.array([[1.0, 3, 2, 5, 4]]), np.array([[2.0, 1, 4, 3, 5]])
    # each correlates 0.8 with `given`, and 0.3 with the other: (0.3 - 0.64) / (1 - 0.64)
    assert truth.partial_rank(one, other, given) == pytest.approx(-17 / 18)
    assert truth.partial_rank(one, one, given) == pytest.approx(1)
    assert truth.partial_rank(given, other, given) == [0]  # tells no more than `given`
    assert np.isnan(truth.partial_rank(one, given, given))  # nothing more to tell
    assert np.isnan(truth.partial_rank(one[:, :4], other[:, :4], given[:, :4]))
    holes = [np.append(v, [[np.nan]], 1) for v in (one, other)]
    assert truth.partial_rank(*holes, np.append(given, [[9]], 1)) == pytest.approx(-17 / 18)


@pytest.fixture
def anatomy():
    """2,000 frames with ten structures that lie anywhere and take from one cell to thirty."""
    draw = torch.Generator().manual_seed(0)
    size = torch.linspace(1, 30, 10).long()
    order = torch.rand(2000, 10, 49, generator=draw).argsort(-1).argsort(-1)
    dose = (order < size[:, None]).float().view(2000, 10, 7, 7)
    return truth.Anatomy(("lung", *map(str, range(9))), dose, 8 * dose), draw


def test_counterfactual_agreement_does_not_follow_size(anatomy):
    known, draw = anatomy
    weight = torch.rand(2000, 7, 7, generator=draw)  # each cell's true effect
    sign = torch.rand(2000, 7, 7, generator=draw).sub(0.5).sign()
    moved = (weight[:, None] * known.dose).sum((2, 3))
    random = torch.rand(2000, 7, 7, generator=draw)
    weighted = (random[:, None] * known.dose).sum((2, 3))
    earned = truth.partial_rank(weighted, moved, torch.rand(2000, 10, generator=draw))
    assert earned.mean() > 0.7  # what a random map would score by size alone

    def agreement(grid):
        return np.nanmean(truth.against_truth(grid, known, moved)["counterfactual_rank"])

    assert agreement(weight) == pytest.approx(1) and agreement(-3 * weight * sign) > 0.99
    assert agreement(torch.ones(2000, 7, 7)) == 0
    for other in (random, torch.randn(2000, 7, 7, generator=draw), random**8):
        assert abs(agreement(other)) < 0.03
    assert agreement(1 - weight) < -0.2


def test_relevance_by_group_of_structures(made):
    made.labels[0, 0, :2] = 0  # half of the ventricle's cell lies outside the sector
    made.visible[0, 3, 2:] = False  # and half of the atrium's in a shadow
    shares = truth.group_shares(made, (2, 2))
    assert torch.equal(shares.sum(1), torch.ones(1, 2, 2))
    grid = torch.tensor([[[4.0, -2.0], [3.0, 1.0]]])
    found = dict(zip(truth.GROUPS, truth.relevance(grid, shares)[0].tolist(), strict=True))
    assert found["heart"] == pytest.approx((2 + 2 + 0.5) / 10 / (2 / 4))
    assert found["lung"] == pytest.approx(3 / 10 / (1 / 4))
    assert found["outside"] == pytest.approx(2 / 10 / (0.5 / 4))
    assert found["shadow"] == pytest.approx(0.5 / 10 / (0.5 / 4))
    assert np.isnan([found[name] for name in ("ribs", "chest wall", "other tissue")]).all()
    even = truth.relevance(torch.full((1, 2, 2), -3.0), shares)[0]
    assert even[even.isfinite()].tolist() == pytest.approx([1] * 4)


def test_shadowed_pixels_count_for_no_structure(made):
    made.visible[0, :2, 1] = False  # half of the ventricle's cell
    assert truth.filled(made, (2, 2))[0, 0, 0, 0] == 0.5


def test_average_map_in_the_target_plane():
    inside = torch.ones(1, 20, 20, dtype=torch.bool)  # bins of two by two pixels, about 16 mm
    at_target = truth.plane_bins(torch.zeros(1, 6), inside)[0]
    assert at_target[15, 4] == 10 * 7 + 2 and at_target[0, 19] == 9
    x0, z0 = truth.pixel_to_probe(0, 0, 20)
    x1, z1 = truth.pixel_to_probe(2, 2, 20)  # two pixels to the right, two down
    moved = torch.zeros(3, 6)
    moved[0, 0], moved[1, 2], moved[2, 1] = x1 - x0, z1 - z0, 20.0
    beside, below, off = truth.plane_bins(moved, inside.expand(3, -1, -1))
    assert beside[15, 4] == at_target[15, 4] + 1 and below[15, 4] == at_target[15, 4] + 10
    assert (off == -1).all()  # 20 mm off the plane
    assert (truth.plane_bins(torch.zeros(1, 6), ~inside) == -1).all()

    bins = torch.full((2, 4, 4), -1)
    bins[:, 0, :2], bins[0, 3, 3] = 7, 42
    grid = torch.tensor([[[3.0, 1.0], [0.0, -4.0]], [[1.0, 1.0], [0.0, 0.0]]])
    mean, count = truth.average_map(grid, bins)
    assert mean.flatten()[7] == pytest.approx((3 / 2 + 1 / 0.5) / 2) and count.flatten()[7] == 2
    assert mean.flatten()[42] == pytest.approx(4 / 2) and count.flatten()[42] == 1
    assert mean.isnan().sum() == 98 and count.sum() == 3


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """A folder of four virtual patients and a run that was split on it, not trained."""
    folder = tmp_path_factory.mktemp("truth")
    data = generate(folder / "data", 4, 3, size=48)
    model = ModelConfig(token_type="patch", backbone="compact", channels=8, width=4, image_size=48,
                        d_model=16, num_heads=2, num_layers=1, guidance=(8, 8))  # fmt: skip
    training = TrainingConfig(val=1, test=2)
    found = Transitions(data, cache=folder)
    split = make_split(found, training)
    run = folder / "run"
    run.mkdir()
    config = {"model": model.model_dump(mode="json"), "training": training.model_dump(mode="json")}
    (run / "config.json").write_text(json.dumps(config))
    parts = {n: sorted(set(found.patient[getattr(split, n)])) for n in ("train", "val", "test")}
    (run / "split.json").write_text(json.dumps({"kind": "patient"} | parts))
    torch.manual_seed(0)
    return run, data, CardiacDreamer(model).eval(), parts


def drawn(run, data, frames):
    found, split = truth.unseen([run], data)
    return truth.draw(found, split.test, split, frames)


def test_unseen_frames_and_their_truth(phantom):
    run, data, model, parts = phantom
    sample = drawn(run, data, 4)
    assert set(sample.patient) == set(parts["test"]) and len(sample.images) == 4
    assert set(sample.take(slice(2)).patient) == set(parts["test"])  # one of each first
    near = truth.nearest(sample, 2)
    assert set(sample.patient[near]) == set(parts["test"])
    away = sample.pose.norm(dim=1)
    assert all(away[k] == away[sample.patient == sample.patient[k]].min() for k in near)
    known = truth.truth(sample)
    removed = truth.remove(sample, known)
    assert torch.equal(removed.whole, sample.images)
    assert known.structures == STRUCTURES and known.labels.shape == (4, 48, 48)
    for where, without in removed.without.values():
        assert (without != sample.images[where]).any()
    moved = truth.changes(model, removed, STRUCTURES, ["x", "rotation"])
    assert moved.shape == (2, 4, len(STRUCTURES))
    there = {name: torch.isfinite(moved[0, :, i]).sum() for i, name in enumerate(STRUCTURES)}
    assert {n for n, count in there.items() if count} == set(removed.without)
    name, (where, images) = next(iter(removed.without.items()))
    gap = truth.predict(model, sample.images[where]) - truth.predict(model, images)
    torch.testing.assert_close(moved[0, where, STRUCTURES.index(name)], gap[:, 0])
    assert not torch.equal(truth.rerender(sample, known, vary={"gain": 5.0}), sample.images)
    image, labels = truth.target_plane(sample, known)
    assert torch.equal(image[None], truth.sweep(sample, "roll", [0])[0])
    assert labels.shape == (48, 48) and (labels == 1).any()
    frames = truth.sweep(sample, "roll", [-10, 0, 10])
    assert frames.shape == (3, 1, 48, 48) and not torch.equal(frames[0], frames[1])


def test_data_without_truth_are_no_error(phantom, tmp_path):
    run, data, *_ = phantom
    sample = drawn(run, data, 2)._replace(folder=tmp_path)
    assert truth.truth(sample) is None and truth.sweep(sample, "x", [0, 1]) is None


def test_frames_that_other_code_drew_are_refused(phantom, tmp_path):
    run, data, *_ = phantom
    card = json.loads((data / "phantom.json").read_text())
    (tmp_path / "phantom.json").write_text(json.dumps(card | {"code": "before"}))
    with pytest.raises(ValueError, match="drawn by other code"):
        truth.truth(drawn(run, data, 2)._replace(folder=tmp_path))


def test_runs_that_do_not_belong_together_are_refused(phantom, tmp_path):
    run, data, _, parts = phantom
    for name in ("config.json", "split.json"):
        (tmp_path / name).write_text((run / name).read_text())
    split = {"kind": "patient"} | parts | {"test": parts["train"], "train": parts["test"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match="runs: they differ"):
        truth.unseen([run, tmp_path], data)
    with pytest.raises(ValueError, match="is not split as"):
        truth.unseen([tmp_path], data)
