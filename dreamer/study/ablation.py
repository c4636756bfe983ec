"""Options against the default: what is trained, side by side, what differs, and what it costs.

Every option is set beside the default of the same token type, on people neither has seen. The
configuration to go on with is chosen on the validation people, so that its gain on the test people
is not made by the choice. Holm's correction: Holm, Scand. J. Statist. 1979.
"""

import multiprocessing
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from scipy import stats
from tqdm.auto import tqdm

from dreamer.study import accuracy as evaluation
from dreamer.study.cost import warm
from dreamer.study.cold import apart, build, peak, stepper
from dreamer.study.costs import counted
from dreamer.data import Transitions
from dreamer.model import ModelConfig
from dreamer.runs import TrainingConfig, load_config, load_run, make_split, write_whole
from dreamer.training import fit

DEFAULT, BEST = "default", "combination"


class Run(NamedTuple):
    """One training of the study: `option` of `base` (its token type without the option)."""

    base: str
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
    bases: Sequence[str] = ("patch", "channel"),
) -> tuple[list[Run], dict[str, str]]:
    """The runs of the default and of every option for each token type, and what was left out.

    `options` maps a name to fields of ModelConfig; one that sets `token_type` is one run for all
    bases. Second: "option, base" -> why ModelConfig refuses it. Raises ValueError with fewer than
    two seeds, and where no base takes an option.
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"seeds: {list(seeds)}; an interval over seeds needs two at least")
    runs, refused = [], {}
    for base in bases:
        for option, fields in {DEFAULT: {}, **options}.items():
            try:
                config = ModelConfig(**{**model, "token_type": base, **fields})
            except ValidationError as error:
                refused[f"{option}, {base}"] = error.errors()[0]["msg"]
                continue
            for seed in seeds:
                name = f"{config.token_type}-{option.replace(' ', '-').replace(':', '')}-seed{seed}"
                settings = TrainingConfig(**{**training, "seed": seed})
                runs.append(Run(base, option, config, settings, Path(folder, name)))
    made = {run.option for run in runs}
    if not made >= {DEFAULT, *options}:
        told = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ValueError(f"no token type takes an option; {told}")
    return runs, refused


def _end_with_parent() -> None:
    """In a worker: a study that is killed takes its trainings along."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(1)
def _transitions(data: str, size: int, patients: tuple[tuple[str, str], ...]) -> Transitions:
    """The data, read once by each worker."""
    return Transitions(data, size, dict(patients) or None)


def _train(run: Run, data: str, patients: Mapping[str, str] | None) -> None:
    """Train, or go on with, one run, and keep its predictions on the test people."""
    torch.set_num_threads(1)
    people = tuple((patients or {}).items())
    transitions = _transitions(data, run.model.image_size, people)
    fit(run.model, run.training, transitions, run.folder, on_epoch=len)  # no progress bar
    split = make_split(transitions, run.training)
    told = evaluation.predict(load_run(run.folder), transitions, split.test, split)
    write_whole(run.folder / "predictions.csv", told.to_csv(index=False).encode())


def finished(run: Run) -> bool:
    """Whether `run` is done, with its predictions, and with just this configuration."""
    if not (run.folder / "predictions.csv").is_file():
        return False
    return load_config(run.folder) == (run.model, run.training)


def train(
    runs: Sequence[Run],
    data: str | Path,
    patients: Mapping[str, str] | None = None,
    workers: int = 2,
) -> int:
    """Train what is not yet finished, `workers` at once with one thread each; returns how many.

    What a killed study had begun goes on where it stopped. Raises what a training raises, as the
    ValueError where a folder belongs to another configuration; those under way end first.
    """
    todo = [run for run in {run.folder: run for run in runs}.values() if not finished(run)]
    # Not forked: PyTorch's thread pools do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, workers), context, _end_with_parent) as pool:
        under_way = [pool.submit(_train, run, str(data), patients) for run in todo]
        try:
            for done in tqdm(as_completed(under_way), total=len(todo), desc="trainings"):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(todo)


def errors(runs: Sequence[Run]) -> dict[tuple[str, str], list[pd.DataFrame]]:
    """(base, option) -> a table of `evaluation.errors` for each seed, on the test people."""
    found: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for run in runs:
        table = evaluation.errors(pd.read_csv(run.folder / "predictions.csv"))
        found.setdefault((run.base, run.option), []).append(table)
    return found


