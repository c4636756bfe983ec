"""Shared by all tests: the project's folder, and tiny notebooks."""

import json
from pathlib import Path

import matplotlib
import nbformat
import pandas as pd
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def torch_settings():
    """One thread, since tensors are tiny; gradients whatever the test before left."""
    torch.set_num_threads(1)
    with torch.enable_grad():  # on leaving it puts the mode back
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def make_notebook():
    """write(path, parameters, *cells): a notebook with one parameters cell and further cells."""

    def write(path: Path, parameters: str, *cells: str) -> Path:
        first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        rest = [nbformat.v4.new_code_cell(source) for source in cells]
        book = nbformat.v4.new_notebook(cells=[first, *rest])
        book.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "py"}
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(book, path)
        return path

    return write


@pytest.fixture(scope="session")
def untrained():
    """write(folder, model configuration): a run's folder as training leaves it, with an untrained
    model; patient_0001 is a training patient and patient_0003 a test patient."""
    from safetensors.torch import save_file

    from dreamer.model import CardiacDreamer
    from dreamer.runs import TrainingConfig

    def write(folder: Path, config) -> Path:
        folder.mkdir(parents=True)
        parts = {"model": config, "training": TrainingConfig()}
        record = {name: part.model_dump(mode="json") for name, part in parts.items()}
        (folder / "config.json").write_text(json.dumps(record | {"data": {}}))
        split = {"kind": "patient", "train": ["patient_0001"], "val": [], "test": ["patient_0003"]}
        (folder / "split.json").write_text(json.dumps(split))
        (folder / "versions.json").write_text("{}")
        torch.manual_seed(0)
        save_file(CardiacDreamer(config).state_dict(), folder / "model.safetensors")
        return folder

    return write


def verdict_table(*rows: tuple) -> pd.DataFrame:
    """A table of verdicts of rows (family, claim, estimate, unit, verdict): margin 0.5, interval
    estimate ± 0.25, 10 seeds, 200 patients."""
    from dreamer.study.stats import COLUMNS

    table = pd.DataFrame(rows, columns="family claim estimate unit verdict".split())
    more = {"low": table["estimate"] - 0.25, "high": table["estimate"] + 0.25, "margin": 0.5}
    more |= {"published": "95.7%", "tokens": "50 / 513", "seeds": 10, "patients": 200}
    return table.assign(**more, power=0.8, seeds_needed=12, size="small", source="")[COLUMNS]


@pytest.fixture(scope="session")
def verdicts():
    return verdict_table


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """A small page with a figure, a film, verdicts, a short and a long table and a notebook."""
    import matplotlib.pyplot as plt

    from dreamer.page import write_page
    from dreamer.plots import save

    folder = tmp_path_factory.mktemp("page")
    fig, axis = plt.subplots(figsize=(8, 3))
    axis.plot([0, 1], [0, 1])
    axis.set_xlabel("mm")
    save(fig, folder, "04_line", caption="A line & more.", alt="a rising line", n="3 patients")
    plt.close(fig)
    verdict_table(
        ("maps", "patch <is> better", 0.1, "mm", "inconclusive"),
        ("accuracy", "more <is> less", 2, "deg", "confirmed"),
    ).to_csv(folder / "04_verdicts.csv", index=False)
    pd.DataFrame({"axis": list("xyz"), "error in mm": [1.23456, 2, 3]}).to_csv(
        folder / "04_short.csv", index=False
    )
    pd.DataFrame({"k": range(100)}).to_csv(folder / "04_long.csv", index=False)
    Image.new("L", (8, 8)).save(folder / "08_search.gif")
    book = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# 04 Compare: which?"),
        nbformat.v4.new_code_cell("1 + 1", outputs=[
            nbformat.v4.new_output("execute_result", {"text/plain": "two"}),
            nbformat.v4.new_output("display_data", {
                "application/vnd.jupyter.widget-view+json": {}, "text/plain": "spinning"}),
            nbformat.v4.new_output("stream", name="stderr", text="spinning"),
            nbformat.v4.new_output("display_data", {"text/html": "<script>alert()</script>x"}),
            nbformat.v4.new_output("display_data", {
                "text/markdown": "- it is **so**", "text/plain": "<Markdown object>"}),
        ]),
    ])  # fmt: skip
    book.metadata["papermill"] = {
        "start_time": "2026-01-01T10:00:00",
        "end_time": "2026-01-01T10:03:00",
        "duration": 180.0,
    }
    (folder / "books").mkdir()
    nbformat.write(book, folder / "books" / "04_compare.ipynb")
    return write_page(folder, folder / "books")
