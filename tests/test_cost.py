"""Cost: formulas against PyTorch's counter and by hand, `fast`, the original, fresh processes."""

import math
import os

import pytest
import torch
from scans import TINY
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.study import cost

RESNET = {"image_size": 64, "d_model": 32, "num_heads": 4, "num_layers": 1}
OPTIONS = [
    {"positions": "learned-2d"},
    {"hierarchy": 2},
    {"pooling": "attention"},
    {"pooling": "action"},
    {"pooling": "generalised-mean"},
    {"token_type": "both"},
    {"token_type": "none"},
    {"token_dropout": 0.5},
    {"reads": "action"},
    {"norm_first": True},
]


def counted(config: ModelConfig, batch: int) -> int:
    """FLOP of a forward pass by PyTorch's counter; nothing is computed on the meta device."""
    with torch.device("meta"):
        model = CardiacDreamer(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*cost.inputs(config, batch, "meta"))
    return counter.get_total_flops()


def calibrated(config: ModelConfig) -> tuple[CardiacDreamer, torch.Tensor, torch.Tensor]:
    """A model whose batch norms are not the identity, frames and actions."""
    model = cost.build(config)
    image, action = cost.discs(config, 4, seed=0)
    model.backbone.train()
    with torch.no_grad():
        model.encode(image)
    return model.eval(), image, action


# Counts


@pytest.mark.parametrize("shapes", [{}, {"image_size": 448}, RESNET, TINY], ids=str)
@pytest.mark.parametrize("variant", cost.VARIANTS)
def test_formula_agrees_with_the_counter(shapes, variant):
    config = cost.configs(shapes)[variant]
    assert sum(cost.flops(config, 2).values()) == pytest.approx(counted(config, 2), rel=0.01)


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
@pytest.mark.parametrize("shapes", [TINY, RESNET], ids=["compact", "resnet34"])
def test_formula_covers_the_options(shapes, fields):
    config = ModelConfig(**{**shapes, **fields})
    assert sum(cost.flops(config, 2).values()) == pytest.approx(counted(config, 2), rel=0.01)


def test_flop_of_a_block_by_hand():
    # 17 tokens of width 16: q, k, v and output 4 x 16 x 16, feed-forward 2 x 16 x 64,
    # scores and mixture 2 x 17 x 16 each token; a multiplication and an addition each.
    parts = cost.flops(cost.configs(TINY)["channel"], batch=1)
    assert parts["attention"] == 2 * 17 * (4 * 16 * 16 + 2 * 17 * 16)
    assert parts["feed-forward"] == 2 * 17 * 2 * 16 * 64


@pytest.mark.parametrize("variant", cost.VARIANTS)
def test_published_parameters_tokens_and_memory(variant):
    config, claim = cost.configs({})[variant], cost.CLAIM[variant]
    with torch.device("meta"):
        model = CardiacDreamer(config)
    parts = cost.parameters(model)
    assert parts["backbone"] == 21_278_400
    assert parts["attention"] + parts["feed-forward"] == 42_527_232
    assert sum(parts.values()) == claim["parameters"]
    assert 1 + config.tokens == claim["tokens"]
    memory = cost.predicted_memory(config)
    assert memory["input"] == (4 * 224 * 224 * 4 + 512) / 2**20  # the actions take one unit
    assert sum(memory.values()) == pytest.approx(claim["memory"], rel=0.01)


def test_operations_predict_four_fifths_less_not_the_published_reduction():
    work = {v: sum(cost.flops(c).values()) for v, c in cost.configs({}).items()}
    assert 0.77 < 1 - work["patch"] / work["channel"] < 0.82 < cost.LESS_TIME


def test_crossing_by_hand():
    # The logarithms of the ratios 2/4 and 8/4 are opposite, so the middle of 200 and 300.
    found = cost.crossing([100, 200, 300], [1.0, 2.0, 8.0], [4.0, 4.0, 4.0])
    assert found == pytest.approx(250)
    assert math.isnan(cost.crossing([100, 200], [1.0, 2.0], [4.0, 4.0]))


def test_transformers_cost_the_same_at_724_pixels():
    # 512 patch tokens are a grid of 22.6 x 22.6 cells of 32 pixels: 724.
    sizes, lines = [672, 704, 736, 768], {}
    for variant in cost.VARIANTS:
        works = [cost.flops(cost.configs({"image_size": s})[variant]) for s in sizes]
        lines[variant] = [sum(work.values()) - work["backbone"] for work in works]
    assert cost.crossing(sizes, lines["patch"], lines["channel"]) == pytest.approx(724, abs=2)


# Ways to run a model


