"""Benchmarks that write committed tables, on tiny data."""

import sys

import fine_tune
import pandas as pd
import pytest
from scans import TINY, write_scan

from dreamer.data import Transitions
from dreamer.runs import configure
from dreamer.training import fit

TRAINING = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 8, "val": 1, "test": 1}


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_is_compared_with_training_from_scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    for number in range(4):
        write_scan(tmp_path / "scans", f"p{number}", seed=number)
    for variant in ("patch", "channel"):
        configs = configure(variant, TINY, TRAINING)
        fit(*configs, Transitions(tmp_path / "scans", 32), tmp_path / variant)
    given = [tmp_path / "scans", tmp_path, "--runs", tmp_path / "patch", tmp_path / "channel"]
    monkeypatch.setattr(
        sys, "argv", [*map(str, ["", *given]), "--seeds", "0", "1", "--epochs", "1"]
    )
    fine_tune.main()
    table = pd.read_csv(tmp_path / "fine_tune.csv")
    assert len(table) == 2 * 2 * 3, "variants, seeds, predictors"
    mean = table[table["predictor"] == "mean pose"]
    assert mean["rotation"].nunique() == 1, "the baseline is that of the split alone"
    own = table[table["predictor"] != "mean pose"]
    assert own["rotation"].nunique() == len(own), "every training is another"
    curves = pd.read_csv(tmp_path / "fine_tune_curves.csv")
    assert (curves["images"] == 16).all() and len(curves) == 2 * 2 * 2
