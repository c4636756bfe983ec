"""Maps whose answer is known by hand, and checks that tell a true map from a false one."""

import itertools

import captum.metrics
import numpy as np
import pytest
import torch
from torch import nn

from dreamer import attribution
from dreamer.study import faithfulness
from dreamer.model import CardiacDreamer, Dream, ModelConfig

C, H = 8, 3


class Additive(nn.Module):
    """A stand-in whose pose is linear in the map: pose = sum over (c, y, x) of weight · feature."""

    def __init__(self, bend: float = 0.0):
        super().__init__()
        self.config = ModelConfig(backbone="compact", channels=C, image_size=48, d_model=16,
                                  num_heads=2, num_layers=1, guidance=(8, 8))  # fmt: skip
        self.weight = torch.randn(6, C, H, H, generator=torch.Generator().manual_seed(1))
        self.bend = bend
        self.register_buffer("image_mean", torch.tensor(0.25))

    def encode(self, image):
        """Each cell's mean grey level, in all channels."""
        return nn.functional.adaptive_avg_pool2d(image, H).expand(-1, C, -1, -1)

    def imagine(self, features, action):
        pose = torch.einsum("bcyx,icyx->bi", features, self.weight)
        pose = pose + self.bend * features.pow(4).sum((1, 2, 3))[:, None]
        return Dream(features, features, features, features.mean((2, 3)), pose)


@pytest.fixture
def additive():
    return Additive()


@pytest.fixture
def features():
    return torch.rand(4, C, H, H, generator=torch.Generator().manual_seed(2)) + 0.1


def taught(**fields):
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="compact", channels=C, width=4, image_size=48, d_model=16, num_heads=2,
        num_layers=2, guidance=(16, 8), **fields,
    )  # fmt: skip
    net = CardiacDreamer(config).eval()
    with torch.no_grad():  # attention that is not nearly even, biases that are not zero
        for block in net.world.blocks:
            block.attention.qkv.weight.mul_(4)
    return net


@pytest.fixture(scope="module", params=["patch", "channel"])
def model(request):
    return taught(token_type=request.param)


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 1, 48, 48), generator=torch.Generator().manual_seed(3),
                         dtype=torch.uint8)  # fmt: skip


LINEAR = ("integrated_gradients", "gradient_x_activation", "shapley", "ablation")


@pytest.mark.parametrize("method", LINEAR)
def test_linear_head_gives_weight_times_input(additive, features, method):
    maps = attribution.attribute(additive, features, "z", method)
    product = additive.weight[2] * features
    assert torch.allclose(maps.grid, product.sum(1), atol=1e-5)
    if maps.channels is not None:
        assert torch.allclose(maps.channels, product.sum((2, 3)), atol=1e-5)


def test_linear_head_with_a_baseline(additive, features):
    base = torch.full((1, C, H, H), 0.3)
    for method in ("integrated_gradients", "shapley", "ablation"):
        maps = attribution.attribute(additive, features, "yaw", method, base)
        assert torch.allclose(maps.grid, (additive.weight[5] * (features - base)).sum(1), atol=1e-5)


def test_grad_cam_of_a_linear_head(additive, features):
    maps = attribution.attribute(additive, features, "x", "grad_cam")
    gradient = additive.weight[0].mean((1, 2))  # [C]
    product = gradient[:, None, None] * features
    assert torch.allclose(maps.grid, product.sum(1), atol=1e-5)
    assert torch.allclose(maps.channels, product.sum((2, 3)), atol=1e-5)


def test_occlusion_of_a_linear_model(additive):
    images = torch.rand(2, 1, 48, 48)
    maps = attribution.attribute(
        additive, additive.encode(images), "roll", "occlusion", images=images
    )
    seen = nn.functional.adaptive_avg_pool2d(images, H)[:, 0] - 0.25
    assert torch.allclose(maps.grid, additive.weight[3].sum(0) * seen, atol=1e-5)
    with pytest.raises(ValueError, match="give `images`"):
        attribution.attribute(additive, additive.encode(images), "roll", "occlusion")


