"""Other formats -> the transitions layout: a clip of frames, a track of poses, and what joins them.

    clip = read_clip("sweep/frames")                 # read_sequence and read_hdf5 return both
    track = read_track("sweep/poses.csv", ["x", "y", "z"], ["qx", "qy", "qz", "qw"], "xyzw")
    sweep = join(clip, track)                        # the frames that have a valid pose
    pose = relative(sweep, target="last")            # P_target^-1 P in mm and degrees
    write_scan("data/own/scan_a", sweep, pose)

Matrices [..., 4, 4] take points of the probe's marker into the frame of the tracker, in mm.
pydicom, av and h5py (the extra `import`) are loaded where their format is read.
"""

import importlib
import io
import json
import logging
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from dreamer import poses
from dreamer.images import Grey, blacken, find_fan, read_image, summary, to_grey, to_square
from dreamer.records import RECORDS, count, doubts, natural, parse_units

log = logging.getLogger(__name__)

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".wmv", ".mpg", ".mpeg")
DICOMS = (".dcm", ".dicom", ".ima")
PIXELS = {"MET_UCHAR": "u1", "MET_USHORT": "u2", "MET_SHORT": "i2"}
FARTHEST = 1e4  # mm from the tracker; beyond, a sample is invalid (trackers write 1e30 and alike)
# From the project's axes (x lateral, y elevation, z depth) to an image's (right, down, into it).
IMAGE_AXES = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], float)


@dataclass(frozen=True)
class Clip:
    """Frames in the order of time: `read(i)` decodes one (`dreamer.images.Grey`), best in rising
    order; `names` are unique, `times` in seconds or None."""

    names: list[str]
    times: NDArray[np.float64] | None
    read: Callable[[int], Grey]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Track:
    """Samples of a tracker: `pose` [K, 4, 4], `valid` [K]; `times` in seconds and frame `names`
    where they were recorded."""

    pose: NDArray[np.float64]
    valid: NDArray[np.bool_]
    times: NDArray[np.float64] | None = None
    names: list[str] | None = None


@dataclass(frozen=True)
class Sweep:
    """Frames `index` [F] of a clip with their poses [F, 4, 4]; `dropped` counts what has none."""

    clip: Clip
    index: NDArray[np.int64]
    pose: NDArray[np.float64]
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the frames."""
        return [self.clip.names[i] for i in self.index]

    @property
    def times(self) -> NDArray[np.float64] | None:
        """Seconds [F], or None."""
        return None if self.clip.times is None else self.clip.times[self.index]


def _library(name: str):
    """An optional library, or ImportError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is needed: pip install -e '.[import]'") from error


# Clips


def read_clip(source: str | Path, bits: int = 0, times: str = "", time_unit: str = "ms") -> Clip:
    """Frames of a folder of images or DICOM files, a video, a DICOM cine loop or a TIFF stack.

    `bits` in use of 16-bit images. `times="name"`: file names end in time stamps in `time_unit`;
    else times are those of the video or DICOM file, if any. Raises ValueError for other files.
    """
    source = Path(source)
    if source.is_dir():
        clip = _folder(source, bits)
    elif not source.is_file():
        raise FileNotFoundError(f"images: no file or folder {source}")
    elif source.suffix.lower() in VIDEOS:
        clip = _video(source)
    elif source.suffix.lower() in DICOMS or _is_dicom(source):
        clip = _dicom(source)
    elif source.suffix.lower() in (*IMAGES, ".gif"):
        clip = _stack(source, bits)
    else:
        raise ValueError(f"images: {source.name} is no image, video or DICOM file")
    if times == "name":
        numbers = [re.findall(r"\d+(?:\.\d+)?", name) for name in clip.names]
        if not all(numbers):
            raise ValueError(f"images: {clip.names[0]} holds no time stamp; leave times empty")
        seconds = np.array([float(found[-1]) for found in numbers]) * SECONDS[time_unit]
        order = np.argsort(seconds, kind="stable")
        names = [clip.names[i] for i in order]
        return Clip(names, seconds[order], lambda i: clip.read(order[i]))
    return clip


