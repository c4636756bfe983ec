"""Tests of maps whose scores are known by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from maps import C, H, additive, features, images, model, tiny  # noqa: F401, fixtures

from dreamer import attribution
from dreamer.study import faithfulness
from dreamer.study.faithfulness import View


def seen(additive, features):
    sample = type("S", (), {"patient": np.array(list("aabb")), "images": None})
    return View(additive, sample, features, torch.zeros(1, C, H, H))


def linear_map(additive, features):
    return (additive.weight[0] * features).sum(1)


def test_deletion_curve_of_an_additive_model(additive, features):
    grid = linear_map(additive, features)
    share, hidden, shown = faithfulness.curves(seen(additive, features), grid, "x")
    assert share.tolist() == [k / 9 for k in range(10)]
    order = grid.flatten(1).abs().argsort(1, descending=True)
    gone = torch.cumsum(grid.flatten(1).gather(1, order), 1)
    expected = torch.cat((torch.zeros(4, 1), gone), 1).abs()
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    left = torch.cat((gone[:, -1:], gone[:, -1:] - gone), 1).abs()
    np.testing.assert_allclose(shown, left, atol=1e-5)


def test_a_faithful_map_has_better_curves_than_its_reverse(additive, features):
    additive.weight = additive.weight.abs()
    grid = linear_map(additive, features)
    _, hidden, shown = faithfulness.curves(seen(additive, features), grid, "x", points=5)
    _, hidden2, shown2 = faithfulness.curves(seen(additive, features), 1 / grid, "x", points=5)
    assert (hidden.mean(1) > hidden2.mean(1)).all() and (shown.mean(1) < shown2.mean(1)).all()


def test_infidelity_by_hand(additive, features):
    view, grid = seen(additive, features), linear_map(additive, features)
    for scale in (1, 7):  # the linear map predicts every change, whatever its scale
        missed = faithfulness.infidelity(view, scale * grid, "x")
        torch.testing.assert_close(missed, torch.zeros(4), atol=1e-5, rtol=0)
    other = torch.rand(4, H, H, generator=torch.Generator().manual_seed(5))
    missed = faithfulness.infidelity(view, other, "x")
    assert (missed > 0.05).all() and (missed <= 1 + 1e-6).all()


def test_sensitivity_of_a_linear_gradient(additive, features):
    view = seen(additive, features)
    found = faithfulness.sensitivity(view, "gradient x activation", "x")
    assert found.shape == (4,) and (found > 0).all() and (found < 0.5).all()
    more = faithfulness.sensitivity(view, "gradient x activation", "x", radius=0.2)
    torch.testing.assert_close(more, 2 * found, rtol=1e-3, atol=1e-4)  # linear in the noise


def test_scores_are_tidy_and_relative(additive, features):
    view = seen(additive, features)
    maps = {"linear": linear_map(additive, features), "flat": torch.ones(4, H, H)}
    table, lines = faithfulness.score(view, maps, "x", points=0)
    assert set(table["measure"]) == {"deletion", "insertion", "infidelity"}
    assert set(lines["kind"]) == {"deletion", "insertion"} and lines["share"].max() == 1
    end = lines[(lines["kind"] == "deletion") & (lines["share"] == 1)]
    assert end.groupby("method")["value"].mean().to_numpy() == pytest.approx(1)
    summary = faithfulness.summarise(table, ["method", "measure"]).set_index(["method", "measure"])
    assert summary.loc[("linear", "infidelity"), "estimate"] == pytest.approx(0, abs=1e-6)
    assert (summary["patients"] == 2).all()


def test_cells_leave_out_patients_that_a_seed_lacks():
    table = pd.DataFrame({
        "seed": [0, 0, 1, 1, 1], "patient": list("aabab"), "measure": "m",
        "value": [0.0, 2.0, 9.0, 3.0, 5.0],
    })  # fmt: skip
    found = faithfulness.cells(table, measure="m")
    assert found.to_dict() == {"a": {0: 1.0, 1: 3.0}}


def test_rank_correlation_by_hand():
    one = torch.tensor([[1.0, -2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    other = torch.tensor([[-1.0, 2.0, 4.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    found = faithfulness.rank_correlation(one, other)
    assert found[0] == pytest.approx(0.8) and np.isnan(found[1])


def test_controls_do_not_know_the_model(images):
    grey = torch.zeros(2, 1, 48, 48)
    grey[..., :24] = 1.0  # one edge, down the middle
    edges = faithfulness.control("edges", grey, (3, 3))
    assert (edges[:, 1, 1] > edges[:, 1, 0]).all() and edges.argmax() % 3 == 1
    centre = faithfulness.control("centre", images, (3, 3))
    assert (centre.flatten(1).argmax(1) == 4).all()
    one, two = (faithfulness.control("random", images, (3, 3), seed) for seed in (0, 1))
    assert not torch.equal(one, two)


def test_weights_are_drawn_anew_from_the_head_down(model, images):
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    names, changed = [], []
    for name, net in faithfulness.randomised(model, seed=1):
        names.append(name)
        state = net.state_dict()
        changed.append({k for k in state if not torch.equal(state[k], kept[k])})
    assert names[:5] == ["guidance", "map heads", "block 2", "block 1", "embedding"]
    assert names[-1] == "backbone 1"
    assert {k.split(".")[0] for k in changed[0]} == {"head"}
    assert all(less <= more for less, more in itertools.pairwise(changed))
    drawn = {k for k in kept if kept[k].ndim > 1}
    assert drawn <= changed[-1]
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_agreement_of_methods_seeds_and_variants():
    grid = torch.rand(2, 3, 3)
    grids = {r: {"ablation": grid, "rollout": -grid} for r in ("p0", "p1", "c0")}
    found = faithfulness.agreement(
        grids, {"p0": "patch", "p1": "patch", "c0": "channel"}, np.array(["a", "b"])
    )
    assert found.value.to_numpy() == pytest.approx(1)
    assert found.kind.value_counts().to_dict() == {"methods": 6, "variants": 8, "seeds": 4}


@pytest.mark.parametrize("name", ["noise", "corner"])
def test_unknown_controls_are_refused(images, name):
    with pytest.raises(ValueError, match="is unknown; one of random"):
        faithfulness.control(name, images, (3, 3))


def test_randomised_maps_lose_the_trained_one(model, images):
    maps = attribution.encode(model, images)
    sample = type("S", (), {"patient": np.arange(5), "images": images, "training": images})
    view = View(model, sample, maps, maps.mean(0, keepdim=True))
    table = faithfulness.randomisation(view, ["gradient x activation"], "x")
    assert table["depth"].max() == 5 + len(model.backbone.stages)
    assert not (table["value"][table["depth"] == table["depth"].max()] > 0.999).all()