@pytest.mark.parametrize("target", attribution.TARGETS)
def test_complete_methods_sum_to_the_difference(model, images, target):
    features = attribution.encode(model, images)
    base = attribution.baseline_map(model, "mean", images, images)
    ask = attribution.Question(model, target)
    with torch.no_grad():
        gap = ask(features, torch.zeros(5, 6)) - ask(base, torch.zeros(1, 6))
    shapley = attribution.attribute(model, features, target, "shapley", base, permutations=2)
    assert torch.allclose(shapley.grid.sum((1, 2)), gap, atol=1e-3 * float(gap.abs().max()) + 1e-5)
    gradients = attribution.attribute(model, features, target, baseline=base, limit=32)
    missed = (gradients.grid.sum((1, 2)) - gap).abs() / gap.abs()
    assert torch.allclose(missed, gradients.error, atol=1e-3)
    assert torch.allclose(gradients.channels.sum(1), gradients.grid.sum((1, 2)), atol=1e-4)


def test_steps_grow_until_the_integral_converges(features, caplog):
    bent = Additive(bend=50.0)
    coarse = attribution.attribute(bent, features, "x", steps=1)
    assert (coarse.error <= attribution.TOLERANCE).all() and (coarse.steps > 1).all()
    exact = bent.weight[0] * features + 50 * features**4  # each term of the sum keeps its own share
    assert torch.allclose(coarse.grid, exact.sum(1), rtol=0.06)
    assert not caplog.records


def test_only_the_piece_of_the_way_that_misses_is_asked_again():
    class Kink(nn.Module):  # at 0.7 of the way of the first map; the second never gets there
        def forward(self, features, action):
            mean = features.mean((1, 2, 3))
            return mean + 100 * (mean - 0.7).clamp_min(0)

    x = torch.ones(2, C, H, H) * torch.tensor([1.0, 0.5])[:, None, None, None]
    given = Kink(), x, torch.zeros_like(x), torch.zeros(2, 6)
    maps, error, steps = attribution._integrated(*given, steps=4, limit=64, rows=16)
    assert steps[1] == 4 and steps[0] in (12, 20, 28)
    assert (error <= attribution.TOLERANCE).all()
    assert torch.allclose(maps.sum((1, 2, 3)), torch.tensor([31.0, 0.5]), rtol=0.05)


def test_a_map_that_does_not_converge_is_told(features, caplog):
    maps = attribution.attribute(Additive(bend=50.0), features, "x", steps=1, limit=1)
    assert (maps.error > attribution.TOLERANCE).all()
    assert "4 of 4 maps (x) miss more than 5% of f(x) - f(baseline) after 1 steps" in caplog.text


def test_steps_are_taken_as_they_are_where_nothing_is_to_converge(features, caplog):
    maps = attribution.attribute(Additive(bend=50.0), features, "x", steps=1, limit=0)
    assert (maps.error > attribution.TOLERANCE).all() and (maps.steps == 1).all()
    assert not caplog.records


def test_small_parts_give_the_same_maps(model, images, monkeypatch):
    features = attribution.encode(model, images[:2])
    given = {"steps": 4, "limit": 8, "permutations": 1}
    for method in attribution.METHODS[:5]:
        whole = attribution.attribute(model, features, "pitch", method, **given)
        with monkeypatch.context() as patch:
            patch.setattr(attribution, "MEMORY", 0)  # one row at once
            alone = attribution.attribute(model, features, "pitch", method, **given)
        if method != "shapley":  # draws other permutations for other parts
            assert torch.allclose(whole.grid, alone.grid, atol=1e-4)


