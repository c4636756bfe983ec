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
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from torch import Tensor
from tqdm.auto import tqdm

from dreamer import phantom, poses
from dreamer.attribution import answer, encode, parts_of, rows_at_once
from dreamer.data import Transitions
from dreamer.model import CardiacDreamer
from dreamer.phantom import crew
from dreamer.phantom.render import APEX, sector
from dreamer.runs import load_config, make_split

AROUND = ("mediastinum", "lung", "liver", "chest_wall", "ribs")  # structures that are not the heart


class Sample(NamedTuple):
    """N frames: `images` uint8 [N, 1, S, S], `pose` [N, 6], `scan`, `frame`, `group` (the patient,
    or a stretch of time) [N]; `training` frames [M, 1, S, S]; the data's `folder`; `split`, either
    patient or blocks of one scan. The first frames of a sample are of as many groups as can be."""

    images: Tensor
    pose: Tensor
    scan: NDArray
    frame: NDArray
    group: NDArray
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
    """`frames` test frames that no run was trained on, spread evenly over the test patients, one
    of each first, then a second of each, and so on.

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
    picked = shuffled[np.argsort(turn, kind="stable")][:frames]
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


def _card(folder: Path) -> tuple[dict, tuple[str, ...]] | None:
    """How a phantom was drawn, and its structures; None where the data are no phantom's."""
    if not (folder / "phantom.json").is_file():
        return None
    card = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))
    return card["arguments"], tuple(card["structures"])


def _drawn(arguments: dict, scan: str, pose, phase, without: str | None, size: int) -> Tensor:
    """Frames uint8 [K, 1, S, S] of a scan's patient, shrunk to `size` where they were larger."""
    patient = phantom.Patient([arguments["seed"], int(scan.rsplit("_", 1)[1])])
    picture = phantom.render(
        patient, pose, phase, without, arguments["target"], arguments["size"]
    ).image[:, None]  # fmt: skip
    if picture.shape[-1] == size:
        return picture
    soft = F.interpolate(picture.float(), (size, size), mode="bilinear", antialias=True)
    return soft.round().clamp(0, 255).to(torch.uint8)


def truth(sample: Sample, least: float = 0.005, progress: str | None = None) -> Truth | None:
    """The sample's `Truth`, every structure that fills `least` of the sector taken away in turn.

    None where the data carry no truth (a real scan). Raises ValueError where the phantom no longer
    draws the frames that lie in the folder.
    """
    if (card := _card(sample.folder)) is None:
        return None
    arguments, names = card

    def of_scan(scan: str) -> tuple[NDArray, NDArray, Tensor, list]:
        where = np.flatnonzero(sample.scan == scan)
        with np.load(sample.folder / scan / "truth.npz") as told:
            rows = pd.Index(told["frames"]).get_indexer(sample.frame[where])
            pose, phase, labels = (told[k][rows] for k in ("pose", "phase", "labels"))

        def draw(rows, without: str | None = None) -> Tensor:
            at = torch.from_numpy(pose[rows]), torch.from_numpy(phase[rows])
            return _drawn(arguments, scan, *at, without, sample.images.shape[-1])

        gone = []
        for number, name in enumerate(names, 1):
            area = (labels == number).sum((1, 2)) / (labels > 0).sum((1, 2))
            if len(there := np.flatnonzero(area >= least)):
                gone.append((name, where[there], draw(there, name)))
        return where, labels, draw(slice(None)), gone

    scans = np.unique(sample.scan)
    sector(arguments["size"])  # made once, before the threads ask for it
    with crew(torch.get_num_threads()) as pool:
        found = tqdm(pool.map(of_scan, scans), progress, len(scans), leave=False,
                     disable=progress is None)  # fmt: skip
        where, labels, whole, gone = zip(*found, strict=True)
    order = np.argsort(np.concatenate(where))
    whole = torch.cat(whole)[order]
    difference = (whole.float() - sample.images.float()).abs().mean()
    if difference > 2:
        raise ValueError(
            f"{sample.folder}: the phantom draws other frames now (mean difference "
            f"{difference:.1f} grey levels); generate the folder anew"
        )
    kept = {}
    for name in names:
        parts = [(rows, pictures) for part in gone for n, rows, pictures in part if n == name]
        if parts:
            rows, pictures = np.concatenate([r for r, _ in parts]), torch.cat([p for _, p in parts])
            if not torch.equal(pictures, whole[rows]):  # what lies between all others cannot go
                kept[name] = rows, pictures
    return Truth(torch.from_numpy(np.concatenate(labels)[order]), names, whole, kept)


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


