"""The tree itself: environments agree, imports go one way."""

import ast
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# Each file imports only from those before it; `phantom` is a package.
CORE = (
    "files poses phantom images records data importers tokens options model runs training "
    "attribution plots pipeline page"
).split()
STUDY = (
    "stats results accuracy cost ground_truth faithfulness maps closed_loop explore ablation "
    "reference"
).split()
ORDER = [*CORE, *(f"study.{name}" for name in STUDY)]
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


def imported(file):
    """Names of the project's modules that a file imports: `data`, `study.stats`."""
    for node in ast.walk(ast.parse(file.read_text())):
        words = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            words = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            words = [alias.name for alias in node.names]
        for word in words:
            parts = word.split(".")[1:] if word.startswith("dreamer.") else []
            yield ".".join(parts[:2] if parts[:1] == ["study"] else parts[:1])


def test_imports_go_one_way(root):
    for position, name in enumerate(ORDER):
        place = root / "dreamer" / Path(*name.split("."))
        for file in [place.with_suffix(".py"), *place.rglob("*.py")]:
            for word in set(imported(file)) & set(ORDER) if file.exists() else ():
                assert word in ORDER[: position + 1], f"{name} imports {word}"


def test_every_module_has_its_place(root):
    folder = root / "dreamer"
    found = {p.stem for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert found - {"__init__", "__pycache__", "study"} <= set(CORE)
    found = {p.stem for p in (folder / "study").glob("*.py")}
    assert found - {"__init__", "__main__"} <= set(STUDY)


def test_presets_hold_only_parameters_of_notebooks(root):
    from dreamer.pipeline import preset_parameters

    for preset in sorted((root / "notebooks" / "parameters").glob("*.yaml")):
        for notebook in sorted((root / "notebooks").glob("*.ipynb")):
            preset_parameters(preset, notebook)
