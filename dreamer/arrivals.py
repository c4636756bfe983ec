"""Who arrives: searches from many starts on unseen patients, kept on disk, scored, compared.

Every policy meets the same starts, the same hearts and the same slips of the hand. Patients, not
starts, are resampled for intervals. mm and degrees stay apart.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from dreamer import poses
from dreamer.evaluation import bootstrap, difference
from dreamer.model import CardiacDreamer
from dreamer.navigation import (
    TOLERANCES,
    Blind,
    Follow,
    NavigationConfig,
    Person,
    Plan,
    Probes,
    away,
    draw_start,
)
from dreamer.phantom import Patient
from dreamer.training import load_run, write_whole

SIGHTED, CONTROLS = ("follow", "average", "plan"), ("stay", "random", "mean", "oracle")
POLICIES = (*SIGHTED, *CONTROLS)
WINDOW = 12  # frames of the running average
NAMES = {"patch": "patch", "channel": "channel", "none": "direct"}


def policy(name: str, model: CardiacDreamer, config: NavigationConfig, **plan: int):
    """One of POLICIES by name; `plan` holds the numbers of `navigation.Plan`.

    `mean` follows the mean pose of the training part, whatever it sees; `random` moves as far as a
    hand can. Raises ValueError for other names.
    """
    reach = torch.tensor([config.limit_mm] * 3 + [config.limit_deg] * 3, dtype=torch.float64)

    def wander(pose: Tensor, draws: Sequence[np.random.Generator]) -> Tensor:
        return torch.from_numpy(np.array([rng.uniform(-1, 1, 6) for rng in draws])) * reach

    answers = {
        "stay": lambda pose, draws: torch.zeros_like(pose),
        "random": wander,
        "mean": lambda pose, draws: poses.remaining(model.pose_mean.cpu().double()).expand_as(pose),
        "oracle": lambda pose, draws: poses.remaining(pose),
    }
    if name in answers:
        return Blind(answers[name])
    if name == "plan":
        return Plan(model, config, **plan)
    if name not in SIGHTED:
        raise ValueError(f"policy {name!r} is unknown; one of {', '.join(POLICIES)}")
    return Follow(model, config, WINDOW if name == "average" else 1)


def unseen_people(runs: Sequence[str | Path], data: str | Path, count: int) -> tuple[list, str]:
    """Up to `count` patients whom no run has seen, and the target plane: of the phantom `data`, the
    test part of all runs; where `data` are recorded scans, new virtual patients (apical plane).

    Raises ValueError where no patient is unseen by all runs.
    """
    card = Path(data) / "phantom.json"
    if not card.is_file():
        return [Person(f"virtual_{n:04d}", (1_000_000, n)) for n in range(count)], "a4c"
    told = json.loads(card.read_text())["arguments"]
    splits = [json.loads((Path(run) / "split.json").read_text()) for run in runs]
    names = sorted(set.intersection(*(set(split["test"]) for split in splits)))
    seen = set().union(*(set(split[part]) for split in splits for part in ("train", "val")))
    names = [name for name in names if name not in seen]
    if not names:
        raise ValueError(f"runs: no patient of {data} is unseen by all of them")
    people = [Person(name, (told["seed"], int(name.rsplit("_", 1)[1]))) for name in names]
    return people[:count], told["target"]


def starts(people: Sequence[Person], count: int, config: NavigationConfig, seed: int):
    """`count` starts dealt out over `people`, a patient's own together: (person, number, pose)."""
    dealt = [
        (person, k, draw_start(np.random.default_rng([seed, *person.seed, k, 0]), config))
        for p, person in enumerate(people)
        for k in range(count // len(people) + (p < count % len(people)))
    ]
    if not dealt:
        raise ValueError(f"starts: at least one is needed, got {count}")
    return dealt


def search(policy, dealt: Sequence, config: NavigationConfig, target: str = "a4c",
           size: int = 112, seed: int = 0) -> pd.DataFrame:  # fmt: skip
    """Let `policy` search from every start of `dealt`, all at once; one row a start and step.

    Columns: patient, start, step (0 is the start), the six axes, translation (mm) and rotation
    (deg) to the plane, contact (share of the probe's face). All `config.steps` are made.
    """
    people = {person: Patient(person.seed) for person, _, _ in dealt}
    draws = [[np.random.default_rng([seed, *person.seed, k, part]) for person, k, _ in dealt]
             for part in (1, 2)]  # fmt: skip
    pose = torch.from_numpy(np.stack([start for *_, start in dealt]))
    probes = Probes([people[p] for p, *_ in dealt], pose, draws[0], config, target, size)
    policy.reset(draws[1])
    tables = []
    for step in range(config.steps + 1):
        if step:
            probes.move(policy(probes.frames() if policy.sees else None, probes.pose))
        table = pd.DataFrame(
            {"patient": [p.name for p, *_ in dealt], "start": [k for _, k, _ in dealt]}
        )
        table["step"] = step
        table[list(poses.AXES)] = probes.pose.numpy()
        table["translation"], table["rotation"] = (v.numpy() for v in away(probes.pose))
        tables.append(table.assign(contact=probes.contact().numpy()))
    return pd.concat(tables, ignore_index=True)


def _digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def navigate(
    runs: Sequence[str | Path], people: Sequence[Person], target: str, count: int,
    config: NavigationConfig, policies: Sequence[str] = POLICIES, seed: int = 0,
    part: int = 48, plan: dict[str, int] | None = None, progress: Callable = tqdm,
) -> pd.DataFrame:  # fmt: skip
    """Every policy with every run from `count` starts: `search` tables with run, variant, policy.

    Controls are of the first run. Each run, policy and part (`part` starts) is a file of its own
    in the run's folder `navigation/`, written whole; one that is there, of the same settings and
    weights, is read and not made again. Raises ValueError for unknown policies.
    """
    if unknown := set(policies) - set(POLICIES):
        raise ValueError(f"policy {', '.join(sorted(unknown))} is unknown; {', '.join(POLICIES)}")
    dealt, plan, jobs, tables = starts(people, count, config, seed), plan or {}, [], []
    for number, run in enumerate(map(Path, runs)):
        model = load_run(run)
        weights = hashlib.sha256(save(model.state_dict())).hexdigest()
        for name in policies:
            if (name in CONTROLS and number) or (name == "plan" and model.world is None):
                continue
            for at in range(0, len(dealt), part):
                jobs.append((run, model, weights, name, dealt[at : at + part]))
    for run, model, weights, name, some in progress(jobs, desc="navigation", unit="part"):
        size = model.config.image_size
        known = _digest(
            weights, name, target, size, config, seed, some, plan if name == "plan" else 0
        )
        file = run / "navigation" / f"{name}-{known}.csv"
        if not file.is_file():
            made = search(policy(name, model, config, **(plan if name == "plan" else {})), some,
                          config, target, size, seed)  # fmt: skip
            file.parent.mkdir(exist_ok=True)
            write_whole(file, made.round(4).to_csv(index=False).encode())
        variant = NAMES[model.config.token_type] if name in SIGHTED else "control"
        tables.append(pd.read_csv(file).assign(run=run.name, variant=variant, policy=name))
    return pd.concat(tables, ignore_index=True).assign(target=target)


def score(table: pd.DataFrame) -> pd.DataFrame:
    """One row a search of `navigate`, from where it stands after the last step.

    `arrived_5`, `arrived_10`: within that many mm and degrees at the end; `passed_10`: at any step;
    `start_mm`, `start_deg`, `final_mm`, `final_deg`; `path_mm`, `path_deg` travelled;
    `detour`: path over the straight way, mm; `lost`: share of steps with under half the contact.
    """
    keys, rows = ["target", "variant", "run", "policy", "patient", "start"], []
    for key, one in table.groupby(keys, sort=False):
        one = one.sort_values("step")
        pose = torch.tensor(one[list(poses.AXES)].to_numpy())
        way, turn = (v.sum().item() for v in away(poses.relative(pose[:-1], pose[1:])))
        mm, deg = one["translation"].to_numpy(), one["rotation"].to_numpy()
        near = {t: (mm <= t) & (deg <= t) for t in TOLERANCES}
        rows.append(dict(zip(keys, key, strict=True)) | {
            **{f"arrived_{t:.0f}": float(near[t][-1]) for t in TOLERANCES},
            "passed_10": float(near[TOLERANCES[1]].any()),
            "start_mm": mm[0], "start_deg": deg[0], "final_mm": mm[-1], "final_deg": deg[-1],
            "path_mm": way, "path_deg": turn, "detour": way / max(mm[0], 1e-9),
            "lost": float((one["contact"] < 0.5).mean()),
        })  # fmt: skip
    return pd.DataFrame(rows)


MEASURES = {
    "arrived_5": "share", "arrived_10": "share", "passed_10": "share", "final_mm": "mm",
    "final_deg": "deg", "path_mm": "mm", "path_deg": "deg", "detour": "ratio", "lost": "share",
}  # fmt: skip


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over starts and runs of `score`'s measures, 95% intervals over patients.

    Columns: target, variant, policy, measure, unit, value, low, high, starts, patients, runs.
    """
    rows = []
    for key, part in scores.groupby(["target", "variant", "policy"], sort=False):
        counts = (
            len(part) // part["run"].nunique(),
            part["patient"].nunique(),
            part["run"].nunique(),
        )
        for measure, unit in MEASURES.items():
            rows.append((*key, measure, unit, *bootstrap(part[measure], part["patient"]), *counts))
    names = ["target", "variant", "policy", "measure", "unit", "value", "low", "high"]
    return pd.DataFrame(rows, columns=[*names, "starts", "patients", "runs"])


def by_distance(scores: pd.DataFrame, edges: dict[str, Sequence[float]]) -> pd.DataFrame:
    """Share that arrives within 10 and 10, by starting distance: `edges` of `start_mm` or
    `start_deg` -> rows variant, policy, measure, middle, value, low, high, searches."""
    rows = []
    for measure, cuts in edges.items():
        cut = pd.cut(scores[measure], cuts)
        for key, part in scores.groupby(["variant", "policy", cut], observed=True, sort=False):
            value = bootstrap(part["arrived_10"], part["patient"])
            rows.append((*key[:2], measure, key[2].mid, *value, len(part)))
    return pd.DataFrame(
        rows,
        columns=["variant", "policy", "measure", "middle", "value", "low", "high", "searches"],
    )


def compare(scores: pd.DataFrame, first: tuple[str, str], second: tuple[str, str],
            margin: float = 0.05) -> dict[str, float | str]:  # fmt: skip
    """Share that arrives within 10 and 10, `second` minus `first`, each (variant, policy).

    Seeds and patients are resampled together (`evaluation.difference`, over misses). Verdict: first
    better, second better, equivalent (within `margin`) or not shown. ValueError where one is not
    in `scores`.
    """
    sides = []
    for variant, name in (first, second):
        part = scores[(scores["variant"] == variant) & (scores["policy"] == name)]
        part = part.assign(group=part["patient"], missed=1 - part["arrived_10"])
        if part.empty:
            raise ValueError(f"no searches of {variant}, {name}")
        sides.append([run.reset_index(drop=True) for _, run in part.groupby("run")])
    found = difference(*sides, "missed", margin)
    return found | {"estimate": -found["estimate"], "low": -found["high"], "high": -found["low"]}


def by_step(table: pd.DataFrame) -> pd.DataFrame:
    """Mean error left after each step: variant, policy, step, measure, value, low, high (95%)."""
    rows = []
    for key, part in table.groupby(["variant", "policy", "step"], sort=False):
        for measure in ("translation", "rotation"):
            rows.append((*key, measure, *bootstrap(part[measure], part["patient"], draws=400)))
    names = ["variant", "policy", "step", "measure", "value", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def film(table: pd.DataFrame, one: pd.Series, people: Sequence[Person], config: NavigationConfig,
         size: int, seed: int = 0) -> tuple[np.ndarray, list[str], np.ndarray]:  # fmt: skip
    """One search of `navigate`, seen again: `one` is its row in `score`.

    Returns frames uint8 [steps + 1, S, S], a caption for each, and the tip's way [steps + 1, 3] in
    the heart frame, mm.
    """
    own = table
    for key in ("run", "policy", "patient", "start"):
        own = own[own[key] == one[key]]
    own = own.sort_values("step")
    person = next(p for p in people if p.name == one["patient"])
    patient, pose = Patient(person.seed), torch.tensor(own[list(poses.AXES)].to_numpy())
    draw = np.random.default_rng([seed, *person.seed, int(one["start"]), 1])
    probe = Probes([patient], pose[:1], [draw], config, one["target"], size)
    images = []
    for at in pose:
        probe.pose = at[None]
        images.append(probe.frames()[0, 0].numpy())
        probe.time += config.seconds
    left = own[["step", "translation", "rotation"]].itertuples(index=False)
    words = [f"{step}: {mm:.0f} mm, {deg:.0f}°" for step, mm, deg in left]
    way = patient.place(one["target"]) @ poses.to_matrix(pose)
    return np.stack(images), words, way[:, :3, 3].numpy()
