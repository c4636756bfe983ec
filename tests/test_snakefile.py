"""The pipeline on made notebooks: order, reruns, promises, locks, faults."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import yaml
from scans import write_scan

TRAIN = """import json, time
from pathlib import Path
Path(run).mkdir(parents=True, exist_ok=True)
for epoch in range(model.get("epochs", 2)):
    done = Path(run, f"{epoch}.json")
    if not done.exists():
        time.sleep(model.get("pause", 0.0))
        done.write_text(json.dumps([token_type, seed, epoch]))
    with open(Path(run, "visits.txt"), "a") as visits:
        visits.write(f"{epoch}\\n")"""
COMPARE = """import json
from pathlib import Path
Path(output).mkdir(parents=True, exist_ok=True)
rows = [p.read_text() for run in runs for p in sorted(Path(run).glob("*.json"))]
Path(output, "07_rows.csv").write_text("row\\n" + "\\n".join(map(json.dumps, rows)))"""


@pytest.fixture
def project(root, tmp_path, make_notebook):
    """A project folder with the real Snakefile, tiny notebooks and one scan."""
    # The real one but for its promises: the tiny notebooks draw no figures.
    rules = re.sub(r'^    "0\d_\w+": \(".*\),\n', "", (root / "Snakefile").read_text(), flags=re.M)
    (tmp_path / "Snakefile").write_text(rules)
    books = tmp_path / "notebooks"
    make_notebook(
        books / "02_train.ipynb",
        "token_type = ''\ndata = ''\nrun = ''\nseed = 0\nmodel = {}",
        TRAIN,
    )
    make_notebook(books / "07_rows.ipynb", "runs = []\ndata = ''\noutput = ''", COMPARE)
    make_notebook(books / "08_extra.ipynb", "title = 'x'", "title")
    (books / "parameters").mkdir()
    (books / "parameters" / "smoke.yaml").write_text("model: {epochs: 2}\n")
    scan = tmp_path / "scans" / "one"
    scan.mkdir(parents=True)
    (scan / "transitions_dataset.json").write_text("[]")
    return tmp_path


COMMAND = [sys.executable, "-m", "dreamer.pipeline", "figures", "preset=smoke", "data=scans"]


def make_figures(project, *more, **options):
    return subprocess.run(
        [*COMMAND, *more], cwd=project, capture_output=True, text=True, timeout=240, **options
    )


def jobs(result):
    """Names of the rules that ran."""
    words = [line.split() for line in (result.stdout + result.stderr).splitlines()]
    return [w[1].rstrip(":") for w in words if w[:1] in (["rule"], ["localrule"])]


def wait_for(path, process, seconds=90):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


def test_order_reruns_and_config(project):
    first = make_figures(project)
    assert first.returncode == 0, first.stderr[-3000:]
    out = project / "data" / "runs" / "smoke-scans"
    rows = (out / "figures" / "07_rows.csv").read_text()
    assert all(word in rows for word in ("patch", "channel"))
    assert (out / "figures" / "index.html").stat().st_size
    assert (out / "notebooks" / "02_train-channel-seed0.ipynb").stat().st_size
    start = time.monotonic()
    again = make_figures(project)
    assert again.returncode == 0 and jobs(again) == []
    assert time.monotonic() - start < 20
    # A parameter of one notebook reruns this one and the page, and no other.
    (project / "notebooks" / "parameters" / "smoke.yaml").write_text(
        "model: {epochs: 2}\ntitle: y\n"
    )
    changed = make_figures(project)
    assert sorted(set(jobs(changed)) - {"all"}) == ["notebook_08_extra", "page"]
    refused = make_figures(project, "sede=1")
    assert refused.returncode and "config sede is unknown" in refused.stderr


def test_failing_step_is_named_and_kept(project, make_notebook):
    make_notebook(project / "notebooks" / "07_rows.ipynb", "runs = []\noutput = ''", "1 / 0")
    result = make_figures(project)
    text = result.stdout + result.stderr
    assert result.returncode and "cell 3 failed: ZeroDivisionError" in text
    kept = project / "data" / "runs" / "smoke-scans" / "notebooks" / "07_rows.ipynb"
    assert "ZeroDivisionError" in json.dumps(json.loads(kept.read_text())["cells"])


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_training_leaves_nothing_behind(project, blow):
    (project / "notebooks" / "08_extra.ipynb").unlink()
    slow = project / "notebooks" / "parameters" / "smoke.yaml"
    slow.write_text("model: {epochs: 3, pause: 3.0}\n")
    run = project / "data" / "runs" / "smoke-scans" / "patch-seed0"
    process = start(project)
    wait_for(run / "0.json", process)
    second = make_figures(project)
    assert second.returncode == 1 and "already running here" in second.stderr and not jobs(second)
    if blow == signal.SIGINT:  # a terminal signals the whole group
        os.killpg(process.pid, blow)
    else:
        process.terminate()
    assert process.wait(60) != 0
    assert not (run / "2.json").exists()
    left = [p for p in psutil.process_iter() if owner(p) == str(project)]
    assert not left


def owner(process):
    try:
        return process.environ().get("DREAMER_PIPELINE")
    except psutil.Error:
        return None


def start(project):
    return subprocess.Popen(  # a background shell's children ignore SIGINT unless told otherwise
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), args=
        COMMAND, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def test_real_trainings_killed_and_started_again_end_the_same(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    projects = [tmp_path / "undisturbed", tmp_path / "killed"]
    for project in projects:
        (project / "notebooks" / "parameters").mkdir(parents=True)
        shutil.copy(root / "Snakefile", project)
        shutil.copy(root / "notebooks" / "02_train.ipynb", project / "notebooks")
        preset = yaml.safe_load((root / "notebooks" / "parameters" / "smoke.yaml").read_text())
        preset["training"] |= {"epochs": 40, "test": 2}
        text = yaml.safe_dump(preset)
        (project / "notebooks" / "parameters" / "smoke.yaml").write_text(text)
        for number in range(5):
            write_scan(project / "scans", f"p{number}", seed=number)
    whole, cut = (start(project) for project in projects)
    runs = [project / "data" / "runs" / "smoke-scans" for project in projects]
    wait_for(runs[1] / "patch-seed0" / "metrics.csv", cut, 200)
    for child in psutil.Process(cut.pid).children():  # its steps are orphans then
        child.kill()
    cut.kill()
    cut.wait()
    before = len(pd.read_csv(runs[1] / "patch-seed0" / "metrics.csv"))
    assert before < 40
    again = make_figures(projects[1])
    assert again.returncode == 0, again.stderr[-3000:]
    assert whole.wait(200) == 0
    for variant in ("patch-seed0", "channel-seed0"):
        for name in (f"tables/{variant}/02_accuracy.csv", f"{variant}/metrics.csv"):
            tables = [pd.read_csv(run / name) for run in runs]
            tables = [t.drop(columns=["seconds", "waiting_share"], errors="ignore") for t in tables]
            pd.testing.assert_frame_equal(*tables, check_exact=True)
        weights = [(run / variant / "model.safetensors").read_bytes() for run in runs]
        assert weights[0] == weights[1]
