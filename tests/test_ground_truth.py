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
    """One frame of 4 x 4 pixels on a 2 x 2 grid: ventricle, septum above; lung, atrium below. All
    but the ribs, in none, have been taken away, which changed nothing but themselves."""
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, :2, :2], labels[0, :2, 2:] = 1, 2
    labels[0, 2:, :2], labels[0, 2:, 2:] = 5, 4
    gone = {name: (np.array([0]), 10 * (labels == 1 + NAMES.index(name))[None].to(torch.uint8))
            for name in ("left_ventricle", "septum", "left_atrium", "lung")}  # fmt: skip
    visible = torch.ones_like(labels, dtype=torch.bool)
    return truth.Truth(labels, visible, NAMES, torch.zeros(1, 1, 4, 4, dtype=torch.uint8), gone)


def test_scores_of_a_made_map(made):
    known = truth.anatomy(made, (2, 2))
    assert known.filled[0, 0].tolist() == [[1, 0], [0, 0]]
    assert known.filled[0, 4].tolist() == [[0, 0], [1, 0]]
    assert known.dose[0, 0].tolist() == [[10, 0], [0, 0]] and known.dose[0, 5].isnan().all()
    grid = torch.tensor([[[-4.0, 2.0], [3.0, 1.0]]])
    moved = torch.tensor([[5.0, 2.0, torch.nan, 1.0, 3.0, 99.0]])  # ribs aside
    found = truth.against_truth(grid, known, moved)
    assert found["pointing"] == [1] and found["decisive"] == [1]  # the top cell is the ventricle
    assert found["mass"] == pytest.approx([(7 / 10) / (3 / 4)])
    assert found["rank"] == pytest.approx([2 / 3])  # of the three top cells one is lung
    assert np.isnan(found["counterfactual"])  # four structures are too few
    assert truth.against_truth(1 / grid, known, moved)["decisive"] == [0]


def test_a_flat_map_points_nowhere(made):
    known = truth.anatomy(made, (2, 2))
    found = truth.against_truth(torch.ones(1, 2, 2), known, torch.rand(1, 6))
    assert all(np.isnan(found[m]).all() for m in ("pointing", "rank", "decisive"))
    assert found["mass"] == pytest.approx([1])


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
        return np.nanmean(truth.against_truth(grid, known, moved)["counterfactual"])

    assert agreement(weight) == pytest.approx(1) and agreement(-3 * weight * sign) > 0.99
    assert agreement(torch.ones(2000, 7, 7)) == 0
    for other in (random, torch.randn(2000, 7, 7, generator=draw), random**8):
        assert abs(agreement(other)) < 0.03
    assert agreement(1 - weight) < -0.2


def test_relevance_by_structure(made):
    known, moved = truth.anatomy(made, (2, 2)), torch.full((1, 6), torch.nan)
    moved[0, 1] = -5.0
    grid = torch.tensor([[[4.0, -2.0], [3.0, 1.0]]])
    table = truth.by_structure(grid, known, np.array(["p"]), moved)
    table = table.set_index(["measure", "structure"])["value"]
    assert table["relevance", "left_ventricle"] == pytest.approx(4 / 10 / (1 / 4))
    assert table["effect", "septum"] == pytest.approx(5 / 2.5)  # mm per grey level in the mean
    assert "mitral_valve" not in table["relevance"] and list(table["effect"].index) == ["septum"]


def test_shadowed_pixels_count_for_no_structure(made):
    visible = made.visible.clone()
    visible[0, :2, 1] = False  # half of the ventricle's cell
    assert truth.anatomy(made._replace(visible=visible), (2, 2)).filled[0, 0, 0, 0] == 0.5


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


def test_unseen_frames_and_their_truth(phantom):
    run, data, model, parts = phantom
    sample = truth.unseen([run], data, 4)
    assert set(sample.patient) == set(parts["test"]) and len(sample.images) == 4
    assert set(sample.take(slice(2)).patient) == set(parts["test"])  # one of each first
    near = truth.nearest(sample, 2)
    assert set(sample.patient[near]) == set(parts["test"])
    away = sample.pose.norm(dim=1)
    assert all(away[k] == away[sample.patient == sample.patient[k]].min() for k in near)
    known = truth.truth(sample)
    assert torch.equal(known.whole, sample.images)
    assert known.structures == STRUCTURES and known.labels.shape == (4, 48, 48)
    for where, without in known.without.values():
        assert (without != sample.images[where]).any()
    moved = truth.changes(model, known, "x")
    there = {name: torch.isfinite(moved[:, i]).sum() for i, name in enumerate(STRUCTURES)}
    assert {n for n, count in there.items() if count} == set(known.without)
    frames = truth.sweep(sample, "roll", [-10, 0, 10])
    assert frames.shape == (3, 1, 48, 48) and not torch.equal(frames[0], frames[1])


def test_data_without_truth_are_no_error(phantom, tmp_path):
    run, data, *_ = phantom
    sample = truth.unseen([run], data, 2)._replace(folder=tmp_path)
    assert truth.truth(sample) is None and truth.sweep(sample, "x", [0, 1]) is None


def test_a_phantom_that_draws_other_frames_is_refused(phantom):
    run, data, *_ = phantom
    sample = truth.unseen([run], data, 2)
    with pytest.raises(ValueError, match=r"renders other frames now .* generate the folder anew"):
        truth.truth(sample._replace(images=255 - sample.images))


def test_runs_that_do_not_belong_together_are_refused(phantom, tmp_path):
    run, data, _, parts = phantom
    for name in ("config.json", "split.json"):
        (tmp_path / name).write_text((run / name).read_text())
    split = {"kind": "patient"} | parts | {"test": parts["train"], "train": parts["test"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match="runs: they differ"):
        truth.unseen([run, tmp_path], data, 2)
    with pytest.raises(ValueError, match="is not split as"):
        truth.unseen([tmp_path], data, 2)
