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
        {"schedule": "step"},
        {"identity": 1.5},
        {"precision": "fp8"},
        {"rotate": 90},
        {"mixup": -0.1},
        {"accumulate": 0},
        {"composed": 0.0, "imagined": 0.0},
    ],
)
def test_refuses_training_fields(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        TrainingConfig(**fields)


def test_what_does_not_train_does_not_wait_for_what_trains():
    heavy = ("pytorch_lightning", "torchvision", "torch._dynamo")
    code = "import sys, dreamer.study.faithfulness, dreamer.study.arrivals, dreamer.study.cold; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "dreamer.runs" in told.stdout and not set(heavy) & set(told.stdout.split())
