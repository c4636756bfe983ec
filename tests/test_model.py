import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torchvision.models import resnet34

from dreamer.data import Statistics
from dreamer.model import Attention, Backbone, CardiacDreamer, ModelConfig, Pooling, sinusoids

TINY = {
    "backbone": "compact", "image_size": 32, "channels": 16, "width": 4, "d_model": 16,
    "num_heads": 2, "num_layers": 2, "guidance": (32, 16),
}  # fmt: skip
VARIANTS = ("patch", "channel")
OPTIONS = [
    {"positions": "learned"}, {"positions": "learned-2d"}, {"positions": "none"},
    {"hierarchy": 2}, {"hierarchy": 2, "positions": "learned-2d", "token_dropout": 0.5},
    {"pooling": "attention"}, {"pooling": "generalised-mean"}, {"pooling": "action"},
    {"token_dropout": 0.5}, {"token_type": "both"},
    {"token_type": "channel", "positions": "learned", "pooling": "action", "token_dropout": 0.5},
    {"token_type": "both", "positions": "learned", "pooling": "attention", "token_dropout": 0.5},
]  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


def tiny(token_type, **fields):
    torch.manual_seed(0)
    return CardiacDreamer(ModelConfig(token_type=token_type, **TINY | fields))


@pytest.mark.parametrize(
    ("token_type", "total", "embed", "head"),
    [("channel", 65_188_584, 38_400, 37_681), ("patch", 66_256_262, 393_984, 393_728)],
)
def test_exact_parameter_counts(token_type, total, embed, head):
    with torch.device("meta"):
        model = CardiacDreamer(ModelConfig(token_type=token_type))
    assert count(model) == total
    assert count(model.backbone) == 21_278_400
    assert count(model.world.action) == 214_464
    assert count(model.world.norm) == 1_536
    assert count(model.world.blocks) == 42_527_232
    assert count(model.head) == 1_053_190
    assert count(model.world.tokens.embedding) == embed
    assert [count(h) for h in model.world.tokens.heads.values()] == [head, head]


@pytest.mark.parametrize("token_type", VARIANTS)
@pytest.mark.parametrize(("size", "grid"), [(224, 7), (448, 14)])
def test_grid_follows_the_image(token_type, size, grid):
    config = ModelConfig(token_type=token_type, image_size=size, d_model=32, num_heads=4,
                         num_layers=1)  # fmt: skip
    model = CardiacDreamer(config).eval()
    dream = model(torch.rand(1, 1, size, size), torch.zeros(1, 6))
    assert dream.features.shape == dream.next_features.shape == (1, 512, grid, grid)
    assert dream.reconstruction.shape == (1, 512, grid, grid)
    assert (dream.pooled.shape, dream.pose.shape) == ((1, 512), (1, 6))
    torch.testing.assert_close(dream.pooled, dream.next_features.mean((2, 3)))


def test_fused_and_recorded_attention_agree():
    torch.manual_seed(0)
    attention = Attention(48, 4, dropout=0.1).eval()
    x, rows = torch.randn(3, 21, 48), []
    fused = attention(x)
    attention.recorded = True
    attention.softmax.register_forward_hook(lambda module, inputs, output: rows.append(output))
    torch.testing.assert_close(attention(x), fused, atol=1e-5, rtol=0)
    assert rows[0].shape == (3, 4, 21, 21)
    torch.testing.assert_close(rows[0].sum(-1), torch.ones(3, 4, 21))


