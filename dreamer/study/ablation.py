"""Options of the model against its default: what to train, the trainings, their errors.

Every option is compared with the default of the same token type, trained with the same seeds.
"""

import multiprocessing
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from pydantic import ValidationError
from tqdm.auto import tqdm

from dreamer.data import Transitions
from dreamer.files import write_whole
from dreamer.model import ModelConfig
from dreamer.runs import TrainingConfig, load_config, load_run, make_split
from dreamer.study import accuracy

DEFAULT = "default"


class Run(NamedTuple):
    """One training: `option` of the model with `variant` tokens, compared with their default."""

    variant: str
    option: str
    model: ModelConfig
    training: TrainingConfig
    folder: Path


def plan(
    options: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    training: Mapping[str, Any],
    seeds: Sequence[int],
    folder: str | Path,
    variants: Sequence[str] = ("patch", "channel"),
) -> tuple[list[Run], dict[str, str]]:
    """The runs of the default and of every option for each variant, and the refused combinations.

    Args:
        options: name -> fields of ModelConfig. One that sets `token_type` is the same training for
            every variant.
        model, training: fields of ModelConfig and TrainingConfig that all runs share.
        seeds: training seeds; verdicts need two or more.
        folder: where the runs' folders go.

    The second result maps "option, variant" to the reason why ModelConfig refuses it. Raises
    ValueError without seeds, and where no variant takes an option.
    """
    if not seeds:
        raise ValueError("seeds: none given; verdicts need two or more, for example seeds: [0, 1]")
    runs, refused = [], {}
    for variant in variants:
        for option, fields in {DEFAULT: {}, **options}.items():
            try:
                config = ModelConfig(**{**model, "token_type": variant, **fields})
            except ValidationError as error:
                refused[f"{option}, {variant}"] = error.errors()[0]["msg"]
                continue
            slug = option.replace(" ", "-").replace(":", "")
            for seed in dict.fromkeys(seeds):
                settings = TrainingConfig(**{**training, "seed": seed})
                place = Path(folder, f"{config.token_type}-{slug}-seed{seed}")
                runs.append(Run(variant, option, config, settings, place))
    taken = {run.option for run in runs}
    if lacking := {DEFAULT, *options} - taken:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ValueError(f"options: no token type takes {', '.join(sorted(lacking))} ({reasons})")
    return runs, refused


def train(
    runs: Sequence[Run],
    data: str | Path,
    patients: Mapping[str, str] | None = None,
    workers: int = 2,
) -> int:
    """Train the unfinished runs, `workers` at once with one thread each; returns their number.

    An interrupted training is resumed. An error of a training, such as the ValueError for a folder
    of another configuration, is raised after those under way have ended.
    """
    todo = [run for run in {run.folder: run for run in runs}.values() if not finished(run)]
    # Not forked: PyTorch's thread pools do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, workers), context, _end_with_parent) as pool:
        futures = [pool.submit(_train, run, str(data), patients) for run in todo]
        try:
            for future in tqdm(as_completed(futures), total=len(todo), desc="trainings"):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(todo)


def finished(run: Run) -> bool:
    """Whether `run` has its predictions, made with exactly this configuration."""
    if not (run.folder / "predictions.csv").is_file():
        return False
    return load_config(run.folder) == (run.model, run.training)


def errors(runs: Sequence[Run]) -> pd.DataFrame:
    """Errors per test frame of finished runs (`accuracy.errors`), with variant, option and seed."""
    tables = []
    for run in runs:
        table = accuracy.errors(pd.read_csv(run.folder / "predictions.csv"))
        names = {"variant": run.variant, "option": run.option, "seed": run.training.seed}
        tables.append(table.assign(**names))
    return pd.concat(tables, ignore_index=True)


def _end_with_parent() -> None:
    """In a worker: end with the parent process, even where that is killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(1)
def _transitions(data: str, size: int, patients: tuple[tuple[str, str], ...]) -> Transitions:
    """The data, read once by each worker."""
    return Transitions(data, size, dict(patients) or None)


def _train(run: Run, data: str, patients: Mapping[str, str] | None) -> None:
    """Train or resume one run, and keep its predictions on the test patients."""
    from dreamer.training import fit  # Lightning, in the workers alone

    torch.set_num_threads(1)
    transitions = _transitions(data, run.model.image_size, tuple((patients or {}).items()))
    fit(run.model, run.training, transitions, run.folder, on_epoch=len)  # no progress bar
    split = make_split(transitions, run.training)
    table = accuracy.predict(load_run(run.folder), transitions, split.test, split)
    write_whole(run.folder / "predictions.csv", table.to_csv(index=False).encode())
