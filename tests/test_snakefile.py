"""The pipeline on tiny notebooks: order, reruns, promises, locks, faults."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from scans import write_scan

from dreamer.phantom import TARGETS

TRAIN = """import json, time
from pathlib import Path
Path(run).mkdir(parents=True, exist_ok=True)
Path(run, "weights").write_bytes(bytes(model.get("size", 0)))
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


COMMAND = [sys.executable, "-m", "dreamer.pipeline", "figures", "preset=smoke", "data=scans"]
OUT = Path("data", "runs", "smoke-scans")


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory, make_notebook):
    """A project folder with the real Snakefile, tiny notebooks and one scan; `make figures` ran."""
    folder = tmp_path_factory.mktemp("finished")
    # The real one except for its promises: the tiny notebooks draw no figures.
    rules = (root / "Snakefile").read_text()
    rules = re.sub(r"^PROMISED = \{.*?^\}$", 'PROMISED = {"07_rows": ["07_rows.csv"]}', rules,
                   flags=re.M | re.S)  # fmt: skip
    (folder / "Snakefile").write_text(rules)
    books = folder / "notebooks"
    make_notebook(
        books / "02_train.ipynb",
        "token_type = ''\ndata = ''\nrun = ''\nseed = 0\nmodel = {}\ntraining = {}",
        TRAIN,
    )
    make_notebook(books / "07_rows.ipynb", "runs = []\ndata = ''\noutput = ''", COMPARE)
    make_notebook(books / "08_extra.ipynb", "title = 'x'\nstore = ''", "title")
    preset(folder, "model: {epochs: 2}")
    scan = folder / "scans" / "one"
    scan.mkdir(parents=True)
    (scan / "transitions_dataset.json").write_text("[]")
    first = make_figures(folder)
    assert first.returncode == 0, first.stderr[-3000:]
    assert {"train", "notebook_07_rows", "notebook_08_extra", "page"} <= set(jobs(first))
    return folder


@pytest.fixture
def project(finished, tmp_path):
    """A copy of the finished project."""
    return shutil.copytree(finished, tmp_path / "project")


def preset(project, text):
    (project / "notebooks" / "parameters").mkdir(exist_ok=True)
    (project / "notebooks" / "parameters" / "smoke.yaml").write_text(text)


def make_figures(project, *more):
    return subprocess.run(
        [*COMMAND, *more], cwd=project, capture_output=True, text=True, timeout=580
    )


def jobs(result):
    """Names of the rules that ran, or would; all trainings are `train`."""
    words = [line.split() for line in (result.stdout + result.stderr).splitlines()]
    names = [w[1].rstrip(":") for w in words if w[:1] in (["rule"], ["localrule"])]
    return [name.removesuffix("_channel") for name in names]


def wait_for(folder, pattern, process, seconds=90):
    """The first file of that pattern to appear in the folder."""
    end = time.monotonic() + seconds
    while not (found := sorted(folder.glob(pattern))):
        assert process.poll() is None and time.monotonic() < end, f"{pattern} did not come"
        time.sleep(0.05)
    return found[0]


def test_every_step_leaves_its_files(finished):
    rows = (finished / OUT / "figures" / "07_rows.csv").read_text()
    assert all(word in rows for word in ("patch", "channel"))
    assert (finished / OUT / "figures" / "index.html").stat().st_size
    assert (finished / OUT / "notebooks" / "02_train-channel-seed0.ipynb").stat().st_size


def test_nothing_runs_twice(finished):
    again = make_figures(finished)
    assert again.returncode == 0 and jobs(again) == []


@pytest.mark.parametrize(
    ("text", "rerun"),
    [("model: {epochs: 2}\ntitle: y", {"notebook_08_extra", "page"}),
     ("model: {epochs: 3}", {"train", "notebook_07_rows", "page"})],
)  # fmt: skip
def test_a_parameter_reruns_exactly_what_depends_on_it(project, text, rerun):
    preset(project, text)
    changed = make_figures(project, "--dry-run")
    assert set(jobs(changed)) - {"all"} == rerun


def test_a_grown_store_reruns_what_reads_it(project):
    (project / "data" / "results").mkdir()
    (project / "data" / "results" / "run.json").write_text("{}")
    assert set(jobs(make_figures(project, "--dry-run"))) - {"all"} == {"notebook_08_extra", "page"}


def test_stopped_after_a_new_training_what_depends_on_it_runs_again(project):
    preset(project, "model: {epochs: 3}")
    assert make_figures(project, "--until", "train", "train_channel").returncode == 0
    again = make_figures(project, "--dry-run")
    assert set(jobs(again)) - {"all"} == {"notebook_07_rows", "page"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [("sede=1", "config sede is unknown"), ("preset=none", "config preset=none is unknown"),
     ("folds=5", "5 folds need 3 or more, and at least as many patients"), ("seeds=0", "seeds=0"),
     ("plane=plax", "that of the scans"), ("plane=a5c", "planes are a4c, plax")],
)  # fmt: skip
def test_settings_are_checked(finished, setting, message):
    refused = make_figures(finished, setting)
    assert refused.returncode and message in refused.stderr


