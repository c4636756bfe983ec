"""The reference study: trains runs, measures them on new patients, adds them to the results store.

Runs on any machine, without notebooks and network; see `python -m dreamer.study --help`. Each run
has a folder of its own with its weights, which stay on the machine; the store gets the tables.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout

from dreamer import load_run, poses
from dreamer.data import Split, Transitions
from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.phantom import generate
from dreamer.runs import TrainingConfig, configure, has_bf16, load_config, make_split, versions
from dreamer.study import accuracy, cost, maps, results

log = logging.getLogger(__name__)

PRESETS = Path(__file__).parents[2] / "notebooks" / "parameters"
NEAR = {"translation": (5.0, 10.0), "rotation": (15.0, 30.0)}  # limits of three distances, mm, deg
ORDER = ("none", "patch", "channel")


class Bench(NamedTuple):
    """What a run is measured with: its own data and split, and the test patients of the plan."""

    run: Path
    model: CardiacDreamer
    train: Transitions
    split: Split
    test: Transitions
    plane: str


def identity(preset: str, variant: str, seed: int, **others: str) -> dict[str, Any]:
    """A run's identity (`results.IDENTITY`); `others`: reads, plane, change."""
    found = {"preset": preset, "variant": variant, "seed": seed}
    return found | {"reads": "tokens", "plane": "a4c", "change": ""} | others


def configuration(
    wanted: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[ModelConfig, TrainingConfig]:
    """The configurations of a run: its preset with `changes`, such as training.epochs: 4.

    Raises ValueError naming the file or field where a preset or a field does not exist.
    """
    file = PRESETS / f"{wanted['preset']}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ValueError(f"{file}: no such preset; use one of {known}")
    preset = yaml.safe_load(file.read_text())
    sections = {"model": dict(preset["model"]), "training": dict(preset["training"])}
    if wanted["variant"] != "none":
        sections["model"]["reads"] = wanted["reads"]
    for name, value in changes.items():
        section, _, field = name.partition(".")
        if section not in sections or not field:
            raise ValueError(f"change {name!r}: use model.<field> or training.<field>")
        sections[section][field] = value
    return configure(wanted["variant"], sections["model"], sections["training"], wanted["seed"])


def phantom(folder: Path, patients: int, frames: int, plane: str, size: int, seed: int) -> Path:
    """A data set of virtual patients under `folder`, drawn or finished where it is lacking."""
    name = f"{plane}-{patients}x{frames}-{size}px-seed{seed}"
    return generate(folder / name, patients, frames, plane, size, seed)


def run(
    wanted: Mapping[str, Any],
    plan: Mapping[str, Any],
    store: Path,
    work: Path,
    data: Path,
    changes: Mapping[str, Any] | None = None,
    families: tuple[str, ...] = (),
    until: float = np.inf,
) -> str:
    """Train a run, or finish it, and add its measures to the store; returns what became of it.

    Args:
        wanted: the run's `identity`.
        work: folder of the runs' folders with their weights; data: of the phantom's data sets.
        changes: see `configuration`.
        families: measured families; all of MEASURED by default, and only those that are lacking.
        until: `time.monotonic()` at which the training stops after its epoch, to be resumed.

    Returns "done", "stored" (nothing was lacking), "stopped" (at `until`) or "busy" (another
    process has the run).
    """
    name = results.run_name(wanted)
    known = results.families(store, name)
    model, training = configuration(wanted, changes or {})
    lacking = [f for f in families or MEASURED if f not in known]
    if model.token_type == "none":
        lacking = [f for f in lacking if f not in NEEDS_TOKENS]
    if not lacking:
        return "stored"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / f".{name}.lock", timeout=0):
            return _run(name, wanted, plan, store, work, data, (model, training), lacking, until)
    except Timeout:
        return "busy"