def change(
    first: Sequence[pd.DataFrame], second: Sequence[pd.DataFrame], measure: str
) -> dict[str, float]:
    """Mean error second - first, its 95% interval and p, over patients and training seeds.

    A table of `errors` per seed, on the same frames, the same seeds in both. Variances of the mean
    difference over seeds and over patients add up; degrees of freedom after Satterthwaite, so that
    few seeds make wide intervals. Also `error`, the standard error, and `freedom`. ValueError where
    frames or numbers of seeds differ.
    """
    if len(first) != len(second) or not all(t["group"].equals(first[0]["group"]) for t in second):
        raise ValueError("the same frames and seeds are needed on both sides")
    a, b = (
        np.stack([t.groupby("group")[measure].mean().to_numpy() for t in side])
        for side in (first, second)
    )  # [seeds, patients]
    values = ((b - a).mean(1), (b - a).mean(0))
    parts = np.array([v.var(ddof=1) / len(v) for v in values]).clip(1e-18)
    freedom = parts.sum() ** 2 / (parts**2 / [len(v) - 1 for v in values]).sum()
    estimate, error = (b - a).mean(), np.sqrt(parts.sum())
    reach = stats.t.ppf(0.975, freedom) * error
    return {
        "estimate": estimate, "low": estimate - reach, "high": estimate + reach,
        "p": 2 * stats.t.sf(abs(estimate) / error, freedom), "error": error, "freedom": freedom,
    }  # fmt: skip


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p values [N] corrected after Holm: the least times N, the next times N - 1, never falling."""
    p = np.asarray(p, float)
    order = p.argsort()
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected[order.argsort()]


def differences(
    found: Mapping[tuple[str, str], Sequence[pd.DataFrame]], margins: Mapping[str, float]
) -> pd.DataFrame:
    """Every option minus the default of its base, one row a measure, with a verdict.

    `margins`: measure -> what counts as equal (mm, deg). Verdict: helps or hurts where p, corrected
    over all rows, is below 0.05; makes no difference where the 90% interval lies within the margin
    (two one-sided tests); not shown otherwise.
    """
    rows = [
        {"base": base, "option": option, "measure": measure, "unit": evaluation.UNITS[measure],
         "margin": margin, "seeds": len(tables),
         "default": float(np.mean([t[measure].mean() for t in found[base, DEFAULT]])),
         **change(found[base, DEFAULT], tables, measure)}
        for (base, option), tables in found.items() if option != DEFAULT
        for measure, margin in margins.items()
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"])
    inner = table["estimate"].abs() + stats.t.ppf(0.95, table["freedom"]) * table["error"]
    table["verdict"] = np.select(
        [(table.p_holm < 0.05) & (table.estimate < 0), table.p_holm < 0.05, inner < table.margin],
        ["helps", "hurts", "makes no difference"],
        "not shown",
    )
    return table.drop(columns=["error", "freedom"])


def scores(runs: Sequence[Run]) -> pd.Series:
    """(base, option) -> validation error over the patch default's, mean over seeds, least first.

    The geometric mean of the two ratios, in mm and in degrees, at the epoch that was kept.
    """
    rows = []
    for run in runs:
        metrics = pd.read_csv(run.folder / "metrics.csv")
        kept = metrics.loc[metrics["val_loss"].idxmin()]
        logs = np.log(kept["val_translation_mm"]) + np.log(kept["val_rotation_deg"])
        rows.append((run.base, run.option, logs / 2))
    table = pd.DataFrame(rows, columns=["base", "option", "log"])
    mean = table.groupby(["base", "option"])["log"].mean()
    base = "patch" if ("patch", DEFAULT) in mean else mean.index[0][0]
    return np.exp(mean - mean[base, DEFAULT]).sort_values()


def combined(
    score: pd.Series, options: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Base and fields of all options that lower the validation `score`, the best of each field.

    The base is that of the best option; an option that ModelConfig refuses beside better ones is
    left out. No fields where nothing betters the default.
    """
    base, fields = score.index[0][0], {}
    own = score[base]
    for option in own[own < own[DEFAULT]].index:
        wider = {**options.get(option, {}), **fields}
        try:
            ModelConfig(**{**model, "token_type": base, **wider})
        except ValueError:
            continue
        fields = wider
    return base, fields


def costs(runs: Sequence[Run], batch: int = 16, repeats: int = 5) -> pd.DataFrame:
    """What each configuration costs, and over its base's default: one row a base and option.

    parameters; flop of one forward pass, counted; step_ms, a training step of `batch` frames on
    this process's threads, median of rounds in turn; peak_mib of training, batch 4, in a process of
    its own.
    """
    configs = {(run.base, run.option): run.model for run in runs}
    steps = {key: stepper(build(config), batch, "float32") for key, config in configs.items()}
    seconds = warm(steps, repeats)
    rows = []
    for (base, option), config in tqdm(configs.items(), desc="costs", leave=False):
        memory = apart(peak, config, "cpu", "training", "float32")["peak"]
        count = sum(p.numel() for p in build(config).parameters())
        step = 1e3 * float(np.median(seconds[base, option]))
        rows.append((base, option, count, counted(config), step, memory))
    names = ["parameters", "flop", "step_ms", "peak_mib"]
    table = pd.DataFrame(rows, columns=["base", "option", *names])
    defaults = table[table["option"] == DEFAULT].set_index("base")[names]
    for name in names:
        table[f"{name}_ratio"] = table[name] / table["base"].map(defaults[name])
    return table


def verdicts(table: pd.DataFrame, config: str, n: str) -> pd.DataFrame:
    """`differences` as the rows of a verdict table, one an option, token type and measure."""
    sign = table["measure"] + ", " + table["unit"]
    return pd.DataFrame({
        "claim": table["option"] + f" instead of the {DEFAULT}, " + table["base"] + ": " + sign,
        "published": "idea without a figure",
        "measured": [f"{r.estimate:+.2f} {r.unit} on {r.default:.2f}" for r in table.itertuples()],
        "interval": [f"{r.low:+.2f} to {r.high:+.2f} {r.unit}, p {r.p_holm:.2g} (Holm)"
                     for r in table.itertuples()],
        "verdict": table["verdict"], "config": config, "n": n,
    })  # fmt: skip
