"""Closed loop: a model guides a probe over a virtual patient, step by step, until it stops.

Published scores judge single predictions on recorded frames. Here predictions are acted on: the
hand has limits and errors, the heart beats, the patient breathes, and nothing shows that the plane
is reached: the policy itself must decide to stop. `dreamer.study.environment` is one such probe as
a Gymnasium environment, registered as dreamer/Probe-v0 where Gymnasium is installed.

- Planning: cross-entropy method (Rubinstein, Methodol Comput Appl Probab 1999;1:127).
- Breathing: at rest most of the time, sin^4 (Lujan et al., Med Phys 1999;26:715, equation 1).
- A hand's limits and errors and the depth of breathing are our choice. Breathing shifts the whole
  patient, chest wall included: no heart slides behind the ribs.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import roma
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dreamer import phantom, poses
from dreamer.model import CardiacDreamer
from dreamer.phantom.render import check
from dreamer.phantom.trajectories import SIDE, SPREAD, STEP

TOLERANCES = (5, 10)  # mm, and degrees
EDGE = torch.tensor([60.0, 60, 60, 179, 89, 179], dtype=torch.float64)  # of the workspace
CAUDAL = torch.tensor([0.0, 0.6, -0.8], dtype=torch.float64)  # in the heart frame
MEMORY = 12  # frames that the filter averages
POLICIES = ("follow", "filter", "plan")
CONTROLS = ("oracle", "stay", "random", "mean pose")


class NavigationConfig(BaseModel):
    """The hand and the patient. Unknown fields and values out of range are refused.

    `limit_mm`, `limit_deg`: how far a hand moves in one of at most `steps`, each of `seconds`;
    `hand_mm`, `hand_deg`: standard deviation of its error, per axis. A policy whose next motion
    would be below `hold_mm` and `hold_deg` stops. Breathing is `breath_mm` deep and takes
    `breath_seconds`. Starts are drawn as an operator's are, `spread` times as wide, at most
    `farthest_mm` and `farthest_deg` from the plane, and not within both `nearest_mm` and
    `nearest_deg`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(20, ge=1)
    limit_mm: float = Field(5.0, gt=0)
    limit_deg: float = Field(10.0, gt=0, le=90)
    hand_mm: float = Field(0.4, ge=0)
    hand_deg: float = Field(1.0, ge=0)
    hold_mm: float = Field(1.5, ge=0)
    hold_deg: float = Field(3.0, ge=0)
    breath_mm: float = Field(2.0, ge=0)
    breath_seconds: float = Field(4.0, gt=0)
    beats_per_minute: float = Field(66.0, ge=0)
    seconds: float = Field(0.5, gt=0)
    spread: float = Field(1.0, gt=0)
    nearest_mm: float = Field(10.0, ge=0)
    nearest_deg: float = Field(10.0, ge=0)
    farthest_mm: float = Field(30.0, gt=0)
    farthest_deg: float = Field(30.0, gt=0)


class Person(NamedTuple):
    """A virtual patient: a name for the tables and the seed of `dreamer.phantom.Patient`."""

    name: str
    seed: tuple[int, ...]


class Start(NamedTuple):
    """Where a search begins: `pose` [6] (mm, degrees), and the `seed` of the phases of heart and
    breathing and of the errors of the hand."""

    person: Person
    pose: NDArray[np.float64]
    seed: int


def unseen_patients(data: str | Path, count: int) -> tuple[list[Person], str]:
    """`count` virtual patients that are in no data set, and the target plane of the phantom `data`
    (apical four-chamber where `data` are recorded scans)."""
    card = phantom.read_card(data)
    arguments = card["arguments"] if card else {"seed": 0, "target": "a4c"}
    seed = 1_000_000 + arguments["seed"]
    return [Person(f"virtual_{n:04d}", (seed, n)) for n in range(count)], arguments["target"]