class Anatomy(NamedTuple):
    """A phantom's truth on a grid of cells, by `structures`, both [N, structures, h, w]. `filled`:
    share of a cell's pixels that a structure visibly fills; those in a rib's shadow count for none.
    `dose`: how far a cell's picture changes when the structure goes, mean |difference| in grey
    levels, on the structure and wherever it threw a shadow; nan where it was not taken away."""

    structures: tuple[str, ...]
    filled: Tensor
    dose: Tensor

    def take(self, rows: slice | Sequence[int]) -> "Anatomy":
        """The anatomy of fewer frames."""
        return Anatomy(self.structures, self.filled[rows], self.dose[rows])


def anatomy(truth: Truth, grid: tuple[int, int]) -> Anatomy:
    """The `Anatomy` of a truth's frames on a grid (h, w)."""
    names, lit = truth.structures, truth.labels.clone()
    if "ribs" in names:
        lit[shadow(truth.labels, names.index("ribs") + 1)] = 0
    numbers = range(1, len(names) + 1)
    filled = [F.adaptive_avg_pool2d((lit == i).float(), grid) for i in numbers]
    dose = torch.full((len(lit), len(names), *grid), torch.nan)
    for name, (where, pictures) in truth.gone.items():
        change = (pictures.float() - truth.whole[where].float()).abs()
        dose[where, names.index(name)] = F.adaptive_avg_pool2d(change, grid)[:, 0]
    return Anatomy(names, torch.stack(filled, 1), dose)


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


def partial_rank(one: ArrayLike, other: ArrayLike, given: ArrayLike, least: int = 5) -> NDArray:
    """Spearman correlation [N] along the rows of [N, K] with the linear effect of the ranks of
    `given` taken out of both; entries that are nan in any are left out.

    0 where `given` explains all of `one`: it tells nothing more. nan where it explains all of
    `other`, so that there is nothing to tell, or where fewer than `least` entries are left.
    """
    values = np.stack([np.asarray(v, dtype=float) for v in (one, other, given)])  # [3, N, K]
    seen = np.isfinite(values).all(0)
    ranks = rankdata(np.where(seen, values, np.nan), axis=2, nan_policy="omit")
    a, b, g = np.where(seen, ranks - np.nanmean(ranks, 2, keepdims=True), 0)
    power = (g**2).sum(1, keepdims=True)
    a, b = (v - g * (v * g).sum(1, keepdims=True) / np.maximum(power, 1e-9) for v in (a, b))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    told = (a * b).sum(1) / np.maximum(size, 1e-9)
    enough = (seen.sum(1) >= least) & ((b**2).sum(1) > 1e-6)
    return np.where(enough, np.where((a**2).sum(1) > 1e-6, told, 0), np.nan)


