"""Frames of unseen patients, and what the phantom knows of them that no scan can tell.

The anatomy on the grid, and the same frames rendered again with one structure gone: does a map
point at the heart, and at what really moves the answer? Pointing game: Zhang et al., ECCV 2016;
relevance mass and rank: Arras et al., Inf. Fusion 2022, the mass relative to the area, so that thin
leaflets count. Pixels in a rib's shadow show nothing and count for no structure.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from dreamer import phantom, poses
from dreamer.attribution import answer, encode, parts_of, rows_at_once
from dreamer.data import Transitions
from dreamer.model import CardiacDreamer
from dreamer.phantom.render import APEX
from dreamer.training import load_config, make_split

AROUND = ("mediastinum", "lung", "liver", "chest_wall", "ribs")  # structures that are not the heart


class Sample(NamedTuple):
    """N frames: `images` uint8 [N, 1, S, S], `pose` [N, 6], `scan`, `frame`, `group` (the patient,
    or a stretch of time) [N]; `training` frames [M, 1, S, S]; the data's `folder`; `split`, either
    patient or blocks of one scan."""

    images: Tensor
    pose: Tensor
    scan: NDArray
    frame: NDArray
    group: NDArray
    training: Tensor
    folder: Path
    split: str


def unseen(
    runs: Sequence[str | Path],
    data: str | Path,
    frames: int,
    seed: int = 0,
    patients: Mapping[str, str] | None = None,
) -> Sample:
    """`frames` test frames that no run was trained on, spread evenly over the test patients.

    `patients` maps scan -> patient, as it was given to the training; without it a scan is one.
    Raises ValueError where the runs were split in different ways or take other picture sizes.
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
    if split.kind != splits[0]["kind"] or set(found.patient[test]) != set(splits[0]["test"]):
        raise ValueError(f"data: {data} is not split as {runs[0]} was; give the data it trained on")
    group = found.patient[test]
    if split.kind == "blocks":
        stretch = np.cumsum(np.diff(test, prepend=test[0] - 1) > 1)
        group = np.array([f"{g} block {b}" for g, b in zip(group, stretch, strict=True)])
    draw = np.random.default_rng(seed)
    shuffled = draw.permutation(len(test))
    turn = pd.Series(shuffled).groupby(group[shuffled]).cumcount().to_numpy()
    picked = np.sort(shuffled[np.argsort(turn, kind="stable")][:frames])
    chosen = test[picked]
    return Sample(
        found.images(found.rows[chosen, 0]),
        found.pose1[chosen],
        found.scan[chosen],
        found.frame[chosen, 0],
        group[picked],
        found.images(found.rows[np.sort(draw.choice(split.train, 128)), 0]),
        Path(data),
        split.kind,
    )


class Truth(NamedTuple):
    """What the phantom knows of N frames: `labels` uint8 [N, S, S], `structures` by label - 1;
    `whole` uint8 [N, 1, S, S] and `gone`, structure -> (frames [K], pictures without it)."""

    labels: Tensor
    structures: tuple[str, ...]
    whole: Tensor
    gone: dict[str, tuple[NDArray, Tensor]]


def truth(sample: Sample, least: float = 0.005, progress: str | None = None) -> Truth | None:
    """The sample's `Truth`, every structure that fills `least` of the sector taken away in turn.

    None where the data carry no truth (a real scan). Raises ValueError where the phantom no longer
    draws the frames that lie in the folder.
    """
    card = sample.folder / "phantom.json"
    if not card.is_file():
        return None
    card = json.loads(card.read_text(encoding="utf-8"))
    arguments, names = card["arguments"], tuple(card["structures"])
    size, n = sample.images.shape[-1], len(sample.images)
    labels = torch.zeros(n, arguments["size"], arguments["size"], dtype=torch.uint8)
    whole, gone = torch.zeros_like(sample.images), {name: [] for name in names}
    for scan in tqdm(np.unique(sample.scan), desc=progress, leave=False, disable=progress is None):
        where = np.flatnonzero(sample.scan == scan)
        with np.load(sample.folder / scan / "truth.npz") as known_of:
            rows = pd.Index(known_of["frames"]).get_indexer(sample.frame[where])
            pose, phase, label = (known_of[k][rows] for k in ("pose", "phase", "labels"))
        labels[where] = torch.from_numpy(label)
        patient = phantom.Patient([arguments["seed"], int(scan.rsplit("_", 1)[1])])

        def draw(frames: NDArray, without: str | None, patient=patient, pose=pose, phase=phase):
            picture = phantom.render(
                patient, torch.from_numpy(pose[frames]), torch.from_numpy(phase[frames]), without,
                arguments["target"], arguments["size"],
            ).image[:, None]  # fmt: skip
            return _resized(picture, size)

        whole[where] = draw(np.arange(len(where)), None)
        share = [(label == i).sum((1, 2)) / (label > 0).sum((1, 2)) for i in _numbers(names)]
        for name, area in zip(names, share, strict=True):
            if len(there := np.flatnonzero(area >= least)):
                gone[name].append((where[there], draw(there, name)))
    difference = (whole.float() - sample.images.float()).abs().mean()
    if difference > 2:
        raise ValueError(
            f"{sample.folder}: the phantom draws other frames now (mean difference "
            f"{difference:.1f} grey levels); generate the folder anew"
        )
    kept = {}
    for name, parts in gone.items():
        if parts:
            where, pictures = (
                np.concatenate([w for w, _ in parts]),
                torch.cat([p for _, p in parts]),
            )
            if not torch.equal(pictures, whole[where]):  # what lies between all others cannot go
                kept[name] = where, pictures
    return Truth(labels, names, whole, kept)


