"""One notebook through papermill: parameters checked, outputs promised and found.

Papermill alone only warns of an unknown parameter, and calls a run that wrote its figures to the
wrong place a success. Here both stop the run. `begin` is the first call of every notebook, and
`figures` is what `make figures` calls: Snakemake behind a lock that dies with its holder.
"""

import argparse
import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

INJECTED = "# Parameters"  # the first line of the cell that papermill inserts
OWNER = "DREAMER_PIPELINE"  # the variable by which the processes of one pipeline are known


class NotebookError(RuntimeError):
    """A notebook that was refused, failed or did not keep its promise; the text says which."""


def _assigned(source: str) -> set[str]:
    """Names assigned at the top level of a cell's source; magics and broken cells hold none."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return set()
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _refuse(given: set[str], known: set[str], who: str) -> None:
    if unknown := given - known:
        raise NotebookError(
            f"unknown parameter {', '.join(sorted(unknown))}; "
            f"{who} takes {', '.join(sorted(known)) or 'none'}"
        )


def known_parameters(notebook: str | Path) -> set[str]:
    """Names that the notebook's one cell tagged `parameters` defines.

    Raises NotebookError when the file is missing, or has no such cell or more than one.
    """
    path = Path(notebook)
    if not path.is_file():
        raise NotebookError(f"{path}: no such notebook")
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotebookError(f"{path}: is not a notebook") from error
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(f"{path}: {len(tagged)} cells are tagged `parameters`; one is needed")
    return _assigned("".join(tagged[0]["source"]))


def preset_parameters(file: str | Path, notebook: str | Path) -> dict[str, Any]:
    """The part of a preset (one YAML for the whole pipeline) that this notebook takes.

    A file that maps no names to values is a NotebookError, and so is a name that no notebook
    beside this one takes: a slip of the pen.
    """
    if not Path(file).is_file():
        raise NotebookError(f"{file}: no such parameter file")
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise NotebookError(f"{file}: is not YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise NotebookError(f"{file}: must map parameter names to values")
    everywhere = {p: known_parameters(p) for p in sorted(Path(notebook).parent.glob("*.ipynb"))}
    strangers = set(values) - set().union(*everywhere.values())
    if strangers:
        raise NotebookError(f"{file}: no notebook takes {', '.join(sorted(strangers))}")
    mine = known_parameters(notebook)
    return {name: value for name, value in values.items() if name in mine}


def run_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Any],
    executed: str | Path,
    outputs: Iterable[str | Path] = (),
    cwd: str | Path = ".",
    timeout: float | None = None,
) -> None:
    """Run one notebook; return only when it ended well and wrote every promised output.

    `executed` gets the notebook with its results, also when a cell fails. `outputs` and relative
    paths in `parameters` are relative to `cwd`; `timeout` is in seconds for each cell. Raises
    NotebookError: unknown parameters before any work, a failing cell by number, or outputs that
    are missing, empty or untouched by this run.
    """
    # Compiling this grammar of web addresses takes seconds, and no notebook's schema asks for it.
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill
    from traitlets.config import Config

    _refuse(set(parameters), known_parameters(notebook), str(notebook))
    promised = [Path(cwd, output) for output in outputs]
    before = {path: path.stat().st_mtime_ns for path in promised if path.exists()}
    Path(executed).parent.mkdir(parents=True, exist_ok=True)
    try:
        # Sockets of its own: of two kernels that begin at once both would take the same free port.
        # The path of a socket ends at some hundred characters.
        short = None if len(tempfile.gettempdir()) < 70 else "/tmp"
        with tempfile.TemporaryDirectory(dir=short) as sockets:
            kernel = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            papermill.execute_notebook(
                str(notebook), str(executed), dict(parameters), cwd=str(cwd),
                kernel_name="python3", progress_bar=False, execution_timeout=timeout,
                start_timeout=300, config=Config(ConnectionFileMixin=kernel),
            )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        raise NotebookError(
            f"{notebook}: cell {error.exec_count} failed: {error.ename}: {error.evalue}; "
            f"the notebook up to there is {executed}"
        ) from None
    except TimeoutError as error:
        raise NotebookError(f"{notebook}: a cell took over {timeout} s; see {executed}") from error
    for path in promised:
        if not path.exists():
            fault = "is missing"
        elif not path.stat().st_size:
            fault = "is empty"
        elif path.stat().st_mtime_ns == before.get(path):
            fault = "was not written by this run"
        else:
            continue
        raise NotebookError(f"{notebook}: ran to its end, but {path} {fault}; see {executed}")


def set_aside(run: str | Path, parameters: Mapping[str, Any]) -> None:
    """Move a run folder that was begun with other parameters to `<run>.before`; one is kept.

    A run goes on only with the configuration it was begun with, which stands beside it in
    `<run>.json`; so a changed preset or code trains anew, and an interrupted training goes on.
    """
    run, wanted = Path(run), json.dumps(dict(parameters), sort_keys=True, indent=1)
    card, before = run.with_name(f"{run.name}.json"), run.with_name(f"{run.name}.before")
    if run.exists() and (not card.exists() or card.read_text(encoding="utf-8") != wanted):
        shutil.rmtree(before, ignore_errors=True)
        run.rename(before)
    run.parent.mkdir(parents=True, exist_ok=True)
    part = card.with_suffix(".part")
    part.write_text(wanted, encoding="utf-8")
    part.replace(card)


def begin() -> None:
    """First call of a notebook: work from the project's root, refuse unknown parameters.

    In JupyterLab a kernel starts in notebooks/: the working directory becomes the root above it.
    Where papermill put in parameters, names that no cell before assigns raise NotebookError.
    """
    here = Path.cwd()
    if here.name == "notebooks" and (here.parent / "dreamer" / "pipeline.py").is_file():
        os.chdir(here.parent)
    from IPython import get_ipython

    known: set[str] = set()
    for source in get_ipython().user_ns.get("In", []) if get_ipython() else []:
        if source.startswith(INJECTED):
            _refuse(_assigned(source), known, "this notebook")
        known |= _assigned(source)


def _pipelines(root: Path) -> Iterator[tuple[psutil.Process, bool]]:
    """Live processes that work on this project's pipeline, and whether `figures` started them."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid in mine or process.status() == psutil.STATUS_ZOMBIE:
                continue
            owned = process.environ().get(OWNER) == str(root)
            words = [Path(word).name for word in process.cmdline()[:3]]
            if owned or ("snakemake" in words and Path(process.cwd()) == root):
                yield process, owned