@pytest.mark.parametrize("norm_first", [False, True])
def test_block_equals_the_librarys(norm_first):
    # The library's encoder layer with the same weights is an independent check of the whole block.
    model = tiny("patch", norm_first=norm_first).eval()
    block = model.world.blocks[0]
    theirs = torch.nn.TransformerEncoderLayer(
        16, 2, 64, activation="gelu", batch_first=True, norm_first=norm_first
    ).eval()
    theirs.self_attn.in_proj_weight = block.attention.qkv.weight
    theirs.self_attn.in_proj_bias = block.attention.qkv.bias
    theirs.self_attn.out_proj = block.attention.out
    theirs.linear1, theirs.linear2 = block.feedforward[0], block.feedforward[3]
    theirs.norm1, theirs.norm2 = block.norm1, block.norm2
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(x), theirs(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("token_type", VARIANTS)
def test_imagined_map_follows_the_action(token_type):
    model, image = tiny(token_type).eval(), torch.rand(1, 1, 32, 32)
    still = model(image, torch.zeros(1, 6))
    moved = model(image, torch.tensor([[5.0, 0, 0, 0, 0, 0]]))
    assert not torch.allclose(still.next_features, moved.next_features, atol=1e-4)
    assert not torch.allclose(still.pose, moved.pose, atol=1e-5)
    torch.testing.assert_close(still.features, moved.features)
    # Every cell of the imagined map has its own value: it isn't one token repeated.
    assert moved.next_features.std(dim=(2, 3)).min() > 1e-4


@pytest.mark.parametrize("token_type", VARIANTS)
def test_frames_do_not_depend_on_their_batch(token_type):
    model, image, action = tiny(token_type).eval(), torch.rand(4, 1, 32, 32), torch.randn(4, 6)
    alone = torch.cat([model(image[i : i + 1], action[i : i + 1]).pose for i in range(4)])
    torch.testing.assert_close(model(image, action).pose, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("token_type", VARIANTS)
def test_one_batch_is_overfitted(token_type):
    model = tiny(token_type, dropout=0.0)
    image, action, pose = torch.rand(4, 1, 32, 32), torch.randn(4, 6), torch.randn(4, 6)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        loss = (model(image, action).pose - pose).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.01


def test_no_tokens_is_the_direct_control():
    model = tiny("none").eval()
    dream = model(torch.rand(2, 1, 32, 32), torch.randn(2, 6))
    assert dream.next_features is dream.features
    torch.testing.assert_close(dream.pose, model.guide(dream.features.mean((2, 3))))


def test_statistics_are_the_models_units():
    plain, scaled = tiny("patch").eval(), tiny("patch").eval()
    units = Statistics(0.2, 0.5, [1.0, 2, 3, 4, 5, 6], [2.0] * 6, [10.0] * 6)
    for name, value in units._asdict().items():
        getattr(scaled, name).copy_(torch.as_tensor(value))
    image, action = torch.rand(2, 1, 32, 32), torch.randn(2, 6)
    expected = plain((image - 0.2) / 0.5, action / 10).pose * 2 + torch.tensor(units.pose_mean)
    torch.testing.assert_close(scaled(image, action).pose, expected, atol=1e-5, rtol=1e-5)


def test_grey_conversion_of_given_weights(tmp_path):
    torch.manual_seed(0)
    colour = resnet34().eval()
    file = tmp_path / "colour.safetensors"
    save_file({name: value.contiguous() for name, value in colour.state_dict().items()}, file)
    torch.save(colour.state_dict(), tmp_path / "colour.pth")
    grey = Backbone(ModelConfig(weights=str(file))).eval()
    image = torch.rand(1, 1, 64, 64)
    # Three equal colours through the averaged filters: a third of the colour net's response.
    stem = colour.bn1(colour.conv1(image.expand(-1, 3, -1, -1) / 3))
    torch.testing.assert_close(grey.stages[0][1](grey.stages[0][0](image)), stem, atol=1e-5, rtol=0)
    again = Backbone(ModelConfig(weights=str(tmp_path / "colour.pth"))).eval()
    torch.testing.assert_close(grey(image), again(image))


def test_refuses_weights_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.pth"):
        Backbone(ModelConfig(weights="nowhere.pth"))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a ResNet34 state dict"):
        Backbone(ModelConfig(weights=str(tmp_path / "other.safetensors")))
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "part.safetensors")
    with pytest.raises(RuntimeError, match="does not fit ResNet34"):
        Backbone(ModelConfig(weights=str(tmp_path / "part.safetensors")))


def test_frozen_stages_stay():
    backbone = Backbone(ModelConfig(freeze=2)).train()
    assert [s.training for s in backbone.stages] == [False, False, True, True, True]
    before = backbone.stages[0][1].running_mean.clone()
    backbone(torch.rand(2, 1, 64, 64)).sum().backward()
    assert torch.equal(before, backbone.stages[0][1].running_mean)
    assert backbone.stages[1][0].conv1.weight.grad is None
    assert backbone.stages[2][0].conv1.weight.grad is not None


@pytest.mark.parametrize(
    ("image", "action", "told"),
    [
        ((1, 3, 32, 32), (1, 6), r"expected images \[B, 1, 32, 32\], got \[1, 3, 32, 32\]"),
        ((1, 1, 48, 48), (1, 6), r"expected images \[B, 1, 32, 32\]"),
        ((2, 1, 32, 32), (1, 6), r"expected actions \[2, 6\], got \[1, 6\]"),
        ((1, 1, 32, 32), (1, 7), r"expected actions \[1, 6\]"),
    ],
)
def test_refuses_wrong_shapes(image, action, told):
    with pytest.raises(ValueError, match=told):
        tiny("patch")(torch.zeros(image), torch.zeros(action))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"token_typ": "patch"}, "token_typ"),
        ({"token_type": "pixel"}, "patch"),
        ({"d_model": 770}, "multiple of num_heads"),
        ({"image_size": 100}, "multiple of 32"),
        ({"channels": 64}, "512 for resnet34"),
        ({"freeze": 6}, "at most 5"),
        ({"dropout": 1.0}, "less than 1"),
        ({"num_layers": 0}, "greater than or equal to 1"),
        ({"backbone": "compact", "weights": "imagenet"}, "trained from scratch"),
        ({"backbone": "compact", "channels": 20}, "multiple of 8"),
        ({"positions": "learned-2d", "token_type": "channel"}, "no row and no column"),
        ({"positions": "learned-2d", "token_type": "both"}, "no row and no column"),
        ({"positions": "learnt"}, "sinusoidal"),
        ({"hierarchy": 7, "token_type": "channel"}, "lies in no window"),
        ({"hierarchy": 7, "token_type": "both"}, "lies in no window"),
        ({"hierarchy": 4}, "do not divide the fine level's side of 14"),
        ({"hierarchy": -1}, "greater than or equal to 0"),
        ({"pooling": "max"}, "generalised-mean"),
        ({"token_dropout": 1.0}, "less than 1"),
        ({"token_type": "none", "positions": "none"}, "positions: token_type none has no tokens"),
        ({"token_type": "none", "hierarchy": 7}, "hierarchy: token_type none"),
        ({"token_type": "none", "pooling": "action"}, "pooling action: token_type none"),
        ({"token_type": "none", "token_dropout": 0.1}, "token_dropout: token_type none"),
    ],
)
def test_refuses_configurations(fields, told):
    with pytest.raises(ValidationError, match=told):
        ModelConfig(**fields)


