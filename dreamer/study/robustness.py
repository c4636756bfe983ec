"""Robustness: unseen virtual patients imaged as usual, and with one factor of variation changed.

Poses, phases and patients stay the same, so that a difference is due to the factor. Changes are
some three standard deviations of what training patients vary by (data/phantom.md). The
counterfactuals test for shortcuts: what remains without the heart may come from ribs, chest wall
and lung, which are honest cues; it must not change with another time-gain curve.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dreamer import phantom, poses
from dreamer.files import write_whole
from dreamer.model import CardiacDreamer
from dreamer.phantom import trajectories
from dreamer.phantom.generate import CODE
from dreamer.phantom.patient import REST
from dreamer.study.closed_loop import Person, in_parts
from dreamer.study.ground_truth import HEART
from dreamer.study.results import BASELINE

CURVE = {"time_gain": 1}
CHANGES = {  # condition -> `vary` and `without` of `phantom.render`, or a fixed `phase`
    "as usual": {},
    "gain -6 dB": {"vary": {"gain": -6}},
    "gain +6 dB": {"vary": {"gain": 6}},
    "dynamic range -8 dB": {"vary": {"dynamic_range": -8}},
    "dynamic range +8 dB": {"vary": {"dynamic_range": 8}},
    "another time-gain curve": {"vary": CURVE},
    "noise +10 dB": {"vary": {"noise": 10}},
    "depth -20 mm": {"vary": {"depth": -20}},
    "depth +20 mm": {"vary": {"depth": 20}},
    "rib shadow +4 mm": {"vary": {"rib_shadow": 4}},
    "4 mm of air": {"vary": {"contact": 4}},
    "end diastole": {"phase": 0.0},
    "end systole": {"phase": 0.36},
    "heart rate +30": {"vary": {"heart_rate": 30}},
    "dilated heart": {"vary": {"anatomy": "dilated"}},
    "hypertrophic heart": {"vary": {"anatomy": "hypertrophic"}},
    "small heart": {"vary": {"anatomy": "small"}},
    "no heart": {"without": HEART},
    "no heart, another time-gain curve": {"without": HEART, "vary": CURVE},
    "no ribs, no chest wall": {"without": ("ribs", "chest_wall")},
}


def plan(person: Person, frames: int, change: Mapping) -> tuple[phantom.Patient, Tensor, Tensor]:
    """A patient under a change, `frames` poses [F, 6] and phases [F]: half of a search, half drawn
    independently; poses do not depend on the change."""
    patient = phantom.Patient(person.seed, change.get("vary"))
    made = trajectories.plan([*person.seed, 1], frames, patient.heart_rate / REST)
    pose, phase = (torch.from_numpy(v[made.pairs[:, 0]]) for v in (made.pose, made.phase))
    return patient, pose, torch.full_like(phase, change["phase"]) if "phase" in change else phase


def render(
    people: Sequence[Person],
    change: Mapping,
    target: str,
    size: int,
    frames: int,
    cache: str | Path | None = None,
) -> Tensor:
    """Frames uint8 [people x frames, 1, S, S] under a change; kept in the folder `cache`.

    Raises ValueError for an unknown target, kind of change, factor or structure.
    """
    if unknown := set(change) - {"vary", "without", "phase"}:
        raise ValueError(f"change {', '.join(unknown)} is unknown; vary, without or phase")
    key = repr((CODE, list(people), change, target, size, frames))
    file = Path(cache or "", f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy")
    if cache and file.is_file():
        return torch.from_numpy(np.load(file))

    def work(person: Person) -> Tensor:
        patient, pose, phase = plan(person, frames, change)
        return phantom.render(patient, pose, phase, change.get("without"), target, size).image

    with phantom.crew(torch.get_num_threads()) as pool:
        images = torch.cat(list(pool.map(work, people)))[:, None]
    if cache:
        stream = io.BytesIO()
        np.save(stream, images.numpy())
        write_whole(file, stream.getvalue())
    return images


def measure(
    model: CardiacDreamer,
    people: Sequence[Person],
    target: str = "a4c",
    frames: int = 8,
    cache: str | Path | None = None,
    changes: Mapping[str, Mapping] = CHANGES,
) -> pd.DataFrame:
    """Single-frame errors under each of `changes`: measure (translation_mm, rotation_deg),
    condition, patient, value; and those of the mean pose of the training part.

    Args:
        people: unseen patients, with `frames` of each: half of a search, half of independent pairs.
        cache: folder in which frames are kept for other runs (5 MB a condition at 112 px, 50
            patients and 8 frames).

    Raises ValueError as `render` does.
    """
    device, size = model.pose_mean.device, model.config.image_size

    @torch.no_grad()
    def predict(image: Tensor) -> Tensor:
        return model(image.to(device), torch.zeros(len(image), 6, device=device)).pose.cpu()

    pose = torch.cat([plan(person, frames, {})[1] for person in people])
    guesses = {BASELINE: model.pose_mean.cpu().expand_as(pose)}
    for condition, change in changes.items():
        images = render(people, change, target, size, frames, cache)
        guesses[condition] = in_parts(predict, images)
    names = np.repeat([person.name for person in people], frames)
    tables = []
    for condition, guess in guesses.items():
        error = poses.errors(guess, pose)
        values = {"translation_mm": error.translation, "rotation_deg": error.rotation}
        table = pd.DataFrame(values).groupby(names).mean().rename_axis("patient").reset_index()
        tables.append(table.melt("patient", var_name="measure").assign(condition=condition))
    return pd.concat(tables)[["measure", "condition", "patient", "value"]].reset_index(drop=True)
