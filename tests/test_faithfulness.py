"""Tests of maps whose scores are known by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from maps import C, H, additive, features, images, model, tiny  # noqa: F401, fixtures

from dreamer import attribution
from dreamer.study import faithfulness
from dreamer.study.faithfulness import View

ZERO = torch.zeros(1, C, H, H)


def seen(additive, features):
    images = torch.rand(4, 1, 48, 48)
    sample = type("S", (), {"patient": np.array(list("aabb")), "images": images})
    return View(additive, sample, features, ZERO, ZERO)


def linear_map(additive, features):
    return (additive.weight[0] * features).sum(1)


def test_deletion_curve_of_an_additive_model(additive, features):
    grid = linear_map(additive, features)
    share, hidden, shown = faithfulness.curves(seen(additive, features), grid, ["x", "y"])
    assert share.tolist() == [k / 9 for k in range(10)] and hidden.shape == (2, 4, 10)
    order = grid.flatten(1).abs().argsort(1, descending=True)
    for k in range(2):
        each = (additive.weight[k] * features).sum(1).flatten(1)
        gone = torch.cumsum(each.gather(1, order), 1)
        expected = torch.cat((torch.zeros(4, 1), gone), 1).abs()
        np.testing.assert_allclose(hidden[k], expected, atol=1e-5)
        left = torch.cat((gone[:, -1:], gone[:, -1:] - gone), 1).abs()
        np.testing.assert_allclose(shown[k], left, atol=1e-5)


def test_a_faithful_map_has_better_curves_than_its_reverse(additive, features):
    additive.weight = additive.weight.abs()
    grid, view = linear_map(additive, features), seen(additive, features)
    _, hidden, shown = faithfulness.curves(view, grid, ["x"], points=5)
    _, hidden2, shown2 = faithfulness.curves(view, 1 / grid, ["x"], points=5)
    assert (hidden.mean(2) > hidden2.mean(2)).all() and (shown.mean(2) < shown2.mean(2)).all()


def test_cells_are_played_in_small_parts_too(additive, features, monkeypatch):
    mask = torch.rand(2, 3, 4, H, H) < 0.5
    whole = faithfulness.play(seen(additive, features), mask)
    mixed = torch.where(mask[1, 2, 3], features[3], 0.0)
    torch.testing.assert_close(whole[1, 2, 3], (additive.weight * mixed).sum((1, 2, 3)))
    images = torch.rand(4, 1, 48, 48)  # on the frame, a hidden cell is grey: 0.25
    view = seen(additive, additive.encode(images))
    view.sample.images = images
    boxes = faithfulness.play(view, mask, "frame")
    mixed = torch.where(mask[1, 2, 3], view.features[3], 0.25)
    torch.testing.assert_close(boxes[1, 2, 3], (additive.weight * mixed).sum((1, 2, 3)))
    with pytest.raises(ValueError, match="on 'pixels' is unknown; one of map, frame"):
        faithfulness.play(view, mask, "pixels")
    monkeypatch.setattr(attribution, "MEMORY", 0)  # one frame at once
    torch.testing.assert_close(faithfulness.play(seen(additive, features), mask), whole)


def test_infidelity_by_hand(additive, features):
    view, grid = seen(additive, features), linear_map(additive, features)
    hidden, poses = faithfulness.hide_at_random(view)
    change = grid.sum((1, 2)) - poses[..., 0]
    for scale in (1, 7):  # the linear map predicts every change, whatever its scale
        missed = faithfulness.infidelity(scale * grid, hidden, change)
        torch.testing.assert_close(missed, torch.zeros(4), atol=1e-5, rtol=0)
    other = torch.rand(4, H, H, generator=torch.Generator().manual_seed(5))
    missed = faithfulness.infidelity(other, hidden, change)
    assert (missed > 0.05).all() and (missed <= 1 + 1e-6).all()


def test_infidelity_is_captums(additive, features):
    """The same masks and the same map give Captum's value, over the mean squared change."""
    from captum.metrics import infidelity

    grid = torch.rand(4, H, H, generator=torch.Generator().manual_seed(5))
    hidden, poses = faithfulness.hide_at_random(seen(additive, features), samples=6)
    change = linear_map(additive, features).sum((1, 2)) - poses[..., 0]
    # Captum repeats each frame for all masks in turn.
    game = attribution.CellGame(attribution.Head(additive, ["x"]))
    given = (features, ZERO.expand_as(features))

    def hide(mask):
        gone = hidden.repeat(4, 1, 1)[:, None].to(mask)
        return gone, mask - gone

    expected = infidelity(
        lambda *args: game(*args)[:, 0], hide, torch.ones(4, 1, H, H), grid[:, None],
        additional_forward_args=given, n_perturb_samples=6, normalize=True,
    )  # fmt: skip
    expected = expected / change.square().mean(0)
    torch.testing.assert_close(faithfulness.infidelity(grid, hidden, change), expected)


def test_complexity_of_a_map():
    flat, even = torch.full((10, 10), 3.0), torch.arange(100.0).view(10, 10)
    one = torch.zeros(10, 10)
    one[0, 0] = 5.0
    found = faithfulness.complexity(torch.stack((flat, even, one)))
    rare = -(0.99 * math.log(0.99) + 0.01 * math.log(0.01))
    assert found == pytest.approx([0, math.log(10), rare])


