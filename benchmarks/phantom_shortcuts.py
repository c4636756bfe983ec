"""What a trained model reads from frames whose heart has been removed.

    python benchmarks/phantom_shortcuts.py RUN [RUN ...] [--patients 24] [--target a4c]

Unseen virtual patients are imaged four times at the same poses: whole, whole with another
time-gain curve, without the heart (chambers, walls, valves), and without the heart with another
curve. The table gives mean errors relative to the mean-pose baseline (1: nothing is read from the
frame). What remains without the heart may come from ribs, chest wall and lung, which are honest
cues; it must not change when the time-gain curve is drawn anew.
"""

import argparse

import pandas as pd
import torch
from torch import Tensor

from dreamer import load_run, poses
from dreamer.phantom import STRUCTURES, Patient, render, trajectories

CHEST = ("mediastinum", "lung", "liver", "chest_wall", "ribs")
HEART = tuple(name for name in STRUCTURES if name not in CHEST)
SEED = 9021  # of patients in no training set
CURVE = {"time_gain": 1}
FRAMES = {
    "whole": {},
    "whole, other time gain": {"vary": CURVE},
    "no heart": {"without": HEART},
    "no heart, other time gain": {"without": HEART, "vary": CURVE},
}


@torch.inference_mode()
def predict(model, images: Tensor) -> Tensor:
    """Poses [N, 6] predicted from single frames uint8 [N, S, S], without motion."""
    still = torch.zeros(len(images), 6)
    return model.imagine(model.encode(images[:, None]), still).pose.double()


def measure(runs: list[str], count: int, target: str) -> pd.DataFrame:
    """Mean errors (mm, degrees) by run, kind of frame and patient, and those of the mean pose."""
    models = {run: load_run(run).eval() for run in runs}
    rows = []
    for number in range(count):
        patient = Patient((SEED, number))
        plan = trajectories.plan([SEED, number, 1], 16)
        pose, phase = torch.from_numpy(plan.pose), torch.from_numpy(plan.phase)
        for kind, change in FRAMES.items():
            for run, model in models.items():
                size = model.config.image_size
                images = render(patient, pose, phase, target=target, size=size, **change).image
                mean = model.pose_mean.double().cpu().expand_as(pose)
                for name, guess in ((kind, predict(model, images)), ("mean pose", mean)):
                    error = poses.errors(guess, pose)
                    mm, degrees = float(error.translation.mean()), float(error.rotation.mean())
                    rows.append((run, name, number, mm, degrees))
    table = pd.DataFrame(rows, columns=["run", "frames", "patient", "translation", "rotation"])
    return table.groupby(["run", "frames", "patient"], sort=False).mean().reset_index()


def relative(table: pd.DataFrame) -> pd.DataFrame:
    """Each kind's mean error over that of the mean-pose baseline, by run."""
    means = table.groupby(["run", "frames"], sort=False)[["translation", "rotation"]].mean()
    return means / means.xs("mean pose", level="frames")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--patients", type=int, default=24)
    parser.add_argument("--target", default="a4c")
    given = parser.parse_args()
    result = relative(measure(given.runs, given.patients, given.target))
    print(result.round(3).to_string())
    print(result.groupby("frames", sort=False).mean().round(3).to_string())
