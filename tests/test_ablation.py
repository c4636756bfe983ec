"""The study of options: its plan, its statistics by hand, its trainings, its choice."""

import subprocess
import sys

import numpy as np
import pandas as pd
import psutil
import pytest
from scans import TINY, write_scan
from scipy import stats

from dreamer.study import ablation as ablations
from dreamer.figures import ablations as draw
from dreamer.model import ModelConfig

SHORT = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 4, "val": 1, "test": 2}
OPTIONS = {
    "hierarchy": {"hierarchy": 2},
    "action: token": {"pooling": "action"},
    "both": {"token_type": "both"},
}


def made(values, groups="aabb"):
    """A table of errors a seed, from its values."""
    return [pd.DataFrame({"group": list(groups), "translation": v, "rotation": v}) for v in values]


def test_plan_crosses_options_token_types_and_seeds(tmp_path):
    runs, refused = ablations.plan(OPTIONS, TINY, SHORT, [0, 1], tmp_path)
    assert len(runs) == 2 * (4 + 3) and len({run.folder for run in runs}) == 2 * 6
    assert list(refused) == ["hierarchy, channel"] and "no window" in refused["hierarchy, channel"]
    assert {run.model.token_type for run in runs if run.option == "both"} == {"both"}
    assert {run.training.seed for run in runs} == {0, 1}
    assert tmp_path / "channel-action-token-seed1" in {run.folder for run in runs}


def test_plan_refuses_what_cannot_be_compared(tmp_path):
    with pytest.raises(ValueError, match="two at least"):
        ablations.plan(OPTIONS, TINY, SHORT, [0, 0], tmp_path)
    with pytest.raises(ValueError, match=r"odd, patch: .*positon.*|odd, patch: Extra inputs"):
        ablations.plan({"odd": {"positon": "none"}}, TINY, SHORT, [0, 1], tmp_path)


def test_change_by_hand():
    first, second = made([[1, 3, 2, 2], [2, 4, 3, 3.0]]), made([[2, 4, 2, 2], [3, 3, 1, 3.0]])
    found = ablations.change(first, second, "translation")
    # Patients a and b: seed 0 differs by 1 and 0, seed 1 by 0 and -1.
    assert found["estimate"] == pytest.approx(0)
    seeds, patients = np.var([0.5, -0.5], ddof=1) / 2, np.var([0.5, -0.5], ddof=1) / 2
    error, freedom = np.sqrt(seeds + patients), (seeds + patients) ** 2 / (seeds**2 + patients**2)
    assert (found["error"], found["freedom"]) == pytest.approx((error, freedom))
    assert found["high"] == pytest.approx(stats.t.ppf(0.975, freedom) * error)
    assert found["p"] == pytest.approx(1)
    with pytest.raises(ValueError, match="same frames and seeds"):
        ablations.change(first, second[:1], "translation")
    with pytest.raises(ValueError, match="same frames and seeds"):
        ablations.change(first, made([[1, 2, 3, 4]] * 2, "abab"), "translation")


def test_holm_by_hand():
    assert ablations.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert ablations.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_differences_say_what_is_shown():
    noise, groups = (
        np.random.default_rng(0).normal(0, 0.01, (4, 3, 40)),
        [f"p{i}" for i in range(40)],
    )
    steps = {"default": 0, "good": -1, "bad": 1, "same": 0.0}
    found = {
        ("patch", name): made(5 + step + noise[i], groups)
        for i, (name, step) in enumerate(steps.items())
    }
    table = ablations.differences(found, {"translation": 0.5, "rotation": 1.0})
    told = table.set_index(["option", "measure"])["verdict"]
    assert told["good", "translation"] == "helps" and told["bad", "rotation"] == "hurts"
    assert told["same", "translation"] == "makes no difference"
    assert (table["p_holm"] >= table["p"]).all() and len(table) == 6
    rows = ablations.verdicts(table, "tiny", "3 seeds")
    columns = ["claim", "published", "measured", "interval", "verdict", "config", "n"]
    assert list(rows.columns) == columns
    assert rows["measured"][0] == "-1.00 mm on 5.00"
    assert len(draw.changes(table).axes) == 2


def test_the_best_of_each_field_are_combined():
    score = pd.Series({
        ("patch", "action: token"): 0.9, ("patch", "hierarchy"): 0.95, ("patch", "both"): 0.97,
        ("patch", "default"): 1.0, ("channel", "default"): 1.1, ("patch", "mean"): 1.2,
    })  # fmt: skip
    base, fields = ablations.combined(score, OPTIONS, TINY)
    # Both sorts of tokens and windows exclude each other: the better one stays.
    assert (base, fields) == ("patch", {"pooling": "action", "hierarchy": 2})
    assert ModelConfig(**TINY, **fields)
    worse = pd.Series({("channel", "default"): 0.9, ("channel", "both"): 1.2})
    assert ablations.combined(worse, OPTIONS, TINY) == ("channel", {})


def test_trainings_are_done_once_and_priced(tmp_path):
    for number in range(5):
        write_scan(tmp_path / "scans", f"s{number}", count=6, seed=number)
    options = {"both": OPTIONS["both"]}
    runs, _ = ablations.plan(options, TINY, SHORT, [0, 1], tmp_path / "runs", bases=["patch"])
    assert not any(map(ablations.finished, runs))
    assert ablations.train(runs, tmp_path / "scans", workers=1) == 4
    before = [(run.folder / "last.ckpt").stat().st_mtime_ns for run in runs]
    assert ablations.train(runs, tmp_path / "scans", workers=1) == 0
    assert [(run.folder / "last.ckpt").stat().st_mtime_ns for run in runs] == before
    found = ablations.errors(runs)
    assert set(found) == {("patch", "default"), ("patch", "both")}
    table = ablations.differences(found, {"translation": 0.5, "rotation": 1.0})
    assert table["estimate"].notna().all()
    assert ablations.scores(runs)["patch", "default"] == pytest.approx(1)
    price = ablations.costs(runs, batch=2, repeats=2).set_index(["base", "option"])
    assert price.loc["patch", "both"]["parameters_ratio"] > 1
    assert (price.loc["patch", "default"].filter(like="ratio") == 1).all()
    assert len(draw.prices(price.reset_index()).axes) == 4
    # Another configuration is neither taken for finished nor trained over.
    other, _ = ablations.plan(options, TINY, {**SHORT, "steps_per_epoch": 3}, [0, 1],
                              tmp_path / "runs", bases=["patch"])  # fmt: skip
    assert not ablations.finished(other[0])
    with pytest.raises(ValueError, match="belongs to another configuration"):
        ablations.train(other[:1], tmp_path / "scans", workers=1)


STUDY = """import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from dreamer.study.ablation import _end_with_parent
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 300).result()
"""


def test_a_killed_study_takes_its_workers_along():
    with subprocess.Popen([sys.executable, "-c", STUDY], stdout=subprocess.PIPE) as study:
        worker = psutil.Process(int(study.stdout.readline()))
        study.kill()
    assert not psutil.wait_procs([worker], timeout=20)[1]
