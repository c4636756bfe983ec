"""The four planes over the cycle, and the structures of each, for the phantom's data card.

    python benchmarks/phantom_gallery.py data/phantom.png [seed]

Frames carry depth ticks every 5 cm, the marker of the probe's orientation and the phase.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch

from dreamer.phantom import LABEL, TARGETS, Patient, render
from dreamer.phantom.sector import probe_to_pixel

PHASES = {"end diastole": 0.0, "mid-systole": 0.18, "end systole": 0.36, "filling": 0.46}
NAMED = {
    "left_ventricle": "LV", "right_ventricle": "RV", "left_atrium": "LA", "right_atrium": "RA",
    "aorta": "Ao", "pulmonary_artery": "PA", "descending_aorta": "DAo", "septum": "IVS",
    "mitral_valve": "MV", "tricuspid_valve": "TV", "aortic_valve": "AV", "pulmonary_valve": "PV",
    "interatrial_septum": "IAS", "papillary_muscles": "PM", "lung": "lung", "liver": "liver",
}  # fmt: skip
SIZE = 224


def show(ax, image, title: str, depth: float) -> None:
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    for centimetres in range(5, round(depth / 10), 5):
        row, _ = probe_to_pixel(0.0, centimetres * 10.0, SIZE, depth)
        ax.plot([SIZE - 7, SIZE - 1], [row, row], color="0.6", lw=1)
    ax.plot(SIZE // 2 + 12, 6, "o", color="tab:green", ms=4)  # the image's right
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def structures(ax, label, visible) -> None:
    """Structures in colour, shadowed parts dimmed, the larger ones named."""
    colour = plt.get_cmap("tab20")(label % 20)[..., :3] * np.where(visible, 1.0, 0.4)[..., None]
    ax.imshow(np.where((label > 0)[..., None], colour, 0))
    for name, short in NAMED.items():
        rows, columns = np.nonzero((label == LABEL[name]) & visible)
        if len(rows) > 40:
            middle = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
            ax.text(
                columns[middle],
                rows[middle],
                short,
                fontsize=7,
                ha="center",
                va="center",
                color="white",
                bbox={"boxstyle": "round,pad=0.1", "fc": "black", "lw": 0},
            )
    ax.set_title("structures, end diastole", fontsize=9)
    ax.axis("off")


if __name__ == "__main__":
    patient = Patient((24, int(sys.argv[2]) if len(sys.argv) > 2 else 0))
    phases = torch.tensor(list(PHASES.values()), dtype=torch.float64)
    fig, axes = plt.subplots(len(TARGETS), len(PHASES) + 1, figsize=(11.5, 9.6))
    for row, (target, title) in zip(axes, TARGETS.items(), strict=True):
        frames = render(patient, torch.zeros(len(phases), 6), phases, target=target, size=SIZE)
        for ax, image, phase in zip(row, frames.image, PHASES, strict=False):
            first = ax is row[0]
            show(ax, image.numpy(), f"{title}\n{phase}" if first else phase, patient.depth)
        structures(row[-1], frames.label[0].numpy(), frames.visible[0].numpy())
    fig.tight_layout()
    fig.savefig(sys.argv[1], dpi=90)
