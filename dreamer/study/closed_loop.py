"""Closed loop: the model guides a probe over a virtual patient, step by step, to the plane.

A published score is that of a single prediction on a recorded frame; here the hand follows, the
heart beats, the patient breathes, and what counts is where the probe ends. Nobody tells a policy
that it has arrived: it is scored where it stands after the last step.

- Interface: Gymnasium (Towers et al., arXiv:2407.17032).
- Planning: cross-entropy method (Rubinstein, Methodol Comput Appl Probab 1999;1:127).
- Breathing: at rest most of the time, sin^4 (Lujan et al., Med Phys 1999;26:715, equation 1).
- Limits of a hand, its noise and the depth of breathing are our choice. Breathing shifts the whole
  patient, chest wall included: the renderer knows no heart that slides behind the ribs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
import roma
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from dreamer import poses
from dreamer.model import CardiacDreamer
from dreamer.phantom import Patient, alone, render, trajectories
from dreamer.phantom.render import check

TOLERANCES = (5.0, 10.0)  # mm, and degrees
FACE, STANDOFF = 9.0, 5.7  # mm: half the probe's face; a gap that the gel no longer fills
EDGE = torch.tensor([60.0, 60, 60, 179, 89, 179], dtype=torch.float64)  # of the workspace
CAUDAL = torch.tensor([0.0, 0.6, -0.8], dtype=torch.float64)  # in the heart frame


class NavigationConfig(BaseModel):
    """The hand and the patient, per step. Unknown fields and values out of range are refused.

    `limit_mm`, `limit_deg`: how far a hand goes in one of `steps`; `hand_mm`, `hand_deg`: standard
    deviation of its error, per axis. `breath_mm` deep, every `breath_seconds`; `seconds` a step.
    Starts are drawn as an operator's are, `spread` times as wide, at most `farthest_mm` and
    `farthest_deg` away and not within `nearest_mm` and `nearest_deg` at once.
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

    @model_validator(mode="after")
    def _has_room(self):
        if self.nearest_mm >= self.farthest_mm or self.nearest_deg >= self.farthest_deg:
            raise ValueError("nearest must be less than farthest, in mm and in degrees")
        return self


class Person(NamedTuple):
    """A virtual patient: a name for the tables and the seed of `dreamer.phantom.Patient`."""

    name: str
    seed: tuple[int, ...]


def _angle(matrix: Tensor) -> Tensor:
    trace = matrix[..., 0, 0] + matrix[..., 1, 1] + matrix[..., 2, 2]
    return torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1)))