def test_answers():
    pose = torch.tensor([[3.0, 4.0, 0.0, 0.0, 0.0, 90.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert attribution.answer(pose, "translation").tolist() == [5, 0]
    assert torch.allclose(attribution.answer(pose, "rotation"), torch.tensor([90.0, 0.0]))
    assert attribution.answer(pose, "y").tolist() == [4, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, f: attribution.attribute(m, f, "depth"),
        lambda m, f: attribution.attribute(m, f, "x", "saliency"),
        lambda m, f: attribution.baseline_map(m, "black", f),
        lambda m, f: attribution.baseline_map(m, "mean", f),
        lambda m, f: attribution.attention_grid(m, f, "gradient"),
        lambda m, f: attribution.read(f, "all"),
        lambda m, f: attribution.to_grid(f, f, "none"),
        lambda m, f: faithfulness.control("noise", f, (3, 3)),
    ],
)
def test_unknown_names_are_refused(additive, features, call):
    with pytest.raises(ValueError, match=r"is unknown; one of|training frames are needed"):
        call(additive, features)


# Attention


def test_recorder_gives_every_layer_and_lets_go(model, images):
    features = attribution.encode(model, images)
    before = model.imagine(features, torch.zeros(5, 6)).pose
    weights = attribution.attention(model, features)
    tokens = 1 + model.world.tokens.count
    assert weights.shape == (2, 5, 2, tokens, tokens)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 5, 2, tokens), atol=1e-5)
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)
    assert torch.equal(model.imagine(features, torch.zeros(5, 6)).pose, before)


def test_recorder_lets_go_after_an_error(model):
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
    one = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(1, 1, 2, 2)  # both tokens read the second
    flow = attribution.rollout(torch.stack([one, one]))
    assert torch.allclose(flow[0, 0], torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    assert torch.allclose(flow[1, 0], torch.tensor([[0.25, 0.75], [0.0, 1.0]]))


def test_readers():
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.6, 0.4], [0.0, 0.2, 0.8]])
    assert torch.allclose(attribution.read(weights, "action"), torch.tensor([0.3, 0.5]))
    assert torch.allclose(attribution.read(weights, "tokens"), torch.tensor([0.4, 0.6]))


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


def test_shares_of_both_sorts_meet_on_the_grid():
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
def test_options_are_seen_through(fields, images):
    net = taught(**fields)
    features = attribution.encode(net, images)
    weights = attribution.attention(net, features)
    tokens = 1 + net.config.tokens
    assert weights.shape == (2, 5, 2, tokens, tokens)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 5, 2, tokens), atol=1e-5)
    if "hierarchy" in fields:
        assert (weights[..., ~net.world.sees] == 0).all()
    pose = net.imagine(features, torch.zeros(5, 6)).pose
    with attribution.recorder(net):
        assert torch.allclose(net.imagine(features, torch.zeros(5, 6)).pose, pose, atol=1e-4)
    for kind in attribution.ATTENTION:
        grid = attribution.attention_grid(net, features, kind)
        assert grid.shape == (5, H, H) and (grid >= 0).all()
    share = attribution.read(weights.mean(2), "action")  # on the grid its total is kept
    grid = attribution.to_grid(share, features, net.config.token_type)
    assert torch.allclose(grid.sum((-1, -2)), share.sum(-1), atol=1e-5)
    maps = attribution.attribute(net, features, "roll", "gradient_x_activation")
    assert maps.grid.shape == (5, H, H) and maps.channels.shape == features.shape[:2]
    assert torch.allclose(maps.grid.sum((1, 2)), maps.channels.sum(1), atol=1e-4)
    before = net.state_dict()
    for stage, fresh in faithfulness.randomised(net):  # each stage draws something anew
        after = {name: value.clone() for name, value in fresh.state_dict().items()}
        assert any(not torch.equal(after[name], before[name]) for name in after), stage
        before = after


@pytest.mark.parametrize("kind", attribution.ATTENTION)
def test_attention_grids(model, images, kind):
    features = attribution.encode(model, images)
    grid = attribution.attention_grid(model, features, kind)
    assert grid.shape == (5, H, H) and (grid >= 0).all() and (grid.sum((1, 2)) <= 1 + 1e-5).all()


# Checks