def _numbered(frames: int) -> list[str]:
    return [f"frame_{i:05d}" for i in range(frames)]


def _folder(folder: Path, bits: int) -> Clip:
    files = [file for file in folder.iterdir() if file.is_file() and file.name[0] != "."]
    files.sort(key=lambda file: natural(file.name))
    images = [file for file in files if file.suffix.lower() in (*IMAGES, *DICOMS)]
    twice = [stem for stem, n in Counter(f.stem for f in images).items() if n > 1]
    if not images or twice:
        what = f"{twice[0]} in several formats" if twice else f"no image ({', '.join(IMAGES)})"
        raise ValueError(f"images: {folder} holds {what}; give a folder with one file per frame")
    if len(files) > len(images):
        log.warning("%s: %s ignored", folder, count(len(files) - len(images), "other file"))
    if images[0].suffix.lower() in DICOMS:
        pydicom = _library("pydicom")
        numbers = [
            pydicom.dcmread(f, stop_before_pixels=True).get("InstanceNumber") for f in images
        ]
        if None not in numbers:
            images = [images[i] for i in np.argsort(numbers, kind="stable")]
        return Clip([f.stem for f in images], None, lambda i: _dicom(images[i]).read(0))
    return Clip([f.stem for f in images], None, lambda i: read_image(images[i], bits))


def _stack(file: Path, bits: int) -> Clip:
    image = Image.open(file)

    def read(number: int) -> Grey:
        image.seek(number)
        return to_grey(image.copy(), bits)

    return Clip(_numbered(getattr(image, "n_frames", 1)), None, read)


class _Frames:
    """Frames of a video by number: decodes forwards, and from the start again to go back."""

    def __init__(self, file: Path):
        self.file, self.next, self.decoded = file, 0, None

    def __call__(self, number: int) -> Grey:
        if self.decoded is None or number < self.next:
            container = _library("av").open(str(self.file))
            self.next, self.decoded = 0, container.decode(video=0)
        for frame in self.decoded:
            self.next += 1
            if self.next > number:
                return to_grey(frame.to_image())
        raise ValueError(f"{self.file}: frame {number} cannot be decoded")


def _video(file: Path) -> Clip:
    with _library("av").open(str(file)) as container:
        packets = [p for p in container.demux(video=0) if p.pts is not None]
        times = np.sort([float(p.pts * p.time_base) for p in packets])
    return Clip(_numbered(len(times)), times - times[0], _Frames(file))


def _is_dicom(file: Path) -> bool:
    with open(file, "rb") as content:
        return content.read(132)[128:] == b"DICM"


def _dicom(file: Path) -> Clip:
    pydicom = _library("pydicom")
    from pydicom.pixels import pixel_array

    data = pydicom.dcmread(file)
    frames = int(data.get("NumberOfFrames") or 1)
    kind = data.get("PhotometricInterpretation", "")
    if kind == "PALETTE COLOR" or "PixelData" not in data:
        raise ValueError(f"{file}: pixels of type {kind or 'none'}; export grey levels or RGB")
    step, vector, rate = (data.get(n) for n in ("FrameTime", "FrameTimeVector", "CineRate"))
    times = None
    if vector is not None and len(vector) == frames:
        times = np.cumsum(np.array(vector, float)) / 1000
    elif step or rate:
        times = np.arange(frames) * (float(step) / 1000 if step else 1 / float(rate))

    def read(number: int) -> Grey:
        values = pixel_array(data, index=number if frames > 1 else None)  # colours become RGB
        if kind == "MONOCHROME1":  # white is 0
            values = 2**data.BitsStored - 1 - values
        return to_grey(values, data.BitsStored)

    return Clip(_numbered(frames), times, read)


