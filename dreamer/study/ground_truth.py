"""Frames of unseen patients, and what the phantom knows of them that no scan can provide.

The anatomy on the 7x7 grid, and the same frames rendered again without a structure or with other
surroundings: does a map lie on the heart, and on what really changes the prediction? Pointing game:
Zhang et al., ECCV 2016. Pixels in the shadow of a rib show nothing and count for no structure.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from torch import Tensor

from dreamer import phantom, poses
from dreamer.attribution import encode, frames_at_once, pose_target
from dreamer.data import Split, Transitions
from dreamer.model import CardiacDreamer
from dreamer.phantom.sector import pixel_to_probe, probe_to_pixel
from dreamer.runs import load_config, make_split

NOT_HEART = ("mediastinum", "lung", "liver", "chest_wall", "ribs")
HEART = tuple(name for name in phantom.STRUCTURES if name not in NOT_HEART)
GROUPS = ("heart", "ribs", "chest wall", "lung", "other tissue", "shadow", "outside")
BINS = 10  # per side of an average map
REACH = 10.0  # mm from the target plane that an average map takes in


class Sample(NamedTuple):
    """N transitions of unseen patients: `images` and `after`, frames 1 and 2, uint8 [N, 1, S, S],
    `pose` of frame 1 and `action` [N, 6], `scan`, `frame` (of frame 1), `patient` (a block of time,
    where the split is by blocks) [N]; `training` frames [M, 1, S, S]; the data's `folder`; `split`,
    patient or blocks. The first transitions are of different patients."""

    images: Tensor
    after: Tensor
    pose: Tensor
    action: Tensor
    scan: NDArray
    frame: NDArray
    patient: NDArray
    training: Tensor
    folder: Path
    split: str

    def take(self, rows: slice | Sequence[int]) -> "Sample":
        """The sample of fewer transitions."""
        return Sample(*(field[rows] for field in self[:7]), *self[7:])


def draw(
    data: Transitions, indices: NDArray[np.int64], split: Split, frames: int, seed: int = 0
) -> Sample:
    """A `Sample` of `frames` of the transitions `indices`, spread evenly over their patients, with
    128 frames of `split.train` for baselines."""
    patient = np.array([str(p) for p in data.patient[indices]])
    if split.kind == "blocks":
        block = np.cumsum(np.diff(indices, prepend=indices[0] - 1) > 1)
        patient = np.array([f"{p} block {b}" for p, b in zip(patient, block, strict=True)])
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(indices))
    turn = pd.Series(shuffled).groupby(patient[shuffled]).cumcount().to_numpy()
    picked = shuffled[np.argsort(turn, kind="stable")][:frames]
    chosen = indices[picked]
    return Sample(
        data.images(data.rows[chosen, 0]),
        data.images(data.rows[chosen, 1]),
        data.pose1[chosen],
        data.action[chosen],
        data.scan[chosen],
        data.frame[chosen, 0],
        patient[picked],
        data.images(data.rows[np.sort(rng.choice(split.train, 128)), 0]),
        data.folder,
        split.kind,
    )


def unseen(
    runs: Sequence[str | Path], data: str | Path, patients: Mapping[str, str] | None = None
) -> tuple[Transitions, Split]:
    """The transitions that several runs were trained on, and their split; no run has seen its test
    part.

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
    if split.kind != splits[0]["kind"] or set(found.patient[split.test]) != set(splits[0]["test"]):
        raise ValueError(f"data: {data} is not split as {runs[0]} was; give the data it trained on")
    return found, split


def nearest(sample: Sample, count: int) -> list[int]:
    """Numbers of the frames nearest to the target plane (mm and degrees alike), each of another
    patient where possible."""
    table = pd.DataFrame({"patient": sample.patient, "away": sample.pose.norm(dim=1).numpy()})
    table["turn"] = table.groupby("patient")["away"].rank(method="first")
    return table.sort_values(["turn", "away"]).index[:count].tolist()


# Re-rendering


