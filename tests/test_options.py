import pytest
import scans
import torch
from safetensors.torch import load_file, save_file

from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.options import BothTokens, Pooling, TwoLevelTokens, drop_tokens
from dreamer.tokens import MAPS, sinusoids

TINY = {**scans.TINY, "num_layers": 2}
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


def identity(tokens):
    for layer in (tokens.embedding, *tokens.heads.values()):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return tokens


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


def test_learned_positions_start_from_sinusoids():
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


def test_without_positions_cells_can_be_exchanged():
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
def test_windows_do_not_attend_to_each_other_within_a_block(recorded):
    # 1 action, 4 coarse and 16 fine tokens in windows of 2 x 2; fine token 0 lies in the first.
    world = tiny("patch", hierarchy=2).eval().world
    block = world.blocks[0]
    block.attention.recorded = recorded
    x = torch.randn(1, 21, 16)
    changed = x.clone()
    changed[0, 5] += 1
    before, after = block(x, world.tokens.mask), block(changed, world.tokens.mask)
    same = torch.isclose(before, after, atol=1e-6).all(-1)[0]
    window = {5, 6, 9, 10}  # rows 0 and 1 of columns 0 and 1 of the fine level
    assert set(torch.nonzero(~same)[:, 0].tolist()) == {0, 1, 2, 3, 4} | window
    # Every token attends to the coarse tokens.
    changed = x.clone()
    changed[0, 3] += 1
    assert not torch.isclose(before, block(changed, world.tokens.mask)).all(-1).any()


def test_one_window_is_full_attention():
    world = tiny("patch", hierarchy=4).eval().world
    assert world.tokens.mask.all()
    x = torch.randn(2, 21, 16)
    torch.testing.assert_close(world.blocks[0](x, world.tokens.mask), world.blocks[0](x))


def pooling(kind, **fields):
    return Pooling(ModelConfig(pooling=kind, **TINY | fields))


def test_poolings_that_start_as_the_mean():
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
    features[0, 5, 0, 1] = 4.0  # one cell, marked by channel 5
    features[0, 0] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with torch.no_grad():
        pool.queries[0, 5] = 100.0  # the first group, channels 0 and 1, attends to it
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


def test_a_dropped_token_receives_the_mean_update_of_the_kept_ones():
    world = tiny("patch", token_dropout=0.5).world

    class Double(torch.nn.Module):
        def forward(self, x, mask):
            return 2 * x

    world.blocks = torch.nn.ModuleList([Double()])
    x = torch.randn(3, 5, 16)
    found = drop_tokens(world._blocks, x, world.tokens.mask, world.dropped)
    kept = torch.isclose(found, 2 * x).all(-1)  # [B, 1 + tokens]
    assert kept[:, 0].all() and kept.sum(1).tolist() == [3, 3, 3]
    for frame in range(3):
        moved = x[frame, 1:][kept[frame, 1:]].mean(0)
        torch.testing.assert_close(found[frame][~kept[frame]], x[frame][~kept[frame]] + moved)
    several = [drop_tokens(world._blocks, x, None, world.dropped) for _ in range(9)]
    several = torch.cat([torch.isclose(result, 2 * x).all(-1) for result in several])
    assert len(several.unique(dim=0)) > 1


def test_windows_hold_among_the_kept_tokens():
    torch.manual_seed(0)
    world = tiny("patch", hierarchy=2, token_dropout=0.5, dropout=0.0).world
    seen = []
    world.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given))
    x = torch.randn(2, 21, 16)
    drop_tokens(world._blocks, x, world.tokens.mask, world.dropped)
    tokens, mask = seen[0]
    assert tokens.shape == (2, 11, 16) and mask.shape == (2, 1, 11, 11)
    numbers = torch.cdist(tokens, x).argmin(-1)  # which token each kept one is
    for frame in range(2):
        expected = world.tokens.mask[numbers[frame]][:, numbers[frame]]
        assert torch.equal(mask[frame, 0], expected)


def test_both_kinds_share_a_sequence_and_are_restored_by_their_mean():
    features = torch.arange(5 * 2 * 3, dtype=torch.float32).reshape(1, 5, 2, 3)
    tokens = BothTokens(5, (2, 3), width=6)
    identity(tokens.patch), identity(tokens.channel)
    embedded = tokens.embed(features)
    assert tokens.count == 11 and embedded.shape == (1, 11, 6)
    for head in MAPS:
        torch.testing.assert_close(tokens.restore(embedded, head), features)
        patch_only = torch.cat((embedded[:, :6], torch.zeros(1, 5, 6)), dim=1)
        torch.testing.assert_close(tokens.restore(patch_only, head), features / 2)


def test_two_levels_round_trip_and_windows():
    fine = torch.arange(3 * 4 * 6, dtype=torch.float32).reshape(1, 3, 4, 6)
    coarse = -torch.arange(5 * 2 * 3, dtype=torch.float32).reshape(1, 5, 2, 3)
    features = torch.cat((coarse, torch.pixel_unshuffle(fine, 2)), dim=1)  # [1, 17, 2, 3]
    tokens = TwoLevelTokens(5, 3, (2, 3), width=5, window=2)
    identity(tokens.coarse), identity(tokens.fine)
    embedded = tokens.embed(features)
    assert tokens.count == 30 and embedded.shape == (1, 30, 5)
    torch.testing.assert_close(embedded[0, 6 + 7, :3], fine[0, :, 1, 1])  # row 1, column 1 of 6
    for head in MAPS:
        torch.testing.assert_close(tokens.restore(embedded, head), features)
    mask = tokens.mask
    assert mask[:, :7].all() and mask[:7].all()
    assert mask[7:, 7:].sum(1).tolist() == [4] * 24 and torch.equal(mask, mask.T)
    assert mask[7, 7 + 7] and not mask[7, 7 + 2]
    with pytest.raises(ValueError, match=r"expected a feature map \[B, 5, 2, 3\]"):
        tokens.embed(features[:, :, :, :2])