def test_another_plane_has_its_own_data_and_runs(finished):
    command = [word for word in COMMAND if not word.startswith("data=")]
    command += ["plane=plax", "starts=200", "--dry-run", "--printshellcmds"]
    result = subprocess.run(command, cwd=finished, capture_output=True, text=True, timeout=580)
    assert "data/phantom/8x6-64px-plax.done" in result.stdout + result.stderr
    assert "data/runs/smoke-plax/patch-seed0" in result.stdout + result.stderr
    assert '"starts"' not in result.stdout + result.stderr  # no notebook here takes it
    planes = re.search(r"^PLANES = (.*)$", (finished / "Snakefile").read_text(), re.M)[1]
    assert ast.literal_eval(planes) == tuple(TARGETS)


def test_the_cluster_profile_names_rules_that_exist_and_trains_on_a_gpu(root):
    profile = yaml.safe_load((root / "profiles" / "slurm" / "config.yaml").read_text())
    rules = set(
        re.findall(r"^ *(?:use )?rule (?:\w+ as )?(\w+)", (root / "Snakefile").read_text(), re.M)
    )
    rules |= {f"notebook_{book.stem}" for book in (root / "notebooks").glob("[0-9]*.ipynb")}
    asked = profile["set-resources"]
    assert set(asked) <= rules
    assert {name for name in rules if name.startswith("train")} == {"train", "train_channel"}
    assert asked["train"] == asked["train_channel"] and asked["train"]["gpu"] == 1


def test_a_changed_phantom_is_drawn_anew(root, tmp_path):
    """The folder of the smoke preset, its own patients only."""
    rules = (root / "Snakefile").read_text()
    (tmp_path / "Snakefile").write_text(rules)
    shutil.copytree(root / "notebooks", tmp_path / "notebooks")
    command = [word for word in COMMAND if not word.startswith("data=")] + ["--until", "phantom"]
    draw = partial(subprocess.run, command, cwd=tmp_path, capture_output=True, text=True)
    assert jobs(draw()) == ["phantom"]
    folder = tmp_path / "data" / "phantom" / "8x6-64px"
    card = json.loads((folder / "phantom.json").read_text())
    (folder / "phantom.json").write_text(json.dumps(card | {"code": "before"}))
    (folder / "patient_0000" / "truth.npz").write_bytes(b"of other code")
    (tmp_path / "Snakefile").write_text(rules.replace('code=state_of_code("phantom")', "code='x'"))
    assert jobs(draw()) == ["phantom"]
    assert json.loads((folder / "phantom.json").read_text()) == card
    assert (folder / "patient_0000" / "truth.npz").stat().st_size > 1000
    assert jobs(draw()) == []


def test_own_data_sizes_seeds_and_folds(project):
    for name in ("two", "three"):
        shutil.copytree(project / "scans" / "one", project / "scans" / name)
    result = make_figures(project, "seeds=2", "folds=3", "--dry-run", "--printshellcmds")
    text = result.stdout + result.stderr
    assert jobs(result).count("train") == 3 * 3 * 2  # variants, folds, seeds
    for fold, (test, val) in enumerate((("one", "three"), ("three", "two"), ("two", "one"))):
        assert f"patch-fold{fold}-seed1" in text
        assert re.search(rf'"test": \["{test}"\], "val": \["{val}"\]', text), fold
    # Two scans of one patient are in one fold.
    whose = "patients: {one: Ann, two: Ann, three: Ben, four: Cleo}"
    shutil.copytree(project / "scans" / "one", project / "scans" / "four")
    (project / "scans" / "reading.yaml").write_text(whose)
    dealt = make_figures(project, "seeds=2", "folds=3", "--dry-run", "--printshellcmds")
    assert re.search(r'"test": \["Ann"\], "val": \["Ben"\]', dealt.stdout + dealt.stderr)
    # Unseen patients: every notebook except the comparison reads the runs of one fold.
    (command,) = [
        line for line in text.splitlines() if "notebooks/07_rows.ipynb --executed" in line
    ]
    assert command.count("-fold0-seed") == 2 * 2 and "-fold1-" not in command


def test_a_missing_promise_fails_and_a_stale_one_does_not_count(project, make_notebook):
    assert (project / OUT / "figures" / "07_rows.csv").exists()  # of the earlier run
    make_notebook(project / "notebooks" / "07_rows.ipynb", "runs = []\noutput = ''", "1")
    result = make_figures(project)
    text = result.stdout + result.stderr
    assert result.returncode and "07_rows.csv" in text and "Missing" in text


