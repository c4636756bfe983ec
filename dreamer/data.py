"""Recorded or synthetic transitions: read, checked as a whole, split without leaks, normalised.

Layout (published with Cardiac-Dreamer): `<folder>/<scan>/transitions_dataset.json`, or
`<folder>/<patient>/<scan>/...`, is a list of records {frame_t1, frame_t2, ft1_image_path,
ft2_image_path, at1_6dof, action_change_6dof, at2_6dof}; poses in mm and degrees relative to the
target plane; image paths relative to the scan, with either slash. `action_change_6dof` is at2 - at1
element by element, or the motion P1^-1 P2. data/README.md describes it in full.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dreamer import poses
from dreamer.images import Reading, store_frames
from dreamer.records import (
    TOLERANCE,
    DataError,
    as_text,
    count,
    find_patients,
    find_scans,
    folds,
    load_reading,
    natural,
    patients_of,
    read_scan,
    report,
)

__all__ = [
    "Batch", "DataError", "Reading", "Split", "Statistics", "Transitions", "find_patients",
    "find_scans", "folds", "mean_pose", "split_by_blocks", "split_by_patient", "statistics",
]  # fmt: skip

log = logging.getLogger(__name__)


class Statistics(NamedTuple):
    """Means and spreads of the training part: grey levels in [0, 1], poses in mm and degrees."""

    image_mean: float
    image_std: float
    pose_mean: Sequence[float]
    pose_std: Sequence[float]
    action_std: Sequence[float]

    @classmethod
    def identity(cls) -> "Statistics":
        """Statistics that change nothing."""
        return cls(0.0, 1.0, [0.0] * 6, [1.0] * 6, [1.0] * 6)


class Batch(NamedTuple):
    """`image1`, `image2` uint8 [B, 1, S, S]; `pose1`, `action`, `pose2` float [B, 6] mm, deg."""

    image1: Tensor
    image2: Tensor
    pose1: Tensor
    action: Tensor
    pose2: Tensor


class Split(NamedTuple):
    """Indices of transitions for training, validation and test, and how they were drawn."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]
    kind: str