# Tracks


def read_track(
    file: str | Path,
    position: Sequence[str | int],
    rotation: Sequence[str | int],
    kind: str,
    units: str = "mm deg",
    time: str | int | None = None,
    time_unit: str = "ms",
    status: str | int | None = None,
    ok: Sequence[str | int] = (0, "OK"),
    frame: str | int | None = None,
) -> Track:
    """Poses of a tracker's log: CSV (comma, semicolon, tab) or columns between blanks.

    Args:
        file: the log; a header line is recognised, lines that begin with # or % are skipped.
        position: columns of x, y, z, by name or by number from 0; empty with `kind="matrix"`.
        rotation: columns of the rotation.
        kind: "xyzw" or "wxyz" (quaternion), "rotvec", "matrix" (12 or 16 columns, row by row), or
            the order of Euler angles as scipy writes it: "xyz" about fixed axes, "XYZ" about the
            body's own.
        units: of positions (mm, cm, m) and angles (deg, rad).
        time, time_unit: column of time stamps, and s, ms, us or ns.
        status, ok: column of the tracker's status, and its values for valid samples.
        frame: column of the frame's name.

    Names of columns may be empty where there are none. Samples with another status, missing or
    absurd numbers, or without a rotation are not valid. Raises ValueError for unknown columns and
    matrices that are no rigid motions.
    """
    time, status, frame = (None if column == "" else column for column in (time, status, frame))
    table = _read_table(Path(file), [*position, *rotation, time, status, frame])

    def numbers(columns: Sequence[str | int]) -> NDArray[np.float64]:
        picked = [pd.to_numeric(_column(table, c), errors="coerce") for c in columns]
        return np.stack(picked, 1).astype(float) if picked else np.zeros((len(table), 0))

    values = numbers([*position, *rotation])
    valid = np.isfinite(values).all(1)
    if status is not None:
        valid &= _is_ok(_column(table, status), ok)
    split = len(position)
    pose, valid = _matrices(values[:, :split], values[:, split:], kind, valid, units)
    times = names = None
    if time is not None:
        times = numbers([time])[:, 0] * SECONDS[time_unit]
        valid &= np.isfinite(times)
    if frame is not None:
        names = [Path(name.strip()).stem for name in _column(table, frame)]
    return Track(pose, valid, times, names)


def _is_ok(status: pd.Series, ok: Sequence[str | int]) -> NDArray[np.bool_]:
    """Which samples have a status among `ok`, as text or as a number."""
    wanted = pd.Series([str(value) for value in ok])
    as_numbers = pd.to_numeric(wanted, errors="coerce").dropna()
    found = pd.to_numeric(status, errors="coerce").isin(as_numbers)
    return (status.str.strip().isin(wanted) | found).to_numpy()


def _read_table(file: Path, columns: Sequence[str | int | None]) -> pd.DataFrame:
    """The log as text, with a header where columns have names or the first line has no number."""
    raw = file.read_bytes()
    wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = raw.decode("utf-16" if wide else "utf-8-sig", errors="replace")
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] not in "#%"]
    if not lines:
        raise ValueError(f"tracking: {file} is empty")
    separator = next((mark for mark in "\t;," if mark in lines[0]), r"\s+")
    if separator != ",":  # then a comma can only be a decimal one
        lines = [re.sub(r"(\d),(\d)", r"\1.\2", line) for line in lines]
    words = re.split(separator, lines[0].strip())
    named = any(isinstance(column, str) for column in columns)
    header = 0 if named or pd.to_numeric(pd.Series(words), errors="coerce").isna().all() else None
    return pd.read_csv(
        io.StringIO("\n".join(line.strip() for line in lines)), sep=separator, header=header,
        dtype=str, keep_default_na=False, skipinitialspace=True, engine="python", index_col=False,
    )  # fmt: skip


