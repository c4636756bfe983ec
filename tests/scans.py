"""Made scans in the published layout, and a model for them, small enough for a test."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dreamer import poses

TINY = {  # fields of ModelConfig
    "backbone": "compact", "image_size": 32, "channels": 16, "width": 4, "d_model": 16,
    "num_heads": 2, "num_layers": 1, "guidance": [32, 16],
}  # fmt: skip


def write_scan(folder: Path, name: str, count=12, size=32, seed=0, convention="difference") -> Path:
    """A chain of `count` transitions; a frame's brightness rises with x and its slope with roll."""
    import torch

    draw = np.random.default_rng(seed)
    scan = folder / name
    start = draw.normal(size=6) * 5
    start[3:] += np.where(start[3:] < 0, -8, 8)  # so that no scan looks as if it were in radians
    pose = np.cumsum(draw.normal(size=(count + 1, 6)), axis=0) + start
    names = [f"frame_{name}_{i:04d}" for i in range(count + 1)]
    column = np.linspace(-1, 1, size)
    for side in ("ft1", "ft2"):
        (scan / side).mkdir(parents=True)
    for i, (x, *_, roll, _, _) in enumerate(pose):
        grey = 120 + 6 * x + 3 * roll * column[None] + draw.normal(size=(size, size))
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
        image.save(scan / "ft1" / f"{names[i]}.png")
        image.save(scan / "ft2" / f"{names[i]}.png")
    records = []
    for i in range(count):
        change = pose[i + 1] - pose[i]
        if convention == "motion":
            start, end = torch.from_numpy(pose[i]), torch.from_numpy(pose[i + 1])
            change = poses.relative(start, end).numpy()
        records.append(
            {
                "frame_t1": names[i],
                "frame_t2": names[i + 1],
                "ft1_image_path": f"ft1\\{names[i]}.png",
                "ft2_image_path": f"ft2\\{names[i + 1]}.png",
                "at1_6dof": pose[i].tolist(),
                "action_change_6dof": change.tolist(),
                "at2_6dof": pose[i + 1].tolist(),
            }
        )
    (scan / "transitions_dataset.json").write_text(json.dumps(records))
    return scan


def edit(scan: Path, number: int, **fields) -> None:
    """Overwrite fields of one record; None removes a field."""
    file = scan / "transitions_dataset.json"
    records = json.loads(file.read_text())
    for field, value in fields.items():
        records[number].pop(field) if value is None else records[number].update({field: value})
    file.write_text(json.dumps(records))
