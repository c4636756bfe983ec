"""Every notebook: its structure, its method in the cells, and one run with smoke.yaml."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
START = ROOT / "notebooks" / "start_here.ipynb"  # not numbered: no part of the pipeline
# Calls that show the method, by notebook.
METHOD = {
    "02": ["fit(", "predict("],
    "03": ["Timer(", "FlopCounterMode("],
    "04": [
        "accuracy.measure(",
        "stats.interval(",
        "results.difference(",
        "results.verdicts(",
        "sns.",
    ],
    "05": ["b c h w -> b (h w) c", "b c h w -> b c (h w)", "attribution.recorder(", "sns."],
    "06": [
        "captum.attr",
        "IntegratedGradients(",
        "GradientShap(",
        "LayerGradCam(",
        "FeatureAblation(",
        "ShapleyValueSampling(",
        "Occlusion(",
        "maps.measure(",
        "sns.",
    ],
    "07": ["stats.", "sns."],
    "08": ["env.reset(", "env.step(", "closed_loop.measure(", "results.verdicts("],
    "10": ["results.verdicts(", "results.summarise("],
}


def code_of(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", [*NOTEBOOKS, START], ids=lambda path: path.stem)
def test_structure(path):
    cells = nbformat.read(path, as_version=4).cells
    heading = "# Start here" if path == START else f"# {path.stem[:2]} "
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith(heading)
    code = code_of(path)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert not tagged[0].source.startswith("# Parameters"), "papermill's cell begins so"
    for node in ast.parse(tagged[0].source).body:
        ast.literal_eval(node.value)
        annotated = isinstance(node, ast.AnnAssign)
        assert annotated or node.value.value is None, "papermill reads types from annotations"
    assert any("begin()" in cell.source for cell in code)
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= 30, cell.source
        assert not re.search(r"^\s*[!%]", cell.source, re.M), "no shell lines, no magics"


@pytest.mark.parametrize("number", METHOD)
def test_the_method_stands_in_the_cells(number):
    [path] = [path for path in NOTEBOOKS if path.stem.startswith(number)]
    text = "\n".join(cell.source for cell in code_of(path))
    assert [call for call in METHOD[number] if call not in text] == []


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A copy of the project in which `make figures` with the smoke preset ran once."""
    project = tmp_path_factory.mktemp("smoke")
    for name in ("notebooks", "Snakefile", "dreamer"):
        (project / name).symlink_to(ROOT / name)
    (project / "data").mkdir()
    (project / "data" / "results").symlink_to(ROOT / "data" / "results")
    command = [sys.executable, "-m", "dreamer.pipeline", "figures", "preset=smoke", "ablations=1"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return project / "data" / "runs" / "smoke"


@pytest.mark.slow
def test_every_notebook_runs(smoke):
    ran = {file.stem[:2] for file in (smoke / "notebooks").glob("*.ipynb")}
    assert ran == {path.stem[:2] for path in NOTEBOOKS} - {"00", "09"}
    assert (smoke / "figures" / "index.html").stat().st_size


@pytest.mark.slow
def test_every_figure_has_its_texts_and_formats(smoke):
    figures = sorted((smoke / "figures").glob("[0-9][0-9]_*.png"))
    assert len(figures) > 15
    for figure in figures:
        notes = json.loads(figure.with_suffix(".json").read_text())
        assert notes["caption"] and notes["alt"] and notes["n"], figure
        assert figure.with_suffix(".svg").exists() and figure.with_suffix(".pdf").exists()


@pytest.mark.slow
def test_one_seed_decides_nothing_about_the_variants(smoke):
    import pandas as pd

    verdicts = [pd.read_csv(file) for file in (smoke / "figures").glob("*_verdicts.csv")]
    words = {"confirmed", "contradicted", "equivalent", "inconclusive", "untested"}
    assert verdicts and all(set(table["verdict"]) <= words for table in verdicts)
    for number in ("04", "08"):
        compared = pd.read_csv(smoke / "figures" / f"{number}_verdicts.csv")
        assert set(compared["verdict"]) == {"untested"}


@pytest.mark.slow
def test_costs_are_measured_where_the_processor_has_no_bf16(tmp_path):
    shapes = dict(backbone="compact", image_size=32, channels=16, width=4, d_model=16, num_heads=2,
                  num_layers=1, guidance=[32, 16])  # fmt: skip
    given = dict(batch_sizes=[1], repeats=1, processes=1, image_sizes=[32], shapes=shapes)
    book = ROOT / "notebooks" / "03_benchmark.ipynb"
    command = [sys.executable, "-m", "dreamer.pipeline", str(book), "--executed"]
    command += [str(tmp_path / "03.ipynb"), "-y", json.dumps(given | {"output": str(tmp_path)})]
    avx2 = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, env=avx2, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "This machine has no bf16" in (tmp_path / "03.ipynb").read_text()
    table = (tmp_path / "03_benchmark.csv").read_text()
    assert "fast" in table and "bf16" not in table
