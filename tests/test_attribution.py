"""Attention and attribution whose values are known by hand."""

import pytest
import torch
from maps import Additive, C, H, additive, features, images, model, tiny  # noqa: F401, fixtures
from torch import nn

from dreamer import attribution
from dreamer.model import CardiacDreamer, ModelConfig

LINEAR = ("integrated gradients", "GradientShap", "Shapley", "ablation")
ZERO = torch.zeros(1, C, H, H)


@pytest.mark.parametrize("method", LINEAR)
def test_linear_head_gives_weight_times_input(additive, features, method):
    found = attribution.attribute(additive, features, ["z", "yaw"], method, ZERO)
    for axis, grid in zip((2, 5), found, strict=True):
        assert torch.allclose(grid, (additive.weight[axis] * features).sum(1), atol=1e-5)


def test_linear_head_with_a_baseline(additive, features):
    base = torch.full((1, C, H, H), 0.3)
    for method in LINEAR:
        [grid] = attribution.attribute(additive, features, ["yaw"], method, base)
        assert torch.allclose(grid, (additive.weight[5] * (features - base)).sum(1), atol=1e-5)


def test_expected_gradients_take_the_mean_over_baselines(additive, features):
    bases = torch.rand(5, C, H, H)
    head = attribution.Head(additive, ["x"])
    [grid] = attribution.attribute(additive, features, ["x"], "GradientShap", bases, steps=400)
    expected = (additive.weight[0] * (features - bases.mean(0))).sum(1)
    assert (grid - expected).abs().max() < 0.3 * expected.std()  # baselines are drawn
    missed = attribution.incompleteness(head, features, head(bases).mean(0, keepdim=True), grid)
    assert missed.shape == (1, 4) and missed.max() < 0.3


def test_grad_cam_of_a_linear_head(additive, features):
    [grid] = attribution.attribute(additive, features, ["x"], "Grad-CAM", ZERO)
    gradient = additive.weight[0].mean((1, 2))  # [C]
    assert torch.allclose(grid, (gradient[:, None, None] * features).sum(1), atol=1e-5)


def test_occlusion_of_a_linear_model(additive):
    images = torch.rand(2, 1, 48, 48)
    maps = additive.encode(images)
    found = attribution.attribute(additive, maps, ["roll", "x"], "occlusion", ZERO, images)
    seen = nn.functional.adaptive_avg_pool2d(images, H)[:, 0] - 0.25
    for axis, grid in zip((3, 0), found, strict=True):
        assert torch.allclose(grid, additive.weight[axis].sum(0) * seen, atol=1e-5)
    with pytest.raises(ValueError, match="give `images`"):
        attribution.attribute(additive, maps, ["roll"], "occlusion", ZERO)


def test_complete_methods_sum_to_the_difference(model, images):
    maps = attribution.encode(model, images)
    base = attribution.baseline_map(model, "mean", images, images)
    head = attribution.Head(model, attribution.TARGETS)
    # Shapley values are efficient: they sum to f(x) - f(baseline) for any number of permutations.
    for method, limit in (("Shapley", 1e-3), ("integrated gradients", 0.2)):
        grid = attribution.attribute(
            model, maps, attribution.TARGETS, method, base, steps=128, permutations=1
        )
        missed = attribution.incompleteness(head, maps, head(base), grid)
        assert missed.shape == (8, 5) and missed.max() < limit, method


def test_incompleteness_by_hand(additive, features):
    head = attribution.Head(additive, ["x"])
    change = head(features)[:, 0]
    grid = torch.zeros(1, 4, H, H)
    grid[0, :, 0, 0] = change + 2
    missed = attribution.incompleteness(head, features, torch.zeros(1, 1), grid)
    torch.testing.assert_close(missed[0], 2 / change.abs().mean().expand(4))


