"""A probe to move by hand: the frame, and both variants' predictions, guidance and maps.

Sliders and buttons are in notebook 09. Only what changed is computed again.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from captum.attr import IntegratedGradients
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dreamer import attribution, poses
from dreamer.phantom import Patient, render
from dreamer.plots import LABELS
from dreamer.runs import load_run
from dreamer.study import closed_loop

REACH = torch.tensor([40, 40, 20, 60, 45, 90])  # of the pose, mm and degrees
# What a hand does for a positive and for a negative number, in the probe's frame. Right is the
# frame's right, away from you is into the frame; rotations are seen from behind the probe.
WORDS = {
    "x": ("slide {:.0f} mm right", "slide {:.0f} mm left"),
    "y": ("slide {:.0f} mm towards you", "slide {:.0f} mm away from you"),
    "z": ("press {:.0f} mm", "ease {:.0f} mm"),
    "roll": ("fan {:.0f}° away from you", "fan {:.0f}° towards you"),
    "pitch": ("rock {:.0f}° right", "rock {:.0f}° left"),
    "yaw": ("rotate {:.0f}° clockwise", "rotate {:.0f}° anticlockwise"),
}


def in_words(motion: Tensor) -> str:
    """A motion [6] (mm, degrees) in a sonographer's words: "hold" under 1 mm and 2 degrees."""
    named = dict(zip(poses.AXES, motion.tolist(), strict=True))
    large = {axis: v for axis, v in named.items() if abs(v) >= (1 if axis in "xyz" else 2)}
    words = [WORDS[axis][v < 0].format(abs(v)) for axis, v in large.items()]
    return ", ".join(words) or "hold: this is the plane"


def paint(frame: NDArray[np.uint8], grid: NDArray | None = None, side: int = 300) -> bytes:
    """PNG of a frame [S, S], a map [h, w] over it: red above zero, blue below, opaque by size."""
    page = Image.fromarray(frame).resize((side, side)).convert("RGB")
    if grid is not None:
        grid = grid - max(grid.min(), 0)
        opacity = 127 * np.abs(grid) / max(np.abs(grid).max(), 1e-9)
        colour = np.where(grid[..., None] > 0, (213, 94, 0), (0, 114, 178))
        over, mask = (Image.fromarray(np.uint8(values)) for values in (colour, opacity))
        nearest = ((side, side), Image.Resampling.NEAREST)
        page.paste(over.resize(*nearest), mask=mask.resize(*nearest))
    stream = io.BytesIO()
    page.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


class Explorer:
    """A probe at `pose` [6] (mm, degrees from the plane) over one of `people` new virtual patients.

    `runs`: the last of each variant is used; those that do not exist are in `missing`. `data`: what
    they were trained on. Raises ValueError where runs differ in the size of frames.
    """

    def __init__(self, runs: Sequence[str], data: str, people: int = 24, seed: int = 0):
        existing = [run for run in runs if Path(run, "model.safetensors").is_file()]
        self.missing = [run for run in runs if run not in existing]
        self.models = {model.config.token_type: model for model in map(load_run, existing)}
        sizes = {model.config.image_size for model in self.models.values()} or {112}
        if len(sizes) > 1:
            raise ValueError(f"runs: frames of {sorted(sizes)} pixels; choose runs of one size")
        self.people, self.trained_plane = closed_loop.unseen_patients(data, people)
        self.config, self.size = closed_loop.NavigationConfig(), sizes.pop()
        self.seed, self.starts = seed, 0
        cached = map(lru_cache(64), (self._frame, self._predict, self._map))
        self.frame, self.predict, self.map = cached
        self.new_patient(0, self.trained_plane)

    def _frame(self, number: int, target: str, pose: tuple, phase: float) -> NDArray[np.uint8]:
        patient, at = Patient(self.people[number].seed), torch.tensor(pose, dtype=torch.float64)
        return render(patient, at, phase, target=target, size=self.size).image.numpy()

    @torch.no_grad()
    def _predict(self, variant: str, view: tuple) -> tuple[Tensor, Tensor]:
        """Feature map [1, C, h, w] and predicted pose [6] of a view."""
        features = self.models[variant].encode(torch.from_numpy(self.frame(*view))[None, None])
        return features, self.models[variant].imagine(features, torch.zeros(1, 6)).pose[0].double()

    def _map(self, variant: str, view: tuple, kind: str) -> NDArray | None:
        """Map [h, w] of `kind`: none, attention (rollout) or attribution (of the rotation)."""
        model, (features, _) = self.models[variant], self.predict(variant, view)
        if kind == "none" or model.world is None:
            return None
        if kind == "attention":
            return attribution.attention_grid(model, features)[0].numpy()
        method = IntegratedGradients(attribution.Head(model, ["rotation"]))
        # Three steps follow the sliders: correlation with 64 steps 0.97 (patch), 0.99 (channel).
        return method.attribute(features, n_steps=3).sum(1)[0].detach().numpy()

    @property
    def view(self) -> tuple:
        """What a frame depends on: patient, plane, pose, phase of the heart."""
        return self.number, self.target, tuple(self.pose.tolist()), self.phase

    def new_patient(self, number: int, target: str) -> None:
        """Begin anew on one of `people`, at the next start."""
        self.number, self.target = number % len(self.people), target
        self.phase, self.policy = 0.0, None
        rng = np.random.default_rng([self.seed, self.number, self.starts])
        self.starts += 1
        self.move(torch.from_numpy(closed_loop.draw_start(rng, self.config)))

    def move(self, pose: Tensor) -> None:
        """Set the pose [6], to 0.5 mm and degrees."""
        self.pose = ((2 * pose).round() / 2).clamp(-REACH, REACH)

    def step(self, variant: str) -> Tensor:
        """Make one guided step, averaged over the last frames; the motion [6] that was made."""
        if self.policy is None or self.policy.model is not self.models[variant]:
            self.policy = closed_loop.policy("filter", self.models[variant], self.config)
            self.moved = None
        frame, before = torch.from_numpy(self.frame(*self.view))[None, None], self.pose
        motion = closed_loop.limited(self.policy(frame, moved=self.moved)[0], self.config)
        self.phase = round((self.phase + 0.55) % 1, 6)  # half a second at 66 beats a minute
        self.move(poses.compose(self.pose, motion))
        self.moved = poses.relative(before, self.pose)[None]
        return motion

    def go(self, variant: str) -> int:
        """Steps made until less than 1 mm and 2 degrees are asked for, 20 at most."""
        for count in range(1, self.config.steps + 1):
            if in_words(self.step(variant)).startswith("hold") and count > 4:
                break
        return count

    def error(self) -> str:
        """How far the probe is from the plane."""
        mm, deg = closed_loop.away(self.pose)
        return f"error: {mm:.1f} mm, {deg:.1f} degrees"

    def images(self, kind: str) -> dict[str, tuple[bytes, str]]:
        """PNG and text of the frame with the true guidance, then of each variant with its map."""
        frame, way = self.frame(*self.view), in_words(poses.remaining(self.pose))
        images = {"frame": (paint(frame), f"<b>true</b>: {self.error()}<br>{way}")}
        for variant in self.models:
            _, pose = self.predict(variant, self.view)
            off, way = poses.errors(pose, self.pose), in_words(poses.remaining(pose))
            text = f"off by {off.translation:.1f} mm, {off.rotation:.1f} degrees<br>{way}"
            image = paint(frame, self.map(variant, self.view, kind))
            images[variant] = (image, f"<b>{LABELS[variant]}</b>: {text}")
        return images
