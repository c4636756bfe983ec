"""Notebooks through papermill, and all of them through Snakemake.

papermill only warns of an unknown parameter; here it stops the run before any work. `begin` is the
first call of every notebook. `figures` is what `make figures` calls: Snakemake behind a lock that
is released when its holder dies.
"""

import argparse
import ast
import contextlib
import getpass
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

from dreamer.files import write_whole

INJECTED = "# Parameters"  # the first line of the cell that papermill inserts
OWNER = "DREAMER_PIPELINE"  # environment variable that marks the processes of one pipeline


class NotebookError(RuntimeError):
    """A notebook that was refused or failed; the message names it, and the cell."""


def _refuse(given: set[str], known: set[str], who: str) -> None:
    if unknown := given - known:
        raise NotebookError(
            f"unknown parameter {', '.join(sorted(unknown))}; "
            f"{who} takes {', '.join(sorted(known)) or 'none'}"
        )


def _papermill():
    # This URL grammar takes seconds to compile, and no schema of a notebook needs it.
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill

    return papermill


def known_parameters(notebook: str | Path) -> set[str]:
    """Names that a notebook's cell tagged `parameters` defines.

    Raises NotebookError where the file is missing, no notebook, or has no such cell.
    """
    path = Path(notebook)
    if not path.is_file():
        raise NotebookError(f"{path}: no such notebook")
    try:
        names = set(_papermill().inspect_notebook(str(path)))
    except Exception as error:  # papermill and nbformat raise many kinds
        raise NotebookError(f"{path}: is not a notebook ({error})") from error
    if not names:
        raise NotebookError(f"{path}: no cell is tagged `parameters`")
    return names


def preset_parameters(file: str | Path, notebook: str | Path) -> dict[str, Any]:
    """The part of a preset (one YAML file for all notebooks) that this notebook takes.

    Raises NotebookError where the file maps no names to values, or a name is a parameter of no
    notebook beside this one.
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
    unknown = set(values) - set().union(*everywhere.values())
    if unknown:
        raise NotebookError(f"{file}: no notebook takes {', '.join(sorted(unknown))}")
    mine = known_parameters(notebook)
    return {name: value for name, value in values.items() if name in mine}


def run_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Any],
    executed: str | Path,
    cwd: str | Path = ".",
    timeout: float | None = None,
) -> None:
    """Run one notebook to its end.

    Args:
        notebook: the notebook; its file is not changed.
        parameters: values for its parameters; relative paths in them are relative to `cwd`.
        executed: where the notebook with its results goes, also when a cell fails.
        cwd: working directory of the kernel.
        timeout: seconds for each cell.

    Raises NotebookError: unknown parameters before any work, or a failing cell by its number.
    """
    papermill = _papermill()
    from traitlets.config import Config

    _refuse(set(parameters), known_parameters(notebook), str(notebook))
    Path(executed).parent.mkdir(parents=True, exist_ok=True)
    # Sockets of its own: two kernels that start at once could take the same free port. The path of
    # a socket is limited to some hundred characters.
    short = None if len(tempfile.gettempdir()) < 70 else "/tmp"
    try:
        with tempfile.TemporaryDirectory(dir=short) as sockets:
            kernel = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            papermill.execute_notebook(
                str(notebook),
                str(executed),
                dict(parameters),
                cwd=str(cwd),
                kernel_name="python3",
                progress_bar=False,
                execution_timeout=timeout,
                start_timeout=300,
                config=Config(ConnectionFileMixin=kernel),
            )
    except papermill.PapermillExecutionError as error:
        raise NotebookError(
            f"{notebook}: cell {error.exec_count} failed: {error.ename}: {error.evalue}; "
            f"the notebook up to there is {executed}"
        ) from None
    except TimeoutError as error:
        raise NotebookError(f"{notebook}: a cell took over {timeout} s; see {executed}") from error


def set_aside(run: str | Path, parameters: Mapping[str, Any]) -> None:
    """Move a run folder that was started with other parameters to `<run>.before`; one is kept.

    A run resumes only with the configuration, code and data it was started with, which are in
    `<run>.json` beside it. So a changed preset, code or scan trains anew, and an interrupted
    training resumes.
    """
    run, wanted = Path(run), json.dumps(dict(parameters), sort_keys=True, indent=1)
    card, before = run.with_name(f"{run.name}.json"), run.with_name(f"{run.name}.before")
    if run.exists() and (not card.exists() or card.read_text(encoding="utf-8") != wanted):
        shutil.rmtree(before, ignore_errors=True)
        run.rename(before)
    run.parent.mkdir(parents=True, exist_ok=True)
    write_whole(card, wanted.encode())


def _assigned(source: str) -> set[str]:
    """Names assigned at the top level of a cell; magics and broken cells have none."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return set()
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def begin() -> None:
    """First call of a notebook: work from the project's root, refuse unknown parameters.

    In JupyterLab a kernel starts in notebooks/; the working directory becomes the root above it.
    Raises NotebookError where papermill injected names that no earlier cell assigns.
    """
    ensure_home()
    here = Path.cwd()
    if here.name == "notebooks" and (here.parent / "dreamer" / "pipeline.py").is_file():
        os.chdir(here.parent)
    from IPython import get_ipython

    known: set[str] = set()
    for source in get_ipython().user_ns.get("In", []) if get_ipython() else []:
        if source.startswith(INJECTED):
            _refuse(_assigned(source), known, "this notebook")
        known |= _assigned(source)


