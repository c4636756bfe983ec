"""Closed loop: a model guides a probe over a virtual patient, step by step, to the target plane.

Published scores judge single predictions on recorded frames. Here predictions are acted on: the
hand has limits and errors, the heart beats, the patient breathes. A search takes all its steps,
because nothing shows a sonographer that the plane is reached, and is scored where it ends.

`Probes` is the environment, many probes stepped together (Gymnasium's vector interface, Towers et
al., arXiv:2407.17032); `ProbeEnv` is one of them:

    env = gymnasium.make("dreamer.study.closed_loop:dreamer/Probe-v0", size=112)
    env = gymnasium.make_vec("dreamer.study.closed_loop:dreamer/Probe-v0", num_envs=8)

The name alone suffices once this module is imported. Sources and assumptions:

- Planning: cross-entropy method (Rubinstein, Methodol Comput Appl Probab 1999;1:127).
- Breathing: at rest most of the time, sin^4 (Lujan et al., Med Phys 1999;26:715, equation 1).
- A hand's limits and errors and the depth of breathing are our choice. Breathing shifts the whole
  patient, chest wall included: no heart slides behind the ribs.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import pandas as pd
import roma
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from dreamer import poses
from dreamer.files import write_whole
from dreamer.model import CardiacDreamer
from dreamer.phantom import Patient, alone, crew, render
from dreamer.phantom.render import check
from dreamer.phantom.trajectories import SIDE, SPREAD, STEP
from dreamer.runs import load_config, load_run
from dreamer.study import stats

TOLERANCES = (5, 10)  # mm, and degrees
FACE, STANDOFF = 9.0, 5.7  # mm: half the probe's face; a gap that the gel no longer fills
EDGE = torch.tensor([60.0, 60, 60, 179, 89, 179], dtype=torch.float64)  # of the workspace
CAUDAL = torch.tensor([0.0, 0.6, -0.8], dtype=torch.float64)  # in the heart frame
WINDOW = 12  # frames of the running average
SIGHTED = ("follow", "average", "plan")
CONTROLS = ("stay", "random", "mean pose", "oracle")
POLICIES = (*SIGHTED, *CONTROLS)
VERSION = 3  # of environment and policies: kept searches of other versions are not read


class NavigationConfig(BaseModel):
    """The hand and the patient. Unknown fields and values out of range are refused.

    `limit_mm`, `limit_deg`: how far a hand moves in one of `steps`, each of `seconds`; `hand_mm`,
    `hand_deg`: standard deviation of its error, per axis. Breathing is `breath_mm` deep and takes
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
    """A search's start: `number` among those of a person, `pose` [6], and the `seed` of the phase
    of heart and breathing and of the errors of the hand."""

    person: Person
    number: int
    pose: NDArray[np.float64]
    seed: int