def test_a_map_that_does_not_converge_is_reported(features, caplog):
    bent = Additive(bend=50.0)
    attribution.attribute(bent, features, ["x"], "integrated gradients", ZERO, steps=1)
    assert "4 of 4 maps (x) miss more than 5% of f(x) - f(baseline)" in caplog.text
    caplog.clear()
    [grid] = attribution.attribute(bent, features, ["x"], "integrated gradients", ZERO, steps=32)
    exact = bent.weight[0] * features + 50 * features**4
    assert torch.allclose(grid, exact.sum(1), rtol=0.01) and not caplog.records


def test_small_parts_give_the_same_maps(model, images, monkeypatch):
    maps = attribution.encode(model, images[:2])
    base = torch.zeros_like(maps[:1])
    for method in ("integrated gradients", "Grad-CAM", "ablation"):
        whole = attribution.attribute(model, maps, ["pitch"], method, base, steps=4)
        with monkeypatch.context() as patch:
            patch.setattr(attribution, "MEMORY", 0)  # one frame at once
            alone = attribution.attribute(model, maps, ["pitch"], method, base, steps=4)
        assert torch.allclose(whole, alone, atol=1e-4)


def test_the_head_answers_for_a_motion_too(model, images):
    maps = attribution.encode(model, images)
    action = torch.randn(5, 6)
    expected = model.imagine(maps, action).pose[:, [3, 0]]
    torch.testing.assert_close(attribution.Head(model, ["roll", "x"])(maps, action), expected)


def test_pose_targets():
    pose = torch.tensor([[3.0, 4.0, 0.0, 0.0, 0.0, 90.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert attribution.pose_target(pose, "translation").tolist() == [5, 0]
    assert torch.allclose(attribution.pose_target(pose, "rotation"), torch.tensor([90.0, 0.0]))
    assert attribution.pose_target(pose, "y").tolist() == [4, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, f: attribution.attribute(m, f, ["depth"], "Grad-CAM", ZERO),
        lambda m, f: attribution.attribute(m, f, ["x"], "saliency", ZERO),
        lambda m, f: attribution.baseline_map(m, "black", f),
        lambda m, f: attribution.baseline_map(m, "mean", f),
        lambda m, f: attribution.attention_grid(m, f, "gradient"),
        lambda m, f: attribution.to_grid(f, f, "none"),
    ],
)
def test_unknown_names_are_refused(additive, features, call):
    with pytest.raises(ValueError, match=r"is unknown; one of|give `training` frames"):
        call(additive, features)


# Attention


def test_recorder_gives_every_layer_and_is_removed(model, images):
    features = attribution.encode(model, images)
    before = model.imagine(features, torch.zeros(5, 6)).pose
    weights = attribution.attention(model, features)
    tokens = 1 + model.world.tokens.count
    assert weights.shape == (2, 5, 2, tokens, tokens)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 5, 2, tokens), atol=1e-5)
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)
    assert torch.equal(model.imagine(features, torch.zeros(5, 6)).pose, before)


def test_recorder_is_removed_after_an_error(model):
    def hooks():
        layers = [block.attention for block in model.world.blocks]
        return [(layer.recorded, len(layer.softmax._forward_hooks)) for layer in layers]

    model.world.blocks[1].attention.recorded = True
    before = hooks()
    with pytest.raises(RuntimeError, match="on purpose"), attribution.recorder(model):
        assert [kept for _, kept in hooks()] == [1, 1]
        raise RuntimeError("on purpose")
    assert hooks() == before == [(False, 0), (True, 0)]
    model.world.blocks[1].attention.recorded = False


def test_no_attention_without_a_transformer():
    config = ModelConfig(token_type="none", backbone="compact", channels=C, image_size=48)
    with pytest.raises(ValueError, match="no attention to record"):
        attribution.attention(CardiacDreamer(config), torch.rand(1, C, H, H))


def test_rollout_of_identity_is_identity():
    eye = torch.eye(5).expand(3, 2, 4, 5, 5)
    assert torch.equal(attribution.rollout(eye), torch.eye(5).expand(3, 2, 5, 5))