@pytest.mark.parametrize("variant", cost.VARIANTS)
def test_fast_in_fp32_is_the_model_without_batch_norms(variant):
    model, image, action = calibrated(cost.configs(RESNET)[variant])
    quick = cost.fast(model, torch.float32)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quick.modules())
    with torch.no_grad():
        expected, got = model(image, action), quick(image, action)
    torch.testing.assert_close(tuple(got), tuple(expected), atol=1e-4, rtol=1e-4)


def test_fast_leaves_the_model_as_it_was_and_returns_fp32():
    model, image, action = calibrated(cost.configs(RESNET)["patch"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dream = cost.fast(model, torch.bfloat16)(image, action)
    assert all(part.dtype == torch.float32 and not part.requires_grad for part in dream)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_fast_works_with_every_option(fields, dtype):
    model = cost.build(ModelConfig(**{**TINY, **fields}))
    image, action = cost.inputs(model.config, 3)
    error = cost.difference(model, cost.fast(model, dtype), image, action)
    assert error.shape == (3, 6)
    assert 0 <= error.max() < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("variant", cost.VARIANTS)
def test_bf16_keeps_the_pose_of_a_trained_model(variant):
    config = cost.configs({**TINY, "d_model": 32, "width": 32, "channels": 32})[variant]
    model = cost.train_on_discs(config, 160)
    image, pose = cost.discs(config, 64, seed=1000)
    still = torch.zeros_like(pose)
    with torch.no_grad():
        error = (model(image, still).pose - pose)[:, :2].square().mean()
    assert error < 0.5  # of the place of the discs; 1 without learning
    quick = cost.difference(model, cost.fast(model, torch.bfloat16), image, still)
    usual = cost.difference(model, cost.under_autocast(model), image, still)
    assert 0 < quick.max() < 0.03
    assert quick.mean() < 2 * usual.mean()


def test_difference_by_hand():
    class Fixed(nn.Module):
        def __init__(self, pose):
            super().__init__()
            self.pose, self.pose_std = torch.tensor([pose]), torch.full((6,), 2.0)

        def forward(self, image, action):
            return self

    model, other = Fixed([4.0, 1, 0, 0, 0, 0]), Fixed([4.0, 0.6, 0, 0, 0, 1])
    expected = torch.tensor([[0, 0.2, 0, 0, 0, 0.5]])  # 0.4 and 1 in units of 2
    torch.testing.assert_close(cost.difference(model, other, None, None), expected)


def test_fast_refuses_other_dtypes():
    with pytest.raises(ValueError, match="float16 is not supported"):
        cost.fast(cost.build(cost.configs(TINY)["patch"]), torch.float16)


@pytest.mark.parametrize(
    "fields",
    [{"token_type": "channel"}, {"norm_first": True}, {"hierarchy": 2}, {"reads": "action"}],
    ids=str,
)
def test_the_original_is_the_model_in_pytorchs_encoder(fields):
    model, image, action = calibrated(ModelConfig(**{**RESNET, **fields}))
    reference = cost.original(model)
    encoders = [m for m in reference.modules() if isinstance(m, nn.TransformerEncoder)]
    assert len(encoders) == 1
    with torch.no_grad():
        expected, got = model(image, action), reference(image, action)
    torch.testing.assert_close(tuple(got), tuple(expected), atol=1e-4, rtol=1e-4)


# Fresh processes


def test_passes_keep_their_order_in_a_process_of_their_own():
    configs = cost.configs(TINY)
    rows = cost.apart(cost.passes, [configs["channel"], configs["patch"]], "cpu")
    assert [(row["variant"], row["place"]) for row in rows] == [("channel", 0), ("patch", 1)]
    assert all(0 < row["clock"] <= row["cold"] and row["warm"] > 0 for row in rows)
    assert all(row["rest"] <= row["peak"] and math.isnan(row["held"]) for row in rows)


def test_memory_of_a_fresh_process_is_at_least_that_of_the_weights():
    config = ModelConfig(**{**TINY, "guidance": [4096, 4096]})  # 16.8 million parameters, 64 MiB
    (row,) = cost.apart(cost.passes, [config], "cpu")
    assert 64 < row["rest"] < 160
    step = cost.apart(cost.training, config, "cpu", False)
    assert step["peak"] > 4 * 64 and step["seconds"] > 0  # weights, gradients, two moments


def test_an_exception_of_a_fresh_process_is_raised_here():
    assert cost.apart(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        cost.apart(divmod, 1, 0)


def test_choose_device_refuses_what_is_not_available():
    assert cost.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: 'tpu'"):
        cost.choose_device("tpu")
