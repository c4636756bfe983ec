"""The study of options: its plan, its trainings, its choice."""

import subprocess
import sys

import pandas as pd
import psutil
import pytest
from scans import TINY, write_scan

from dreamer.model import ModelConfig
from dreamer.study import ablation

SHORT = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 4, "val": 1, "test": 2}
OPTIONS = {
    "hierarchy": {"hierarchy": 2},
    "action: token": {"pooling": "action"},
    "both": {"token_type": "both"},
}


def test_plan_crosses_options_variants_and_seeds(tmp_path):
    runs, refused = ablation.plan(OPTIONS, TINY, SHORT, [0, 1, 1], tmp_path)
    assert len(runs) == 2 * (4 + 3) and len({run.folder for run in runs}) == 2 * 6
    assert list(refused) == ["hierarchy, channel"] and refused["hierarchy, channel"]
    assert {run.model.token_type for run in runs if run.option == "both"} == {"both"}
    assert {run.training.seed for run in runs} == {0, 1}
    assert tmp_path / "channel-action-token-seed1" in {run.folder for run in runs}


def test_plan_refuses_what_cannot_be_trained(tmp_path):
    with pytest.raises(ValueError, match="seeds: none given"):
        ablation.plan(OPTIONS, TINY, SHORT, [], tmp_path)
    with pytest.raises(ValueError, match=r"no token type takes odd .*Extra inputs"):
        ablation.plan({"odd": {"positon": "none"}}, TINY, SHORT, [0, 1], tmp_path)


def test_the_best_of_each_field_are_combined():
    score = pd.Series({
        ("patch", "action: token"): 0.9, ("patch", "hierarchy"): 0.95, ("patch", "both"): 0.97,
        ("patch", "default"): 1.0, ("channel", "default"): 1.1, ("patch", "mean"): 1.2,
    })  # fmt: skip
    variant, fields = ablation.combined(score, OPTIONS, TINY)
    # Both kinds of tokens and windows exclude each other: the better one stays.
    assert (variant, fields) == ("patch", {"pooling": "action", "hierarchy": 2})
    assert ModelConfig(**TINY, **fields)
    worse = pd.Series({("channel", "default"): 0.9, ("channel", "both"): 1.2})
    assert ablation.combined(worse, OPTIONS, TINY) == ("channel", {})


def test_scores_by_hand(tmp_path):
    runs, _ = ablation.plan({"both": OPTIONS["both"]}, TINY, SHORT, [0, 1], tmp_path, ["patch"])
    values = {
        ("default", 0): (4, 9),
        ("default", 1): (9, 4),
        ("both", 0): (2, 2),
        ("both", 1): (4, 9),
    }
    for run in runs:
        mm, deg = values[run.option, run.training.seed]
        run.folder.mkdir()
        metrics = {
            "val_loss": [2, 1],
            "val_translation_mm": [99, mm],
            "val_rotation_deg": [99, deg],
        }
        pd.DataFrame(metrics).to_csv(run.folder / "metrics.csv", index=False)
    # Geometric means: 6 and 6 for the default, 2 and 6 for the option.
    score = ablation.scores(runs)
    assert score["patch", "both"] == pytest.approx(12**0.5 / 6)
    assert score["patch", "default"] == pytest.approx(1) and score.index[0] == ("patch", "both")


def test_trainings_are_done_once(tmp_path):
    for number in range(5):
        write_scan(tmp_path / "scans", f"s{number}", count=6, seed=number)
    options = {"both": OPTIONS["both"]}
    place = tmp_path / "runs"
    runs, _ = ablation.plan(options, TINY, SHORT, [0, 1], place, variants=["patch"])
    assert not any(map(ablation.finished, runs))
    assert ablation.train(runs, tmp_path / "scans", workers=1) == 4
    before = [(run.folder / "last.ckpt").stat().st_mtime_ns for run in runs]
    assert ablation.train(runs, tmp_path / "scans", workers=1) == 0
    assert [(run.folder / "last.ckpt").stat().st_mtime_ns for run in runs] == before
    table = ablation.errors(runs)
    counts = table.groupby(["variant", "option", "seed"])["patient"].nunique()
    assert len(counts) == 4 and (counts == 2).all() and table["rotation"].notna().all()
    assert ablation.scores(runs)["patch", "default"] == pytest.approx(1)
    # Another configuration is neither taken for finished nor trained over.
    longer = {**SHORT, "steps_per_epoch": 3}
    other, _ = ablation.plan(options, TINY, longer, [0, 1], place, variants=["patch"])
    assert not ablation.finished(other[0])
    with pytest.raises(ValueError, match="another configuration"):
        ablation.train(other[:1], tmp_path / "scans", workers=1)


STUDY = """import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from dreamer.study.ablation import _end_with_parent
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 300).result()
"""


def test_a_killed_study_ends_its_workers():
    with subprocess.Popen([sys.executable, "-c", STUDY], stdout=subprocess.PIPE) as study:
        worker = psutil.Process(int(study.stdout.readline()))
        study.kill()
    assert not psutil.wait_procs([worker], timeout=20)[1]