def against_truth(grid: Tensor, known: Anatomy, moved: Tensor) -> dict[str, NDArray]:
    """How maps [N, h, w] agree with the anatomy, and with what moves the answer, `moved`
    [N, structures]. Arrays [N], nan where a frame cannot tell.

    mass: the share of the map's magnitude that lies on the heart, over the heart's share of the
    visible area. rank: of as many top cells as are mostly heart, the share that are. pointing: the
    top cell is mostly heart. decisive: it holds a part of the structure that moves the answer most,
    ribs left out for the shadow they throw elsewhere.
    counterfactual: over a frame's structures, does the answer move more than the change of the
    picture bids where the map is strong? `partial_rank` of sum(|map| · dose), what the map says of
    the cells that change, and |change of the answer|, given sum(dose). Without the last, more
    picture changed means more of any map and more change of the answer, and a random map scores
    well. Magnitudes, since in the mean a map of random cells then says no more than an even one,
    which scores 0; sums with signs would not, for they cancel the more the more cells there are.
    """
    structures, filled, dose = known
    size = grid.abs()[:, None] * (filled.sum(1, keepdim=True) > 0)
    on = (size * filled).sum((2, 3))  # [N, structures], what the map says of each
    area, heart = filled.sum((2, 3)), [name not in AROUND for name in structures]
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
    flat = torch.where(grid.flatten(1).std(1) > 0, 0.0, torch.nan)  # no top cell: nan
    seen = torch.where(count > 0, 0.0, torch.nan)  # no heart in the picture: nan
    effective = torch.where(effect[:, usable].isfinite().any(1), 0.0, torch.nan)
    told = (grid.abs()[:, None] * dose).sum((2, 3))
    return {
        "mass": (share / (area[:, heart].sum(1) / area.sum(1)) + seen).numpy(),
        "rank": ((hits & among).sum(1) / count + flat).numpy(),
        "pointing": (hits[:, 0] + flat + seen).numpy(),
        "decisive": ((there[:, 0] > 0.05) + flat + effective).numpy(),
        "counterfactual": partial_rank(told, effect, dose.sum((2, 3))),
    }


def by_structure(grid: Tensor, known: Anatomy, group: NDArray, moved: Tensor) -> pd.DataFrame:
    """What maps [N, h, w] say of each structure that is seen, and what happens without it, `moved`
    [N, structures]: group, frame, structure, measure, value.

    mass: the map's share over the area's share. told: the map's mean magnitude where the picture
    changes, over its mean. Both are 1 as the size bids. moved: |change of the answer| in its unit
    for one grey level of change in the mean over the picture.
    """
    structures, filled, dose = known
    on, area = (grid.abs()[:, None] * filled).sum((2, 3)), filled.sum((2, 3))
    share, total = area / area.sum(1, keepdim=True).clamp_min(1e-9), dose.sum((2, 3))
    values = {
        "mass": on / on.sum(1, keepdim=True) / share,
        "told": (grid.abs()[:, None] * dose).sum((2, 3)) / total / grid.abs().mean((1, 2))[:, None],
        "moved": moved.abs() / (total / grid[0].numel()),
    }
    frame, structure = np.nonzero((share > 0.005).numpy())
    table = pd.concat(
        pd.DataFrame({
            "group": group[frame], "frame": frame,
            "structure": np.array(structures)[structure], "measure": measure,
            "value": value[frame, structure].numpy(),
        })
        for measure, value in values.items()
    )  # fmt: skip
    return table[np.isfinite(table["value"])]


def sweep(sample: Sample, axis: str, offsets: Sequence[float], number: int = 0) -> Tensor | None:
    """Frames uint8 [K, 1, S, S] of one of the sample's patients, the probe `offsets` (mm or deg)
    from the target plane along one axis; None where the data are no phantom's."""
    if (card := _card(sample.folder)) is None:
        return None
    pose = torch.zeros(len(offsets), 6)
    pose[:, poses.AXES.index(axis)] = torch.tensor(list(offsets), dtype=torch.float32)
    scan = np.unique(sample.scan)[number]
    return _drawn(card[0], scan, pose, 0.0, None, sample.images.shape[-1])


def showing(known: Truth, names: Sequence[str]) -> dict[str, int]:
    """For each structure by name, the number of the frame that shows most of it; those in none are
    left out."""
    found = {}
    for name in names:
        area = (known.labels == known.structures.index(name) + 1).sum((1, 2))
        if area.max() > 0:
            found[name] = int(area.argmax())
    return found


def nearest(sample: Sample, count: int) -> list[int]:
    """Numbers of the frames nearest to the target plane (mm and degrees alike), one of each group
    first."""
    table = pd.DataFrame({"group": sample.group, "away": sample.pose.norm(dim=1).numpy()})
    table["turn"] = table.groupby("group")["away"].rank(method="first")
    return table.sort_values(["turn", "away"]).index[:count].tolist()
