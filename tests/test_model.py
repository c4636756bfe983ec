import math

import pytest
import scans
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torchvision.models import resnet34

from dreamer.data import Statistics
from dreamer.model import Attention, Backbone, CardiacDreamer, ModelConfig, as_input

TINY = {**scans.TINY, "num_layers": 2}
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
def test_block_equals_the_librarys_encoder_layer(norm_first):
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


def test_without_tokens_the_frames_own_map_is_pooled():
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
    with pytest.raises(RuntimeError, match="Missing key"):
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
    ("image", "action", "message"),
    [
        ((1, 3, 32, 32), (1, 6), r"expected images \[B, 1, 32, 32\], got \[1, 3, 32, 32\]"),
        ((1, 1, 48, 48), (1, 6), r"expected images \[B, 1, 32, 32\]"),
        ((2, 1, 32, 32), (1, 6), r"expected actions \[2, 6\], got \[1, 6\]"),
        ((1, 1, 32, 32), (1, 7), r"expected actions \[1, 6\]"),
    ],
)
def test_refuses_wrong_shapes(image, action, message):
    with pytest.raises(ValueError, match=message):
        tiny("patch")(torch.zeros(image), torch.zeros(action))


@pytest.mark.parametrize(
    ("fields", "message"),
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
        ({"token_type": "none", "reads": "action"}, "reads action: token_type none"),
        ({"token_type": "both", "reads": "action"}, "patch or channel tokens of one level"),
    ],
)
def test_refuses_configurations(fields, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**fields)


class Original(torch.nn.Module):
    """The published system from library parts alone, written without reference to dreamer."""

    def __init__(self, token_type):
        super().__init__()
        backbone = resnet34()
        backbone.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        self.backbone = torch.nn.Sequential(*list(backbone.children())[:-2])
        self.token_type, values = token_type, 512 if token_type == "patch" else 49
        self.embed = torch.nn.Linear(values, 768)
        self.reconstruction = torch.nn.Linear(768, values)
        self.next_features = torch.nn.Linear(768, values)
        self.action = torch.nn.Sequential(
            torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 256), torch.nn.ReLU(),
            torch.nn.Linear(256, 768),
        )  # fmt: skip
        self.norm = torch.nn.LayerNorm(768)
        layer = torch.nn.TransformerEncoderLayer(
            768, 12, 4 * 768, dropout=0.1, activation="gelu", batch_first=True
        )
        self.encoder = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.guidance = torch.nn.Sequential(
            torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.1),
            torch.nn.Linear(1024, 512), torch.nn.ReLU(), torch.nn.Dropout(0.1),
            torch.nn.Linear(512, 6),
        )  # fmt: skip

    def forward(self, image, action):
        features = self.backbone(image).flatten(2)  # [B, 512, 49]
        tokens = features.transpose(1, 2) if self.token_type == "patch" else features
        x = torch.cat((self.action(action)[:, None], self.embed(tokens)), 1)
        position = torch.arange(x.shape[1], dtype=torch.float32)[:, None]
        rate = torch.exp(torch.arange(0, 768, 2).float() * (-math.log(10000.0) / 768))
        table = torch.zeros(x.shape[1], 768)
        table[:, 0::2], table[:, 1::2] = torch.sin(position * rate), torch.cos(position * rate)
        out = self.encoder(self.norm(x + table.to(x)))[:, 1:]
        maps = [self.reconstruction(out), self.next_features(out)]
        if self.token_type == "patch":
            maps = [m.transpose(1, 2) for m in maps]
        return [m.unflatten(2, (7, 7)) for m in maps], self.guidance(maps[1].mean(2))


def weights_of(original, names):
    """The original's weights under the names of CardiacDreamer `names`, mapped one to one."""
    theirs = original.state_dict()
    stages = {"0.0": "0", "0.1": "1", "1": "4", "2": "5", "3": "6", "4": "7"}
    renamed = {
        "world.tokens.embedding": "embed", "world.tokens.heads": "", "world.action": "action",
        "world.norm": "norm", "head": "guidance",
    }  # fmt: skip
    inside = {
        "attention.qkv.weight": "self_attn.in_proj_weight",
        "attention.qkv.bias": "self_attn.in_proj_bias", "attention.out.": "self_attn.out_proj.",
        "feedforward.0.": "linear1.", "feedforward.3.": "linear2.",
    }  # fmt: skip
    mapped = {}
    for name in names:
        if name.startswith("backbone.stages."):
            rest = name.removeprefix("backbone.stages.")
            ours = next(stage for stage in stages if rest.startswith(f"{stage}."))
            source = f"backbone.{stages[ours]}{rest.removeprefix(ours)}"
        elif name.startswith("world.blocks."):
            source = name.replace("world.blocks.", "encoder.layers.")
            for ours, other in inside.items():
                source = source.replace(ours, other)
        elif any(name.startswith(f"{ours}.") for ours in renamed):
            ours = next(o for o in renamed if name.startswith(f"{o}."))
            source = f"{renamed[ours]}{name.removeprefix(ours)}".lstrip(".")
        else:
            continue  # the statistics, which the original does not have
        mapped[name] = theirs[source]
    assert len(mapped) == len(theirs)
    return mapped


@pytest.mark.parametrize("token_type", VARIANTS)
def test_weights_of_the_original_give_the_same_maps_and_pose(token_type):
    torch.manual_seed(0)
    original = Original(token_type).eval()
    model = CardiacDreamer(ModelConfig(token_type=token_type)).eval()
    assert count(original) == count(model)
    missing, unexpected = model.load_state_dict(
        weights_of(original, model.state_dict()), strict=False
    )
    assert not unexpected and set(missing) == set(Statistics._fields)
    image, action = torch.rand(2, 1, 224, 224), torch.randn(2, 6)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        original.to(dtype), model.to(dtype)
        with torch.no_grad():
            maps, pose = original(image.to(dtype), action.to(dtype))
            features = model.backbone(image.to(dtype))
            *ours, _ = model.world(features, action.to(dtype))
            guided = model.head(ours[1].mean((2, 3)))
        for got, expected in ((ours[0], maps[0]), (ours[1], maps[1]), (guided, pose)):
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("token_type", "distinct"), [("patch", 16), ("channel", 1)])
def test_reading_the_action_token_leaves_channel_tokens_one_number(token_type, distinct):
    # The action token repeated: patch tokens keep C values for the head, channel tokens one.
    corrected, first = tiny(token_type).eval(), tiny(token_type, reads="action").eval()
    assert count(corrected) == count(first)
    image, action = torch.rand(3, 1, 32, 32), torch.randn(3, 6)
    for row in first(image, action).pooled:
        assert len(row.detach().mul(1e4).round().unique()) == distinct
    for row in corrected(image, action).pooled:
        assert len(row.detach().mul(1e4).round().unique()) == 16


def test_reading_the_action_token_by_hand():
    world = tiny("channel", reads="action").eval().world
    head = world.tokens.heads["next_features"]
    features, action = torch.rand(1, 16, 2, 2), torch.randn(1, 6)
    _, imagined, token = world(features, action)
    once = token @ head.weight.T + head.bias  # [1, 4], the values of every channel
    torch.testing.assert_close(imagined, once.view(1, 1, 2, 2).expand(1, 16, 2, 2))


def test_uint8_frames_become_input_once():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(as_input(frames), torch.tensor([0.0, 0.2, 1.0]))
    floats = torch.rand(2)
    assert as_input(floats) is floats
    model, image = tiny("patch").eval(), torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model.encode(image), model.encode(image / 255))
