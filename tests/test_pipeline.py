"""The runner: what it refuses before work, what it finds after, and notebooks in JupyterLab."""

import json
import re
from pathlib import Path

import pytest

from dreamer.pipeline import (
    NotebookError,
    begin,
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
    with pytest.raises(NotebookError, match="0 cells are tagged"):
        known_parameters(book)


def test_outputs_are_promised_and_found(tmp_path, make_notebook, monkeypatch):
    book = make_notebook(
        tmp_path / "a.ipynb",
        "text = ''\nname = 'table.csv'",
        BEGIN,
        "open(name, 'w').write(text)",
    )
    executed = tmp_path / "out" / "a.ipynb"
    run_notebook(book, {"text": "1"}, executed, ["table.csv"], cwd=tmp_path)
    assert (tmp_path / "table.csv").read_text() == "1" and executed.stat().st_size
    # The same cells without a kernel: what is looked at afterwards are the files alone.
    monkeypatch.setattr(
        "papermill.execute_notebook",
        lambda book, executed, given, cwd, **_: Path(cwd, given["name"]).write_text(given["text"]),
    )
    for given, promised, told in (
        ({"name": "table.csv", "text": ""}, "table.csv", "table.csv is empty"),
        ({"name": "b.csv", "text": "1"}, "other.csv", "other.csv is missing"),
        ({"name": "b.csv", "text": "1"}, "table.csv", "table.csv was not written by this run"),
    ):
        with pytest.raises(NotebookError, match=re.escape(told)):
            run_notebook(book, given, executed, [promised], cwd=tmp_path)
        (tmp_path / "table.csv").write_text("of an earlier run")


def test_failing_cell_is_named_and_the_notebook_kept(tmp_path, make_notebook, monkeypatch):
    far = tmp_path / ("deep" * 20)  # sockets cannot lie there
    far.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(far))
    book = make_notebook(tmp_path / "a.ipynb", "x = 1", "print('reached')", "1 / 0")
    told = r"cell 3 failed: ZeroDivisionError: division by zero; .*out\.ipynb"
    with pytest.raises(NotebookError, match=told):
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
    ("text", "told"), [("a: [1", "is not YAML"), ("- 1", "must map"), ("1: 2", "must map")]
)
def test_parameter_files_are_checked(tmp_path, make_notebook, text, told):
    book = make_notebook(tmp_path / "01_a.ipynb", "seed = 0")
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(NotebookError, match=told):
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
