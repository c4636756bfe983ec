"""The closed loop as a Gymnasium environment (Towers et al., arXiv:2407.17032).

import dreamer.study.closed_loop
env = gymnasium.make("dreamer/Probe-v0", size=112)
env = gymnasium.make_vec("dreamer/Probe-v0", num_envs=8)
"""

from collections.abc import Mapping, Sequence

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray

from dreamer.phantom.render import check
from dreamer.study.closed_loop import (
    NavigationConfig,
    Person,
    Probes,
    Start,
    away,
    draw_start,
)


class ProbeEnv(gymnasium.Env):
    """One probe on a virtual patient.

    An observation is a frame, uint8 [1, S, S]; an action is a motion [6] in the probe's own frame,
    mm and degrees, which the hand shortens to its limits and carries out with an error. No motion
    (zero) terminates the episode, which is truncated after `config.steps`.
    The reward is the decrease of max(mm, degrees) to the target plane. Infos: pose [6], phase of
    the heart, translation and rotation (mm and degrees to the plane), patient (its name).

    Args:
        people: virtual patients to choose from.
        target, size: the plane; pixels of a frame.
        config: a NavigationConfig or its fields.

    Raises ValueError on bad arguments.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012, as Gymnasium has it

    def __init__(
        self,
        people: Sequence[Person] = (Person("virtual_0000", (1_000_000, 0)),),
        target: str = "a4c",
        size: int = 112,
        config: NavigationConfig | Mapping | None = None,
        render_mode: str | None = None,
    ):
        check(target, size)
        if not people:
            raise ValueError("people: at least one is needed")
        self.people, self.target, self.size = list(people), target, size
        self.config = NavigationConfig.model_validate(config or {})
        self.render_mode, self.probes = render_mode, None
        reach = np.repeat([self.config.limit_mm, self.config.limit_deg], 3).astype(np.float32)
        self.action_space = Box(-reach, reach)
        self.observation_space = Box(0, 255, (1, size, size), np.uint8)

    def reset(self, *, seed: int | None = None, options: Mapping | None = None):
        """Frame and infos of a new episode; `options`: `start`, a Start, drawn if absent."""
        super().reset(seed=seed)
        options = dict(options or {})
        start = options.pop("start", None)
        if options:
            raise ValueError(f"options: unknown {', '.join(options)}; start")
        if start is None:
            person = self.people[self.np_random.integers(len(self.people))]
            pose = draw_start(self.np_random, self.config)
            start = Start(person, pose, int(self.np_random.integers(2**32)))
        self.person = start.person
        self.probes = Probes([start], self.target, self.size, self.config)
        return self._look()

    def step(self, action: ArrayLike):
        """Frame, reward, terminated, truncated and infos after a motion [6]."""
        if self.probes is None or self.probes.count >= self.config.steps:
            raise gymnasium.error.ResetNeeded("reset the environment before this step")
        motion, before = torch.from_numpy(np.array(action, float))[None], self.left
        terminated = not motion.any()
        if not terminated:
            self.probes.move(motion, [0])
        frame, info = self._look()
        return frame, before - self.left, terminated, self.probes.count >= self.config.steps, info

    def _look(self) -> tuple[NDArray[np.uint8], dict]:
        mm, deg = (float(value) for value in away(self.probes.pose[0]))
        phase = float(self.probes.seen()[1][0])
        self.left, self.frame = max(mm, deg), self.probes.frames([0])[0].numpy()
        info = {"pose": self.probes.pose[0].numpy().copy(), "phase": phase, "translation": mm}
        return self.frame, info | {"rotation": deg, "patient": self.person.name}

    def render(self) -> NDArray[np.uint8]:
        """The frame [S, S, 3], grey."""
        return np.repeat(self.frame[0][..., None], 3, axis=-1)
