"""Recorded or synthetic transitions: read, checked as a whole, split without leaks, normalised.

Layout (published with Cardiac-Dreamer): `<folder>/<scan>/transitions_dataset.json` is a list of
records {frame_t1, frame_t2, ft1_image_path, ft2_image_path, at1_6dof, action_change_6dof,
at2_6dof}; poses in mm and degrees relative to the target plane; image paths relative to the scan,
with either slash. `action_change_6dof` is at2 - at1 element by element, or the motion P1^-1 P2.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from dreamer import poses

log = logging.getLogger(__name__)

RECORDS = "transitions_dataset.json"
IMAGES, FRAMES = ("ft1_image_path", "ft2_image_path"), ("frame_t1", "frame_t2")
VECTORS = ("at1_6dof", "action_change_6dof", "at2_6dof")
TOLERANCE = 1e-2  # mm and degrees: how far a recorded action may lie from its two poses


class DataError(ValueError):
    """A folder of scans that cannot be used; the text lists its problems, file by file."""

    def __init__(self, folder: Path, problems: Sequence[str]):
        shown = "\n".join(f"  - {text}" for text in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"{folder}: {len(problems)} {noun}\n{shown}{more}")


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


def _vector(record: dict, field: str) -> list[float] | None:
    value = record.get(field)
    if not isinstance(value, list) or len(value) != 6:
        return None
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    return value if numbers and np.isfinite(value).all() else None


def _read_records(path: Path, problems: list[str]) -> list[dict]:
    """The records of one scan that are complete; what is wrong with the others is noted."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not valid JSON ({error}); write it again")
        return []
    if not isinstance(records, list) or not records:
        problems.append(f"{path}: expected a list of records and at least one")
        return []
    good = []
    for number, record in enumerate(records):
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            problems.append(f"{where}: expected an object, got {type(record).__name__}")
            continue
        names = [f for f in IMAGES + FRAMES if not isinstance(record.get(f), str)]
        vectors = [f for f in VECTORS if _vector(record, f) is None]
        problems += [f"{where}, {f}: missing, or not a text" for f in names]
        problems += [f"{where}, {f}: six finite numbers are needed" for f in vectors]
        if not names and not vectors:
            good.append(record)
    return good


def _check_actions(path: Path, vectors: NDArray, problems: list[str]) -> None:
    """`vectors` [N, 3, 6]: start, recorded action, end. One convention must fit all of a scan."""
    start, action, end = torch.from_numpy(vectors).unbind(1)

    def misfit(expected: Tensor) -> Tensor:
        gap = action - expected
        return torch.cat((gap[:, :3], poses.wrap(gap[:, 3:])), 1).abs().amax(1)

    gaps = [misfit(end - start), misfit(poses.relative(start, end))]
    if all((gap > TOLERANCE).any() for gap in gaps):
        worst = min(gaps, key=lambda gap: (gap > TOLERANCE).sum())
        number = int(worst.argmax())
        problems.append(
            f"{path}, record {number}, action_change_6dof: off by {worst[number]:.3g} from "
            "at2 - at1 and no P1^-1 P2 either; record one of the two, in mm and degrees"
        )