class Truth(NamedTuple):
    """What the phantom knows of N frames: `labels` uint8 [N, S, S], `structures` by label - 1,
    which pixels are `visible`, not shadowed, `pose` [N, 6] and `phase` [N] of the cycle as they
    were rendered, and the phantom's `arguments`."""

    labels: Tensor
    visible: Tensor
    pose: Tensor
    phase: Tensor
    structures: tuple[str, ...]
    arguments: dict

    def take(self, rows: slice | Sequence[int]) -> "Truth":
        """The truth of fewer frames."""
        return Truth(*(field[rows] for field in self[:4]), *self[4:])


def truth(sample: Sample) -> Truth | None:
    """The `Truth` of a sample; None where the data have none (a real scan).

    Raises ValueError where other code drew the folder.
    """
    if (card := phantom.read_card(sample.folder)) is None:
        return None
    size = card["arguments"]["size"]
    labels = torch.zeros(len(sample.images), size, size, dtype=torch.uint8)
    visible = torch.zeros_like(labels, dtype=torch.bool)
    pose = torch.zeros(len(labels), 6, dtype=torch.float64)
    phase = torch.zeros(len(labels), dtype=torch.float64)
    for scan in np.unique(sample.scan):
        where = np.flatnonzero(sample.scan == scan)
        with np.load(sample.folder / scan / "truth.npz") as stored:
            rows = pd.Index(stored["frames"]).get_indexer(sample.frame[where])
            for field, name in ((labels, "labels"), (visible, "visible"), (pose, "pose")):
                field[where] = torch.from_numpy(stored[name][rows]).to(field)
            phase[where] = torch.from_numpy(stored["phase"][rows]).double()
    return Truth(labels, visible, pose, phase, tuple(card["structures"]), card["arguments"])


@lru_cache(256)
def _patient(seed: int, scan: str) -> phantom.Patient:
    return phantom.Patient([seed, int(scan.rsplit("_", 1)[1])])


def _render(arguments: dict, scan: str, pose: Tensor, phase, size: int, **change) -> Tensor:
    """Frames uint8 [K, 1, S, S] of a scan's patient, reduced to `size` where they were larger."""
    image = phantom.render(
        _patient(arguments["seed"], scan), pose, phase,
        target=arguments["target"], size=arguments["size"], **change,
    ).image[:, None]  # fmt: skip
    if image.shape[-1] == size:
        return image
    soft = F.interpolate(image.float(), (size, size), mode="bilinear", antialias=True)
    return soft.round().clamp(0, 255).to(torch.uint8)


def rerender(
    sample: Sample,
    known: Truth,
    without: str | Collection[str] | None = None,
    vary: Mapping[str, float | str] | None = None,
) -> Tensor:
    """The sample's frames uint8 [N, 1, S, S] again, `without` structures or with factors of
    variation changed; arguments as `dreamer.phantom.render`."""
    images = torch.empty_like(sample.images)
    for scan in np.unique(sample.scan):
        rows = np.flatnonzero(sample.scan == scan)
        images[rows] = _render(
            known.arguments, scan, known.pose[rows], known.phase[rows], images.shape[-1],
            without=without, vary=vary,
        )  # fmt: skip
    return images


class Removed(NamedTuple):
    """Frames rendered again: `whole` uint8 [N, 1, S, S], and `without`: structure -> (numbers of K
    frames that show it, those frames without it)."""

    whole: Tensor
    without: dict[str, tuple[NDArray[np.int64], Tensor]]


def remove(sample: Sample, known: Truth, least: float = 0.005) -> Removed:
    """The sample's frames without each structure that fills `least` of the sector, in turn.

    A structure that is the background of the others cannot be removed and is left out.
    """
    found, whole = {}, rerender(sample, known)
    sector = (known.labels > 0).sum((1, 2))
    for number, name in enumerate(known.structures, 1):
        area = (known.labels == number).sum((1, 2)) / sector
        if len(there := np.flatnonzero(area >= least)):
            images = rerender(sample.take(there), known.take(there), name)
            if not torch.equal(images, whole[there]):
                found[name] = there, images
    return Removed(whole, found)


def sweep(sample: Sample, axis: str, offsets: Sequence[float]) -> Tensor | None:
    """Frames uint8 [K, 1, S, S] of the sample's first patient, the probe `offsets` (mm or deg) from
    the target plane along one axis; None where the data are not a phantom's."""
    if (known := truth(sample.take(slice(1)))) is None:
        return None
    pose = torch.zeros(len(offsets), 6)
    pose[:, poses.AXES.index(axis)] = torch.tensor(list(offsets), dtype=torch.float32)
    return _render(known.arguments, sample.scan[0], pose, 0.0, sample.images.shape[-1])