def first_frames(sample: Sample, known: Truth | None, count: int) -> tuple[Sample, Truth | None]:
    """The first `count` frames of a sample, spread over groups, with their truth."""
    order = pd.Series(sample.group).groupby(sample.group).cumcount().to_numpy()
    rows = np.sort(np.argsort(order, kind="stable")[:count])
    each = {f: getattr(sample, f)[rows] for f in ("images", "pose", "scan", "frame", "group")}
    if known is None:
        return sample._replace(**each), None
    place = pd.Index(rows)
    gone = {}
    for name, (where, pictures) in known.gone.items():
        at = place.get_indexer(where)
        if (at >= 0).any():
            gone[name] = at[at >= 0], pictures[torch.from_numpy(at >= 0)]
    fewer = known._replace(labels=known.labels[rows], whole=known.whole[rows], gone=gone)
    return sample._replace(**each), fewer


def _numbers(names: Sequence[str]) -> range:
    return range(1, len(names) + 1)


def _resized(picture: Tensor, size: int) -> Tensor:
    if picture.shape[-1] == size:
        return picture
    soft = F.interpolate(picture.float(), (size, size), mode="bilinear", antialias=True)
    return soft.round().clamp(0, 255).to(torch.uint8)


def shadow(labels: Tensor, rib: int) -> Tensor:
    """Pixels [N, S, S] that lie behind a pixel labelled `rib`, on the same line of sight."""
    n, size, _ = labels.shape
    scale = size / 224
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    dx = column - ((APEX[0] + 0.5) * scale - 0.5)
    dy = row - ((APEX[1] + 0.5) * scale - 0.5)
    depth, line = torch.hypot(dx, dy), (torch.atan2(dx, dy) + torch.pi) / (2 * torch.pi)
    line = (line * 4 * size).long().flatten()
    at_rib = torch.where(labels.flatten(1) == rib, depth.flatten(), torch.inf)
    first = torch.full((n, 4 * size + 1), torch.inf)
    first = first.scatter_reduce(1, line.expand(n, -1), at_rib, "amin")
    return (depth.flatten() > first.gather(1, line.expand(n, -1))).view_as(labels)


def occupancy(truth: Truth, grid: tuple[int, int]) -> Tensor:
    """Share [N, structures, h, w] of each cell's pixels that a structure visibly fills: pixels in a
    rib's shadow count for none."""
    lit = truth.labels.clone()
    if "ribs" in truth.structures:
        lit[shadow(truth.labels, truth.structures.index("ribs") + 1)] = 0
    shares = [F.adaptive_avg_pool2d((lit == i).float(), grid) for i in _numbers(truth.structures)]
    return torch.stack(shares, 1)


@torch.no_grad()
def changes(model: CardiacDreamer, truth: Truth, targets: Sequence[str]) -> Tensor:
    """How the answer moves [targets, N, structures] when a structure goes, nan where there is none:
    f(frame) - f(frame without it), mm or deg."""

    def ask(images: Tensor) -> Tensor:
        features = encode(model, images)
        parts = parts_of(len(features), rows_at_once(model), None)
        pose = [model.imagine(f := features[p], f.new_zeros(len(f), 6)).pose.cpu() for p in parts]
        return torch.stack([answer(torch.cat(pose), t) for t in targets])

    whole = ask(truth.whole)
    moved = torch.full((*whole.shape, len(truth.structures)), torch.nan)
    for name, (where, pictures) in truth.gone.items():
        moved[:, where, truth.structures.index(name)] = whole[:, where] - ask(pictures)
    return moved