def test_robustness_of_maps_that_know_nothing(model, images):
    sample = type("S", (), {"patient": np.arange(5), "images": images, "training": images})
    view = faithfulness.view(model, sample)
    table = faithfulness.robust(view, ["edges", "rollout", "Grad-CAM"], "x", steps=2)
    value = table.groupby(["measure", "condition"])["value"].agg(["min", "max"])
    for measure, edges in (
        ("max_sensitivity", 0),
        ("randomisation_rank", 1),
        ("randomisation_smooth_rank", 1),
        ("randomisation_complexity_rise", 0),
    ):
        assert value.loc[(measure, "edges | x")].tolist() == pytest.approx([edges, edges])
    assert value.loc[("max_sensitivity", "Grad-CAM | x"), "min"] > 0
    # Attention does not depend on the guidance head, gradients do.
    name = ("randomisation_rank", "{} | x | guidance")
    assert value.loc[(name[0], name[1].format("rollout")), "min"] == pytest.approx(1)
    assert value.loc[(name[0], name[1].format("Grad-CAM")), "min"] < 0.99
    assert value.loc[("randomisation_rank", "rollout | x"), "min"] < 0.99


def test_sensitivity_is_captums(model, images):
    """The same noise gives the value of Captum's `sensitivity_max`."""
    from captum.metrics import sensitivity_max

    sample = type("S", (), {"patient": np.arange(5), "images": images, "training": images})
    view = faithfulness.view(model, sample)
    features = view.features
    table = faithfulness.robust(view, ["Grad-CAM"], "x", noise=3)
    found = table[table["measure"] == "max_sensitivity"]["value"].to_numpy()
    draw = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.rand(features.shape, generator=draw) for _ in range(3)])
    noise = 0.1 * features.std() * (2 * noise - 1)

    def explain(x):
        x = x[0] if isinstance(x, tuple) else x  # Captum passes both
        grid = attribution.attribute(model, x, ["x"], "Grad-CAM", view.baseline)
        return (grid[0].flatten(1),)

    draws = iter(noise)

    def shift(x, reach):
        return ((x[0] if isinstance(x, tuple) else x) + next(draws),)

    expected = sensitivity_max(
        explain, features, shift, n_perturb_samples=3, max_examples_per_batch=5
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_scores_are_tidy_and_relative(additive, features):
    view = seen(additive, features)
    both = torch.stack([(additive.weight[k] * features).sum(1) for k in range(2)])
    maps = {"linear": both, "flat": torch.ones(2, 4, H, H)}
    table, lines = faithfulness.faithful(view, maps, ["x", "y"], points=0)
    assert list(table) == ["measure", "condition", "patient", "value"]
    assert len(table) == 4 * 2 * (2 * 3 + 2)  # frames, maps, targets, and on the frame for one
    assert lines["share"].max() == 1
    end = lines[(lines["kind"] == "deletion") & (lines["share"] == 1)]
    assert end.groupby("method")["value"].mean().to_numpy() == pytest.approx(1)
    means = table.groupby(["measure", "condition"])["value"].mean()
    for axis in "xy":
        assert means["infidelity", f"linear | {axis}"] == pytest.approx(0, abs=1e-6)
        assert means["infidelity", f"flat | {axis}"] > 0.1


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


def test_weights_are_drawn_anew_from_the_head_down(model):
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    names, changed = [], []
    for name, net in faithfulness.randomised(model, seed=1):
        names.append(name)
        state = net.state_dict()
        changed.append({k for k in state if not torch.equal(state[k], kept[k])})
    assert names == ["guidance", "transformer", "all"]
    assert {k.split(".")[0] for k in changed[0]} == {"head"}
    assert {k.split(".")[0] for k in changed[1]} == {"head", "world"}
    assert all(less <= more for less, more in itertools.pairwise(changed))
    assert {k for k in kept if kept[k].ndim > 1} <= changed[-1]
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_agreement_of_methods():
    grid = torch.rand(2, 2, 3, 3)
    grids = {"ablation": grid, "rollout": -grid, "random": grid}
    found = faithfulness.map_agreement(grids, ["x", "y"], np.array(["a", "b"]))
    assert found["value"].to_numpy() == pytest.approx(1)
    assert set(found["condition"]) == {"ablation | rollout | x", "ablation | rollout | y"}


def test_agreement_of_measures_by_hand():
    values = {"deletion": [4, 3, 2, 1, 9], "insertion": [1, 2, 3, 4, 9]}
    values["pointing"] = [4, 3, 1, 2, 0]
    methods = ["a", "b", "c", "d", "edges"]
    table = pd.concat([
        faithfulness.rows(measure, f"{method} | x", np.array(["p"]), [value])
        for measure, each in values.items() for method, value in zip(methods, each, strict=True)
    ])  # fmt: skip
    other = table.assign(condition=table["condition"] + " | heart")  # not a score of the method
    wide = faithfulness.score_matrix(pd.concat([table, other]), "x")
    ranks = faithfulness.score_ranks(wide)
    assert ranks.loc["edges"].tolist() == [1, 5, 5] and ranks.loc["a"].tolist() == [2, 1, 1]
    found = faithfulness.metric_agreement(wide).set_index("condition")["value"]  # without edges
    assert found["deletion | insertion"] == pytest.approx(1)
    assert found["deletion | pointing"] == pytest.approx(0.8)


@pytest.mark.parametrize("name", ["noise", "corner"])
def test_unknown_controls_are_refused(images, name):
    with pytest.raises(ValueError, match="is unknown; one of random"):
        faithfulness.control(name, images, (3, 3))