class Transitions(Dataset):
    """All transitions of a folder of scans, checked as a whole before anything else happens.

    N transitions over M different images: `pose1`, `action` (the motion P1^-1 P2), its inverse
    `undone`, `pose2` float32 [N, 6] in mm and degrees; `rows` [N, 2] into `frames` uint8
    [M, S, S] (memory-mapped, S is `image_size` or the frames' own); `scan`, `patient`, `motion`
    [N], `frame` [N, 2] texts, `frame_id` [N, 2] their numbers; `blank` [M], images of a single
    grey level; `digest` of images and poses.

    Args:
        folder: of scans, see `find_scans`.
        image_size: pixels that frames are brought to.
        patients: scan -> patient; without it as `find_patients`.
        cache: folder for decoded frames, see `dreamer.images.cache_folder`.
        reading: fields of `dreamer.images.Reading`, where the folder differs from the layout, over
            those of <folder>/reading.yaml.

    Raises DataError with every problem found, FileNotFoundError without a folder, OSError where
    the disk is too full for the decoded frames.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int | None = None,
        patients: Mapping[str, str] | None = None,
        cache: str | Path | None = None,
        reading: Reading | Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        self.reading, stated = load_reading(self.folder, reading)
        scans = find_scans(self.folder)
        problems: list[str] = []
        owner = patients_of(list(scans), patients or stated, problems)
        read = [read_scan(n, file, self.reading, problems) for n, file in scans.items()]
        read = [scan for scan in read if scan is not None]
        # First frames before second ones, of which most are the former again.
        paths = [pair[side] for side in (0, 1) for scan in read for pair in scan.paths]
        owners = [scan.name for _ in (0, 1) for scan in read for _ in scan.paths]
        ids: dict[tuple[str, str], int] = {}
        frame_id = [
            [ids.setdefault((scan.name, frame), len(ids)) for frame in pair]
            for scan in read
            for pair in scan.frames
        ]
        stored = store_frames(
            self.folder, paths, owners, len(ids), image_size, self.reading, problems, cache
        )
        if stored is None:
            raise DataError(self.folder, problems)

        row_of = dict(zip(paths, stored.rows, strict=True))
        self.frames, self.blank = stored.frames, stored.blank
        self.rows = np.array([[row_of[p] for p in pair] for scan in read for pair in scan.paths])
        both = torch.from_numpy(np.concatenate([scan.pose for scan in read]))
        self.pose1, self.pose2 = both[:, 0].float(), both[:, 1].float()
        self.action = poses.relative(both[:, 0], both[:, 1]).float()
        self.undone = poses.inverse(self.action)
        self.scan = np.array([scan.name for scan in read for _ in scan.paths])
        self.patient = np.array([owner[name] for name in self.scan])
        self.frame = np.array([pair for scan in read for pair in scan.frames])
        self.frame_id = np.array(frame_id)
        self.motion = np.array([motion for scan in read for motion in scan.motion])
        content = hashlib.blake2b(stored.digest.encode() + both.numpy().tobytes(), digest_size=12)
        self.digest = content.hexdigest()
        self._check_frames(both.flatten(0, 1), problems)
        self._check_copies(both.flatten(0, 1).numpy(), problems)
        if problems:
            raise DataError(self.folder, problems)
        if self.blank.any():
            blank = count(np.unique(self.frame_id[self.blank[self.rows]]), "frame")
            log.warning("%s: %s of a single grey level", folder, blank)

    def __len__(self) -> int:
        return len(self.rows)

    def _check_frames(self, pose: Tensor, problems: list[str]) -> None:
        """A frame's name stands for one pose and one image in all records of its scan."""
        ids, rows = self.frame_id.ravel(), self.rows.ravel()
        _, first = np.unique(ids, return_index=True)
        first = first[ids]
        gap = poses.errors(pose, pose[first])
        moved = ((gap.translation > TOLERANCE) | (gap.rotation > TOLERANCE)).numpy()
        start = {scan: np.flatnonzero(self.scan == scan)[0] for scan in set(self.scan)}
        for wrong, what in ((moved, "poses"), (rows != rows[first], "images")):
            once = np.unique(ids[wrong], return_index=True)[1]
            for here in np.flatnonzero(wrong)[once]:
                scan = self.scan[here // 2]
                places = [f"record {at // 2 - start[scan]}" for at in (first[here], here)]
                problems.append(
                    f"scan {scan}, frame {self.frame.ravel()[here]}: two {what}, in "
                    f"{places[0]} and {places[1]}; give each frame one, or two names"
                )

    def _check_copies(self, pose: NDArray, problems: list[str]) -> None:
        """No image in scans of two patients, and no scan under two names."""
        names, scan = np.unique(self.scan.repeat(2), return_inverse=True)
        frames = np.unique(np.stack([self.frame_id.ravel(), scan], 1), axis=0)
        size, rows = np.bincount(frames[:, 1]), self.rows.ravel()
        owner = dict(zip(self.scan.tolist(), self.patient.tolist(), strict=True))
        for pair, shared in _shared(rows, scan, ~self.blank[rows]).items():
            one, two = names[list(pair)]
            at = [np.flatnonzero((rows == shared[0]) & (scan == number))[0] for number in pair]
            text = (
                f"scans {one} and {two} share {count(shared, 'image')}, for example frame "
                f"{' and frame '.join(self.frame.ravel()[at])}; remove the copy"
            )
            if owner[one] != owner[two]:
                text += f", or give both to one patient (now {owner[one]} and {owner[two]})"
            elif 2 * len(shared) <= size[list(pair)].min():
                log.warning("%s", text)
                continue
            report([text], self.reading, problems)
        _, same = np.unique(pose.round(6), axis=0, return_inverse=True)
        for pair, shared in _shared(same.ravel(), scan, pose.any(1)).items():
            if 2 * len(shared) > size[list(pair)].min():
                one, two = names[list(pair)]
                text = "scans %s and %s share %s: is one a copy of the other?"
                log.warning(text, one, two, count(shared, "pose"))

    def images(self, rows: NDArray[np.int64]) -> Tensor:
        """Frames uint8 [B, 1, S, S] by their rows."""
        return torch.from_numpy(self.frames[rows])[:, None]

    def singles(self, indices: NDArray[np.int64]) -> tuple[NDArray, Tensor, NDArray]:
        """The different frames among transitions: rows [K], poses [K, 6], a transition of each."""
        _, first = np.unique(self.frame_id[indices].ravel(), return_index=True)
        first.sort()
        origin, side = np.asarray(indices)[first // 2], first % 2
        pose = torch.stack((self.pose1[origin], self.pose2[origin]), 1)
        return self.rows[origin, side], pose[range(len(side)), side], origin

    def batch(
        self,
        indices: NDArray[np.int64],
        identity: NDArray[np.bool_] | None = None,
        reverse: NDArray[np.bool_] | None = None,
    ) -> Batch:
        """Transitions as a `Batch`: time-reversed where `reverse`; then, where `identity`, the
        second frame is the first and the action 0."""
        first, second = self.rows[indices].T
        pose1, action, pose2 = self.pose1[indices], self.action[indices], self.pose2[indices]
        if reverse is not None:
            back = torch.from_numpy(reverse)[:, None]
            first, second = np.where(reverse, second, first), np.where(reverse, first, second)
            pose1, pose2 = torch.where(back, pose2, pose1), torch.where(back, pose1, pose2)
            action = torch.where(back, self.undone[indices], action)
        if identity is not None:
            second = np.where(identity, first, second)
            still = torch.from_numpy(identity)[:, None]
            action, pose2 = torch.where(still, 0.0, action), torch.where(still, pose1, pose2)
        return Batch(self.images(first), self.images(second), pose1, action, pose2)


def _shared(
    values: NDArray, owners: NDArray, counts: NDArray[np.bool_]
) -> dict[tuple[int, int], list[int]]:
    """For each pair of owners the values that both have, where `counts`."""
    pairs = np.unique(np.stack([values, owners], 1)[counts], axis=0)
    twice = np.flatnonzero(np.bincount(pairs[:, 0])[pairs[:, 0]] > 1)
    several: dict[int, list[int]] = {}
    for value, owner in pairs[twice].tolist():
        several.setdefault(value, []).append(owner)
    shared: dict[tuple[int, int], list[int]] = {}
    for value, among in several.items():
        for pair in combinations(among, 2):
            shared.setdefault(pair, []).append(value)
    return shared


# Splits


def split_by_patient(
    data: Transitions,
    val: int | Sequence[str],
    test: int | Sequence[str],
    seed: int = 0,
) -> Split:
    """Whole patients to validation and test: named, or a number drawn with `seed`; others train.

    Raises ValueError when a patient is named twice or not in the data, when none is left for a
    part, and when two parts share an image.
    """
    known = sorted(set(data.patient.tolist()))
    drawn = list(np.random.default_rng(seed).permutation(known))
    wanted = {"test": test, "val": val}
    groups = {
        part: [as_text(name) for name in names]
        for part, names in wanted.items()
        if not isinstance(names, int)
    }
    for name, group in groups.items():
        if absent := sorted(set(group) - set(known)):
            raise ValueError(f"{name}: no patient {', '.join(absent)} in {data.folder}")
        drawn = [patient for patient in drawn if patient not in group]
    for name, number in wanted.items():
        if isinstance(number, int):
            groups[name], drawn = drawn[:number], drawn[number:]
    if both := sorted(set(groups["val"]) & set(groups["test"])):
        raise ValueError(f"patient {', '.join(both)} is in both validation and test")
    groups["train"] = drawn
    if empty := [name for name, group in groups.items() if not group]:
        raise ValueError(
            f"{data.folder} has {len(known)} patients, and none is left for {', '.join(empty)}; "
            "ask for fewer to validate and test, at least one each, or use split: blocks"
        )
    parts = [np.flatnonzero(np.isin(data.patient, groups[n])) for n in ("train", "val", "test")]
    return _without_leaks(data, Split(*parts, kind="patient"))


def split_by_blocks(data: Transitions, blocks: int = 30, gap: int = 2) -> Split:
    """Each scan's frames cut in time into `blocks`, of every six one to validate and one to test.

    `gap` frames are dropped on either side of a cut between parts, where near-copies would meet, as
    are transitions that join two parts. For a single scan only: what it measures is interpolation.
    Raises ValueError if nothing is left, or two parts share an image.
    """
    deal = np.array([0, 2, 0, 0, 1, 0])  # train, test, train, train, validate, train
    part_of = np.full(data.frame_id.max() + 1, -1)
    for scan in dict.fromkeys(data.scan):
        order = _in_time(data, np.flatnonzero(data.scan == scan))
        part = np.concatenate([
            np.full(len(block), deal[number % len(deal)])
            for number, block in enumerate(np.array_split(order, blocks))
        ])  # fmt: skip
        kept = part.copy()
        for cut in np.flatnonzero(np.diff(part)) + 1:
            kept[max(cut - gap, 0) : cut + gap] = -1
        part_of[order] = kept
    first, second = part_of[data.frame_id].T
    own = np.where(first == second, first, -1)
    parts = [np.flatnonzero(own == number) for number in range(3)]
    if blocks < len(deal) or not all(map(len, parts)):
        train, val, test = map(len, parts)
        raise ValueError(
            f"{blocks} blocks with a gap of {gap} leave train {train}, val {val}, test {test} of "
            f"{len(data)} transitions; at least 6 blocks, or a smaller gap, are needed"
        )
    log.warning("split: %d of %d transitions dropped at cuts", (own < 0).sum(), len(data))
    return _without_leaks(data, Split(*parts, kind="blocks"))


def _in_time(data: Transitions, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """`frame_id` of a scan's frames in the order of time: that of the records or of the names,
    whichever makes the probe's path shorter."""
    _, pose, _ = data.singles(indices)
    ids, first = np.unique(data.frame_id[indices].ravel(), return_index=True)
    names = data.frame[indices].ravel()[np.sort(first)]
    by_name = sorted(range(len(names)), key=lambda number: natural(names[number]))

    def length(order: list[int]) -> float:
        step = pose[order].diff(dim=0)
        return float(torch.cat((step[:, :3], poses.wrap(step[:, 3:])), 1).norm(dim=1).sum())

    return ids[np.argsort(first)][min((list(range(len(names))), by_name), key=length)]


def _without_leaks(data: Transitions, split: Split) -> Split:
    """The split. Raises ValueError where a frame, or another with the same image, is in two parts.

    Images of a single grey level do not count.
    """
    for one, other in combinations(("train", "val", "test"), 2):
        rows = [np.unique(data.rows[getattr(split, part)]) for part in (one, other)]
        both = np.intersect1d(*rows)
        both = both[~data.blank[both]]
        if len(both):
            places = np.argwhere(data.rows == both[0])
            at, side = places[0]
            raise ValueError(
                f"{data.folder}: both {one} and {other} hold {count(both, 'image')}, for example "
                f"frame {data.frame[at, side]} of scan {data.scan[at]}; remove the copies, keep "
                "their scans in one part (patients: ...), or choose other blocks"
            )
    return split


def statistics(data: Transitions, indices: NDArray[np.int64]) -> Statistics:
    """Means and spreads over the transitions `indices` (the training part) and their frames.

    Means of angles are circular. An axis that never moves keeps a spread of one, so that it is
    neither scaled up nor divided by zero.
    """
    levels, counts = np.arange(256) / 255, np.zeros(256)
    for rows in np.array_split(np.unique(data.rows[indices]), max(1, len(indices) // 64)):
        counts += np.bincount(data.frames[rows].ravel(), minlength=256)
    mean = np.average(levels, weights=counts)
    variance = np.average((levels - mean) ** 2, weights=counts)
    pose = torch.cat((data.pose1[indices], data.pose2[indices])).double()
    centre = mean_pose(pose)
    away = pose - centre
    away[:, 3:] = poses.wrap(away[:, 3:])

    def spread(values: Tensor) -> list[float]:
        std = values.pow(2).mean(0).sqrt()
        return torch.where(std > 1e-6, std, 1.0).tolist()

    return Statistics(
        float(mean),
        float(np.sqrt(max(variance, 1e-8))),
        centre.tolist(),
        spread(away),
        spread(data.action[indices].double()),
    )


def mean_pose(pose: Tensor) -> Tensor:
    """Mean [6] of poses [N, 6]; angles are averaged around the circle.

    Where no angle is farther than 180 degrees from the others' direction, this is their mean.
    """
    angles = torch.deg2rad(pose[:, 3:])
    centre = torch.rad2deg(torch.atan2(angles.sin().mean(0), angles.cos().mean(0)))
    centre = poses.wrap(centre + poses.wrap(pose[:, 3:] - centre).mean(0))
    return torch.cat((pose[:, :3].mean(0), centre))
