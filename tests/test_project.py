"""The tree itself: environments agree, notebooks are thin, imports go one way."""

import ast
import re
import tomllib
from importlib import metadata

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# Each file imports only from those before it; an entry may be a file or a package.
ORDER = [
    "poses", "phantom", "data", "tokens", "model", "runs", "training", "evaluation", "navigation",
    "arrivals", "costs", "fast", "cold", "benchmark", "ablations", "attribution", "truth",
    "faithfulness", "figures", "explore", "report", "pipeline",
]  # fmt: skip
CONDA = {
    "torch": "pytorch", "matplotlib": "matplotlib-base", "snakemake": "snakemake-minimal",
    "playwright": "playwright-python",
}  # fmt: skip


def split(requirement: str) -> tuple[str, frozenset[str]]:
    """'a>=1,<2' -> ('a', {'>=1', '<2'})."""
    name, bounds = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(.*)", requirement).groups()
    return name, frozenset(bound.strip() for bound in bounds.split(",") if bound)


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def declared(project):
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return dict(split(requirement) for group in groups for requirement in group)


@pytest.fixture(scope="module")
def pinned(root):
    lines = (root / "requirements.txt").read_text().splitlines()
    pins: dict[str, set[str]] = {}
    for line in lines:
        name, version = re.fullmatch(r"([a-z0-9.-]+)==([^ ;]+)( ; .*)?", line).groups()[:2]
        pins.setdefault(name, set()).add(version)
    return pins


def test_conda_has_the_same_packages_and_bounds(root, project, declared):
    environment = yaml.safe_load((root / "environment.yml").read_text())
    listed = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    conda = dict(split(entry) for entry in listed if entry != "pip")
    assert conda.pop("python") == split("python" + project["requires-python"])[1]
    assert conda == {CONDA.get(name, name): bounds for name, bounds in declared.items()}


def test_requirements_pin_all_that_is_declared_without_addresses(root, pinned, declared):
    text = (root / "requirements.txt").read_text()
    assert "://" not in text and "index-url" not in text and "@" not in text
    assert set(declared) <= set(pinned)
    for name, bounds in declared.items():
        assert all(v in SpecifierSet(",".join(bounds)) for v in pinned[name]), name


def test_torch_and_torchvision_are_one_pair(pinned):
    (torch,), (vision,) = pinned["torch"], pinned["torchvision"]
    if metadata.version("torchvision") != vision:
        pytest.skip("another torchvision is installed than the pinned one")
    (needed,) = [r for r in map(Requirement, metadata.requires("torchvision")) if r.name == "torch"]
    assert torch in needed.specifier


def test_imports_go_one_way(root):
    for position, name in enumerate(ORDER):
        files = [root / "dreamer" / f"{name}.py", *(root / "dreamer" / name).rglob("*.py")]
        for file in filter(lambda f: f.exists(), files):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom):
                    base = "dreamer." if node.level else ""
                    inside = node.level == 1 and file.parent.name == name
                    words = [] if inside else [f"{base}{node.module or ''}".strip(".")]
                    if words == ["dreamer"]:
                        words = [f"dreamer.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    words = [alias.name for alias in node.names]
                else:
                    continue
                for word in words:
                    part = word.split(".")[1] if word.startswith("dreamer.") else None
                    if part in ORDER:
                        allowed = ORDER[: position + 1]
                        assert part in allowed, f"{file.name} imports {part}"


def test_every_module_has_its_place(root):
    found = {p.stem for p in (root / "dreamer").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert found - {"__init__", "__pycache__"} <= set(ORDER)


def notebooks():
    from pathlib import Path

    return sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.name)
def test_notebook_is_thin(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert not tagged[0].source.startswith("# Parameters"), "papermill's cell begins so"
    for node in ast.parse(tagged[0].source).body:
        ast.literal_eval(node.value)
        annotated = isinstance(node, ast.AnnAssign)
        assert annotated or node.value.value is None, "papermill reads types off annotations"
    assert all(line.count("=") <= 1 for line in tagged[0].source.splitlines())
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= 20
        assert not re.search(r"^\s*[!%]", cell.source, re.M), "no shell lines, no magics"
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef}
    assert "output" in tagged[0].source
    assert any("begin()" in cell.source for cell in code)


def test_presets_hold_only_parameters_of_notebooks(root):
    from dreamer.pipeline import preset_parameters

    for preset in sorted((root / "notebooks" / "parameters").glob("*.yaml")):
        for notebook in notebooks():
            preset_parameters(preset, notebook)