def in_parts(function: Callable[..., Tensor], *tensors: Tensor, size: int = 16) -> Tensor:
    """A function of batches, applied to `size` rows at a time: less memory, and faster on a CPU."""
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def away(pose: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [...] in mm and angle [...] in degrees of poses or motions [..., 6] from zero."""
    error = poses.errors(pose, torch.zeros_like(pose))
    return error.translation, error.rotation


def limited(motion: Tensor, config: NavigationConfig) -> Tensor:
    """Motions [..., 6] shortened to what a hand can do; directions and axes stay."""

    def shorten(vector: Tensor, limit: float) -> Tensor:
        return vector * (limit / vector.norm(dim=-1, keepdim=True).clamp_min(limit))

    matrix = poses.to_matrix(motion.double())
    turn = roma.rotmat_to_rotvec(matrix[..., :3, :3])
    matrix[..., :3, :3] = roma.rotvec_to_rotmat(shorten(turn, np.radians(config.limit_deg)))
    matrix[..., :3, 3] = shorten(matrix[..., :3, 3], config.limit_mm)
    return poses.from_matrix(matrix)


def settled(motion: Tensor, config: NavigationConfig) -> Tensor:
    """Motions [..., 6], zero where they are so small that a policy stops."""
    mm, deg = away(motion)
    return torch.where(((mm < config.hold_mm) & (deg < config.hold_deg))[..., None], 0.0, motion)


def draw_start(rng: np.random.Generator, config: NavigationConfig) -> NDArray[np.float64]:
    """A starting pose [6], mm and degrees.

    Raises ValueError where hardly any lies between nearest and farthest.
    """
    for _ in range(2000):
        z = np.clip(rng.standard_normal(6), -2.2, 2.2)
        pose = (z * SPREAD + SIDE) * config.spread
        mm, deg = (float(value) for value in away(torch.from_numpy(pose)))
        near = mm <= config.nearest_mm and deg <= config.nearest_deg
        if mm <= config.farthest_mm and deg <= config.farthest_deg and not near:
            return pose
    raise ValueError(f"no start lies between nearest and farthest: {config}")


def draw_starts(people: Sequence[Person], config: NavigationConfig, seed: int = 0) -> list[Start]:
    """One start on each patient; it depends on the patient and `seed` alone."""
    draws = [(person, np.random.default_rng([seed, *person.seed])) for person in people]
    return [Start(p, draw_start(rng, config), int(rng.integers(2**32))) for p, rng in draws]


class Probes:
    """B probes, each on the patient of its start, moved together.

    `pose` [B, 6], mm and degrees; `count` moves made. Which frames a probe sees depends on its
    start and its own moves alone. Raises ValueError on bad arguments.
    """

    def __init__(
        self,
        starts: Sequence[Start],
        target: str = "a4c",
        size: int = 112,
        config: NavigationConfig | None = None,
    ):
        check(target, size)
        if not starts:
            raise ValueError("starts: at least one is needed")
        self.target, self.size, self.config = target, size, config or NavigationConfig()
        self.patients = [phantom.Patient(start.person.seed) for start in starts]
        draws = [np.random.default_rng(start.seed) for start in starts]
        self.first_phase = torch.tensor(np.array([rng.random(2) for rng in draws]))
        errors = np.array([rng.standard_normal((self.config.steps, 6)) for rng in draws])
        errors *= np.repeat([self.config.hand_mm, self.config.hand_deg], 3)
        self.errors = torch.from_numpy(errors)
        # A heart that moves caudally is one over which the probe has moved cranially.
        self.sway = torch.stack([-p.place(target)[:3, :3].T @ CAUDAL for p in self.patients])
        pose = self._checked(np.array([start.pose for start in starts], float), len(starts))
        self.pose, self.count = pose.clamp(-EDGE, EDGE), 0

    def _checked(self, values: ArrayLike, count: int) -> Tensor:
        values = torch.as_tensor(values, dtype=torch.float64)
        if values.shape != (count, 6) or not values.isfinite().all():
            raise ValueError(f"finite poses or motions [{count}, 6] are needed, got {values}")
        return values

    def seen(self) -> tuple[Tensor, Tensor]:
        """Poses [B, 6] over the hearts as breathing has shifted them, and phases [B] of these."""
        config, time = self.config, self.count * self.config.seconds
        heart, breath = self.first_phase.T
        depth = torch.sin(np.pi * (breath + time / config.breath_seconds)) ** 4 * config.breath_mm
        pose = torch.cat((self.pose[:, :3] + depth[:, None] * self.sway, self.pose[:, 3:]), 1)
        return pose, torch.remainder(heart + time * config.beats_per_minute / 60, 1.0)

    def frames(self, rows: Sequence[int] | Tensor) -> Tensor:
        """What the probes `rows` see, uint8 [len(rows), 1, S, S]."""
        pose, phase = self.seen()
        with phantom.alone():
            made = [
                phantom.render(self.patients[k], pose[k], phase[k], None, self.target, self.size)
                for k in rows
            ]
        return torch.stack([frame.image for frame in made])[:, None]

    def move(self, motions: Tensor, rows: Sequence[int] | Tensor) -> Tensor:
        """Move the probes `rows` by motions [len(rows), 6], shortened by the hand's limits and with
        its errors; returns the motions made, as a tracker measures them."""
        before, motions = self.pose[rows], self._checked(motions, len(rows))
        made = poses.compose(limited(motions, self.config), self.errors[rows, self.count])
        self.pose[rows] = poses.compose(before, made).clamp(-EDGE, EDGE)
        self.count += 1
        return poses.relative(before, self.pose[rows])


# Policies: called with the frames [B, 1, S, S] of the probes that still move, their true poses
# [B, 6] (for the oracle alone), the motions made since the last call, and a mask of which probes of
# the last call are left; they return motions [B, 6], and zero to end a search.


class Follow:
    """Follow the guidance: the motion from the estimated pose to the plane.

    The estimate is the mean of the predictions of the last `memory` frames or so, each carried on
    by the motions since (one frame: the prediction itself). Rotations are averaged as the one
    nearest to their mean matrix. It stops after `memory` frames at the earliest.
    """

    sees = True

    def __init__(self, model: CardiacDreamer, config: NavigationConfig, memory: int = 1):
        if memory < 1:
            raise ValueError(f"memory must be at least 1 frame, got {memory}")
        self.model, self.config, self.memory = model, config, memory
        self.reset()

    def reset(self) -> None:
        """Begin new searches."""
        self.mean, self.count = torch.zeros(()), 0

    @torch.no_grad()
    def __call__(self, frames: Tensor, pose=None, moved=None, left=slice(None)) -> Tensor:
        features = in_parts(self.model.encode, frames.to(self.model.pose_mean.device))
        predicted = poses.to_matrix(self.imagine(features, torch.zeros(len(frames), 6)))
        if self.count:  # a mean of matrices is carried on as each of them is
            self.mean = self.mean[left] @ poses.to_matrix(moved)
        self.count = min(self.count + 1, self.memory)
        self.mean = self.mean + (predicted - self.mean) / self.count
        matrix = self.mean.clone()
        matrix[:, :3, :3] = roma.special_procrustes(matrix[:, :3, :3])
        motion = self.choose(features, poses.from_matrix(matrix))
        return settled(motion, self.config) if self.count == self.memory else motion

    def imagine(self, features: Tensor, motion: Tensor) -> Tensor:
        """Poses [N, 6] imagined after motions [N, 6] from maps [N, C, h, w]."""
        motion = motion.float().to(features.device)
        dreamt = in_parts(lambda *part: self.model.imagine(*part).pose, features, motion)
        return dreamt.double().cpu()

    def choose(self, features: Tensor, estimate: Tensor) -> Tensor:
        """The motions [B, 6] to make from the estimated poses [B, 6]."""
        return poses.remaining(estimate)


class Plan(Follow):
    """Plan one step with the world model: the motion whose imagined pose is nearest the plane.

    Cross-entropy method about the guided step, within half the spread of the motions that the world
    model was trained on: `rounds` of `candidates`, a normal distribution fitted to the `elites` of
    least cost, whose mean is made (the best alone would be the luckiest). Cost: how far (mm and
    degrees over a hand's limits, squared) the imagined pose lies from the plane, and from where the
    motion leads by geometry: imagination is trusted as far as the two agree. All probes share the
    candidates' noise. Raises ValueError for a model without a world model.
    """

    def __init__(
        self,
        model: CardiacDreamer,
        config: NavigationConfig,
        candidates: int = 8,
        elites: int = 3,
        rounds: int = 2,
    ):
        if model.world is None:
            raise ValueError("token_type none has no world model to plan with")
        if not 1 < elites <= candidates or rounds < 1:
            raise ValueError(f"1 < elites <= candidates, rounds >= 1; got {elites}, {candidates}")
        self.candidates, self.elites, self.rounds = candidates, elites, rounds
        super().__init__(model, config)

    def reset(self) -> None:
        super().reset()
        self.generator = torch.Generator().manual_seed(0)

    def cost(self, pose: Tensor) -> Tensor:
        mm, deg = away(pose)
        return (mm / self.config.limit_mm) ** 2 + (deg / self.config.limit_deg) ** 2

    def choose(self, features: Tensor, estimate: Tensor) -> Tensor:
        mean = limited(poses.remaining(estimate), self.config)[:, None]  # [B, 1, 6]
        spread = torch.from_numpy(STEP / 2)
        rows = features.repeat_interleave(self.candidates, 0)
        for _ in range(self.rounds):
            noise = torch.randn(self.candidates, 6, generator=self.generator, dtype=torch.float64)
            motions = limited(mean + spread * noise, self.config)  # [B, candidates, 6]
            imagined = self.imagine(rows, motions.flatten(0, 1)).view(motions.shape)
            geometric = poses.compose(estimate[:, None].expand_as(motions), motions)
            cost = self.cost(imagined) + self.cost(poses.relative(geometric, imagined))
            best = cost.argsort(1)[:, : self.elites, None].expand(-1, -1, 6)
            elite = motions.gather(1, best)
            mean, spread = elite.mean(1, keepdim=True), elite.std(1, keepdim=True)
        return mean[:, 0]


class Control:
    """A policy that sees no frame: oracle, stay, random, or mean pose.

    `oracle` follows the true pose, `stay` stops at once, `random` moves as far as a hand can.
    `mean pose` takes `mean_pose` [6], that of the training part, for the start, moves from there to
    the plane, and stops. Raises ValueError for other names.
    """

    sees = False

    def __init__(self, name: str, mean_pose: Tensor, config: NavigationConfig):
        if name not in CONTROLS:
            raise ValueError(f"control {name!r} is unknown; one of {', '.join(CONTROLS)}")
        self.name, self.mean_pose, self.config = name, mean_pose.double().cpu(), config
        self.reach = torch.tensor([config.limit_mm, config.limit_deg]).repeat_interleave(3)
        self.reset()

    def reset(self) -> None:
        self.generator, self.estimate = torch.Generator().manual_seed(0), None

    def __call__(self, frames, pose: Tensor, moved=None, left=slice(None)) -> Tensor:
        if self.name == "stay":
            return torch.zeros_like(pose)
        if self.name == "random":
            draw = torch.rand(pose.shape, generator=self.generator, dtype=torch.float64)
            return (2 * draw - 1) * self.reach
        if self.name == "oracle":
            return settled(poses.remaining(pose), self.config)
        known = self.estimate is not None
        self.estimate = (
            poses.compose(self.estimate[left], moved) if known else self.mean_pose.expand_as(pose)
        )
        return settled(poses.remaining(self.estimate), self.config)


def policy(name: str, model: CardiacDreamer, config: NavigationConfig) -> Follow:
    """One of POLICIES: `follow`, `filter` (the same with a memory) or `plan`.

    Raises ValueError for other names.
    """
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is unknown; one of {', '.join(POLICIES)}")
    if name == "plan":
        return Plan(model, config)
    return Follow(model, config, MEMORY if name == "filter" else 1)


class Searches(NamedTuple):
    """Searches of one policy: `pose` [T + 1, B, 6] at the start and after each step, that of a
    stopped probe repeated; `steps` [B] made; `stopped` [B], whether the policy ended the search."""

    pose: Tensor
    steps: Tensor
    stopped: Tensor


def search(policy: Follow | Control, probes: Probes) -> Searches:
    """Let a policy steer probes until it stops them, for `config.steps` steps at most."""
    policy.reset()
    rows, left, moved = torch.arange(len(probes.pose)), slice(None), None
    steps, stopped = torch.full_like(rows, probes.config.steps), torch.zeros_like(rows).bool()
    record = [probes.pose.clone()]
    for step in range(probes.config.steps + 1):  # the last time to stop only
        frames = probes.frames(rows) if policy.sees else None
        motion = policy(frames, probes.pose[rows], moved, left)
        left = motion.any(1)
        steps[rows[~left]], stopped[rows[~left]] = step, True
        rows = rows[left]
        if step == probes.config.steps or not len(rows):
            break
        moved = probes.move(motion[left], rows)
        record.append(probes.pose.clone())
    record += [probes.pose] * (probes.config.steps + 1 - len(record))
    return Searches(torch.stack(record), steps, stopped)


def score(found: Searches) -> pd.DataFrame:
    """One row per search.

    `reached_5`, `reached_10`: stopped within that many mm and degrees of the plane; `passed_5`,
    `passed_10`: within them at the start or after any step; `steps_to_`: steps until then (all,
    where it never was); `stopped`; `steps` made; `start_`, `final_` and `nearest_` distance (where
    the larger of mm and degrees is least), and length of the path, each in mm and degrees.
    """
    mm, deg = away(found.pose)  # [T + 1, B]
    nearest = torch.maximum(mm, deg).argmin(0, keepdim=True)
    walked = away(poses.relative(found.pose[:-1], found.pose[1:]))
    scores = {"stopped": found.stopped.double(), "steps": found.steps}
    for limit in TOLERANCES:
        near = (mm <= limit) & (deg <= limit)
        scores[f"reached_{limit}"] = (near[-1] & found.stopped).double()
        scores[f"passed_{limit}"] = near.any(0).double()
        scores[f"steps_to_{limit}"] = torch.where(near.any(0), near.int().argmax(0), len(near) - 1)
    for unit, left, path in zip(("mm", "deg"), (mm, deg), walked, strict=True):
        scores[f"start_{unit}"], scores[f"final_{unit}"] = left[0], left[-1]
        scores[f"nearest_{unit}"] = left.gather(0, nearest)[0]
        scores[f"path_{unit}"] = path.sum(0)
    return pd.DataFrame({name: value.double().numpy() for name, value in scores.items()})


def measure(
    model: CardiacDreamer,
    people: Sequence[Person],
    target: str = "a4c",
    config: NavigationConfig | None = None,
    policies: Sequence[str] = POLICIES,
    planned: int = 24,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of a model's policies, one start on each patient: measure, condition (the policy),
    patient, value.

    Planning costs most and uses the first `planned` patients, on which `follow of the planned` are
    the scores to compare with; both are left out for a model without a world model. Raises
    ValueError for unknown policies.
    """
    config = config or NavigationConfig()
    starts, tables = draw_starts(people, config, seed), {}
    for name in policies:
        if name == "plan" and model.world is None:
            continue
        own = starts[:planned] if name == "plan" else starts
        probes = Probes(own, target, model.config.image_size, config)
        tables[name] = _tidy(score(search(policy(name, model, config), probes)), name, own)
    if {"follow", "plan"} <= set(tables):
        same = tables["follow"]["patient"].isin(tables["plan"]["patient"])
        tables["both"] = tables["follow"][same].assign(condition="follow of the planned")
    return pd.concat(tables.values(), ignore_index=True)


def measure_controls(
    mean_pose: Tensor,
    people: Sequence[Person],
    target: str = "a4c",
    config: NavigationConfig | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of the controls from the starts of `measure`; only `mean_pose` [6] (mm, degrees), that
    of the training part, depends on the data."""
    config = config or NavigationConfig()
    starts, tables = draw_starts(people, config, seed), []
    for name in CONTROLS:
        found = search(Control(name, mean_pose, config), Probes(starts, target, config=config))
        tables.append(_tidy(score(found), name, starts))
    return pd.concat(tables, ignore_index=True)


def _tidy(scores: pd.DataFrame, condition: str, starts: Sequence[Start]) -> pd.DataFrame:
    names = [start.person.name for start in starts]
    table = scores.assign(condition=condition, patient=names)
    table = table.melt(["condition", "patient"], var_name="measure")
    return table[["measure", "condition", "patient", "value"]]


with suppress(ModuleNotFoundError):  # everything above works without Gymnasium
    import gymnasium

    gymnasium.register("dreamer/Probe-v0", "dreamer.study.environment:ProbeEnv")