def figures(arguments: Iterable[str] = (), root: str | Path = ".") -> int:
    """Run the project's Snakefile as the only one in this folder; return its exit status.

    The lock is the kernel's (flock), so it falls with its holder, and Snakemake's own lock, which
    a SIGKILL leaves behind, is opened only when nothing lives. Steps that outlived a killed
    pipeline are ended first: two trainings in one run folder would spoil each other.
    """
    import fcntl

    root = Path(root).resolve()
    (root / ".snakemake").mkdir(exist_ok=True)
    with open(root / ".snakemake" / "figures.lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            print(f"make figures is already running here (process {lock.read().strip()}); "
                  "this one stops, nothing was touched", file=sys.stderr)  # fmt: skip
            return 1
        alive = list(_pipelines(root))
        if others := [process.pid for process, owned in alive if not owned]:
            print(f"snakemake is running here (process {others[0]}); this one stops, "
                  "nothing was touched", file=sys.stderr)  # fmt: skip
            return 1
        for process, _ in alive:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        for process in psutil.wait_procs([process for process, _ in alive], timeout=10)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        snakemake = [sys.executable, "-m", "snakemake", "--cores", "all"]
        snakemake += ["--resources", "trainer=1", *arguments]
        environment = {**os.environ, OWNER: str(root)}
        if any((root / ".snakemake" / "locks").glob("*")):
            subprocess.run([*snakemake, "--unlock"], env=environment, cwd=root, check=True)
        rerun = [*snakemake, "--rerun-incomplete"]
        child = subprocess.Popen(rerun, env=environment, cwd=root, pass_fds=[lock.fileno()])
        lock.truncate(0)
        lock.write(str(child.pid))
        lock.flush()

        def end(*_: object) -> None:  # Snakemake itself would wait for a training's end
            child.terminate()
            for process, owned in _pipelines(root):
                if owned and process.pid != child.pid:
                    with contextlib.suppress(psutil.Error):
                        process.terminate()

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, lambda *_: None)  # a terminal's Ctrl-C reaches the child too
        return child.wait()


def main() -> int:
    """The command line: one notebook, or `figures` and options and settings for Snakemake."""
    if sys.argv[1:2] == ["figures"]:
        rest = sys.argv[2:]
        pairs = [word for word in rest if "=" in word and not word.startswith("-")]
        options = [word for word in rest if word not in pairs]
        return figures([*options, *(["--config", *pairs] if pairs else [])])
    parser = argparse.ArgumentParser(prog="python -m dreamer.pipeline", description=__doc__)
    parser.add_argument("notebook")
    parser.add_argument("--executed", required=True, help="where the executed notebook goes")
    parser.add_argument("--output", action="append", default=[], help="a promised file")
    parser.add_argument("-y", default="{}", metavar="YAML", help="parameters")
    parser.add_argument(
        "--run", nargs=2, metavar=("FOLDER", "CODE"), help="set aside a run begun otherwise"
    )
    parser.add_argument("--timeout", type=float, help="seconds for each cell")
    given = parser.parse_args()
    values = yaml.safe_load(given.y)
    try:
        if given.run:
            set_aside(given.run[0], {**values, "code": given.run[1]})
        run_notebook(given.notebook, values, given.executed, given.output, timeout=given.timeout)
    except (NotebookError, OSError) as error:  # a full disk, too
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
