"""Frames of unseen patients, and what the phantom knows of them that no scan can provide.

The anatomy on the 7x7 grid, and the same frames rendered again without one structure: does a map
lie on the heart, and on what really changes the prediction? Pointing game: Zhang et al., ECCV 2016;
relevance mass and rank accuracy: Arras et al., Inf. Fusion 2022, the mass relative to the area, so
that thin leaflets count. Pixels in the shadow of a rib show nothing and count for no structure.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from torch import Tensor
from tqdm.auto import tqdm

from dreamer import phantom, poses
from dreamer.attribution import encode, frames_at_once, pose_target
from dreamer.data import Transitions
from dreamer.model import CardiacDreamer
from dreamer.runs import load_config, make_split

NOT_HEART = ("mediastinum", "lung", "liver", "chest_wall", "ribs")


class Sample(NamedTuple):
    """N frames of unseen patients: `images` uint8 [N, 1, S, S], `pose` [N, 6], `scan`, `frame`,
    `patient` (a block of time, where the split is by blocks) [N]; `training` frames [M, 1, S, S];
    the data's `folder`; `split`, patient or blocks. The first frames are of different patients."""

    images: Tensor
    pose: Tensor
    scan: NDArray
    frame: NDArray
    patient: NDArray
    training: Tensor
    folder: Path
    split: str

    def take(self, rows: slice | Sequence[int]) -> "Sample":
        """The sample of fewer frames."""
        return Sample(*(field[rows] for field in self[:5]), *self[5:])


def unseen(
    runs: Sequence[str | Path],
    data: str | Path,
    frames: int,
    seed: int = 0,
    patients: Mapping[str, str] | None = None,
) -> Sample:
    """`frames` test frames that no run was trained on, spread evenly over the test patients.

    `patients` maps scan -> patient, as in training. Raises ValueError where the runs were split in
    different ways or take different image sizes.
    """
    configs = [load_config(run) for run in runs]
    splits = [json.loads((Path(run) / "split.json").read_text()) for run in runs]
    sizes = {model.image_size for model, _ in configs}
    if len(sizes) > 1 or any(split != splits[0] for split in splits):
        raise ValueError(
            "runs: they differ in image_size or in their split, so no frame is unseen by all; "
            "compare runs of one configuration"
        )
    found = Transitions(data, sizes.pop(), patients)
    split = make_split(found, configs[0][1])
    test = split.test
    patient = np.array([str(p) for p in found.patient[test]])
    if split.kind != splits[0]["kind"] or set(patient) != set(splits[0]["test"]):
        raise ValueError(f"data: {data} is not split as {runs[0]} was; give the data it trained on")
    if split.kind == "blocks":
        block = np.cumsum(np.diff(test, prepend=test[0] - 1) > 1)
        patient = np.array([f"{p} block {b}" for p, b in zip(patient, block, strict=True)])
    draw = np.random.default_rng(seed)
    shuffled = draw.permutation(len(test))
    turn = pd.Series(shuffled).groupby(patient[shuffled]).cumcount().to_numpy()
    picked = shuffled[np.argsort(turn, kind="stable")][:frames]
    chosen = test[picked]
    return Sample(
        found.images(found.rows[chosen, 0]),
        found.pose1[chosen],
        found.scan[chosen],
        found.frame[chosen, 0],
        patient[picked],
        found.images(found.rows[np.sort(draw.choice(split.train, 128)), 0]),
        Path(data),
        split.kind,
    )


def nearest(sample: Sample, count: int) -> list[int]:
    """Numbers of the frames nearest to the target plane (mm and degrees alike), each of another
    patient where possible."""
    table = pd.DataFrame({"patient": sample.patient, "away": sample.pose.norm(dim=1).numpy()})
    table["turn"] = table.groupby("patient")["away"].rank(method="first")
    return table.sort_values(["turn", "away"]).index[:count].tolist()


# Re-rendering


class Truth(NamedTuple):
    """What the phantom knows of N frames: `labels` uint8 [N, S, S], `structures` by label - 1, and
    which pixels are `visible`, not shadowed; `whole` uint8 [N, 1, S, S]; `without`: structure ->
    (frames [K], images without it)."""

    labels: Tensor
    visible: Tensor
    structures: tuple[str, ...]
    whole: Tensor
    without: dict[str, tuple[NDArray, Tensor]]


def _card(folder: Path) -> tuple[dict, tuple[str, ...]] | None:
    """Arguments and structures of a phantom; None for other data."""
    card = phantom.read_card(folder)
    return card and (card["arguments"], tuple(card["structures"]))


def _render(arguments: dict, scan: str, pose, phase, without: str | None, size: int) -> Tensor:
    """Frames uint8 [K, 1, S, S] of a scan's patient, reduced to `size` where they were larger."""
    patient = phantom.Patient([arguments["seed"], int(scan.rsplit("_", 1)[1])])
    image = phantom.render(
        patient, pose, phase, without, arguments["target"], arguments["size"]
    ).image[:, None]
    if image.shape[-1] == size:
        return image
    soft = F.interpolate(image.float(), (size, size), mode="bilinear", antialias=True)
    return soft.round().clamp(0, 255).to(torch.uint8)


