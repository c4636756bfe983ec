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
import yaml
from filelock import FileLock, Timeout

from dreamer import load_run
from dreamer.data import Split, Transitions
from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.phantom import generate
from dreamer.runs import TrainingConfig, configure, has_bf16, load_config, make_split, versions
from dreamer.study import accuracy, closed_loop, cost, imagination, maps, results, robustness

log = logging.getLogger(__name__)

PRESETS = Path(__file__).parents[2] / "notebooks" / "parameters"
ORDER = ("none", "patch", "channel")


class Bench(NamedTuple):
    """What a run is measured with: its own data and split, and the test patients of the plan."""

    run: Path
    model: CardiacDreamer
    train: Transitions
    split: Split
    test: Transitions
    plane: str
    plan: Mapping[str, Any]
    controls: bool  # measures what does not depend on the run, too


def identity(preset: str, variant: str, seed: int, **others: str) -> dict[str, Any]:
    """A run's identity (`results.IDENTITY`); `others`: reads, plane, change."""
    found = {"preset": preset, "variant": variant, "seed": seed}
    return found | results.USUAL | others


def configuration(
    wanted: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[ModelConfig, TrainingConfig]:
    """The configurations of a run: its preset with `changes`, such as training.epochs: 4; those of
    the plan's data, such as data.patients: 1120, are no part of them.

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
        if name in ("data.patients", "data.frames"):
            if type(value) is not int or value < 1:
                raise ValueError(f"change {name!r}: {value!r} is not a number from 1")
            continue
        if section not in sections or not field:
            known = "model.<field>, training.<field>, data.patients or data.frames"
            raise ValueError(f"change {name!r}: use {known}")
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
    if not lacking:
        return "stored"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / f".{name}.lock", timeout=0):
            wanted = {**wanted, "settings": dict(changes or {})}
            return _run(name, wanted, plan, store, work, data, (model, training), lacking, until)
    except Timeout:
        return "busy"


def _run(name, wanted, plan, store, work, data, configs, lacking, until) -> str:
    from dreamer.training import fit  # Lightning takes seconds to import

    model, training = configs
    settings = wanted["settings"].items()
    other = {name[5:]: value for name, value in settings if name.startswith("data.")}
    drawn, size = plan["data"] | other, model.image_size
    folder = phantom(data, drawn["patients"], drawn["frames"], wanted["plane"], size, drawn["seed"])
    train = Transitions(folder, size)
    curve = fit(model, training, train, work / name, lambda _: time.monotonic() > until)
    if len(curve) < training.epochs and time.monotonic() > until:
        return "stopped"  # not by patience
    drawn = plan["test"]
    folder = phantom(data, drawn["patients"], drawn["frames"], wanted["plane"], size, drawn["seed"])
    bench = Bench(
        work / name, load_run(work / name), train, make_split(train, training),
        Transitions(folder, size), wanted["plane"], plan,
        wanted["variant"] == "none" and wanted["seed"] == plan["seeds"][0],
    )  # fmt: skip
    bf16 = training.precision == "bf16" or (training.precision == "auto" and has_bf16())
    record = {
        **{field: wanted[field] for field in [*results.IDENTITY, "settings"]},
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


def measure_convergence(run: str | Path) -> pd.DataFrame:
    """Validation errors of a run's folder on the way, by images and by FLOP, of the whole run.

    Conditions: "mean" over the epochs (the area under the curve), shares of the run's images, and
    shares of the FLOP that patch tokens take for as many images.
    """
    curve = pd.read_csv(Path(run) / "metrics.csv")
    config = load_config(run)[0]
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


def measure_imagination(bench: Bench) -> pd.DataFrame:
    """Imagined maps and poses beside their controls, see `dreamer.study.imagination`."""
    return imagination.measure(bench.model, bench.train, bench.split, bench.test)


def measure_space(bench: Bench) -> pd.DataFrame:
    """What linear probes read from the tokens, see `dreamer.study.imagination`."""
    return imagination.space(bench.model, bench.train, bench.split, bench.test)


def measure_maps(bench: Bench) -> pd.DataFrame:
    """Attention and attribution maps on the test patients, see `dreamer.study.maps`."""
    everything = np.arange(len(bench.test))
    drawn = np.random.default_rng(0).choice(bench.split.train, 128)
    training = bench.train.images(bench.train.rows[np.sort(drawn), 0])
    none = np.array([], dtype=int)
    split = Split(everything, none, everything, "patient")
    return maps.measure(bench.model, bench.test, everything, split, training=training)


def measure_closed_loop(bench: Bench) -> pd.DataFrame:
    """Searches that the model guides, one for each of new patients; controls for one run alone."""
    people, _ = closed_loop.unseen_patients(bench.train.folder, bench.plan["searches"])
    table = closed_loop.measure(bench.model, people, bench.plane)
    if bench.controls:
        mean = bench.model.pose_mean.cpu()
        table = pd.concat([table, closed_loop.measure_controls(mean, people, bench.plane)])
    return table


def measure_robustness(bench: Bench) -> pd.DataFrame:
    """Errors under each change of `dreamer.study.robustness`, with varied_ before the measure."""
    people, _ = closed_loop.unseen_patients(bench.train.folder, bench.plan["varied"])
    cache = bench.train.folder.with_name(f"{bench.train.folder.name}.varied")
    cache.mkdir(exist_ok=True)
    table = robustness.measure(bench.model, people, bench.plane, cache=cache)
    return table.assign(measure="varied_" + table["measure"])


MEASURED: dict[str, Callable[[Bench], pd.DataFrame]] = {
    "accuracy": lambda b: accuracy.measure(b.model, b.train, b.split, b.test),
    "convergence": lambda b: measure_convergence(b.run),
    "imagination": measure_imagination,
    "space": measure_space,
    "maps": measure_maps,
    "closed_loop": measure_closed_loop,
    "robustness": measure_robustness,
}
