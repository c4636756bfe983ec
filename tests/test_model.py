import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torchvision.models import resnet34

from dreamer.data import Statistics
from dreamer.model import Attention, Backbone, CardiacDreamer, ModelConfig

TINY = {
    "backbone": "compact", "image_size": 32, "channels": 16, "width": 4, "d_model": 16,
    "num_heads": 2, "num_layers": 2, "guidance": (32, 16),
}  # fmt: skip
VARIANTS = ("patch", "channel")


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
    ],
)
def test_refuses_configurations(fields, told):
    with pytest.raises(ValidationError, match=told):
        ModelConfig(**fields)