def away(pose: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [...] in mm and angle [...] in degrees from poses [..., 6] to the target plane."""
    error = poses.errors(pose, torch.zeros_like(pose))
    return error.translation, error.rotation


def limited(motion: Tensor, mm: float, deg: float) -> Tensor:
    """Motions [..., 6] shortened to `mm` and `deg` at most; directions and axes stay."""

    def shorten(vector: Tensor, limit: float) -> Tensor:
        return vector * (limit / vector.norm(dim=-1, keepdim=True).clamp_min(limit))

    matrix = poses.to_matrix(motion.double())
    turn = shorten(roma.rotmat_to_rotvec(matrix[..., :3, :3]), np.radians(deg))
    matrix[..., :3, :3] = roma.rotvec_to_rotmat(turn)
    matrix[..., :3, 3] = shorten(matrix[..., :3, 3], mm)
    return poses.from_matrix(matrix)


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


# The environment


class Probes(gymnasium.vector.VectorEnv):
    """B probes on virtual patients, stepped together.

    Observations are frames, uint8 [B, 1, S, S]; actions are motions [B, 6] in each probe's own
    frame, mm and degrees, which the hand shortens to its limits and carries out with an error. The
    reward is the decrease of max(mm, degrees) / 5 to the target plane. An episode never terminates
    and is truncated after `config.steps`. Infos: pose and seen [B, 6] (`seen` is the pose over the
    heart as breathing has shifted it), phase of the heart, contact (share of the probe's face on
    the skin), translation, rotation and patient (a number in `people`), each [B].

    Args:
        num_envs: B.
        people: patients to choose from.
        target, size: the plane; pixels of a frame.
        config: a NavigationConfig or its fields.
        black: B flags; frames of these probes stay black, which saves the time to draw them.

    Raises ValueError on bad arguments.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012, as Gymnasium has it

    def __init__(
        self,
        num_envs: int = 1,
        people: Sequence[Person] = (Person("virtual_0000", (1_000_000, 0)),),
        target: str = "a4c",
        size: int = 112,
        config: NavigationConfig | Mapping | None = None,
        black: Sequence[bool] | None = None,
    ):
        check(target, size)
        if not people:
            raise ValueError("people: at least one is needed")
        self.num_envs, self.people, self.target, self.size = num_envs, list(people), target, size
        self.config = NavigationConfig.model_validate(config or {})
        reach = np.repeat([self.config.limit_mm, self.config.limit_deg], 3).astype(np.float32)
        self.single_action_space = Box(-reach, reach)
        self.single_observation_space = Box(0, 255, (1, size, size), np.uint8)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.drawn = ~np.asarray(np.zeros(num_envs) if black is None else black, bool)
        self.draws: list[np.random.Generator] = []
        self.pose: Tensor | None = None
        self._patients: dict[int, Patient] = {}

    def reset(self, *, seed: int | Sequence[int] | None = None, options: Mapping | None = None):
        """Frames and infos of new searches.

        `seed`: one in all, or one for each probe, whose search then does not depend on the others.
        `options`: `patient` [B], numbers in `people`, and `pose` [B, 6]; both are drawn if absent.
        """
        if seed is not None or not self.draws:
            one = seed is None or isinstance(seed, int)
            seeds = np.random.SeedSequence(seed).spawn(self.num_envs) if one else seed
            self.draws = [np.random.default_rng(each) for each in seeds]
        options = dict(options or {})
        patient, pose = options.pop("patient", None), options.pop("pose", None)
        if options:
            raise ValueError(f"options: unknown {', '.join(options)}; patient or pose")
        if patient is None:
            patient = [int(rng.integers(len(self.people))) for rng in self.draws]
        if not set(patient) <= set(range(len(self.people))) or len(patient) != self.num_envs:
            raise ValueError(f"patient: {self.num_envs} of 0 to {len(self.people) - 1}: {patient}")
        if pose is None:
            pose = [draw_start(rng, self.config) for rng in self.draws]
        self.pose = self._checked(pose, "pose").clamp(-EDGE, EDGE)
        self.number, self.count = np.asarray(patient), 0
        for number in set(patient) - set(self._patients):
            self._patients[number] = Patient(self.people[number].seed)
        bodies = [self._patients[number] for number in patient]
        # A heart that moves caudally is one over which the probe has moved cranially.
        self.sway = torch.stack([-b.place(self.target)[:3, :3].T @ CAUDAL for b in bodies])
        self.first_phase = torch.from_numpy(np.array([rng.random(2) for rng in self.draws]))
        return self._look()

    def step(self, actions: ArrayLike):
        """Frames, rewards [B], terminated [B], truncated [B] and infos after motions [B, 6]."""
        if self.pose is None:
            raise gymnasium.error.ResetNeeded("reset the environment before its first step")
        hand, before = self.config, self.left
        motion = limited(self._checked(actions, "motions"), hand.limit_mm, hand.limit_deg)
        noise = np.array([rng.standard_normal(6) for rng in self.draws])
        slip = torch.from_numpy(noise * np.repeat([hand.hand_mm, hand.hand_deg], 3))
        made = poses.compose(motion, slip)
        self.pose = poses.compose(self.pose, made).clamp(-EDGE, EDGE)
        self.count += 1
        frames, infos = self._look()
        truncated = np.full(self.num_envs, self.count >= hand.steps)
        return frames, before - self.left, np.zeros_like(truncated), truncated, infos

    def _checked(self, values: ArrayLike, name: str) -> Tensor:
        values = torch.from_numpy(np.array(values, float))
        if values.shape != (self.num_envs, 6) or not values.isfinite().all():
            raise ValueError(f"{name} must be finite, [{self.num_envs}, 6]; got {values.tolist()}")
        return values

    def _look(self) -> tuple[NDArray[np.uint8], dict[str, NDArray]]:
        time, config = self.count * self.config.seconds, self.config
        beats, breaths = time * config.beats_per_minute / 60, time / config.breath_seconds
        phase = torch.remainder(self.first_phase[:, 0] + beats, 1.0)
        depth = config.breath_mm * torch.sin(np.pi * (self.first_phase[:, 1:] + breaths)) ** 4
        seen = torch.cat((self.pose[:, :3] + depth * self.sway, self.pose[:, 3:]), 1)
        mm, deg = away(self.pose)
        self.left = (torch.maximum(mm, deg) / TOLERANCES[0]).numpy()
        tensors = {"pose": self.pose, "seen": seen, "phase": phase, "contact": self._contact(),
                   "translation": mm, "rotation": deg}  # fmt: skip
        infos = {name: value.numpy() for name, value in tensors.items()} | {"patient": self.number}

        frames = np.zeros((self.num_envs, 1, self.size, self.size), np.uint8)
        for number in set(self.number[self.drawn].tolist()):  # those of one patient together
            rows = np.flatnonzero((self.number == number) & self.drawn)
            with alone():
                made = render(self._patients[number], seen[rows], phase[rows], target=self.target,
                              size=self.size)  # fmt: skip
            frames[rows, 0] = made.image.numpy()
        return frames, infos

    def _contact(self) -> Tensor:
        """The share [B] of each probe's face that touches the skin."""
        matrix = poses.to_matrix(self.pose)
        face = torch.linspace(-FACE, FACE, 19, dtype=torch.float64)
        x, y, z = (matrix[:, :3, 3:] + matrix[:, :3, :1] * face).unbind(1)  # [B, 19] each
        bodies = [self._patients[number] for number in self.number]
        skin = torch.stack([body.skin(x[k], y[k]) for k, body in enumerate(bodies)])
        return (skin - z < STANDOFF).double().mean(1)


class ProbeEnv(gymnasium.Env):
    """One probe: `Probes` without the leading axis, with the same arguments."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012, as Gymnasium has it

    def __init__(self, render_mode: str | None = None, **arguments):
        self.probes, self.render_mode = Probes(1, **arguments), render_mode
        self.action_space = self.probes.single_action_space
        self.observation_space = self.probes.single_observation_space

    def reset(self, *, seed: int | None = None, options: Mapping | None = None):
        super().reset(seed=seed)
        self.probes.draws = [self.np_random]
        frames, infos = self.probes.reset(options={k: [v] for k, v in (options or {}).items()})
        self.frame = frames[0]
        return self.frame, {name: value[0] for name, value in infos.items()}

    def step(self, action: ArrayLike):
        frames, rewards, _, truncated, infos = self.probes.step([action])
        self.frame, info = frames[0], {name: value[0] for name, value in infos.items()}
        return self.frame, float(rewards[0]), False, bool(truncated[0]), info

    def render(self) -> NDArray[np.uint8]:
        """The frame [S, S, 3], grey."""
        return np.repeat(self.frame[0][..., None], 3, axis=-1)


gymnasium.register(
    "dreamer/Probe-v0",
    "dreamer.study.closed_loop:ProbeEnv",
    vector_entry_point="dreamer.study.closed_loop:Probes",
)


# Policies: called with frames [B, 1, S, S] and infos of `Probes`, they return motions [B, 6].
# `reset(seeds)` begins B searches. Only the oracle reads the true pose.


class Follow:
    """Follow the guidance: the motion from the single-frame prediction to the plane.

    With `window` over 1, the predictions of the last frames, each carried on by the motions made
    since, are averaged first (rotations by the one nearest to their mean matrix).
    """

    sees = True

    def __init__(self, model: CardiacDreamer, config: NavigationConfig, window: int = 1):
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.model, self.config, self.window = model, config, window
        self.reset()

    def reset(self, seeds: Sequence[int] = ()) -> None:
        self.past: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, frames: ArrayLike, infos: Mapping | None = None) -> Tensor:
        features = self.model.encode(torch.as_tensor(frames))
        predicted = self.imagine(features, torch.zeros(len(features), 1, 6))[:, 0]
        self.past = [*self.past, poses.to_matrix(predicted)][-self.window :]
        mean = torch.stack(self.past).mean(0)
        mean[:, :3, :3] = roma.special_procrustes(mean[:, :3, :3])
        self.estimate = poses.from_matrix(mean)
        motion = self.limited(self.choose(features, poses.remaining(self.estimate)))
        self.past = [matrix @ poses.to_matrix(motion) for matrix in self.past]
        return motion

    def imagine(self, features: Tensor, motion: Tensor) -> Tensor:
        """Poses [B, N, 6] imagined after motions [B, N, 6] from maps [B, C, h, w]."""
        rows = features.repeat_interleave(motion.shape[1], 0)
        pose = self.model.imagine(rows, motion.flatten(0, 1).float()).pose
        return pose.double().view(motion.shape)

    def limited(self, motion: Tensor) -> Tensor:
        return limited(motion, self.config.limit_mm, self.config.limit_deg)

    def choose(self, features: Tensor, guided: Tensor) -> Tensor:
        """The motion [B, 6] to make; `guided` leads to the plane by the estimated pose."""
        return guided


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

    def reset(self, seeds: Sequence[int] = ()) -> None:
        super().reset(seeds)
        self.generator = torch.Generator().manual_seed(0)

    def cost(self, pose: Tensor) -> Tensor:
        mm, deg = away(pose)
        return (mm / self.config.limit_mm) ** 2 + (deg / self.config.limit_deg) ** 2

    def choose(self, features: Tensor, guided: Tensor) -> Tensor:
        mean = self.limited(guided)[:, None]
        spread = torch.from_numpy(STEP / 2)
        for _ in range(self.rounds):
            noise = torch.randn(self.candidates, 6, generator=self.generator, dtype=torch.float64)
            motions = self.limited(mean + spread * noise)
            imagined = self.imagine(features, motions)
            geometric = poses.compose(self.estimate[:, None].expand_as(motions), motions)
            cost = self.cost(imagined) + self.cost(poses.relative(geometric, imagined))
            best = cost.argsort(1)[:, : self.elites, None].expand(-1, -1, 6)
            elite = motions.gather(1, best)
            mean, spread = elite.mean(1, keepdim=True), elite.std(1, keepdim=True)
        return mean[:, 0]


class Control:
    """A policy that does not look: `answer(poses, generators)` returns the motions."""

    sees = False

    def __init__(self, answer: Callable[[Tensor, Sequence[np.random.Generator]], Tensor]):
        self.answer = answer

    def reset(self, seeds: Sequence[int] = ()) -> None:
        self.draws = [np.random.default_rng([seed, 1]) for seed in seeds]

    def __call__(self, frames: ArrayLike, infos: Mapping) -> Tensor:
        return self.answer(torch.as_tensor(infos["pose"]), self.draws)


def policy(name: str, model: CardiacDreamer, config: NavigationConfig, **plan: int):
    """One of POLICIES by name; `plan` holds further arguments of `Plan`.

    `stay` holds still, `random` moves as far as a hand can, `mean pose` follows the mean pose of
    the training part, `oracle` the true pose. Raises ValueError for other names.
    """
    if name == "follow":
        return Follow(model, config)
    if name == "average":
        return Follow(model, config, WINDOW)
    if name == "plan":
        return Plan(model, config, **plan)
    if name not in CONTROLS:
        raise ValueError(f"policy {name} is unknown; one of {', '.join(POLICIES)}")
    reach = np.repeat([config.limit_mm, config.limit_deg], 3)

    def answer(pose: Tensor, draws: Sequence[np.random.Generator]) -> Tensor:
        if name == "stay":
            return torch.zeros_like(pose)
        if name == "random":
            return torch.from_numpy(np.array([rng.uniform(-reach, reach) for rng in draws]))
        if name == "mean pose":
            return poses.remaining(model.pose_mean.cpu().double()).expand_as(pose)
        return poses.remaining(pose)

    return Control(answer)


# Many searches


def unseen_patients(
    runs: Sequence[str | Path], data: str | Path, count: int
) -> tuple[list[Person], str]:
    """Up to `count` patients that no run has seen, and the target plane.

    Of the phantom `data`: test patients of all runs. Without runs, or where `data` are recorded
    scans: new virtual patients, apical four-chamber plane. Raises ValueError where no patient is
    unseen by all runs.
    """
    card = Path(data) / "phantom.json"
    if not runs or not card.is_file():
        return [Person(f"virtual_{n:04d}", (1_000_000, n)) for n in range(count)], "a4c"
    arguments = json.loads(card.read_text())["arguments"]
    splits = [json.loads((Path(run) / "split.json").read_text()) for run in runs]
    tested = set.intersection(*(set(split["test"]) for split in splits))
    seen = {name for split in splits for part in ("train", "val") for name in split[part]}
    names = sorted(tested - seen)
    if not names:
        raise ValueError(f"runs: no patient of {data} is unseen by all of them")
    people = [Person(name, (arguments["seed"], int(name.rsplit("_", 1)[1]))) for name in names]
    return people[:count], arguments["target"]


def draw_starts(
    people: Sequence[Person], count: int, config: NavigationConfig, seed: int = 0
) -> list[Start]:
    """`count` starts shared out evenly among `people`, those of a person together."""
    if count < 1:
        raise ValueError(f"starts: at least one is needed, got {count}")
    starts = []
    for place, person in enumerate(people):
        for number in range(count // len(people) + (place < count % len(people))):
            rng = np.random.default_rng([seed, *person.seed, number])
            pose = draw_start(rng, config)
            starts.append(Start(person, number, pose, int(rng.integers(2**32))))
    return starts


def search(
    policies: Mapping[str, Follow | Control],
    starts: Sequence[Start],
    config: NavigationConfig,
    target: str = "a4c",
    size: int = 112,
) -> pd.DataFrame:
    """One row per step of every policy's search from every start, all steps being made.

    Columns: policy, patient, start, step (0 is the start), the six axes, translation (mm) and
    rotation (deg) to the plane, contact. All policies meet the same hearts and errors of the hand.
    """
    people = list(dict.fromkeys(start.person for start in starts))
    seeds, count = [start.seed for start in starts], len(policies)
    black = np.repeat([not each.sees for each in policies.values()], len(starts))
    probes = Probes(count * len(starts), people, target, size, config, black)
    patient = [people.index(start.person) for start in starts] * count
    pose = [start.pose for start in starts] * count
    frames, infos = probes.reset(seed=seeds * count, options={"patient": patient, "pose": pose})
    for each in policies.values():
        each.reset(seeds)
    record = [infos]
    for _ in range(config.steps):
        motions = []
        for k, each in enumerate(policies.values()):
            own = slice(k * len(starts), (k + 1) * len(starts))
            motions.append(each(frames[own], {name: v[own] for name, v in infos.items()}))
        frames, *_, infos = probes.step(torch.cat(motions))
        record.append(infos)

    names = [(start.person.name, start.number) for start in starts]
    rows = [(each, *name, k) for each in policies for name in names for k in range(len(record))]
    table = pd.DataFrame(rows, columns=["policy", "patient", "start", "step"])
    table[list(poses.AXES)] = np.stack([each["pose"] for each in record], 1).reshape(-1, 6)
    for name in ("translation", "rotation", "contact"):
        table[name] = np.stack([each[name] for each in record], 1).ravel()
    return table


def navigate(
    runs: Sequence[str | Path],
    starts: Sequence[Start],
    target: str,
    config: NavigationConfig,
    policies: Sequence[str] = POLICIES,
    plan: Mapping[str, int] | None = None,
    part: int = 12,
) -> pd.DataFrame:
    """Tables of `search` for every run and policy, with columns run, seed, variant and target.

    Controls do not depend on training and are those of the first run. Each run, policy and `part`
    starts are a file in the run's folder `navigation/`; a file of the same settings and weights is
    read and not made again. Parts run in threads. Raises ValueError for unknown policies.
    """
    if unknown := set(policies) - set(POLICIES):
        raise ValueError(f"policy {', '.join(sorted(unknown))} is unknown; {', '.join(POLICIES)}")
    files, jobs = {}, {}
    for run in map(Path, runs):
        model, training = load_run(run), load_config(run)[1]
        weights = hashlib.sha256(save(model.state_dict())).hexdigest()
        size, folder = model.config.image_size, run / "navigation"
        folder.mkdir(exist_ok=True)
        for name, at in product(policies, range(0, len(starts), part)):
            control = name in CONTROLS
            if (control and run != Path(runs[0])) or (name == "plan" and model.world is None):
                continue
            own, given = starts[at : at + part], dict(plan or {}) if name == "plan" else {}
            key = repr((VERSION, weights, name, target, size, config, own, given))
            digest = hashlib.sha256(key.encode()).hexdigest()[:12]
            file = folder / f"{name.replace(' ', '_')}-{digest}.csv"
            variant = "control" if control else model.config.token_type
            files[file] = {"run": run.name, "seed": training.seed, "variant": variant,
                           "policy": name, "target": target}  # fmt: skip
            if not file.is_file():
                jobs.setdefault((at, size), {})[file] = policy(name, model, config, **given)

    def work(job: tuple) -> None:
        (at, size), missing = job
        made = search(missing, starts[at : at + part], config, target, size)
        for file, table in made.groupby("policy", sort=False):
            write_whole(file, table.drop(columns="policy").round(4).to_csv(index=False).encode())

    with crew(torch.get_num_threads()) as pool:
        list(tqdm(pool.map(work, jobs.items()), "searches", len(jobs), unit="part"))
    tables = [pd.read_csv(file).assign(**names) for file, names in files.items()]
    return pd.concat(tables, ignore_index=True)


# Scores


def score(table: pd.DataFrame) -> pd.DataFrame:
    """One row per search of `navigate`.

    `reached_5`, `reached_10`: within that many mm and degrees after the last step; `passed_5`,
    `passed_10`: after any step; `steps_10`: steps until then (all, where it never was);
    `start_mm`, `start_deg`, `final_mm`, `final_deg`: error; `path_mm`, `path_deg`: travelled;
    `lost`: share of steps with less than half the probe's face on the skin.
    """
    keys = ["target", "variant", "policy", "run", "seed", "patient", "start"]
    count = table["step"].nunique()
    pose = torch.tensor(table[list(poses.AXES)].to_numpy(float)).unflatten(0, (-1, count))
    mm, deg, contact = (
        table[name].to_numpy().reshape(-1, count) for name in ("translation", "rotation", "contact")
    )
    path_mm, path_deg = (v.sum(1).numpy() for v in away(poses.relative(pose[:, :-1], pose[:, 1:])))
    scores = table[keys][::count].reset_index(drop=True)
    for limit in TOLERANCES:
        near = (mm <= limit) & (deg <= limit)
        scores[f"reached_{limit}"] = near[:, -1].astype(float)
        scores[f"passed_{limit}"] = near.any(1).astype(float)
    scores["steps_10"] = np.where(near.any(1), near.argmax(1), count - 1)
    return scores.assign(
        start_mm=mm[:, 0], start_deg=deg[:, 0], final_mm=mm[:, -1], final_deg=deg[:, -1],
        path_mm=path_mm, path_deg=path_deg, lost=(contact < 0.5).mean(1),
    )  # fmt: skip


def cells(scores: pd.DataFrame, variant: str, policy: str, measure: str = "reached_10"):
    """Means [seeds, patients] of a measure of `score`, for `stats.interval` and `stats.compare`;
    one value per patient for controls, which have no seeds."""
    own = scores[(scores["variant"] == variant) & (scores["policy"] == policy)]
    values = stats.matrix(own, measure)
    return values.iloc[0] if variant == "control" else values
