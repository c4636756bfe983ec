"""The reference study from the command line: trains, measures, resumes, stops in time."""

import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml

from dreamer.data import Transitions
from dreamer.study import reference, results
from dreamer.study.__main__ import main, numbers

# Not on a GPU machine that has PyTorch, Lightning, timm and the scientific stack alone.
ABSENT = (
    "captum gymnasium papermill snakemake nbclient nbformat nbconvert jupyterlab IPython "
    "ipywidgets pydicom av h5py SimpleITK psutil"
).split()
PLAN = {
    "preset": "smoke",
    "seeds": [1],
    "data": {"patients": 8, "frames": 6, "seed": 0},
    "test": {"patients": 3, "frames": 12, "seed": 7},
    "searches": 2,
    "varied": 2,
    "claims": [],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "results").mkdir()
    (folder / "results" / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    return folder


def command(place, *words):
    folders = {"--store": "results", "--work": "work", "--data": "phantom"}
    given = [text for option, name in folders.items() for text in (option, str(place / name))]
    return [*words, "--preset", "smoke", *given]


def test_seeds_are_ranges_and_numbers():
    assert numbers("100-103,110") == [100, 101, 102, 103, 110]


def test_a_run_without_what_a_bare_machine_lacks(place, root):
    block = f"""
import sys
sys.modules |= dict.fromkeys({ABSENT})  # None: as if not installed
from dreamer.study.__main__ import main
sys.exit(main({command(place, "train", "--variant", "patch", "none")}))
"""
    done = subprocess.run([sys.executable, "-c", block], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    store = results.read(place / "results")
    assert sorted(store.runs.index) == ["smoke_a4c_none_seed1", "smoke_a4c_patch_seed1"]
    assert {"accuracy", "convergence"} <= set(store.measures["family"])


def test_what_one_machine_lacks_another_adds_and_nothing_is_repeated(place, capsys):
    name = "smoke_a4c_patch_seed1"
    assert "maps" not in results.families(place / "results", name)
    for outcome in ("done", "stored"):
        assert main(command(place, "train", "--variant", "patch")) == 0
        assert f"{name}: {outcome}" in capsys.readouterr().out
    assert "maps" in results.families(place / "results", name)
    assert main(command(place, "missing", "--variant", "patch", "--seeds", "1,2")) == 1
    assert "missing: smoke_a4c_patch_seed2" in capsys.readouterr().out


def test_a_training_stops_in_time_and_resumes(place):
    plan = results.load_plan(place / "results")
    wanted = reference.identity("smoke", "channel", 1)
    folders = (place / "results", place / "work", place / "phantom")
    assert reference.run(wanted, plan, *folders, until=time.monotonic() - 1) == "stopped"
    run = place / "work" / "smoke_a4c_channel_seed1"
    first = pd.read_csv(run / "metrics.csv")
    assert len(first) == 1
    assert reference.run(wanted, plan, *folders) == "done"
    whole = pd.read_csv(run / "metrics.csv")
    assert len(whole) == 2
    assert whole.iloc[0]["val_loss"] == first.iloc[0]["val_loss"]


def test_a_run_of_another_process_is_passed_over(place):
    from filelock import FileLock

    wanted = reference.identity("smoke", "none", 5)
    folders = (place / "results", place / "work", place / "phantom")
    with FileLock(place / "work" / f".{results.run_name(wanted)}.lock"):
        assert reference.run(wanted, results.load_plan(place / "results"), *folders) == "busy"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "huge"], "no such preset"),
        (["--change", "wide", "--set", "model.wings=2"], "wings"),
        (["--change", "wide", "--set", "width=2"], "use model.<field>"),
        (["--change", "more", "--set", "data.patients=many"], "'many' is not a number"),
        (["--change", "more", "--set", "data.frames=0"], "0 is not a number from 1"),
    ],
)
def test_a_bad_name_is_refused_before_any_work(place, words, message):
    with pytest.raises(ValueError, match=message):
        main([*command(place, "train"), *words])


def test_a_stored_change_cannot_stand_for_other_settings(tmp_path):
    wanted = reference.identity("smoke", "patch", 1, change="narrow")
    words = ["--variant", "patch", "--change", "narrow", "--set", "training.epochs=1"]
    others = {"training.epochs": 1, "model.d_model": 32}
    kept = {field: kind() for field, kind in results.RECORD.items()} | wanted
    results.write(tmp_path / "results", kept | {"settings": others})
    (tmp_path / "results" / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    with pytest.raises(ValueError, match="choose another name"):
        main(command(tmp_path, "train", *words))
    assert not (tmp_path / "work").exists()


def test_a_change_can_draw_other_training_patients(place):
    words = ["--change", "more patients", "--set", "data.patients=9", "training.epochs=1"]
    measures = ["--variant", "none", "--families", "convergence"]
    assert main([*command(place, "train"), *words, *measures]) == 0
    store = results.records(place / "results")
    run = store["smoke_a4c_none_more-patients_seed1"]
    assert run["settings"] == {"data.patients": 9, "training.epochs": 1}
    [drawn] = (place / "phantom").glob("a4c-9x6-*seed0")
    assert run["data"] == Transitions(drawn, 32).digest


def test_a_change_needs_a_name(place, capsys):
    with pytest.raises(SystemExit):
        main([*command(place, "train"), "--set", "model.d_model=32"])
    assert "go together" in capsys.readouterr().err