def _run(name, wanted, plan, store, work, data, configs, lacking, until) -> str:
    from dreamer.training import fit  # Lightning takes seconds to import

    model, training = configs
    drawn, size = plan["data"], model.image_size
    folder = phantom(data, drawn["patients"], drawn["frames"], wanted["plane"], size, drawn["seed"])
    train = Transitions(folder, size)
    curve = fit(model, training, train, work / name, lambda _: time.monotonic() > until)
    if len(curve) < training.epochs and not training.patience:
        return "stopped"
    drawn = plan["test"]
    folder = phantom(data, drawn["patients"], drawn["frames"], wanted["plane"], size, drawn["seed"])
    bench = Bench(
        work / name, load_run(work / name), train, make_split(train, training),
        Transitions(folder, size), wanted["plane"],
    )  # fmt: skip
    bf16 = training.precision == "bf16" or (training.precision == "auto" and has_bf16())
    record = {
        **{field: wanted[field] for field in results.IDENTITY},
        "tokens": 1 + model.tokens,
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "steps": int(curve["step"].iloc[-1]),
        "images": int(curve["images"].iloc[-1]),
        # A backward pass takes twice a forward pass.
        "flop": 3.0 * sum(cost.flops(model).values()) * int(curve["images"].iloc[-1]),
        "seconds": float(curve["seconds"].iloc[-1]),
        "data": train.digest,
        "test": bench.test.digest,
        "plan": plan["hash"],
        "precision": "bf16" if bf16 else "fp32",
        "versions": versions(),
    }
    for family in lacking:  # each is kept as soon as it is measured
        start = time.perf_counter()
        try:
            rows = MEASURED[family](bench)
        except ModuleNotFoundError as error:
            log.warning("%s: %s is not measured, %s", name, family, error)
            continue
        results.write(store, record, rows.assign(family=family), curve)
        log.info("%s: %s, %.0f s", name, family, time.perf_counter() - start)
    return "done"


# Measures: families of the store


def _rows(cells: pd.DataFrame | pd.Series, condition: str = "") -> pd.DataFrame:
    """Rows of the store from means by patient, one column per measure."""
    table = cells.rename_axis("patient").reset_index()
    return table.melt("patient", var_name="measure").assign(condition=condition)


def measure_accuracy(bench: Bench) -> pd.DataFrame:
    """Single-frame errors: over all frames, by distance from the target, and of the mean pose."""
    everything = np.arange(len(bench.test))
    frames = accuracy.predict(bench.model, bench.test, everything, bench.split)
    mean = accuracy.predict_mean_pose(bench.train, bench.split.train, bench.split)
    units = {m: f"{m}_{u}" for m, u in accuracy.UNITS.items()}
    true = torch.from_numpy(frames[accuracy.TRUE].to_numpy())
    far = poses.errors(true, torch.zeros_like(true))
    distance = {"translation": far.translation.numpy(), "rotation": far.rotation.numpy()}
    tables = []
    for name, table in (
        ("", frames),
        (results.BASELINE, frames.assign(**mean.iloc[0][accuracy.PREDICTED])),
    ):
        error = accuracy.errors(table).rename(columns=units)
        tables.append(_rows(error.groupby("patient").mean(), name))
        for kind, limits in NEAR.items():
            column = units[kind]
            unit = column.split("_")[1]
            place = np.digitize(distance[kind], limits)
            for k, words in enumerate(
                (f"to {limits[0]:g}", "{:g} to {:g}".format(*limits), f"over {limits[1]:g}")
            ):
                cells = error[place == k].groupby("patient")[[column]].mean()
                tables.append(_rows(cells, f"{name}, {words} {unit}".removeprefix(", ")))
    return pd.concat(tables)


def measure_convergence(bench: Bench) -> pd.DataFrame:
    """Validation errors on the way, by images and by FLOP; they belong to the whole run.

    Conditions: "mean" over the epochs (the area under the curve), shares of the run's images, and
    shares of the FLOP that patch tokens take for as many images.
    """
    curve = pd.read_csv(bench.run / "metrics.csv")
    config = load_config(bench.run)[0]
    reference = config.model_copy(update={"token_type": "patch", "reads": "tokens"})
    flop = sum(cost.flops(config).values()) / sum(cost.flops(reference).values())
    rows = []
    for measure in ("val_translation_mm", "val_rotation_deg"):
        share = curve["images"] / curve["images"].iloc[-1]
        rows.append((measure, "mean", curve[measure].mean()))
        for part in (0.25, 0.5, 1.0):
            rows.append((measure, f"{part:.0%} of images", np.interp(part, share, curve[measure])))
            at = np.interp(part, share * flop, curve[measure])
            rows.append((measure, f"{part:.0%} of FLOP", at))
    table = pd.DataFrame(rows, columns=["measure", "condition", "value"])
    return table.assign(patient="")


def measure_maps(bench: Bench) -> pd.DataFrame:
    """Attention and attribution maps on the test patients, see `dreamer.study.maps`."""
    everything = np.arange(len(bench.test))
    drawn = np.random.default_rng(0).choice(bench.split.train, 128)
    training = bench.train.images(bench.train.rows[np.sort(drawn), 0])
    none = np.array([], dtype=int)
    split = Split(everything, none, everything, "patient")
    return maps.measure(bench.model, bench.test, everything, split, training=training)


MEASURED: dict[str, Callable[[Bench], pd.DataFrame]] = {
    "accuracy": measure_accuracy,
    "convergence": measure_convergence,
    "maps": measure_maps,
}
NEEDS_TOKENS: set[str] = set()  # families that a run without transformer lacks
