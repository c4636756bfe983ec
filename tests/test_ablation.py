"""The study of options: its plan and its trainings."""

import subprocess
import sys

import psutil
import pytest
from scans import TINY, write_scan

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