def _column(table: pd.DataFrame, name: str | int) -> pd.Series:
    if isinstance(name, int) and -table.shape[1] <= name < table.shape[1]:
        return table.iloc[:, name]
    wanted = str(name).strip().casefold()
    found = [c for c in table.columns if str(c).strip().casefold() == wanted]
    if isinstance(name, int) or len(found) != 1:
        listed = ", ".join(map(str, table.columns))
        raise ValueError(f"tracking: no column {name!r} among {table.shape[1]}: {listed}")
    return table[found[0]]


def _matrices(
    position: NDArray,
    rotation: NDArray,
    kind: str,
    valid: NDArray[np.bool_],
    units: str = "mm deg",
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Poses [K, 4, 4] in mm, the identity where there is none; which samples are valid."""
    length, angle = parse_units(units)
    euler = re.fullmatch("[xyz]{3}|[XYZ]{3}", kind) is not None
    wanted = {"xyzw": (4,), "wxyz": (4,), "rotvec": (3,), "matrix": (12, 16)}
    wanted = (3,) if euler else wanted.get(kind, ())
    if rotation.shape[1] not in wanted or position.shape[1] != (0 if kind == "matrix" else 3):
        raise ValueError(
            f"tracking: {position.shape[1]} columns of position and {rotation.shape[1]} of "
            f"rotation do not fit {kind!r}; known are xyzw, wxyz, rotvec, matrix (12 or 16 "
            "columns, no position) and orders of Euler angles such as xyz or ZYX"
        )
    pose = np.tile(np.eye(4), (len(rotation), 1, 1))
    rigid = valid.copy()
    if not valid.any():
        return pose, rigid
    if kind in ("xyzw", "wxyz"):
        size = np.linalg.norm(np.nan_to_num(rotation), axis=1)
        rigid &= np.abs(size - 1) < 0.05  # trackers write zeros for what they do not see
        turn = Rotation.from_quat(rotation[rigid], scalar_first=kind == "wxyz")
    elif kind == "matrix":
        rows = rotation.reshape(len(rotation), -1, 4)
        determinant = np.linalg.det(np.nan_to_num(rows[:, :3, :3]))
        rigid &= np.abs(determinant) > 1e-6
        check_rigid(rows[rigid], "tracking")
        turn, position = Rotation.from_matrix(rows[rigid, :3, :3]), rows[:, :3, 3]
    elif kind == "rotvec":
        turn = Rotation.from_rotvec(rotation[rigid] * angle, degrees=True)
    else:
        turn = Rotation.from_euler(kind, rotation[rigid] * angle, degrees=True)
    pose[rigid, :3, :3] = turn.as_matrix()
    pose[rigid, :3, 3] = position[rigid] * length
    return pose, rigid & (np.abs(pose[:, :3, 3]).max(1) < FARTHEST)


def check_rigid(matrices: NDArray, where: str) -> None:
    """Raises ValueError unless all [N, 3 or 4, 4] are rotations with a translation."""
    turn = matrices[:, :3, :3]
    off = np.abs(turn @ turn.swapaxes(1, 2) - np.eye(3)).max((1, 2)) > 1e-2
    off |= np.linalg.det(turn) < 0
    if matrices.shape[1] == 4:
        off |= np.abs(matrices[:, 3] - [0, 0, 0, 1]).max(1) > 1e-6
    if off.any():
        raise ValueError(
            f"{where}: matrix {int(off.argmax())} is no rigid motion (scaled, mirrored, or written "
            "column by column: then list its columns in the order of its rows)"
        )


def read_sequence(
    file: str | Path, transform: str = "", reference: str = "", bits: int = 0
) -> tuple[Clip, Track]:
    """Clip and track of a PlusToolkit or 3D Slicer IGT sequence (.mha, .igs.mha, .mhd).

    `transform`, for example "ProbeToTracker", may be left out where there is one. `reference`, for
    example "ReferenceToTracker": a marker on the patient, whose frame the poses are then in.
    Samples whose status is not OK are not valid. Raises ValueError for other files.
    """
    file = Path(file)
    header, frames, start = _read_header(file)
    try:
        size = [int(n) for n in header["DimSize"].split()]
        kind = np.dtype(PIXELS[header["ElementType"]])
    except KeyError as error:
        raise ValueError(f"{file}: no image sequence of 8 or 16 bits ({error})") from error
    big = "TRUE" in (header.get(f"{n}ByteOrderMSB", "").upper() for n in ("Element", "BinaryData"))
    kind = kind.newbyteorder(">" if big else "<")
    channels = int(header.get("ElementNumberOfChannels", 1))
    shape = (size[2], size[1], size[0], channels) if channels > 1 else size[::-1]
    data = file if start is not None else file.with_name(header["ElementDataFile"])
    if header.get("CompressedData", "").upper() == "TRUE":
        content = zlib.decompress(data.read_bytes()[start or 0 :])
        images = np.frombuffer(content, kind).reshape(shape)
    else:
        images = np.memmap(data, kind, "r", offset=start or 0, shape=tuple(shape))

    orientation = header.get("UltrasoundImageOrientation", "MF")
    if not re.fullmatch("[MU][FN]A?", orientation):
        raise ValueError(f"{file}: images of orientation {orientation}; MF, MN, UF, UN are known")
    down = slice(None, None, -1 if orientation[1] == "N" else 1)  # to marked side, far from probe
    right = slice(None, None, -1 if orientation[0] == "U" else 1)

    known = sorted({n[: -len("Transform")] for f in frames for n in f if n.endswith("Transform")})
    transform = transform or (known[0] if len(known) == 1 else "")
    for name in filter(None, (transform or "?", reference)):
        if name not in known:
            raise ValueError(f"{file}: transform {name}? It holds {', '.join(known) or 'none'}")
    pose, valid = _tracked(frames, transform)
    if reference:
        marker, seen = _tracked(frames, reference)
        pose, valid = np.linalg.inv(marker) @ pose, valid & seen
    valid &= np.array([f.get("ImageStatus", "OK").upper() in ("OK", "VALID") for f in frames])
    times = None
    if all("Timestamp" in f for f in frames):
        times = np.array([float(f["Timestamp"]) for f in frames])
    names = _numbered(len(frames))
    clip = Clip(names, times, lambda i: to_grey(np.ascontiguousarray(images[i][down, right]), bits))
    return clip, Track(pose, valid, times, names)


def _read_header(file: Path) -> tuple[dict[str, str], list[dict[str, str]], int | None]:
    """Fields of a MetaImage, those of each frame, and where its pixels begin (None: elsewhere)."""
    header: dict[str, str] = {}
    with open(file, "rb") as content:
        for line in content:
            name, _, value = line.decode("utf-8", "replace").partition("=")
            header[name.strip()] = value.strip()
            if name.strip() == "ElementDataFile":
                break
        start = content.tell() if header.get("ElementDataFile", "").upper() == "LOCAL" else None
    if "ElementDataFile" not in header or len(header.get("DimSize", "").split()) != 3:
        raise ValueError(f"{file}: no MetaImage of frames (width, height, number)")
    frames: list[dict[str, str]] = [{} for _ in range(int(header["DimSize"].split()[2]))]
    for name, value in header.items():
        if match := re.fullmatch(r"Seq_Frame(\d+)_(\w+)", name):
            frames[int(match[1])][match[2]] = value
    return header, frames, start


def _tracked(frames: list[dict[str, str]], name: str) -> tuple[NDArray, NDArray[np.bool_]]:
    """Matrices [N, 4, 4] of one transform of a sequence, and which of them are valid."""
    status = [frame.get(f"{name}TransformStatus", "OK").upper() == "OK" for frame in frames]
    texts = [frame.get(f"{name}Transform", "") for frame in frames]
    values = [np.array(text.split(), float) if text else np.full(16, np.nan) for text in texts]
    rows = np.stack(values)
    valid = np.array(status) & np.isfinite(rows).all(1)
    return _matrices(rows[:, :0], rows, "matrix", valid)


def read_hdf5(
    file: str | Path, frames: str = "frames", transforms: str = "tforms", bits: int = 0
) -> tuple[Clip, Track]:
    """Clip and track of an HDF5 file as in TUS-REC: `frames` [N, H, W], `transforms` [N, 4, 4] from
    the marker to the tracker in mm. Raises ValueError for other content."""
    content = _library("h5py").File(file, "r")
    if missing := {frames, transforms} - set(content):
        raise ValueError(f"{file}: no {', '.join(missing)}; it holds {', '.join(content)}")
    images, rows = content[frames], np.asarray(content[transforms], float)
    if images.ndim < 3 or rows.shape != (len(images), 4, 4):
        raise ValueError(f"{file}: frames {images.shape} and poses {rows.shape} do not correspond")
    valid = np.isfinite(rows).all((1, 2))
    pose, valid = _matrices(rows[:, 0, :0], rows.reshape(-1, 16), "matrix", valid)
    names = _numbered(len(images))
    clip = Clip(names, None, lambda i: to_grey(images[i], bits))
    return clip, Track(pose, valid, None, names)


# From tracker coordinates to transitions


def read_calibration(source: str | Path | ArrayLike) -> NDArray[np.float64]:
    """The rigid part [4, 4] of a calibration image -> marker, from a file or numbers.

    A file holds four rows of four numbers (text and other lines are skipped), or eight: pixels to
    mm, then mm to the marker, as in TUS-REC. Millimetres per pixel are divided out. Raises
    ValueError where it is no rotation after that.
    """
    if isinstance(source, str | Path):
        lines = [
            re.split(r"[,;\s]+", s.strip(" ,;\t")) for s in Path(source).read_text().splitlines()
        ]
        rows = [pd.to_numeric(pd.Series(line), errors="coerce") for line in lines if len(line) == 4]
        source = [row for row in rows if row.notna().all()]
    matrix = np.array(source, float).reshape(-1, 4, 4)
    matrix = matrix[0] if len(matrix) == 1 else matrix[1] @ matrix[0]
    scale = np.linalg.norm(matrix[:3, :3], axis=0)
    if not np.allclose(scale, 1, atol=1e-3):
        log.warning("calibration: a scale of %s is divided out", scale.round(4))
        matrix[:3, :3] /= scale
    check_rigid(matrix[None], "calibration")
    return matrix


def join(clip: Clip, track: Track, largest_gap: float = 0.05, delay: float = 0.0) -> Sweep:
    """Frames with their poses: by frame name, else by time, else one to one in order.

    By time, a frame takes the valid sample nearest to its time + `delay`, at most `largest_gap`
    seconds away. Raises ValueError where numbers or times do not correspond.
    """
    dropped = {"invalid samples": int((~track.valid).sum())}
    if track.names is not None:
        at = {track.names[i]: i for i in np.flatnonzero(track.valid)}
        if len(at) < track.valid.sum():
            twice = Counter(np.array(track.names)[track.valid].tolist()).most_common(1)[0][0]
            raise ValueError(f"frame {twice} has two samples; match by time, or remove one")
        sample = np.array([at.get(name, -1) for name in clip.names])
    elif clip.times is not None and track.times is not None:
        frames = pd.DataFrame({"time": clip.times + delay, "frame": range(len(clip))})
        samples = pd.DataFrame({"time": track.times, "sample": range(len(track.times))})
        found = pd.merge_asof(
            frames.sort_values("time"), samples[track.valid].sort_values("time"), on="time",
            direction="nearest", tolerance=largest_gap,
        )  # fmt: skip
        sample = found.sort_values("frame")["sample"].fillna(-1).to_numpy(int)
    elif len(clip) == len(track.pose):
        sample = np.where(track.valid, np.arange(len(clip)), -1)
    else:
        raise ValueError(
            f"{len(clip)} frames and {len(track.pose)} samples; match them by time or frame name"
        )
    index = np.flatnonzero(sample >= 0)
    dropped["frames without a pose"] = len(clip) - len(index)
    if len(index) < 2:
        spans = [
            f"{what} {t.min():.3f} to {t.max():.3f} s"
            for what, t in (("frames", clip.times), ("samples", track.times))
            if t is not None
        ]
        raise ValueError(
            f"{len(index)} of {len(clip)} frames have a valid pose ({'; '.join(spans)}); check "
            "time columns and units, delay, largest gap, and the status column"
        )
    return Sweep(clip, index, track.pose[sample[index]], dropped)


def relative(
    sweep: Sweep,
    target: str | int | Sequence[float] = "last",
    calibration: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Poses [F, 6] relative to the target plane, P_target^-1 P, in mm and degrees.

    `target`: "last", a frame's name, its number in the clip, or a pose in the tracker's frame (six
    numbers in mm and degrees). With a calibration, axes are those of the image (x lateral, y
    elevation, z depth); without one, those of the marker. Raises ValueError for an unknown frame.
    """
    to_marker = np.eye(4) if calibration is None else calibration @ IMAGE_AXES
    pose = sweep.pose @ to_marker
    if not isinstance(target, str | int):
        goal = poses.to_matrix(torch.tensor(target, dtype=torch.float64)).numpy()
    else:
        names, numbers = sweep.names, sweep.index.tolist()
        if target == "last":
            at = len(names) - 1
        elif target in numbers:
            at = numbers.index(target)
        elif str(target) in names:
            at = names.index(str(target))
        else:
            raise ValueError(f"target: no frame {target} with a pose; {names[0]} to {names[-1]}")
        goal = pose[at]
    return poses.from_matrix(torch.from_numpy(np.linalg.inv(goal) @ pose)).numpy()


def pair(sweep: Sweep, gaps: Sequence[int] = (1,)) -> NDArray[np.int64]:
    """Pairs [N, 2] of the sweep's frames that lie as many frames of the clip apart."""
    place = {frame: at for at, frame in enumerate(sweep.index.tolist())}
    pairs = [(at, place.get(frame + gap)) for frame, at in place.items() for gap in gaps]
    pairs = [(first, second) for first, second in pairs if second is not None]
    if not pairs:
        raise ValueError(f"gaps {list(gaps)}: no two frames with a pose are so far apart")
    return np.array(pairs)


def check(sweep: Sweep, pose: NDArray[np.float64]) -> tuple[pd.DataFrame, list[str]]:
    """A table per frame (pose, step from the frame before, speed), and warnings in words."""
    table = pd.DataFrame(pose, columns=list(poses.AXES))
    table.insert(0, "frame", sweep.names)
    motion = poses.relative(torch.from_numpy(pose[:-1]), torch.from_numpy(pose[1:]))
    step = poses.errors(motion, torch.zeros_like(motion))
    table["step_mm"] = np.append(np.nan, step.translation)
    table["step_deg"] = np.append(np.nan, step.rotation)
    warnings = []

    def warn(found: pd.Series, noun: str, text: str) -> None:
        if number := int(found.sum()):
            warnings.append(f"{count(number, noun)} {text}")

    if sweep.times is not None:
        table.insert(1, "time_s", sweep.times)
        table["gap_s"] = table["time_s"].diff()
        table["speed_mm_s"] = table["step_mm"] / table["gap_s"].where(table["gap_s"] > 0)
        usual = table["gap_s"].median()
        warn(table["gap_s"] <= 0, "frame", "not later than the one before")
        warn(table["gap_s"] > 5 * usual, "gap", f"over five times the usual {usual:.3g} s")
        warn(table["speed_mm_s"] > 500, "step", "faster than 500 mm/s: invalid samples?")
    warn(table["step_mm"] > 30, "step", "longer than 30 mm: invalid samples, or gaps?")
    warn(table["step_deg"] > 30, "step", "of more than 30 degrees: another order of angles?")
    still = (table["step_mm"] < 1e-6) & (table["step_deg"] < 1e-5)
    warn(still, "frame", "with exactly the pose of the one before: does the tracker lag?")
    warn(table["pitch"].abs() > 80, "pose", "with a pitch near 90 degrees, where roll and yaw "
         "describe the same rotation")  # fmt: skip
    lost = sweep.dropped.get("frames without a pose", 0)
    if lost > 0.1 * len(sweep.clip):
        warnings.append(f"{lost} of {len(sweep.clip)} frames without a pose")
    warnings += doubts(pose)
    return table, warnings


def write_scan(
    folder: str | Path,
    sweep: Sweep,
    pose: NDArray[np.float64],
    gaps: Sequence[int] = (1,),
    square: str = "pad",
    mask: Sequence[Sequence[int]] = (),
    bits: int = 0,
    source: str = "",
    force: bool = False,
) -> list[str]:
    """Write a sweep as one scan of the transitions layout; returns what was changed, in words.

    `pose` [F, 6] as `relative` returns it; `gaps`: frames between the two of a pair; `square` and
    `mask` as `dreamer.images.Reading`. The scan appears whole or not at all, and replaces an
    earlier import. Raises FileExistsError where `folder` is anything else, ValueError where units
    look wrong, unless `force`.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "import.json").is_file():
        raise FileExistsError(f"{folder} exists and is no import; choose another name")
    if (found := doubts(pose)) and not force:
        raise ValueError("; ".join(found) + "; correct `units`, or force the import")
    pairs, names, fan = pair(sweep, gaps), sweep.names, None
    if square == "fan":
        fan = fan_of(sweep, mask)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "frames").mkdir(parents=True)
    notes, peak, shape = Counter(), 0, (0, 0)
    for number, name in zip(tqdm(sweep.index, desc="frames", delay=2), names, strict=True):
        image = sweep.clip.read(number)
        notes.update(image.notes)
        peak, shape = max(peak, image.peak), image.grey.shape
        frame = to_square(blacken(image.grey, mask), square, fan)
        Image.fromarray(frame).save(part / "frames" / f"{name}.png", compress_level=1)
    start, end = (torch.from_numpy(pose[side]) for side in pairs.T)
    motion = poses.relative(start, end).numpy()
    records = [
        {
            "frame_t1": names[a],
            "frame_t2": names[b],
            "ft1_image_path": f"frames/{names[a]}.png",
            "ft2_image_path": f"frames/{names[b]}.png",
            "at1_6dof": pose[a].tolist(),
            "action_change_6dof": change,
            "at2_6dof": pose[b].tolist(),
            "units": "mm deg",
        }
        for (a, b), change in zip(pairs.tolist(), motion.tolist(), strict=True)
    ]
    (part / RECORDS[0]).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    changes = summary(notes, peak, shape, square, bits)
    about = {"source": source, "frames": len(names), "pairs": len(pairs), "changes": changes}
    about |= {"dropped": sweep.dropped, "gaps": list(gaps)}
    (part / "import.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(part, folder)
    return changes


def fan_of(sweep: Sweep, mask: Sequence[Sequence[int]] = (), images: int = 48) -> NDArray[np.bool_]:
    """The ultrasound sector bool [H, W] of a sweep, from some of its frames."""
    chosen = np.unique(np.linspace(0, len(sweep.index) - 1, images).astype(int))
    return find_fan(blacken(sweep.clip.read(i).grey, mask) for i in sweep.index[chosen])