def ensure_home() -> None:
    """Set HOME and USER where a container has neither nor an entry for the user id.

    Caches of several libraries need them; the home is then in the temporary folder.
    """
    with contextlib.suppress(RuntimeError):
        if Path.home().is_dir():
            return _ensure_user()
    os.environ["HOME"] = str(Path(tempfile.gettempdir(), f"home-{os.getuid()}"))
    Path(os.environ["HOME"]).mkdir(mode=0o700, exist_ok=True)
    _ensure_user()


def _ensure_user() -> None:
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"


# The whole pipeline


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


def _end(processes: Iterable[psutil.Process]) -> None:
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=10)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _locked(lock) -> bool:
    """Take the lock file `lock`, or return False where another process holds it.

    The lock is the kernel's (flock): it is released when its holder dies. On file systems without
    such locks, the process id in the file decides.
    """
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        lock.seek(0)
        holder = lock.read().strip()
        return not (holder.isdigit() and psutil.pid_exists(int(holder)))
    return True


def figures(arguments: Iterable[str] = (), root: str | Path = ".") -> int:
    """Run the project's Snakefile as the only one in this folder; return its exit status.

    Snakemake's own lock, which survives a SIGKILL, is opened only when no other run lives. Steps
    that outlived a killed pipeline are ended first: two trainings in one run folder would corrupt
    each other.
    """
    root = Path(root).resolve()
    (root / ".snakemake").mkdir(exist_ok=True)
    with open(root / ".snakemake" / "figures.lock", "a+", encoding="utf-8") as lock:
        if not _locked(lock):
            lock.seek(0)
            holder = lock.read().strip()
            print(f"make figures is already running here (process {holder}); stopped, nothing "
                  "was changed", file=sys.stderr)  # fmt: skip
            return 1
        alive = list(_pipelines(root))
        if others := [process.pid for process, owned in alive if not owned]:
            print(f"snakemake is running here (process {others[0]}); stopped, nothing was changed",
                  file=sys.stderr)  # fmt: skip
            return 1
        _end(process for process, _ in alive)
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

        def end(*_: object) -> None:  # Snakemake itself would wait for the end of a training
            child.terminate()
            for process, owned in _pipelines(root):
                if owned and process.pid != child.pid:
                    with contextlib.suppress(psutil.Error):
                        process.terminate()

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, lambda *_: None)  # a terminal's Ctrl-C reaches the child too
        return child.wait()


def main() -> int:
    """The command line: one notebook, or `figures` with options and settings for Snakemake."""
    ensure_home()
    if sys.argv[1:2] == ["figures"]:
        rest = sys.argv[2:]
        pairs = [word for word in rest if "=" in word and not word.startswith("-")]
        options = [word for word in rest if word not in pairs]
        return figures([*options, *(["--config", *pairs] if pairs else [])])
    parser = argparse.ArgumentParser(prog="python -m dreamer.pipeline", description=__doc__)
    parser.add_argument("notebook")
    parser.add_argument("--executed", required=True, help="where the executed notebook goes")
    parser.add_argument("-y", default="{}", metavar="YAML", help="parameters")
    parser.add_argument(
        "--run",
        nargs=2,
        metavar=("FOLDER", "STATE"),
        help="a run's folder, set aside where parameters or STATE (of code and data) changed",
    )
    parser.add_argument("--timeout", type=float, help="seconds for each cell")
    given = parser.parse_args()
    values = yaml.safe_load(given.y)
    try:
        if given.run:
            set_aside(given.run[0], {**values, "state": given.run[1]})
        run_notebook(given.notebook, values, given.executed, timeout=given.timeout)
    except (NotebookError, OSError) as error:  # a full disk, too
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