def target_plane(sample: Sample, known: Truth) -> tuple[Tensor, Tensor]:
    """Frame and labels, uint8 [S, S], of the target plane of the sample's first patient."""
    at = torch.zeros(6)
    size, target = sample.images.shape[-1], known.arguments["target"]
    frame = phantom.render(
        _patient(known.arguments["seed"], sample.scan[0]), at, 0.0, target=target, size=size
    )
    return frame.image, frame.label


class Anatomy(NamedTuple):
    """A phantom's truth on the grid, both [N, structures, h, w]. `filled`: the share of a cell's
    pixels that a structure visibly fills. `dose`: how far a cell's image changes without the
    structure, mean |difference| in grey levels; NaN where it was not removed."""

    structures: tuple[str, ...]
    filled: Tensor
    dose: Tensor


def filled(known: Truth, grid: tuple[int, int]) -> Tensor:
    """The share of each cell's pixels [N, structures, h, w] that a structure visibly fills."""
    shown, numbers = known.labels * known.visible, range(1, len(known.structures) + 1)
    shares = [F.adaptive_avg_pool2d((shown == i).float(), grid) for i in numbers]
    return torch.stack(shares, 1)


def anatomy(known: Truth, removed: Removed, grid: tuple[int, int]) -> Anatomy:
    """The `Anatomy` of frames on a grid (h, w)."""
    names = known.structures
    dose = torch.full((len(known.labels), len(names), *grid), torch.nan)
    for name, (where, images) in removed.without.items():
        change = (images.float() - removed.whole[where].float()).abs()
        dose[where, names.index(name)] = F.adaptive_avg_pool2d(change, grid)[:, 0]
    return Anatomy(names, filled(known, grid), dose)


@torch.no_grad()
def predict(model: CardiacDreamer, images: Tensor) -> Tensor:
    """Single-frame predictions [N, 6] of frames uint8 [N, 1, S, S], on the CPU."""
    parts = encode(model, images).split(frames_at_once(model))
    return torch.cat([model.imagine(p, p.new_zeros(len(p), 6)).pose.cpu() for p in parts])


def changes(
    model: CardiacDreamer, removed: Removed, structures: Sequence[str], targets: Sequence[str]
) -> Tensor:
    """f(frame) - f(frame without the structure) [targets, N, structures], mm or deg; NaN where a
    structure was not removed."""
    whole = predict(model, removed.whole)
    moved = torch.full((len(targets), len(whole), len(structures)), torch.nan)
    for name, (where, images) in removed.without.items():
        gone = predict(model, images)
        for k, target in enumerate(targets):
            change = pose_target(whole[where], target) - pose_target(gone, target)
            moved[k, where, list(structures).index(name)] = change
    return moved


def group_shares(known: Truth, grid: tuple[int, int]) -> Tensor:
    """Share of each cell [N, groups, h, w] that each of GROUPS fills; the sum over groups is 1.

    `shadow` is what lies behind a rib, lung or lost contact; `outside` is not in the sector.
    """
    names = {"ribs": "ribs", "chest_wall": "chest wall", "lung": "lung"}
    other = dict.fromkeys(NOT_HEART, "other tissue")
    group = [(other | names).get(name, "heart") for name in known.structures]
    number = torch.tensor([GROUPS.index("outside"), *map(GROUPS.index, group)])
    label = number[known.labels.long()]
    hidden = (known.labels > 0) & ~known.visible
    label = torch.where(hidden, GROUPS.index("shadow"), label)
    shares = [F.adaptive_avg_pool2d((label == k).float(), grid) for k in range(len(GROUPS))]
    return torch.stack(shares, 1)


def relevance(grid: Tensor, shares: Tensor) -> Tensor:
    """Share of a map's magnitude on each group or structure over its share of the frame's area
    [N, groups], for maps [N, h, w] and `shares` [N, groups, h, w]: 1 for an even map, NaN where
    there is nothing of it."""
    size = grid.detach().abs()[:, None].to(shares)
    on = (size * shares).sum((2, 3)) / size.sum((2, 3)).clamp_min(1e-12)
    area = shares.mean((2, 3))
    return torch.where(area > 0, on / area.clamp_min(1e-12), torch.nan)