class Transitions(Dataset):
    """All transitions of a folder of scans, checked as a whole before anything else happens.

    N transitions over M distinct frames: `pose1`, `action` (the motion P1^-1 P2), its inverse
    `undone`, `pose2` float32 [N, 6] in mm and degrees; `rows` [N, 2] into `frames` uint8
    [M, S, S] (memory-mapped, S is `image_size` or the frames' own); `scan`, `patient`, `motion`
    [N], `frame` [N, 2] texts; `digest` of the pictures. `patients` maps scan -> patient; without
    it a scan is a person.
    Raises DataError with every problem found, FileNotFoundError without a folder, OSError where
    the disk is too full for the decoded frames.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int | None = None,
        patients: Mapping[str, str] | None = None,
        cache: str | Path | None = None,
    ):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"data: no folder {self.folder}; see data/README.md")
        scans = sorted(p.parent for p in self.folder.glob(f"*/{RECORDS}"))
        scans = [s for s in scans if not s.name.startswith((".", "_"))]
        if not scans:
            raise DataError(self.folder, [f"no scans: no */{RECORDS} in it; see data/README.md"])
        problems: list[str] = []
        names = {scan.name for scan in scans}
        if patients is not None and (missing := sorted(names - set(patients))):
            problems.append(f"patients: no patient given for scan {', '.join(missing)}")
        if patients is None:
            log.warning("%s: each of the %d scans counts as one person", folder, len(scans))

        kept, vectors, paths = [], [], []
        for scan in scans:
            records = _read_records(scan / RECORDS, problems)
            if not records:
                continue
            values = np.array([[r[f] for f in VECTORS] for r in records], dtype=np.float64)
            _check_actions(scan / RECORDS, values, problems)
            vectors.append(values)
            kept += [(scan.name, record) for record in records]
            named = [record[field] for record in records for field in IMAGES]
            home, known = scan.resolve(), {}
            found = {
                text: _image_path(scan, home, known, text, problems)
                for text in dict.fromkeys(named)
            }
            paths += [found[text] for text in named]
        rows, self.frames, self.digest = _frames(self.folder, paths, image_size, cache, problems)

        both = torch.from_numpy(np.concatenate(vectors))
        self.rows = rows.reshape(-1, 2)
        self.pose1, self.pose2 = both[:, 0].float(), both[:, 2].float()
        self.action = poses.relative(both[:, 0], both[:, 2]).float()
        self.undone = poses.inverse(self.action)
        self.scan = np.array([name for name, _ in kept])
        self.patient = np.array([(patients or {}).get(name, name) for name, _ in kept])
        self.frame = np.array([[r[f] for f in FRAMES] for _, r in kept])
        self.motion = np.array([r.get("motion", "recorded") for _, r in kept])

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, rows: NDArray[np.int64]) -> Tensor:
        """Frames uint8 [B, 1, S, S] by their rows."""
        return torch.from_numpy(self.frames[rows])[:, None]

    def singles(self, indices: NDArray[np.int64]) -> tuple[NDArray, Tensor, NDArray]:
        """The distinct frames among transitions: rows [K], poses [K, 6], a transition of each."""
        seen: dict[tuple, tuple] = {}
        for i in indices:
            for side, pose in enumerate((self.pose1[i], self.pose2[i])):
                seen.setdefault((self.scan[i], self.frame[i, side]), (self.rows[i, side], pose, i))
        rows, pose, origin = zip(*seen.values(), strict=True)
        return np.array(rows), torch.stack(pose), np.array(origin)

    def batch(
        self,
        indices: NDArray[np.int64],
        identity: NDArray[np.bool_] | None = None,
        reverse: NDArray[np.bool_] | None = None,
    ) -> Batch:
        """Transitions as a `Batch`: where `reverse`, gone through backwards; then, where
        `identity`, the second frame is the first and the action 0."""
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


def _image_path(
    scan: Path, home: Path, known: dict[str, bool], text: str, problems: list[str]
) -> str:
    """The path of an image; `known` remembers which folders lie inside the scan's `home`."""
    # As text: for thousands of frames Path takes longer than reading them.
    path = os.path.normpath(f"{scan}{os.sep}" + text.replace("\\", "/"))
    inside = path.startswith(os.path.normpath(scan) + os.sep) and not PureWindowsPath(text).anchor
    if inside:
        folder = os.path.dirname(path)
        if folder not in known:
            known[folder] = Path(folder).resolve().is_relative_to(home)
        linked = os.path.islink(path)
        inside = Path(path).resolve().is_relative_to(home) if linked else known[folder]
    if not inside:
        problems.append(f"{scan / RECORDS}: image {text} lies outside its scan; move it inside")
    return path


def _frames(
    folder: Path,
    paths: list[str],
    size: int | None,
    cache: str | Path | None,
    problems: list[str],
) -> tuple[NDArray[np.int64], NDArray[np.uint8], str]:
    """Row of each path, all distinct frames and a digest of them; decoded once for a content.

    The cache file's name carries a digest of the pictures, so a changed folder is decoded anew and
    its earlier cache goes. Equal pictures (frame 2 of a record, frame 1 of the next) are one row.
    """
    digests: dict[str, bytes] = {}
    for path in dict.fromkeys(paths):
        try:
            with open(path, "rb") as picture:
                digests[path] = hashlib.blake2b(picture.read(), digest_size=16).digest()
        except OSError:
            problems.append(f"{path}: image missing or not readable")
    distinct = {digest: path for path, digest in reversed(digests.items())}
    order = {digest: row for row, digest in enumerate(sorted(distinct))}
    key = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=6).hexdigest()
    content = hashlib.blake2b(b"".join(order), digest_size=12).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dreamer"
    root = Path(cache or os.environ.get("DREAMER_CACHE") or root)
    file = root / f"{key}-{size or 'own'}-{content}.npy"
    if problems or not file.is_file():
        frames = _decode([distinct[digest] for digest in order], size, problems)
        if problems:
            raise DataError(folder, problems)
        _store(file, frames)
        for old in root.glob(f"{key}-{size or 'own'}-*.npy"):
            if old != file:
                old.unlink(missing_ok=True)
    rows = np.array([order[digests[path]] for path in paths])
    return rows, np.load(file, mmap_mode="r"), content


