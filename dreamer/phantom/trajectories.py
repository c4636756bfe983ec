"""Where the probe goes: searches that end at the target plane, and independent perturbations.

The spread (mm and degrees) is that of a published real scan. The direction of a search gives its
goal away, so half of the transitions are pairs whose motion is drawn independently of the first
pose: the second pose is the first one composed with the motion.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dreamer import poses

SPREAD = np.array([4.0, 5.5, 3.0, 18.0, 6.0, 15.0])  # mm and degrees, standard deviations
SIDE = np.array([0.0, 0.0, 0.0, 7.0, 0.0, -4.0])  # where searches come from, as in that scan
STEP = np.array([2.2, 2.2, 2.2, 7.0, 4.0, 7.0])  # of an independent motion; no direction preferred
TICK = 1 / 26  # share of a mean heartbeat between two frames of the scanner
MOTIONS = ("search", "independent")


class Plan(NamedTuple):
    """F frames and T transitions of one patient: `pose` [F, 6] mm and degrees, `phase` [F] of the
    cycle, `number` [F] of each frame, `pairs` [T, 2] rows of frames, `motion` [T] one of MOTIONS.
    """

    pose: NDArray[np.float64]
    phase: NDArray[np.float64]
    number: NDArray[np.int64]
    pairs: NDArray[np.int64]
    motion: list[str]


def search(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """`count` poses [count, 6] of an operator's search, at uneven times, ending near the plane.

    Each axis is settled at its own pace, with hesitation that dies down towards the end.
    """
    start = np.clip(rng.standard_normal(6), -1.7, 1.7) * 1.75
    pace = rng.uniform(0.6, 1.5, 6)
    time = np.linspace(0, 1, count)[:, None] if count > 1 else np.ones((1, 1))
    left = (1 - time) ** pace
    speed, shift = rng.uniform(4, 14, (3, 6)), rng.uniform(0, 2 * np.pi, (3, 6))
    wander = np.sin(time[:, None] * speed + shift).sum(1) * 0.33
    wander = wander * (0.12 + 0.88 * np.sqrt(1 - time))
    return (start * left + wander) * SPREAD + SIDE * left


def independent(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """`count` pairs of poses [count, 2, 6] whose motion does not depend on where it starts."""
    start = np.clip(rng.standard_normal((count, 6)), -2.2, 2.2) * SPREAD + SIDE
    motion = np.clip(rng.standard_normal((count, 6)), -2.2, 2.2) * STEP
    end = poses.compose(torch.from_numpy(start), torch.from_numpy(motion)).numpy()
    return np.stack((start, end), 1)


def plan(seed: int | list[int], transitions: int, rate: float = 1.0) -> Plan:
    """All frames and transitions of a patient: the first half a search, the rest independent.

    `rate`: the heart rate as a multiple of the mean one.

    The frames of a search are shared, the second frame of a transition being the first of the
    next, and lie 1 to 3 ticks apart; an independent pair has two frames of its own. Poses are
    rounded to what the records hold, 1e-6.
    """
    rng = np.random.default_rng(seed)
    half = transitions // 2
    gaps = rng.integers(1, 4, transitions)
    walk = search(rng, half + 1) if half else np.zeros((0, 6))
    pairs = independent(rng, transitions - half)
    number = [np.concatenate(([0], np.cumsum(gaps[:half])))] if half else []
    first = int(number[0][-1]) + 5 if half else 0
    begin = first + 8 * np.arange(transitions - half)
    number.append(np.stack((begin, begin + gaps[half:]), 1).ravel())
    number = np.concatenate(number)
    phase = rng.random() + number * (TICK * rate)
    phase[len(walk) :] += np.repeat(rng.random(transitions - half), 2)
    pose = np.concatenate((walk, pairs.reshape(-1, 6))).round(6)
    rows = [(i, i + 1) for i in range(half)]
    rows += [(len(walk) + 2 * i, len(walk) + 2 * i + 1) for i in range(transitions - half)]
    motion = [MOTIONS[0]] * half + [MOTIONS[1]] * (transitions - half)
    return Plan(pose, np.mod(phase, 1).round(6), number, np.array(rows), motion)