def test_an_added_scan_and_a_changed_image_train_anew(project):
    shutil.copytree(project / "scans" / "one", project / "scans" / "two")
    assert "train" in jobs(make_figures(project, "--dry-run"))
    shutil.rmtree(project / "scans" / "two")
    assert not jobs(make_figures(project, "--dry-run"))
    (project / "scans" / "one" / "frame.png").write_bytes(b"another image")
    again = make_figures(project)
    assert again.returncode == 0 and jobs(again).count("train") == 3
    assert (project / OUT / "patch-seed0.before").is_dir()


def test_folders_with_spaces_and_other_letters(project):
    (project / "scans").rename(project / "scans à moi")
    command = [*COMMAND[:-1], "data=scans à moi"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (project / "data" / "runs" / "smoke-scans à moi" / "figures" / "index.html").exists()


def test_failing_step_is_named_and_kept(project, make_notebook):
    make_notebook(project / "notebooks" / "07_rows.ipynb", "runs = []\noutput = ''", "1 / 0")
    result = make_figures(project)
    text = result.stdout + result.stderr
    assert result.returncode and "cell 3 failed: ZeroDivisionError" in text
    kept = json.loads((project / OUT / "notebooks" / "07_rows.ipynb").read_text())
    assert "ZeroDivisionError" in json.dumps(kept["cells"])


def test_a_full_disk_stops_it_and_it_goes_on(finished, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk to fill needs root and the right to mount it")
    try:
        project = shutil.copytree(finished, tmp_path / "project")
        shutil.rmtree(project / "data")
        preset(project, "model: {epochs: 2, size: 1000000}")  # two trainings, a megabyte each
        free = shutil.disk_usage(project).free
        (tmp_path / "ballast").write_bytes(bytes(free - 1_500_000))
        full = make_figures(project)
        assert full.returncode and "No space left on device" in full.stdout + full.stderr
        assert not (project / OUT / "figures" / "07_rows.csv").exists()
        (tmp_path / "ballast").unlink()
        again = make_figures(project)
        assert again.returncode == 0, again.stderr[-3000:]
        rows = [(folder / OUT / "figures" / "07_rows.csv") for folder in (finished, project)]
        assert rows[0].read_text() == rows[1].read_text()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def owner(process):
    try:
        return process.environ().get("DREAMER_PIPELINE")
    except psutil.Error:
        return None


@pytest.fixture
def start():
    """start(project): `make figures` in the background, ended with all its steps after the test."""
    projects = []

    def begin(project):
        projects.append(str(project))
        return subprocess.Popen(  # a background shell's children ignore SIGINT otherwise
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), args=
            COMMAND, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    yield begin
    for process in psutil.process_iter():
        if owner(process) in projects:
            process.kill()


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_training_leaves_nothing_behind(project, start, blow):
    shutil.rmtree(project / "data")
    preset(project, "model: {epochs: 3, pause: 3.0}")
    run = project / OUT / "patch-seed0"
    process = start(project)
    wait_for(run, "0.json", process)
    if blow == signal.SIGINT:  # a terminal signals the whole group
        os.killpg(process.pid, blow)
    else:
        second = make_figures(project)
        assert second.returncode == 1 and "already running here" in second.stderr
        assert not jobs(second)
        process.terminate()
    assert process.wait(60) != 0
    assert not (run / "2.json").exists()
    left = [p for p in psutil.process_iter() if owner(p) == str(project)]
    assert not left


def test_real_trainings_killed_and_started_again_end_the_same(root, start, tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    projects = [tmp_path / "undisturbed", tmp_path / "killed"]
    for project in projects:
        (project / "notebooks" / "parameters").mkdir(parents=True)
        shutil.copy(root / "Snakefile", project)
        shutil.copy(root / "notebooks" / "02_train.ipynb", project / "notebooks")
        preset = yaml.safe_load((root / "notebooks" / "parameters" / "smoke.yaml").read_text())
        preset["training"] |= {"epochs": 15, "test": 2}
        text = yaml.safe_dump(preset)
        (project / "notebooks" / "parameters" / "smoke.yaml").write_text(text)
        for number in range(5):
            write_scan(project / "scans", f"p{number}", seed=number)
    whole, cut = (start(project) for project in projects)
    runs = [project / "data" / "runs" / "smoke-scans" for project in projects]
    begun = wait_for(runs[1], "*-seed0/metrics.csv", cut, 400)
    for child in psutil.Process(cut.pid).children():  # its steps are orphans then
        child.kill()
    cut.kill()
    cut.wait(60)
    assert len(pd.read_csv(begun)) < 15
    again = make_figures(projects[1])
    assert again.returncode == 0, again.stderr[-3000:]
    assert whole.wait(400) == 0
    for variant in ("patch-seed0", "channel-seed0", "none-seed0"):
        for name in (f"tables/{variant}/02_accuracy.csv", f"{variant}/metrics.csv"):
            tables = [pd.read_csv(run / name) for run in runs]
            tables = [t.drop(columns=["seconds", "waiting_share"], errors="ignore") for t in tables]
            pd.testing.assert_frame_equal(*tables, check_exact=True)
        weights = [(run / variant / "model.safetensors").read_bytes() for run in runs]
        assert weights[0] == weights[1]