def _decode(paths: list[str], size: int | None, problems: list[str]) -> NDArray[np.uint8]:
    frames, shape = [], None
    for path in paths:
        try:
            with Image.open(path) as image:
                grey = image.convert("L")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            problems.append(f"{path}: not a readable image ({error})")
            continue
        shape = shape or grey.size
        if grey.size != shape:
            problems.append(
                f"{path}: {grey.width}x{grey.height} pixels, others {shape[0]}x{shape[1]}; "
                "bring all frames to one size"
            )
        elif shape[0] != shape[1]:
            problems.append(f"{path}: {shape[0]}x{shape[1]} pixels; crop or pad to a square")
        elif not problems:
            if size and grey.width != size:
                grey = grey.resize((size, size), Image.Resampling.BILINEAR)
            frames.append(np.asarray(grey))
    return np.stack(frames) if frames and not problems else np.zeros((0, 1, 1), np.uint8)


def _store(file: Path, frames: NDArray[np.uint8]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(file.parent).free
    if free < frames.nbytes + 2**26:
        raise OSError(
            f"{file.parent}: {free / 2**20:.0f} MiB free, {frames.nbytes / 2**20 + 64:.0f} needed "
            "for the frame cache; free some, or point DREAMER_CACHE elsewhere"
        )
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as part:
        try:
            np.save(part, frames)
            part.flush()
            os.replace(part.name, file)
        except BaseException:
            os.unlink(part.name)
            raise


def split_by_patient(
    data: Transitions,
    val: int | Sequence[str],
    test: int | Sequence[str],
    seed: int = 0,
) -> Split:
    """Whole patients to validation and test: named, or a number drawn with `seed`; others train.

    Raises ValueError when a patient is named twice or not in the data, or nobody is left to train.
    """
    known = sorted(set(data.patient))
    drawn = list(np.random.default_rng(seed).permutation(known))
    named = {name: list(w) for name, w in (("test", test), ("val", val)) if not isinstance(w, int)}
    for name, group in named.items():
        if absent := sorted(set(group) - set(known)):
            raise ValueError(f"{name}: no patient {', '.join(absent)} in {data.folder}")
        drawn = [patient for patient in drawn if patient not in group]
    groups = dict(named)
    for name, wanted in (("test", test), ("val", val)):
        if isinstance(wanted, int):
            groups[name], drawn = drawn[:wanted], drawn[wanted:]
    if both := sorted(set(groups["val"]) & set(groups["test"])):
        raise ValueError(f"patient {', '.join(both)} is in both validation and test")
    groups["train"] = drawn
    if empty := [name for name, group in groups.items() if not group]:
        raise ValueError(
            f"{data.folder} has {len(known)} patients, and none is left for {', '.join(empty)}; "
            "ask for fewer to validate and test, at least one each, or use split: blocks"
        )
    parts = [np.flatnonzero(np.isin(data.patient, groups[n])) for n in ("train", "val", "test")]
    return Split(*parts, kind="patient")


def split_by_blocks(data: Transitions, blocks: int = 30, gap: int = 2) -> Split:
    """Each scan cut in time into `blocks`, of every six one to validate and one to test.

    `gap` records are dropped on either side of a cut between parts, where near-copies would meet.
    For a single scan only: what it measures is interpolation. Raises ValueError if nothing is left.
    """
    deal = ("train", "test", "train", "train", "val", "train")
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for scan in dict.fromkeys(data.scan):
        cut = np.array_split(np.flatnonzero(data.scan == scan), blocks)
        names = [deal[number % len(deal)] for number in range(blocks)]
        for number, (block, name) in enumerate(zip(cut, names, strict=True)):
            start = gap if number and names[number - 1] != name else 0
            stop = gap if number + 1 < blocks and names[number + 1] != name else 0
            parts[name] += list(block[start : len(block) - stop])
    if blocks < 6 or not all(parts.values()):
        raise ValueError(
            f"{blocks} blocks with a gap of {gap} leave "
            + ", ".join(f"{name} {len(part)}" for name, part in parts.items())
            + f" of {len(data)} transitions; at least 6 blocks, or a smaller gap, are needed"
        )
    return Split(*(np.array(parts[name]) for name in ("train", "val", "test")), kind="blocks")


def statistics(data: Transitions, indices: NDArray[np.int64]) -> Statistics:
    """Means and spreads over the transitions `indices` (the training part) and their frames.

    An axis that never moves keeps a spread of one, so that it is neither scaled up nor divided
    by zero.
    """
    rows = np.unique(data.rows[indices])
    total, squares = 0.0, 0.0
    for part in np.array_split(rows, max(1, len(rows) // 512)):
        pixels = data.frames[part].astype(np.float64) / 255
        total, squares = total + pixels.sum(), squares + (pixels**2).sum()
    count = len(rows) * data.frames[0].size
    mean = total / count
    pose = torch.cat((data.pose1[indices], data.pose2[indices])).double()

    def spread(values: Tensor) -> list[float]:
        std = values.pow(2).mean(0).sqrt()
        return torch.where(std > 1e-6, std, 1.0).tolist()

    return Statistics(
        float(mean),
        float(np.sqrt(max(squares / count - mean**2, 1e-8))),
        pose.mean(0).tolist(),
        spread(pose - pose.mean(0)),
        spread(data.action[indices].double()),
    )