# The options


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        # More than the default's 66,256,262 (patch) or 65,188,584 (channel), by formula.
        ({"positions": "learned"}, 50 * 768),
        ({"positions": "learned", "token_type": "channel"}, 513 * 768),
        ({"positions": "learned-2d"}, (1 + 7 + 7) * 768),
        ({"positions": "none"}, 0),
        # Embedding and two heads for fine tokens of 256 values.
        ({"hierarchy": 7}, 256 * 768 + 768 + 2 * (768 * 256 + 256)),
        ({"pooling": "attention"}, 8 * 512),
        ({"pooling": "generalised-mean", "token_type": "channel"}, 1),
        ({"pooling": "action"}, 768 * 512 + 512),
        ({"token_dropout": 0.5}, 0),
        # The channel tokens' embedding and heads on top of the patch tokens'.
        ({"token_type": "both"}, 38_400 + 2 * 37_681),
    ],
)
def test_parameters_of_the_options(fields, more):
    with torch.device("meta"):
        model = CardiacDreamer(ModelConfig(**fields))
    start = 65_188_584 if fields.get("token_type") == "channel" else 66_256_262
    assert count(model) == start + more


def test_default_weights_keep_their_names():
    parts = ("action", "blocks", "norm", "tokens")
    names = {name.split(".")[1] for name in tiny("patch").state_dict() if name.startswith("world")}
    assert names == set(parts)
    roots = {name.split(".")[0] for name in tiny("channel").state_dict()}
    units = {"image_mean", "image_std", "pose_mean", "pose_std", "action_std"}
    assert roots == {"backbone", "world", "head"} | units


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_every_option_runs_learns_and_comes_back(fields, tmp_path):
    model = tiny(**{"token_type": "patch", **fields})
    image, action = torch.rand(3, 1, 32, 32), torch.randn(3, 6)
    dream = model(image, action)
    (dream.pose.square().sum() + dream.next_features.sum() + dream.reconstruction.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert dream.next_features.shape == dream.reconstruction.shape == dream.features.shape
    assert dream.pooled.shape == (3, 16)
    # With dropout off, evaluation gives the same answer twice, also from a checkpoint.
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = CardiacDreamer(ModelConfig(**model.config.model_dump())).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    pose = model.eval()(image, action).pose
    assert torch.equal(again(image, action).pose, pose)
    moved = model(image, action + 5).next_features
    assert not torch.allclose(moved, model(image, action).next_features, atol=1e-5)


def test_learned_positions_begin_at_sinusoids():
    waves = sinusoids(5, 16)
    assert torch.equal(tiny("patch").world.positions(), waves)
    assert torch.equal(tiny("patch", positions="learned").world.positions(), waves)
    assert not tiny("patch", positions="none").world.positions().any()
    model, default = tiny("channel", positions="learned").eval(), tiny("channel").eval()
    image, action = torch.rand(1, 1, 32, 32), torch.randn(1, 6)
    assert torch.equal(model(image, action).pose, default(image, action).pose)


def test_positions_of_rows_and_columns():
    positions = tiny("patch", positions="learned-2d", hierarchy=4).world.positions
    with torch.no_grad():
        for number, level in enumerate((*positions.rows, *positions.columns)):
            level.copy_(torch.arange(len(level))[:, None] * 10.0**-number)
    table = positions()[0, :, 0]
    assert len(table) == 1 + 4 + 16 and table[0] == 0
    expected = [r + c / 100 for r in range(2) for c in range(2)]  # coarse rows, coarse columns
    expected += [r / 10 + c / 1000 for r in range(4) for c in range(4)]
    torch.testing.assert_close(table[1:], torch.tensor(expected))


def test_without_positions_places_can_be_exchanged():
    model = tiny("patch", positions="none").eval()
    features, action, order = torch.rand(2, 16, 2, 2), torch.randn(2, 6), torch.tensor([2, 0, 3, 1])
    mixed = features.flatten(2)[:, :, order].reshape(features.shape)
    expected = model.imagine(features, action).next_features.flatten(2)[:, :, order]
    found = model.imagine(mixed, action).next_features.flatten(2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_map_carries_both_levels():
    model, image = tiny("patch", hierarchy=2).eval(), torch.rand(2, 1, 32, 32)
    features = model.encode(image)
    assert features.shape == (2, 16 + 4 * 8, 2, 2)
    fine = model.backbone.stages[1](model.backbone.stages[0](image))  # [2, 8, 4, 4]
    torch.testing.assert_close(features[:, :16], model.backbone.stages[2](fine))
    torch.testing.assert_close(torch.pixel_shuffle(features[:, 16:], 2), fine)
    dream = model(image, torch.zeros(2, 6))
    torch.testing.assert_close(dream.pooled, dream.next_features[:, :16].mean((2, 3)))


@pytest.mark.parametrize("recorded", [False, True])
def test_windows_do_not_see_each_other_within_a_block(recorded):
    # 1 action, 4 coarse and 16 fine tokens in windows of 2 x 2; fine token 0 lies in the first.
    world = tiny("patch", hierarchy=2).eval().world
    block = world.blocks[0]
    block.attention.recorded = recorded
    x = torch.randn(1, 21, 16)
    changed = x.clone()
    changed[0, 5] += 1
    same = torch.isclose(block(x, world.sees), block(changed, world.sees), atol=1e-6).all(-1)[0]
    window = {5, 6, 9, 10}  # rows 0 and 1 of columns 0 and 1 of the fine level
    assert set(torch.nonzero(~same)[:, 0].tolist()) == {0, 1, 2, 3, 4} | window
    # A coarse token, and the action's, is seen by all.
    changed = x.clone()
    changed[0, 3] += 1
    assert not torch.isclose(block(x, world.sees), block(changed, world.sees)).all(-1).any()


def test_one_window_is_full_attention():
    world = tiny("patch", hierarchy=4).eval().world
    assert world.sees.all()
    x = torch.randn(2, 21, 16)
    torch.testing.assert_close(world.blocks[0](x, world.sees), world.blocks[0](x))


def pooling(kind, **fields):
    return Pooling(ModelConfig(pooling=kind, **TINY | fields))


def test_poolings_that_begin_as_the_mean():
    features = torch.randn(3, 16, 2, 2)  # restored maps have signs
    for kind in ("mean", "attention", "generalised-mean"):
        torch.testing.assert_close(pooling(kind)(features, None), features.mean((2, 3)))


def test_generalised_mean_by_hand():
    pool = pooling("generalised-mean")
    with torch.no_grad():
        pool.log_exponent.fill_(torch.log(torch.tensor(2.0)))
    features = torch.tensor([3.0, 1.0, 1.0, 1.0]).reshape(1, 1, 2, 2).expand(1, 16, 2, 2)
    expected = torch.full((1, 16), 3.0**0.5)  # the root of the mean of 9, 1, 1, 1
    torch.testing.assert_close(pool(features, None), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(pool(-features, None), -expected, atol=1e-3, rtol=0)


def test_attention_pooling_by_hand():
    pool = pooling("attention")
    features = torch.zeros(1, 16, 2, 2)
    features[0, 5, 0, 1] = 4.0  # one place, told by channel 5
    features[0, 0] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with torch.no_grad():
        pool.queries[0, 5] = 100.0  # the first group, channels 0 and 1, looks for it
    found = pool(features, None)[0]
    torch.testing.assert_close(found[0], torch.tensor(2.0))
    torch.testing.assert_close(found[5], torch.tensor(1.0))  # another group: still the mean


def test_action_pooling_reads_the_action_token_alone():
    model = tiny("patch", pooling="action").eval()
    token = torch.randn(2, 16)
    pooled = model.pooling(torch.randn(2, 16, 2, 2), token)
    torch.testing.assert_close(
        pooled, token @ model.pooling.read.weight.T + model.pooling.read.bias
    )


@pytest.mark.parametrize(("token_type", "share", "left"),
                         [("patch", 0.5, 2), ("patch", 0.99, 1), ("channel", 0.25, 12),
                          ("both", 0.3, 14)])  # fmt: skip
def test_token_dropout_leaves_exactly_its_share(token_type, share, left):
    model, seen = tiny(token_type, token_dropout=share, dropout=0.0), []
    for block in model.world.blocks:
        block.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    image, action = torch.rand(4, 1, 32, 32), torch.randn(4, 6)
    model(image, action)
    assert seen == [1 + left] * 2
    model.eval()(image, action)
    assert seen[2:] == [1 + model.config.tokens] * 2


def test_a_token_left_out_moves_as_the_kept_ones_did():
    world = tiny("patch", token_dropout=0.5).world

    class Double(torch.nn.Module):
        def forward(self, x, sees):
            return 2 * x

    world.blocks = torch.nn.ModuleList([Double()])
    x = torch.randn(3, 5, 16)
    found = world._some(x)
    kept = torch.isclose(found, 2 * x).all(-1)  # [B, 1 + tokens]
    assert kept[:, 0].all() and kept.sum(1).tolist() == [3, 3, 3]
    for frame in range(3):
        moved = x[frame, 1:][kept[frame, 1:]].mean(0)
        torch.testing.assert_close(found[frame][~kept[frame]], x[frame][~kept[frame]] + moved)
    several = torch.cat([torch.isclose(world._some(x), 2 * x).all(-1) for _ in range(9)])
    assert len(several.unique(dim=0)) > 1


def test_windows_hold_among_the_kept_tokens():
    torch.manual_seed(0)
    world = tiny("patch", hierarchy=2, token_dropout=0.5, dropout=0.0).world
    seen = []
    world.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given))
    x = torch.randn(2, 21, 16)
    world._some(x)
    tokens, sees = seen[0]
    assert tokens.shape == (2, 11, 16) and sees.shape == (2, 1, 11, 11)
    numbers = torch.cdist(tokens, x).argmin(-1)  # which token each kept one is
    for frame in range(2):
        expected = world.sees[numbers[frame]][:, numbers[frame]]
        assert torch.equal(sees[frame, 0], expected)
