import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from dreamer.model import ModelConfig
from dreamer.runs import TrainingConfig, configure, export_run, load_run, start_from


def test_flat_and_sectioned_parameters():
    assert configure("", {}, {})[0].token_type == "patch"
    assert configure("channel", {}, {})[0].token_type == "channel"
    assert configure("", {"token_type": "channel"}, {"seed": 3})[1].seed == 3
    assert configure("patch", {"token_type": "patch"}, {}, seed=2)[1].seed == 2
    with pytest.raises(ValueError, match="token_type is 'patch' as a parameter and 'channel'"):
        configure("patch", {"token_type": "channel"}, {})
    with pytest.raises(ValueError, match="seed is 1 as a parameter and 2"):
        configure("", {}, {"seed": 2}, seed=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"epoch": 3},
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": "fast"},
        {"identity": 1.5},
        {"precision": "fp8"},
        {"reverse": -0.1},
        {"accumulate": 0},
        {"composed": 0.0, "imagined": 0.0},
    ],
)
def test_refuses_training_fields(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        TrainingConfig(**fields)


@pytest.mark.parametrize("module", ["runs", "study.faithfulness", "study.closed_loop"])
def test_reading_a_run_does_not_load_lightning_or_the_compiler(module):
    heavy = {"pytorch_lightning", "torchvision", "torch._dynamo", "timm"}
    code = f"import sys, dreamer.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"dreamer.{module}" in done.stdout and not heavy & set(done.stdout.split())


def test_patients_named_by_numbers_are_texts():
    config = TrainingConfig(val=[1, 2], test=3)
    assert config.val == ["1", "2"] and config.test == 3


TINY = ModelConfig(
    backbone="compact", image_size=32, channels=16, width=4, d_model=16, num_heads=2, num_layers=1,
    guidance=(32, 16),
)  # fmt: skip


def test_an_exported_run_is_half_the_size_and_predicts_the_same(untrained, tmp_path):
    run = untrained(tmp_path / "run", TINY)
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    folder = export_run(run, tmp_path / "weights" / "patch", images)
    sizes = [(place / "model.safetensors").stat().st_size for place in (run, folder)]
    assert sizes[1] < 0.6 * sizes[0]
    whole, half = load_run(run), load_run(folder)
    still = torch.zeros(4, 6)
    assert {value.dtype for value in half.parameters()} == {torch.float32}
    assert (half(images, still).pose - whole(images, still).pose).abs().max() < 0.01
    names = {"config.json", "model.safetensors", "split.json", "versions.json"}
    assert {file.name for file in folder.iterdir()} == names


def test_large_convolutions_are_exported_in_8_bit(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr("dreamer.runs.LARGE", 100)
    run = untrained(tmp_path / "run", TINY)
    weights = load_file(run / "model.safetensors")
    name = max((n for n in weights if weights[n].ndim == 4), key=lambda n: weights[n].numel())
    weights[name][0, 0] = 0.0  # a kernel without a largest value
    save_file(weights, run / "model.safetensors")
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    folder = export_run(run, tmp_path / "weights", images)
    assert load_file(folder / "model.safetensors")[name].dtype == torch.int8
    exact, given = weights[name], load_run(folder).state_dict()[name]
    step = exact.abs().amax(dim=(2, 3), keepdim=True) / 127
    assert ((given - exact).abs() <= 0.6 * step + 1e-7).all()
    other = load_run(run)  # another run starts from it
    assert start_from(other, folder) == []
    torch.testing.assert_close(other.state_dict()[name], given, rtol=0, atol=0)


def test_statistics_are_exported_as_they_are(untrained, tmp_path):
    run = untrained(tmp_path / "run", TINY)
    weights = load_file(run / "model.safetensors")
    weights["pose_std"] = torch.full((6,), 18.180941)  # half precision: 18.1875
    save_file(weights, run / "model.safetensors")
    folder = export_run(run, tmp_path / "weights", torch.zeros(1, 1, 32, 32))
    assert load_run(folder).pose_std.tolist() == weights["pose_std"].tolist()


@pytest.mark.parametrize("factor", [1e3, 1e9])
def test_weights_that_half_precision_does_not_hold_are_not_exported(untrained, tmp_path, factor):
    run = untrained(tmp_path / "run", TINY)
    weights = load_file(run / "model.safetensors")
    weights["head.6.weight"] *= factor
    save_file(weights, run / "model.safetensors")
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    with pytest.raises(ValueError, match="rounding moves a pose by"):
        export_run(run, tmp_path / "weights", images)
    assert not (tmp_path / "weights").exists()