# The target plane's coordinates


def plane_bins(pose: Tensor, inside: Tensor) -> Tensor:
    """Which bin of the target plane's frame each pixel shows: [N, S, S], row * BINS + column, or -1
    where it lies outside the sector (`inside` [N, S, S]) or over REACH mm off the plane.

    `pose` [N, 6] is the known one, mm and degrees; bins are BINS x BINS of the whole frame.
    """
    size = inside.shape[-1]
    row, column = torch.meshgrid(*[torch.arange(size, dtype=torch.float32)] * 2, indexing="ij")
    x, z = pixel_to_probe(row, column, size)
    points = torch.stack((x, torch.zeros_like(x), z, torch.ones_like(x)))  # [4, S, S]
    x, y, z, _ = torch.einsum("nij,jrc->inrc", poses.to_matrix(pose.float()), points)
    there = inside & (y.abs() <= REACH)
    row, column = (((v + 0.5) / size * BINS).floor().long() for v in probe_to_pixel(x, z, size))
    for v in (row, column):
        there = there & (v >= 0) & (v < BINS)
    return torch.where(there, row * BINS + column, -1)


def average_map(grid: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of maps [N, h, w], each relative to its mean magnitude, in each of the target plane's
    bins [BINS, BINS] (NaN where nothing was seen), and the number of frames that saw it."""
    size = grid.detach().abs().float().cpu()
    even = size / size.mean((1, 2), keepdim=True).clamp_min(1e-12)
    pixels = F.interpolate(even[:, None], bins.shape[1:], mode="nearest")[:, 0]
    total, count = torch.zeros(2, len(grid), BINS**2 + 1)
    where = bins.flatten(1) % (BINS**2 + 1)  # -1 becomes the last
    total.scatter_add_(1, where, pixels.flatten(1))
    count.scatter_add_(1, where, torch.ones_like(pixels).flatten(1))
    seen = (count > 0)[:, :-1]
    mean = (total[:, :-1] / count[:, :-1].clamp_min(1)).sum(0) / seen.sum(0)
    return mean.view(BINS, BINS), seen.sum(0).view(BINS, BINS)


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
    """How maps [N, h, w] agree with the anatomy and with `moved` [N, structures], how far the
    prediction moves without each structure (NaN where it was not removed).

    Arrays [N], NaN where a frame cannot tell:

    - pointing: whether the top cell is mostly heart.
    - decisive: whether it contains part of the structure that changes the prediction most (ribs
      excluded, because of their shadow).
    - counterfactual_rank: over a frame's structures, `partial_rank` of sum(|map| · dose) and
      |change of the prediction|, given sum(dose). Without the last a random map scores well, since
      a larger change of the image means more of any map and more change of the prediction.
      Magnitudes, because sums of signed values cancel the more cells there are; an even map: 0.
    """
    structures, filled, dose = known
    heart = [name not in NOT_HEART for name in structures]
    cells = filled[:, heart].sum(1) > filled[:, [not h for h in heart]].sum(1)  # mostly heart
    top = grid.abs().flatten(1).argmax(1)[:, None]
    effect = moved.abs()
    usable = [k for k, name in enumerate(structures) if name != "ribs"]
    best = effect[:, usable].nan_to_num(-1).argmax(1)
    there = filled[:, usable][torch.arange(len(grid)), best].flatten(1).gather(1, top)[:, 0]
    flat = torch.where(grid.flatten(1).std(1) > 0, 0.0, torch.nan)  # a flat map has no top cell
    seen = torch.where(cells.any(2).any(1), 0.0, torch.nan)  # no heart in the frame
    effective = torch.where(effect[:, usable].isfinite().any(1), 0.0, torch.nan)
    weight = (grid.abs()[:, None] * dose).sum((2, 3))
    return {
        "pointing": (cells.flatten(1).gather(1, top)[:, 0] + flat + seen).numpy(),
        "decisive": ((there > 0.05) + flat + effective).numpy(),
        "counterfactual_rank": partial_rank(weight, effect, dose.sum((2, 3))),
    }