def truth(sample: Sample, least: float = 0.005, progress: str | None = None) -> Truth | None:
    """The `Truth` of a sample: each structure that fills `least` of the sector removed in turn.

    None where the data have no truth (a real scan). Raises ValueError where the phantom no longer
    renders the frames that are in the folder.
    """
    if (card := _card(sample.folder)) is None:
        return None
    arguments, names = card
    size = sample.images.shape[-1]
    whole = torch.zeros_like(sample.images)
    labels = torch.zeros(len(whole), arguments["size"], arguments["size"], dtype=torch.uint8)
    visible = torch.zeros_like(labels, dtype=torch.bool)
    removed: dict[str, list[tuple[NDArray, Tensor]]] = {name: [] for name in names}
    scans = np.unique(sample.scan)
    for scan in tqdm(scans, progress, leave=False, disable=progress is None):
        where = np.flatnonzero(sample.scan == scan)
        with np.load(sample.folder / scan / "truth.npz") as known:
            rows = pd.Index(known["frames"]).get_indexer(sample.frame[where])
            pose, phase = (torch.from_numpy(known[k][rows]) for k in ("pose", "phase"))
            labels[where] = torch.from_numpy(known["labels"][rows])
            visible[where] = torch.from_numpy(known["visible"][rows])
        whole[where] = _render(arguments, scan, pose, phase, None, size)
        for number, name in enumerate(names, 1):
            area = (labels[where] == number).sum((1, 2)) / (labels[where] > 0).sum((1, 2))
            there = np.flatnonzero(area >= least)
            if len(there):
                images = _render(arguments, scan, pose[there], phase[there], name, size)
                removed[name].append((where[there], images))
    difference = (whole.float() - sample.images.float()).abs().mean()
    if difference > 2:
        raise ValueError(
            f"{sample.folder}: the phantom renders other frames now (mean difference "
            f"{difference:.1f} grey levels); generate the folder anew"
        )
    without = {}
    for name, parts in removed.items():
        if parts:
            rows = np.concatenate([r for r, _ in parts])
            images = torch.cat([i for _, i in parts])
            if not torch.equal(images, whole[rows]):  # tissue between all others cannot be removed
                without[name] = rows, images
    return Truth(labels, visible, names, whole, without)


def sweep(sample: Sample, axis: str, offsets: Sequence[float], number: int = 0) -> Tensor | None:
    """Frames uint8 [K, 1, S, S] of one of the sample's patients, the probe `offsets` (mm or deg)
    from the target plane along one axis; None where the data are not a phantom's."""
    if (card := _card(sample.folder)) is None:
        return None
    pose = torch.zeros(len(offsets), 6)
    pose[:, poses.AXES.index(axis)] = torch.tensor(list(offsets), dtype=torch.float32)
    scan = np.unique(sample.scan)[number]
    return _render(card[0], scan, pose, 0.0, None, sample.images.shape[-1])


class Anatomy(NamedTuple):
    """A phantom's truth on the grid, both [N, structures, h, w]. `filled`: the share of a cell's
    pixels that a structure visibly fills. `dose`: how far a cell's image changes without the
    structure, mean |difference| in grey levels; NaN where it was not removed."""

    structures: tuple[str, ...]
    filled: Tensor
    dose: Tensor

    def take(self, rows: slice | Sequence[int]) -> "Anatomy":
        """The anatomy of fewer frames."""
        return Anatomy(self.structures, self.filled[rows], self.dose[rows])


def anatomy(known: Truth, grid: tuple[int, int]) -> Anatomy:
    """The `Anatomy` of a truth's frames on a grid (h, w)."""
    names, numbers = known.structures, range(1, len(known.structures) + 1)
    shown = known.labels * known.visible
    filled = [F.adaptive_avg_pool2d((shown == i).float(), grid) for i in numbers]
    dose = torch.full((len(shown), len(names), *grid), torch.nan)
    for name, (where, images) in known.without.items():
        change = (images.float() - known.whole[where].float()).abs()
        dose[where, names.index(name)] = F.adaptive_avg_pool2d(change, grid)[:, 0]
    return Anatomy(names, torch.stack(filled, 1), dose)


@torch.no_grad()
def changes(model: CardiacDreamer, known: Truth, target: str) -> Tensor:
    """f(frame) - f(frame without the structure) [N, structures], mm or deg; NaN where absent."""

    def predict(images: Tensor) -> Tensor:
        parts = encode(model, images).split(frames_at_once(model))
        pose = [model.imagine(part, part.new_zeros(len(part), 6)).pose.cpu() for part in parts]
        return pose_target(torch.cat(pose), target)

    whole = predict(known.whole)
    moved = torch.full((len(whole), len(known.structures)), torch.nan)
    for name, (where, images) in known.without.items():
        moved[where, known.structures.index(name)] = whole[where] - predict(images)
    return moved


