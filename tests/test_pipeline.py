"""One notebook through papermill: what is refused before work, what is kept after a failure."""

import json
import os
from pathlib import Path

import pytest

from dreamer.pipeline import (
    NotebookError,
    _locked,
    begin,
    ensure_home,
    known_parameters,
    preset_parameters,
    run_notebook,
    set_aside,
)

BEGIN = "from dreamer.pipeline import begin\nbegin()"


def test_known_parameters_are_the_tagged_cells_names(tmp_path, make_notebook):
    book = make_notebook(tmp_path / "a.ipynb", "data: str = 'x'  # where\nseed = 0", "other = 1")
    assert known_parameters(book) == {"data", "seed"}


def test_unknown_parameter_stops_before_any_work(tmp_path, make_notebook):
    book = make_notebook(tmp_path / "a.ipynb", "seed = 0", "open('trace', 'w').write('x')")
    with pytest.raises(NotebookError, match=r"unknown parameter sead; .*a\.ipynb takes seed"):
        run_notebook(book, {"sead": 1}, tmp_path / "out.ipynb", cwd=tmp_path)
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out.ipynb").exists()


def test_missing_notebook_and_missing_cell_are_named(tmp_path, make_notebook):
    with pytest.raises(NotebookError, match=r"none\.ipynb: no such notebook"):
        run_notebook(tmp_path / "none.ipynb", {}, tmp_path / "out.ipynb")
    book = make_notebook(tmp_path / "a.ipynb", "seed = 0")
    text = json.loads(book.read_text())
    text["cells"][0]["metadata"] = {}
    book.write_text(json.dumps(text))
    with pytest.raises(NotebookError, match="no cell is tagged"):
        known_parameters(book)


def test_a_notebook_runs_in_its_folder_and_is_kept(tmp_path, make_notebook):
    book = make_notebook(tmp_path / "a.ipynb", "text = ''", BEGIN, "open('t.csv', 'w').write(text)")
    executed = tmp_path / "out" / "a.ipynb"
    run_notebook(book, {"text": "1"}, executed, cwd=tmp_path)
    assert (tmp_path / "t.csv").read_text() == "1" and executed.stat().st_size


def test_failing_cell_is_named_and_the_notebook_kept(tmp_path, make_notebook, monkeypatch):
    far = tmp_path / ("deep" * 20)  # sockets cannot lie there
    far.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(far))
    book = make_notebook(tmp_path / "a.ipynb", "x = 1", "print('reached')", "1 / 0")
    message = r"cell 3 failed: ZeroDivisionError: division by zero; .*out\.ipynb"
    with pytest.raises(NotebookError, match=message):
        run_notebook(book, {}, tmp_path / "out.ipynb", cwd=tmp_path)
    assert "reached" in (tmp_path / "out.ipynb").read_text()


def test_a_cell_that_hangs_is_stopped_and_the_notebook_kept(tmp_path, make_notebook):
    book = make_notebook(tmp_path / "a.ipynb", "x = 1", "import time; time.sleep(60)")
    with pytest.raises(NotebookError, match=r"over 2 s"):
        run_notebook(book, {}, tmp_path / "out.ipynb", cwd=tmp_path, timeout=2)
    assert (tmp_path / "out.ipynb").stat().st_size


def test_notebook_itself_refuses_unknown_parameters(tmp_path, make_notebook):
    import papermill

    book = make_notebook(tmp_path / "a.ipynb", "seed: int = 0", BEGIN)
    quiet = {"progress_bar": False, "cwd": str(tmp_path), "kernel_name": "python3"}
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter sead"):
        papermill.execute_notebook(book, tmp_path / "bad.ipynb", {"sead": 1}, **quiet)


def test_begin_moves_from_the_notebooks_to_the_root(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    begin()
    assert Path.cwd() == tmp_path / "notebooks"  # some other project's folder: left alone
    (tmp_path / "dreamer").mkdir()
    (tmp_path / "dreamer" / "pipeline.py").touch()
    begin()
    assert Path.cwd() == tmp_path


def test_presets_are_shared_out_and_slips_refused(tmp_path, make_notebook):
    first = make_notebook(tmp_path / "01_a.ipynb", "seed = 0")
    make_notebook(tmp_path / "02_b.ipynb", "seed = 0\nmodel: dict = {}")
    preset = tmp_path / "p.yaml"
    preset.write_text("seed: 3\nmodel: {d_model: 8}\n")
    assert preset_parameters(preset, first) == {"seed": 3}
    preset.write_text("sede: 3\n")
    with pytest.raises(NotebookError, match=r"p\.yaml: no notebook takes sede"):
        preset_parameters(preset, first)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "is not YAML"), ("- 1", "must map"), ("1: 2", "must map")]
)
def test_parameter_files_are_checked(tmp_path, make_notebook, text, message):
    book = make_notebook(tmp_path / "01_a.ipynb", "seed = 0")
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(NotebookError, match=message):
        preset_parameters(tmp_path / "p.yaml", book)
    with pytest.raises(NotebookError, match="no such parameter file"):
        preset_parameters(tmp_path / "q.yaml", book)


def test_a_run_with_other_parameters_is_set_aside(tmp_path):
    run = tmp_path / "runs" / "patch-seed0"
    set_aside(run, {"d_model": 8})
    run.mkdir()
    (run / "weights").write_text("8")
    set_aside(run, {"d_model": 8})
    assert (run / "weights").read_text() == "8"
    set_aside(run, {"d_model": 16})
    assert not run.exists() and (run.with_name("patch-seed0.before") / "weights").exists()


def test_a_container_without_home_and_user_gets_both(tmp_path, monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ensure_home()
    assert Path.home().is_dir() and Path.home().parent == tmp_path
    assert os.environ["USER"] == f"user{os.getuid()}"
    monkeypatch.setenv("HOME", str(tmp_path / "mine"))  # set, but missing
    ensure_home()
    assert Path.home().is_dir()


def test_without_kernel_locks_the_process_id_decides(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with open(tmp_path / "figures.lock", "a+") as lock:
        assert _locked(lock)
        lock.write(str(os.getpid()))  # a live process
        lock.flush()
        assert not _locked(lock)
        lock.truncate(0)
        lock.write("999999999")  # no such process
        lock.flush()
        assert _locked(lock)