def test_rollout_by_hand():
    one = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(1, 1, 2, 2)  # both attend to the second
    flow = attribution.rollout(torch.stack([one, one]))
    assert torch.allclose(flow[0, 0], torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    assert torch.allclose(flow[1, 0], torch.tensor([[0.25, 0.75], [0.0, 1.0]]))


def test_channel_share_lies_where_the_channel_does():
    features = torch.zeros(1, 2, 2, 2)
    features[0, 0] = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # channel 1 is silent
    one = attribution.to_grid(torch.tensor([[1.0, 0.0]]), features, "channel")
    assert torch.allclose(one[0], torch.tensor([[0.75, 0.0], [0.0, 0.25]]))
    both = attribution.to_grid(torch.tensor([[0.6, 0.4]]), features, "channel")
    assert torch.allclose(both[0], torch.tensor([[0.55, 0.1], [0.1, 0.25]]))


def test_patch_share_lies_on_its_cell():
    share = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    grid = attribution.to_grid(share, torch.rand(1, 3, 2, 2), "patch")
    assert grid[0].tolist() == share.view(2, 2).tolist()


def test_a_fine_share_lies_on_the_cell_around_it():
    share = torch.zeros(1, 4 + 16)  # a coarse level of 2 x 2, a fine one of 4 x 4
    share[0, 3], share[0, 4 + 4 * 2 + 1], share[0, 4 + 3] = 0.5, 0.3, 0.2
    grid = attribution.to_grid(share, torch.rand(1, 3, 2, 2), "patch")
    assert torch.allclose(grid[0], torch.tensor([[0.0, 0.2], [0.3, 0.5]]))


def test_shares_of_both_kinds_meet_on_the_grid():
    features = torch.zeros(1, 2, 2, 2)
    features[0, 0] = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    share = torch.tensor([[0.1, 0.2, 0.0, 0.0, 0.4, 0.0]])  # four cells, two channels
    grid = attribution.to_grid(share, features, "both")
    assert torch.allclose(grid[0], torch.tensor([[0.4, 0.2], [0.0, 0.1]]))


@pytest.mark.parametrize(
    "fields",
    [
        {"hierarchy": 2}, {"hierarchy": 3, "positions": "learned-2d", "pooling": "action"},
        {"token_type": "both"}, {"token_type": "both", "pooling": "generalised-mean"},
        {"pooling": "attention", "token_dropout": 0.5},
        {"token_type": "channel", "pooling": "action"},
    ],
    ids=str,
)  # fmt: skip
def test_options_have_attention_and_maps(fields, images):
    net = tiny(**fields)
    features = attribution.encode(net, images)
    weights = attribution.attention(net, features)
    tokens = 1 + net.config.tokens
    assert weights.shape == (2, 5, 2, tokens, tokens)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 5, 2, tokens), atol=1e-5)
    if "hierarchy" in fields:
        assert (weights[..., ~net.world.tokens.mask] == 0).all()
    pose = net.imagine(features, torch.zeros(5, 6)).pose
    with attribution.recorder(net):
        assert torch.allclose(net.imagine(features, torch.zeros(5, 6)).pose, pose, atol=1e-4)
    for kind in attribution.ATTENTION:
        grid = attribution.attention_grid(net, features, kind)
        assert grid.shape == (5, H, H) and (grid >= 0).all()
    share = weights.mean(2)[..., 0, 1:]  # on the grid its total is kept
    grid = attribution.to_grid(share, features, net.config.token_type)
    assert torch.allclose(grid.sum((-1, -2)), share.sum(-1), atol=1e-5)
    zero = torch.zeros_like(features[:1])
    maps = attribution.attribute(net, features, ["roll"], "Grad-CAM", zero)
    assert maps.shape == (1, 5, H, H)


@pytest.mark.parametrize("kind", attribution.ATTENTION)
def test_attention_grids(model, images, kind):
    features = attribution.encode(model, images)
    grid = attribution.attention_grid(model, features, kind)
    assert grid.shape == (5, H, H) and (grid >= 0).all() and (grid.sum((1, 2)) <= 1 + 1e-5).all()
