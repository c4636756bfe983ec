import subprocess
import sys

import pytest
from pydantic import ValidationError

from dreamer.runs import TrainingConfig, configure


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