def against_truth(grid: Tensor, filled: Tensor, moved: Tensor, known: Truth) -> dict[str, NDArray]:
    """How maps [N, h, w] agree with the anatomy `filled` [N, structures, h, w] and with what moves
    the answer, `moved` [N, structures]; arrays [N], nan where a frame cannot tell (see MEASURES).

    mass: the share of the map's magnitude that lies on the heart, over the heart's share of the
    visible area. rank: of as many top cells as are mostly heart, the share that are. pointing: the
    top cell is mostly heart. decisive: it holds a part of the structure that moves the answer most.
    counterfactual: Spearman correlation over the frame's structures, ribs left out for the shadow
    they throw elsewhere, between |map summed over the structure| and |change without it|.
    """
    size = grid.abs()[:, None] * (filled.sum(1, keepdim=True) > 0)
    on = (size * filled).sum((2, 3))  # [N, structures], what the map says of each
    area, heart = filled.sum((2, 3)), [name not in AROUND for name in known.structures]
    cells = filled[:, heart].sum(1) > filled[:, [not h for h in heart]].sum(1)  # mostly heart
    order = size.flatten(1).argsort(1, descending=True)
    hits = cells.flatten(1).gather(1, order)
    count = cells.sum((1, 2))
    among = torch.arange(hits.shape[1]) < count[:, None]
    usable = [n for n in range(len(known.structures)) if known.structures[n] != "ribs"]
    told = (grid[:, None] * filled).sum((2, 3)).abs()[:, usable].numpy()
    effect = moved.abs()[:, usable]
    best = effect.nan_to_num(-1).argmax(1)
    there = filled[:, usable][torch.arange(len(grid)), best].flatten(1).gather(1, order[:, :1])
    agree = []
    for a, b in zip(told, effect.numpy(), strict=True):
        seen = np.isfinite(b)
        enough = seen.sum() >= 4 and np.ptp(a[seen]) > 0 and np.ptp(b[seen]) > 0
        agree.append(spearmanr(a[seen], b[seen]).statistic if enough else np.nan)
    share = on[:, heart].sum(1) / on.sum(1)
    flat = torch.where(grid.flatten(1).std(1) > 0, 0.0, torch.nan)  # no top cell: nan
    seen = torch.where(count > 0, 0.0, torch.nan)  # no heart in the picture: nan
    effective = torch.where(effect.isfinite().any(1), 0.0, torch.nan)
    return {
        "mass": (share / (area[:, heart].sum(1) / area.sum(1)) + seen).numpy(),
        "rank": ((hits & among).sum(1) / count + flat).numpy(),
        "pointing": (hits[:, 0] + flat + seen).numpy(),
        "decisive": ((there[:, 0] > 0.05) + flat + effective).numpy(),
        "counterfactual": np.array(agree),
    }


def by_structure(
    grids: Mapping[tuple[str, str], Tensor],
    known: Truth,
    group: NDArray,
    moved: Tensor | None = None,
) -> pd.DataFrame:
    """What maps say of each structure that is seen: group, frame, method, target, structure,
    measure, value.

    mass: the map's share over the area's share, 1 as its size bids; told: |sum over the structure|
    in the map's unit; moved: |change of the answer without it|, from `moved` [N, structures].
    """
    rows = []
    for (method, target), grid in grids.items():
        filled = occupancy(known, grid.shape[1:])
        on, area = (grid.abs()[:, None] * filled).sum((2, 3)), filled.sum((2, 3))
        share = area / area.sum(1, keepdim=True).clamp_min(1e-9)
        values = {
            "mass": on / on.sum(1, keepdim=True) / share,
            "told": (grid[:, None] * filled).sum((2, 3)).abs(),
        } | ({} if moved is None else {"moved": moved.abs()})
        frame, structure = np.nonzero((share > 0.005).numpy())
        for measure, value in values.items():
            rows.append(pd.DataFrame({
                "group": group[frame], "frame": frame, "method": method, "target": target,
                "structure": np.array(known.structures)[structure], "measure": measure,
                "value": value[frame, structure].numpy(),
            }))  # fmt: skip
    table = pd.concat(rows, ignore_index=True)
    return table[np.isfinite(table["value"])]


def sweep(sample: Sample, axis: str, offsets: Sequence[float], number: int = 0) -> Tensor | None:
    """Frames uint8 [K, 1, S, S] of one of the sample's patients, the probe `offsets` (mm or deg)
    from the target plane along one axis; None where the data are no phantom's."""
    card = sample.folder / "phantom.json"
    if not card.is_file():
        return None
    arguments = json.loads(card.read_text(encoding="utf-8"))["arguments"]
    scan = np.unique(sample.scan)[number]
    pose = torch.zeros(len(offsets), 6)
    pose[:, poses.AXES.index(axis)] = torch.tensor(list(offsets), dtype=torch.float32)
    patient = phantom.Patient([arguments["seed"], int(scan.rsplit("_", 1)[1])])
    picture = phantom.render(patient, pose, 0.0, None, arguments["target"], arguments["size"])
    return _resized(picture.image[:, None], sample.images.shape[-1])


def showing(known: Truth, names: Sequence[str]) -> dict[str, int]:
    """For each structure by name, the number of the frame that shows most of it; those in none are
    left out."""
    found = {}
    for name in names:
        area = (known.labels == known.structures.index(name) + 1).sum((1, 2))
        if area.max() > 0:
            found[name] = int(area.argmax())
    return found
