"""Who arrives: searches from many starts on unseen patients, kept on disk, scored, compared.

Every policy meets the same starts, the same hearts and the same slips of the hand. Patients, not
starts, are resampled for intervals. mm and degrees stay apart.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from dreamer import poses
from dreamer.study.accuracy import bootstrap, difference
from dreamer.model import CardiacDreamer
from dreamer.study.closed_loop import (
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
from dreamer.phantom import Patient, crew
from dreamer.runs import load_run, write_whole

SIGHTED, CONTROLS = ("follow", "average", "plan"), ("stay", "random", "mean", "oracle")
POLICIES = (*SIGHTED, *CONTROLS)
VERSION = 2  # of the policies: kept searches of others are not read
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


def search(policies: Mapping, dealt: Sequence, config: NavigationConfig, target: str = "a4c",
           size: int = 112, seed: int = 0) -> pd.DataFrame:  # fmt: skip
    """Let every policy search from every start of `dealt`, all at once; one row a step.

    Columns: policy (its key), patient, start, step (0 is the start), the six axes, translation (mm)
    and rotation (deg) to the plane, contact (share of the probe's face). All `config.steps` are
    made. Each policy meets the same hearts and slips.
    """
    count, n = len(policies), len(dealt)
    bodies = {person: Patient(person.seed) for person, _, _ in dealt}

    def draws(part: int) -> list[np.random.Generator]:
        return [np.random.default_rng([seed, *person.seed, k, part]) for person, k, _ in dealt]

    pose = torch.from_numpy(np.stack([start for *_, start in dealt])).repeat(count, 1)
    slips = [draw for _ in policies for draw in draws(1)]
    probes = Probes([bodies[p] for p, *_ in dealt] * count, pose, slips, config, target, size)
    for policy in policies.values():
        policy.reset(draws(2))
    sees = torch.tensor([policy.sees for policy in policies.values()]).repeat_interleave(n)
    way, contact = [probes.pose], [probes.contact()]
    for _ in range(config.steps):
        sights = zip(policies.values(), probes.frames(sees).split(n), probes.pose.split(n),
                     strict=True)  # fmt: skip
        probes.move(torch.cat([policy(image, at) for policy, image, at in sights]))
        way.append(probes.pose)
        contact.append(probes.contact())
    rows = [(name, p.name, k, step) for name in policies for p, k, _ in dealt
            for step in range(config.steps + 1)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["policy", "patient", "start", "step"])
    pose = torch.stack(way, 1).flatten(0, 1)
    table[list(poses.AXES)] = pose.numpy()
    table["translation"], table["rotation"] = (v.numpy() for v in away(pose))
    return table.assign(contact=torch.stack(contact, 1).flatten().numpy())


def navigate(
    runs: Sequence[str | Path], people: Sequence[Person], target: str, count: int,
    config: NavigationConfig, policies: Sequence[str] = POLICIES, seed: int = 0,
    part: int = 12, plan: Mapping[str, int] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Every policy with every run from `count` starts: `search` tables with run and variant.

    Controls are of the first run. Of `part` starts, all that is missing is searched at once, parts
    in threads. Each run, policy and part is a file of its own in the run's folder `navigation/`,
    written whole; one that is there, of the same settings and weights, is read and not made again.
    Raises ValueError for unknown policies.
    """
    if unknown := set(policies) - set(POLICIES):
        raise ValueError(f"policy {', '.join(sorted(unknown))} is unknown; {', '.join(POLICIES)}")
    dealt, plan, files, jobs = starts(people, count, config, seed), plan or {}, [], {}
    for number, run in enumerate(map(Path, runs)):
        model = load_run(run)
        weights = hashlib.sha256(save(model.state_dict())).hexdigest()
        size, folder = model.config.image_size, run / "navigation"
        folder.mkdir(exist_ok=True)
        for name, at in product(policies, range(0, len(dealt), part)):
            if (name in CONTROLS and number) or (name == "plan" and model.world is None):
                continue
            own = plan if name == "plan" else {}
            known = (VERSION, weights, name, target, size, config, seed, dealt[at : at + part], own)
            file = folder / f"{name}-{hashlib.sha256(repr(known).encode()).hexdigest()[:12]}.csv"
            variant = NAMES[model.config.token_type] if name in SIGHTED else "control"
            files.append((file, {"run": run.name, "variant": variant, "policy": name}))
            if not file.is_file():
                jobs.setdefault((at, size), {})[file] = policy(name, model, config, **own)

    def make(job: tuple) -> None:
        (at, size), todo = job
        made = search(todo, dealt[at : at + part], config, target, size, seed)
        for file, table in made.groupby("policy", sort=False):
            write_whole(file, table.drop(columns="policy").round(4).to_csv(index=False).encode())

    with crew(torch.get_num_threads()) as pool:
        list(tqdm(pool.map(make, jobs.items()), "navigation", len(jobs), unit="part"))
    tables = [pd.read_csv(file).assign(**told) for file, told in files]
    return pd.concat(tables, ignore_index=True).assign(target=target)


def score(table: pd.DataFrame) -> pd.DataFrame:
    """One row a search of `navigate`, from where it stands after the last step.

    `arrived_5`, `arrived_10`: within that many mm and degrees at the end; `passed_10`: at any step;
    `start_mm`, `start_deg`, `final_mm`, `final_deg`; `path_mm`, `path_deg` travelled;
    `detour`: path over the straight way, mm; `lost`: share of steps with under half the contact.
    """
    keys = ["target", "variant", "run", "policy", "patient", "start"]
    steps = table["step"].nunique()
    pose = torch.tensor(table[list(poses.AXES)].to_numpy()).unflatten(0, (-1, steps))
    mm, deg, contact = (
        table[name].to_numpy().reshape(-1, steps) for name in ("translation", "rotation", "contact")
    )
    way, turn = (v.sum(1).numpy() for v in away(poses.relative(pose[:, :-1], pose[:, 1:])))
    near = {t: (mm <= t) & (deg <= t) for t in TOLERANCES}
    return table[keys][::steps].reset_index(drop=True).assign(
        **{f"arrived_{t:.0f}": near[t][:, -1].astype(float) for t in TOLERANCES},
        passed_10=near[TOLERANCES[1]].any(1).astype(float),
        start_mm=mm[:, 0], start_deg=deg[:, 0], final_mm=mm[:, -1], final_deg=deg[:, -1],
        path_mm=way, path_deg=turn, detour=way / mm[:, 0].clip(1e-9),
        lost=(contact < 0.5).mean(1),
    )  # fmt: skip


MEASURES = {
    "arrived_5": "share", "arrived_10": "share", "passed_10": "share", "final_mm": "mm",
    "final_deg": "deg", "path_mm": "mm", "path_deg": "deg", "detour": "ratio", "lost": "share",
}  # fmt: skip


def _means(table: pd.DataFrame, keys: Sequence[str], columns: Iterable[str], draws: int = 2000):
    rows = [
        (*key, name, *bootstrap(part[name], part["patient"], draws), len(part))
        for key, part in table.groupby(list(keys), sort=False, observed=True)
        for name in columns
    ]
    return pd.DataFrame(rows, columns=[*keys, "measure", "value", "low", "high", "searches"])


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over starts and runs of `score`'s measures, 95% intervals over patients.

    Columns: target, variant, policy, measure, unit, value, low, high, starts, patients, runs.
    """
    keys = ["target", "variant", "policy"]
    counts = scores.groupby(keys)[["patient", "run"]].nunique()
    counts = counts.set_axis(["patients", "runs"], axis=1).reset_index()
    table = _means(scores, keys, MEASURES).merge(counts, on=keys)
    table.insert(4, "unit", table["measure"].map(MEASURES))
    table.insert(8, "starts", table.pop("searches") // table["runs"])
    return table


def by_distance(scores: pd.DataFrame, edges: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Share that arrives within 10 and 10, by starting distance: `edges` of `start_mm` or
    `start_deg` -> rows variant, policy, measure, middle, value, low, high, searches."""
    tables = []
    for measure, cuts in edges.items():
        cut = scores.assign(middle=pd.cut(scores[measure], cuts).map(lambda at: at.mid))
        table = _means(cut, ["variant", "policy", "middle"], ["arrived_10"])
        tables.append(table.assign(measure=measure))
    columns = ["variant", "policy", "measure", "middle", "value", "low", "high", "searches"]
    return pd.concat(tables, ignore_index=True)[columns]


def by_step(table: pd.DataFrame) -> pd.DataFrame:
    """Mean error left after each step: variant, policy, step, measure, value, low, high (95%)."""
    return _means(table, ["variant", "policy", "step"], ["translation", "rotation"], 400)


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


def verdicts(scores: pd.DataFrame, summary: pd.DataFrame, margin: float = 0.05) -> pd.DataFrame:
    """What was asked of the searches, and what `compare` and `summarise` answer.

    Columns: claim, published, measured, interval, verdict. Comparisons need two patients; what was
    not searched is left out.
    """
    shares = summary[summary["measure"] == "arrived_10"].set_index(["variant", "policy"])
    asked = [
        (f"{words} ({v})", (v, one), (v, two))
        for words, one, two in (
            ("planning with the world model beats following", "follow", "plan"),
            ("planning with the world model beats averaging frames", "average", "plan"),
            ("averaging frames beats following", "follow", "average"),
        )
        for v in ("patch", "channel")
    ]
    asked += [
        (f"patch tokens beat channel tokens ({p})", ("channel", p), ("patch", p)) for p in SIGHTED
    ]
    words = {"second better": "supported", "first better": "refuted here"}
    words |= {"equivalent": "equivalent", "not shown": "not supported"}
    rows = []
    for claim, one, two in asked if scores["patient"].nunique() > 1 else []:
        if {one, two} <= set(shares.index):
            gap = compare(scores, one, two, margin)
            rows.append((
                claim, "not measured",
                f"{shares['value'][two]:.0%} against {shares['value'][one]:.0%} arrive",
                f"difference {100 * gap['low']:+.0f} to {100 * gap['high']:+.0f} points",
                words[gap["verdict"]],
            ))  # fmt: skip
    goals = [("guided searches arrive, 60% or more", best(summary), 0.6)]
    goals += [(f"{p} arrives, 5% or less", ("control", p), -0.05) for p in CONTROLS[:3]]
    goals += [("the oracle arrives, 95% or more", ("control", "oracle"), 0.95)]
    for claim, who, level in goals:
        if who in shares.index:
            row = shares.loc[who]
            reached = row["value"] >= level if level > 0 else row["value"] <= -level
            rows.append((
                claim, "goal", f"{row['value']:.0%} within 10 mm and 10 degrees ({', '.join(who)})",
                f"{row['low']:.0%} to {row['high']:.0%}", "reached" if reached else "not reached",
            ))  # fmt: skip
    return pd.DataFrame(rows, columns=["claim", "published", "measured", "interval", "verdict"])


def best(summary: pd.DataFrame) -> tuple[str, str]:
    """(variant, policy) of the guided searches that most often arrive within 10 and 10."""
    shares = summary[(summary["measure"] == "arrived_10") & (summary["variant"] != "control")]
    return tuple(shares.loc[shares["value"].idxmax(), ["variant", "policy"]])


def ends(table: pd.DataFrame) -> pd.DataFrame:
    """Where `search` tables stand after the last step, by axis: unit, mean, mean size, and the
    spread (standard deviation) of the patients' means: what a patient's searches share."""
    last = table[table["step"] == table["step"].max()].set_index("patient")[list(poses.AXES)]
    return pd.DataFrame({
        "unit": dict(zip(poses.AXES, poses.UNITS, strict=True)),
        "mean": last.mean(), "mean size": last.abs().mean(),
        "spread between patients": last.groupby("patient").mean().std(),
    }).rename_axis("axis")  # fmt: skip


def shortfall(own: pd.DataFrame) -> str:
    """Of the `score` rows `own`, why those that do not arrive do not, in a sentence."""
    failed = own[own["arrived_10"] == 0]
    if failed.empty:
        return "all searches arrive"
    far, turned = (failed["final_mm"] > 10).mean(), (failed["final_deg"] > 10).mean()
    return (
        f"of the {len(failed)} searches that do not arrive, {far:.0%} end over 10 mm away and "
        f"{turned:.0%} over 10 degrees; {failed['passed_10'].mean():.0%} have passed the plane"
    )


def way(table: pd.DataFrame, one: Mapping) -> Tensor:
    """Poses [steps + 1, 6] of one search of `navigate`; `one` is its row in `score`."""
    own = table
    for key in ("run", "policy", "patient", "start"):
        own = own[own[key] == one[key]]
    return torch.tensor(own[list(poses.AXES)].to_numpy())


def walks(table: pd.DataFrame, scores: pd.DataFrame, person: Person) -> list[tuple]:
    """For `figures.navigation.paths`: the tip's ways [steps + 1, 3] in the heart frame, mm, from
    the person's first start, with variant and policy: guided and oracle, of their first run."""
    own = scores[(scores["variant"] != "control") | (scores["policy"] == "oracle")]
    own = own[(own["patient"] == person.name) & (own["start"] == 0)]
    found = []
    for one in own.drop_duplicates(["variant", "policy"]).to_dict("records"):
        matrix = Patient(person.seed).place(one["target"]) @ poses.to_matrix(way(table, one))
        found.append((matrix[:, :3, 3].numpy(), one["variant"], one["policy"]))
    return found


def film(table: pd.DataFrame, one: Mapping, people: Sequence[Person], config: NavigationConfig,
         size: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:  # fmt: skip
    """One search of `navigate`, seen again: `one` is its row in `score`.

    Returns frames uint8 [steps + 1, S, S] and a caption for each.
    """
    person = next(p for p in people if p.name == one["patient"])
    pose = way(table, one)
    draws = [np.random.default_rng([seed, *person.seed, int(one["start"]), 1]) for _ in pose]
    probes = Probes([Patient(person.seed)] * len(pose), pose, draws, config, one["target"], size)
    probes.time = torch.arange(len(pose)) * config.seconds
    left = torch.stack(away(pose), 1).tolist()
    words = [f"step {k}: {mm:.0f} mm, {deg:.0f}°" for k, (mm, deg) in enumerate(left)]
    return probes.frames()[:, 0].numpy(), words