def away(pose: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [...] in mm and angle [...] in degrees from poses [..., 6] to the target plane."""
    return pose[..., :3].norm(dim=-1), _angle(poses.to_matrix(pose.double()))


def _cut(matrix: Tensor, mm: float, deg: float) -> Tensor:
    way, angle = matrix[..., :3, 3].norm(dim=-1), _angle(matrix)
    if (way <= mm + 1e-9).all() and (angle <= deg + 1e-6).all():
        return matrix
    share = (deg / angle.clamp_min(1e-9)).clamp(max=1)[..., None]
    cut = matrix.clone()
    cut[..., :3, :3] = roma.rotvec_to_rotmat(roma.rotmat_to_rotvec(matrix[..., :3, :3]) * share)
    cut[..., :3, 3] *= (mm / way.clamp_min(1e-9)).clamp(max=1)[..., None]
    return cut


def limited(motion: Tensor, mm: float, deg: float) -> Tensor:
    """Motions [..., 6] cut to at most `mm` and `deg`; direction and axis of the turn stay."""
    return poses.from_matrix(_cut(poses.to_matrix(motion.double()), mm, deg))


def draw_start(rng: np.random.Generator, config: NavigationConfig) -> NDArray[np.float64]:
    """A starting pose [6], mm and degrees, as `NavigationConfig` says where starts lie.

    Raises ValueError where the spread all but never falls between nearest and farthest.
    """
    for _ in range(2000):
        z = np.clip(rng.standard_normal(6), -2.2, 2.2)
        pose = (z * trajectories.SPREAD + trajectories.SIDE) * config.spread
        mm, deg = (float(v) for v in away(torch.from_numpy(pose)))
        near = mm <= config.nearest_mm and deg <= config.nearest_deg
        if mm <= config.farthest_mm and deg <= config.farthest_deg and not near:
            return pose
    raise ValueError(f"spread {config.spread}: no start lies between nearest and farthest")


class Probes:
    """B probes at `pose` [B, 6] (float64, mm, degrees), each on its own or a shared patient.

    `draws`: a generator for each, from which first its heart's and breath's phase comes, then the
    error of the hand, so that what happens to a probe does not depend on the others.
    """

    def __init__(self, patients: Sequence[Patient], pose: Tensor,
                 draws: Sequence[np.random.Generator], config: NavigationConfig,
                 target: str = "a4c", size: int = 112):  # fmt: skip
        check(target, size)
        if not len(patients) == len(pose) == len(draws) or pose.shape[1:] != (6,):
            raise ValueError(f"{len(patients)} patients, {len(draws)} draws, pose {pose.shape}")
        if not pose.isfinite().all():
            raise ValueError(f"pose must be finite, got {pose.tolist()}")
        self.patients, self.draws, self.config = list(patients), list(draws), config
        self.target, self.size, self.time = target, size, 0.0
        self.pose = pose.detach().double().clamp(-EDGE, EDGE)
        self.phase0 = torch.from_numpy(np.array([rng.random(2) for rng in draws]))
        # A heart that moves caudally is one over which the probe has moved cranially.
        self.sway = torch.stack([-p.place(target)[:3, :3].T @ CAUDAL for p in patients])
        self.matrix = poses.to_matrix(self.pose)

    @property
    def phase(self) -> Tensor:
        """Where in its cycle each heart is [B], in [0, 1)."""
        beats = self.time * self.config.beats_per_minute / 60
        return torch.remainder(self.phase0[:, 0] + beats, 1.0)

    def seen(self) -> Tensor:
        """Poses [B, 6] over the hearts as breathing has shifted them; `pose` is that at rest."""
        breath = self.time / self.config.breath_seconds + self.phase0[:, 1]
        depth = self.config.breath_mm * torch.sin(np.pi * breath) ** 4
        return torch.cat((self.pose[:, :3] + self.sway * depth[:, None], self.pose[:, 3:]), 1)

    def frames(self, wanted: Tensor | None = None) -> Tensor:
        """What the probes show, uint8 [B, 1, S, S]; black where not `wanted` (bool [B], all).

        Probes on one patient are drawn together.
        """
        image = torch.zeros(len(self.pose), 1, self.size, self.size, dtype=torch.uint8)
        seen, phase = self.seen(), self.phase
        owner = np.array([id(patient) for patient in self.patients])
        owner = owner if wanted is None else np.where(wanted, owner, 0)
        for own in set(owner) - {0}:
            rows = torch.from_numpy(np.flatnonzero(owner == own))
            image[rows, 0] = render(self.patients[int(rows[0])], seen[rows], phase[rows],
                                    target=self.target, size=self.size).image  # fmt: skip
        return image

    def away(self) -> tuple[Tensor, Tensor]:
        """Distance [B] in mm and angle [B] in degrees to the plane."""
        return self.matrix[:, :3, 3].norm(dim=-1), _angle(self.matrix)

    def contact(self) -> Tensor:
        """The share [B] of each probe's face that touches the skin."""
        face = torch.linspace(-FACE, FACE, 19, dtype=torch.float64)
        points = self.matrix[:, :3, 3:] + self.matrix[:, :3, :1] * face  # [B, 3, 19]
        skin = [p.skin(x, y) for p, (x, y, _) in zip(self.patients, points, strict=True)]
        return (torch.stack(skin) - points[:, 2] < STANDOFF).double().mean(1)

    def move(self, motion: Tensor) -> None:
        """One step: motions [B, 6] in the probes' frames, as far and as well as a hand makes them.

        Raises ValueError on motions that are not finite or of another shape.
        """
        config, motion = self.config, motion.double()
        if motion.shape != self.pose.shape or not motion.isfinite().all():
            raise ValueError(f"motions must be finite, {list(self.pose.shape)}; got {motion}")
        noise = torch.from_numpy(np.array([rng.standard_normal(6) for rng in self.draws]))
        slip = torch.eye(4, dtype=torch.float64).repeat(len(noise), 1, 1)
        slip[:, :3, :3] = roma.rotvec_to_rotmat(torch.deg2rad(noise[:, 3:] * config.hand_deg))
        slip[:, :3, 3] = noise[:, :3] * config.hand_mm
        made = _cut(poses.to_matrix(motion), config.limit_mm, config.limit_deg) @ slip
        self.matrix = self.matrix @ made
        self.pose = poses.from_matrix(self.matrix)
        if (self.pose.abs() > EDGE).any():
            self.pose = self.pose.clamp(-EDGE, EDGE)
            self.matrix = poses.to_matrix(self.pose)
        self.time += config.seconds


class ProbeEnv(gymnasium.Env):
    """One probe on a virtual patient, as Gymnasium has it.

    Observation: the frame, uint8 [1, S, S]. Action: a motion [6] in the probe's frame, mm and
    degrees. Reward: by how much the larger of mm / 5 and degrees / 5 to the plane fell.
    `reset(seed, options)` takes `patient` (a number in `people`) and `pose` [6], else draws both.
    Info: pose, seen (mm, deg), phase, contact, translation, rotation, patient. Terminated within
    5 mm and 5 degrees, truncated after `config.steps`. ValueError on bad arguments.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012, as Gymnasium has it

    def __init__(self, people: Sequence[Person] = (Person("virtual_0", (1_000_000, 0)),),
                 target: str = "a4c", size: int = 112, config: NavigationConfig | None = None,
                 render_mode: str | None = None):  # fmt: skip
        check(target, size)
        if not people:
            raise ValueError("people: at least one is needed")
        self.people, self.target, self.size = list(people), target, size
        self.config, self.render_mode = config or NavigationConfig(), render_mode
        reach = [self.config.limit_mm] * 3 + [self.config.limit_deg] * 3
        bound = np.array(reach, dtype=np.float32)
        self.action_space = gymnasium.spaces.Box(-bound, bound)
        self.observation_space = gymnasium.spaces.Box(0, 255, (1, size, size), np.uint8)
        self.probe: Probes | None = None
        self._patients: dict[int, Patient] = {}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - {"patient", "pose"}:
            raise ValueError(f"options: unknown {', '.join(sorted(unknown))}; patient or pose")
        number = options.get("patient", int(self.np_random.integers(len(self.people))))
        if number not in range(len(self.people)):
            raise ValueError(f"patient: 0 to {len(self.people) - 1}, got {number!r}")
        pose = options.get("pose")
        pose = np.asarray(draw_start(self.np_random, self.config) if pose is None else pose, float)
        if number not in self._patients:
            self._patients[number] = Patient(self.people[number].seed)
        self.number, self.count = number, 0
        self.probe = Probes([self._patients[number]], torch.from_numpy(pose.reshape(1, -1)),
                            [self.np_random], self.config, self.target, self.size)  # fmt: skip
        return self._look()

    def step(self, action: NDArray):
        if self.probe is None:
            raise gymnasium.error.ResetNeeded("reset the environment before its first step")
        before = self.left
        self.probe.move(torch.as_tensor(np.asarray(action, float)).reshape(1, -1))
        self.count += 1
        image, info = self._look()
        return image, before - self.left, self.left <= 1, self.count >= self.config.steps, info

    def render(self) -> NDArray[np.uint8]:
        """The frame [S, S, 3], grey."""
        return np.repeat(self.image[0][..., None], 3, axis=-1)

    def _look(self) -> tuple[NDArray, dict]:
        with alone():
            self.image = self.probe.frames()[0].numpy()
        mm, deg = (float(value) for value in self.probe.away())
        self.left = max(mm, deg) / TOLERANCES[0]
        return self.image, {
            "pose": self.probe.pose[0].numpy().copy(), "seen": self.probe.seen()[0].numpy(),
            "phase": float(self.probe.phase[0]), "contact": float(self.probe.contact()[0]),
            "translation": mm, "rotation": deg, "patient": self.number,
        }  # fmt: skip


gymnasium.register("dreamer/Probe-v0", "dreamer.study.closed_loop:ProbeEnv")


# Policies: called with frames [B, 1, S, S] (None unless `sees`) and true poses [B, 6], which only
# the oracle reads; they answer motions [B, 6]. `reset(draws)` begins B new searches.


class Blind:
    """A control without sight: `answer(pose, draws)` gives the motions, whatever the picture."""

    sees = False

    def __init__(self, answer: Callable[[Tensor, Sequence[np.random.Generator]], Tensor]):
        self.answer = answer

    def reset(self, draws: Sequence[np.random.Generator]) -> None:
        self.draws = draws

    def __call__(self, image: Tensor | None, pose: Tensor) -> Tensor:
        return self.answer(pose, self.draws)


class Follow:
    """Follow the guidance: the motion from the single-frame prediction to the plane.

    With `window` over 1, predictions of the last frames, each carried on by the motions asked for
    since, are averaged first (rotations by the nearest to their mean matrix).
    """

    sees = True

    def __init__(self, model: CardiacDreamer, config: NavigationConfig, window: int = 1):
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.model, self.config, self.window = model, config, window

    def reset(self, draws: Sequence[np.random.Generator]) -> None:
        self.past: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, image: Tensor, pose: Tensor | None = None) -> Tensor:
        features = self.model.encode(image.float() / 255)
        said = self.imagine(features, torch.zeros(len(image), 1, 6))[:, 0]
        self.past = [*self.past, poses.to_matrix(said)][-self.window :]
        mean = torch.stack(self.past).mean(0)
        mean[:, :3, :3] = roma.special_procrustes(mean[:, :3, :3])
        self.estimate = poses.from_matrix(mean)
        ask = self.limited(self.choose(features, poses.remaining(self.estimate)))
        step = poses.to_matrix(ask)
        self.past = [matrix @ step for matrix in self.past]
        return ask

    def imagine(self, features: Tensor, motion: Tensor) -> Tensor:
        """Poses [B, N, 6] that the model sees after motions [B, N, 6] from maps [B, C, h, w]."""
        rows = features.repeat_interleave(motion.shape[1], 0)
        said = self.model.imagine(rows, motion.flatten(0, 1).float()).pose
        return said.double().view(motion.shape)

    def limited(self, motion: Tensor) -> Tensor:
        return limited(motion, self.config.limit_mm, self.config.limit_deg)

    def choose(self, features: Tensor, guided: Tensor) -> Tensor:
        """The motion [B, 6] to ask for, `guided` being the one to the plane."""
        return guided


class Plan(Follow):
    """Plan one step with the world model: the motion whose imagined view is nearest the plane.

    Cross-entropy method about the guided step, within half the spread of the motions that the world
    model was trained on: `rounds` of `candidates`, a normal distribution fitted to the `elites` of
    least cost, whose mean is made (the best alone would be the luckiest). Cost: how far (mm and
    degrees over a hand's limits, squared) the imagined pose lies from the plane, and from where the
    motion leads by geometry: imagination is trusted as far as the two agree. Every probe sees the
    same draws. ValueError for a model without a world model.
    """

    def __init__(self, model: CardiacDreamer, config: NavigationConfig, candidates: int = 8,
                 elites: int = 3, rounds: int = 2, window: int = 1, seed: int = 0):  # fmt: skip
        super().__init__(model, config, window)
        if model.world is None:
            raise ValueError("token_type none has no world model to plan with")
        if not 1 < elites <= candidates or rounds < 1:
            raise ValueError(f"1 < elites <= candidates, rounds >= 1; got {elites}, {candidates}")
        self.candidates, self.elites, self.rounds, self.seed = candidates, elites, rounds, seed

    def reset(self, draws: Sequence[np.random.Generator]) -> None:
        super().reset(draws)
        self.generator = torch.Generator().manual_seed(self.seed)

    def cost(self, pose: Tensor) -> Tensor:
        mm, deg = away(pose)
        return (mm / self.config.limit_mm) ** 2 + (deg / self.config.limit_deg) ** 2

    def choose(self, features: Tensor, guided: Tensor) -> Tensor:
        mean = self.limited(guided)[:, None]
        spread = torch.from_numpy(trajectories.STEP / 2)
        for _ in range(self.rounds):
            draw = torch.randn(self.candidates, 6, generator=self.generator, dtype=torch.float64)
            tried = self.limited(mean + spread * draw)
            imagined = self.imagine(features, tried)
            led = poses.compose(self.estimate[:, None].expand_as(tried), tried)
            cost = self.cost(imagined) + self.cost(poses.relative(led, imagined))
            order = cost.argsort(1)[:, : self.elites, None].expand(-1, -1, 6)
            chosen = tried.gather(1, order)
            mean, spread = chosen.mean(1, keepdim=True), chosen.std(1, keepdim=True)
        return mean[:, 0]