def test_deletion_curve_of_an_additive_model(additive, features):
    base = torch.zeros(1, C, H, H)
    grid = attribution.attribute(additive, features, "x", baseline=base).grid
    share, found = faithfulness.curves(additive, features, {("true", "x"): grid}, ["x"], base)
    deletion, insertion = found["true", "x"]
    assert share.tolist() == [k / 9 for k in range(10)]
    order = grid.flatten(1).abs().argsort(1, descending=True)
    gone = torch.cumsum(grid.flatten(1).gather(1, order), 1)
    zero = torch.zeros(4, 1)
    assert torch.allclose(deletion, torch.cat((zero, gone), 1).abs(), atol=1e-5)
    left = torch.cat((gone[:, -1:], gone[:, -1:] - gone), 1)
    assert torch.allclose(insertion, left.abs(), atol=1e-5)


def test_a_true_map_has_better_curves_than_its_reverse(additive, features):
    additive.weight = additive.weight.abs()
    base = torch.zeros(1, C, H, H)
    grid = attribution.attribute(additive, features, "x", baseline=base).grid
    maps = {("true", "x"): grid, ("false", "any"): 1 / grid}
    _, found = faithfulness.curves(additive, features, maps, ["x"], base, points=5)
    true, false = (found[name, "x"].mean(-1) for name in ("true", "false"))
    assert (true[0] > false[0]).all() and (true[1] < false[1]).all()


def test_infidelity_is_captums(additive, features):
    base = torch.zeros(1, C, H, H)
    true = attribution.attribute(additive, features, "x").grid
    other = torch.rand(4, H, H, generator=torch.Generator().manual_seed(5))
    maps = {("true", "x"): true, ("scaled", "x"): 7 * true, ("other", "any"): other}
    mine = faithfulness.infidelity(additive, features, maps, ["x"], base, samples=500)
    mine = {method: value for (method, _), value in mine.items()}
    assert torch.allclose(mine["true"], torch.zeros(4), atol=1e-6)
    assert torch.allclose(mine["scaled"], torch.zeros(4), atol=1e-6)

    def hide(mask):
        torch.manual_seed(1)
        part = torch.rand(500, 1, 1, 1).repeat(len(mask) // 500, 1, 1, 1) / 2
        gone = (torch.rand_like(mask) < part).float()
        return gone, 1 - gone

    game = attribution.Cells(attribution.Question(additive, "x"))
    given = {"additional_forward_args": (features, base.expand_as(features), torch.zeros(4, 6))}
    ones = torch.ones(4, 1, H, H)
    theirs, change = (
        captum.metrics.infidelity(
            game, hide, ones, grid, n_perturb_samples=500, normalize=normalize, **given
        )
        for grid, normalize in ((other[:, None], True), (torch.zeros(4, 1, H, H), False))
    )
    assert torch.allclose(mine["other"], theirs / change, rtol=0.15)


def test_sensitivity_of_a_linear_gradient(additive, features):
    found = faithfulness.sensitivity(
        additive, features, "gradient_x_activation", "x", torch.zeros(1, C, H, H)
    )
    assert found.shape == (4,) and (found > 0).all() and (found < 0.5).all()


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


def test_runs_asked_side_by_side_say_the_same(images):
    """What is drawn at random hangs on no state that threads share."""
    nets = {name: taught(token_type=name) for name in ("patch", "channel")}
    before = torch.get_num_threads()

    def ask(name):
        features = attribution.encode(nets[name], images)
        base = torch.zeros_like(features[:1])
        game = attribution.attribute(nets[name], features, "x", "shapley", permutations=2, seed=3)
        fresh = next(n.head[0].weight for _, n in faithfulness.randomised(nets[name], seed=1))
        how = faithfulness.sensitivity(nets[name], features, "grad_cam", "x", base, seed=2)
        return game.grid, fresh, how, torch.get_num_threads()

    try:
        torch.set_num_threads(2)
        found = faithfulness.each(ask, nets)
        assert torch.get_num_threads() == 2 and list(found) == list(nets)
        torch.set_num_threads(1)
        expected = faithfulness.each(ask, nets)
    finally:
        torch.set_num_threads(before)
    for name in nets:
        assert found[name][-1] == 1
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(ZeroDivisionError):
        faithfulness.each(lambda run: 1 / 0, ["a", "b"])
