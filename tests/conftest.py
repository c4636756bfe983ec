"""Shared by all tests: the project's folder, and tiny notebooks."""

from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch

matplotlib.use("Agg")
# Tiny tensors: a second thread only makes them wait, and much so on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
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