# Scores of maps


def partial_rank(one: ArrayLike, other: ArrayLike, given: ArrayLike, least: int = 5) -> NDArray:
    """Spearman correlation [N] along rows [N, K], with the linear effect of the ranks of `given`
    removed from both; entries that are NaN in any of the three are left out.

    0 where `given` explains all of `one`. NaN where it explains all of `other`, or where fewer than
    `least` entries are left.
    """
    values = np.stack([np.asarray(v, dtype=float) for v in (one, other, given)])  # [3, N, K]
    seen = np.isfinite(values).all(0)
    ranks = rankdata(np.where(seen, values, np.nan), axis=2, nan_policy="omit")
    a, b, g = np.where(seen, ranks - np.nanmean(ranks, 2, keepdims=True), 0)
    power = (g**2).sum(1, keepdims=True)
    a, b = (v - g * (v * g).sum(1, keepdims=True) / np.maximum(power, 1e-9) for v in (a, b))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    value = (a * b).sum(1) / np.maximum(size, 1e-9)
    enough = (seen.sum(1) >= least) & ((b**2).sum(1) > 1e-6)
    return np.where(enough, np.where((a**2).sum(1) > 1e-6, value, 0), np.nan)


def against_truth(grid: Tensor, known: Anatomy, moved: Tensor) -> dict[str, NDArray]:
    """How maps [N, h, w] agree with the anatomy and with `moved` [N, structures], see `changes`.

    Arrays [N], NaN where a frame cannot tell:

    - mass: share of the map's magnitude on the heart over the heart's share of the visible area.
    - rank: of as many top cells as are mostly heart, the share that are.
    - pointing: whether the top cell is mostly heart.
    - decisive: whether it contains part of the structure that changes the prediction most (ribs
      excluded, because of their shadow).
    - counterfactual: over a frame's structures, `partial_rank` of sum(|map| · dose) and |change of
      the prediction|, given sum(dose). Without the last a random map scores well, since a larger
      change of the image means more of any map and more change of the prediction. Magnitudes,
      because sums of signed values cancel the more cells there are; an even map scores 0.
    """
    structures, filled, dose = known
    size = grid.abs()[:, None] * (filled.sum(1, keepdim=True) > 0)
    on = (size * filled).sum((2, 3))  # [N, structures]
    area, heart = filled.sum((2, 3)), [name not in NOT_HEART for name in structures]
    cells = filled[:, heart].sum(1) > filled[:, [not h for h in heart]].sum(1)  # mostly heart
    order = size.flatten(1).argsort(1, descending=True)
    hits = cells.flatten(1).gather(1, order)
    count = cells.sum((1, 2))
    among = torch.arange(hits.shape[1]) < count[:, None]
    effect = moved.abs()
    usable = [k for k, name in enumerate(structures) if name != "ribs"]
    best = effect[:, usable].nan_to_num(-1).argmax(1)
    there = filled[:, usable][torch.arange(len(grid)), best].flatten(1).gather(1, order[:, :1])
    share = on[:, heart].sum(1) / on.sum(1)
    flat = torch.where(grid.flatten(1).std(1) > 0, 0.0, torch.nan)  # a flat map has no top cell
    seen = torch.where(count > 0, 0.0, torch.nan)  # no heart in the frame
    effective = torch.where(effect[:, usable].isfinite().any(1), 0.0, torch.nan)
    weight = (grid.abs()[:, None] * dose).sum((2, 3))
    return {
        "mass": (share / (area[:, heart].sum(1) / area.sum(1)) + seen).numpy(),
        "rank": ((hits & among).sum(1) / count + flat).numpy(),
        "pointing": (hits[:, 0] + flat + seen).numpy(),
        "decisive": ((there[:, 0] > 0.05) + flat + effective).numpy(),
        "counterfactual": partial_rank(weight, effect, dose.sum((2, 3))),
    }


def by_structure(grid: Tensor, known: Anatomy, patient: NDArray, moved: Tensor) -> pd.DataFrame:
    """Relevance and effect of each visible structure: patient, frame, structure, measure, value.

    relevance: the map's share over the area's share, 1 for an even map. effect: |change of the
    prediction| in its unit per grey level of change, averaged over the image.
    """
    structures, filled, dose = known
    on, area = (grid.abs()[:, None] * filled).sum((2, 3)), filled.sum((2, 3))
    share = area / area.sum(1, keepdim=True).clamp_min(1e-9)
    values = {
        "relevance": on / on.sum(1, keepdim=True) / share,
        "effect": moved.abs() / (dose.sum((2, 3)) / grid[0].numel()),
    }
    frame, number = np.nonzero((share > 0.005).numpy())
    names = {"patient": patient[frame], "frame": frame, "structure": np.array(structures)[number]}
    parts = [
        pd.DataFrame({**names, "measure": measure, "value": value[frame, number].numpy()})
        for measure, value in values.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    return table[np.isfinite(table["value"])]
