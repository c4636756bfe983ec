"""Image files -> grey, square frames uint8 [M, S, S], decoded once into a memory-mapped cache.

Nothing is scaled, cut or dropped silently: what cannot be read faithfully is refused with its file
and a remedy, and what is changed on reading (bit depth, colour, orientation, shape) is counted in
a note that is logged whenever the frames are used.
"""

import hashlib
import io
import logging
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage
from tqdm import tqdm

from dreamer.files import write_whole

log = logging.getLogger(__name__)

MODES = ("L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow's, of 8 bits
COLOUR = 32  # difference between colour channels that lossy compression of grey does not reach
SPARE = 2**26  # bytes of disk that stay free
CHUNK = 64  # files that are in memory together
SAMPLES = 64  # frames of a cache file whose checksums are compared when it is opened
FORMAT = 1  # of the cache


class Reading(BaseModel):
    """How a folder of scans is read, where it differs from the layout. Unknown fields are refused.

    `units`: of poses, for example "m rad"; empty means mm and degrees, checked for plausibility.
    `square`: rule for images that are not square: "pad" with black, "crop" to the centre, or "fan"
    (black outside the ultrasound sector, cut to its box, padded). `bits`: grey levels of 16-bit
    files are 0 to 2^bits - 1; 0 means all 16. `mask`: boxes [left, top, right, bottom] in pixels of
    the file that become black, for example a vendor's badge. `follow_links`: read images through
    links that lead out of their scan. `force`: implausible poses, shared images and copied scans
    are logged instead of refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    units: str = ""
    square: Literal["pad", "crop", "fan"] = "pad"
    bits: int = Field(0, ge=0, le=16)
    mask: tuple[tuple[int, int, int, int], ...] = ()
    follow_links: bool = False
    force: bool = False


class Grey(NamedTuple):
    """One decoded image, `grey` uint8 [H, W]; `notes` on changes; highest level if 16-bit."""

    grey: NDArray[np.uint8]
    notes: list[str]
    peak: int


class Stored(NamedTuple):
    """Decoded frames: `frames` uint8 [M, S, S] on disk, `blank` bool [M] (a single grey level),
    `rows` [K] of each path, `digest` of their content, `notes` on changes."""

    frames: NDArray[np.uint8]
    blank: NDArray[np.bool_]
    rows: NDArray[np.int64]
    digest: str
    notes: list[str]


def to_uint8(values: NDArray, bits: int = 0) -> NDArray[np.uint8]:
    """Grey levels 0 to 2^bits - 1 (0: 16 bits) as uint8, rounded; uint8 stays as it is.

    Raises ValueError for levels that are fractional, negative or above the range.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "ui" or values.dtype.itemsize > 2:
        raise ValueError(f"grey levels are {values.dtype}; write them with 8 or 16 bits")
    top = 2 ** (bits or 16) - 1
    if values.min() < 0 or values.max() > top:
        raise ValueError(
            f"grey levels {values.min()} to {values.max()} do not fit into {bits or 16} bits; "
            "state the number of bits in use (bits)"
        )
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def read_image(source: str | Path | BinaryIO, bits: int = 0) -> Grey:
    """One image file as upright grey levels. Raises ValueError where content would be lost."""
    with Image.open(source) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"holds {image.n_frames} frames; write one file per frame")
        return to_grey(image, bits)


def to_grey(image: Image.Image | NDArray, bits: int = 0) -> Grey:
    """A Pillow image, or an array [H, W] or [H, W, 3], as upright grey levels.

    Raises ValueError where content would be lost.
    """
    if not isinstance(image, Image.Image):
        if image.ndim == 2 and image.dtype != np.uint8:
            return Grey(to_uint8(image, bits), ["reduced from 16 to 8 bits"], int(image.max()))
        image = Image.fromarray(image)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode not in MODES and not deep:
        raise ValueError(f"pixels of type {image.mode}; write grey levels of 8 or 16 bits")
    if image.has_transparency_data:
        opacity = image.convert("RGBA").getchannel("A").getextrema()
        if opacity != (255, 255):
            raise ValueError("is transparent; flatten it to plain grey levels")
    turned = image.getexif().get(0x0112, 1) != 1
    notes = ["turned upright, as their EXIF orientation states"] if turned else []
    upright = ImageOps.exif_transpose(image) if turned else image
    if deep:
        found = to_grey(np.asarray(upright).astype(np.uint16), bits)
        return found._replace(notes=notes + found.notes)
    if image.mode not in ("L", "LA") and _is_coloured(upright.convert("RGB")):
        notes.append("coloured, of which only the luminance is kept")
    return Grey(np.asarray(upright.convert("L")), notes, 0)


def _is_coloured(image: Image.Image) -> bool:
    red, green, blue = (np.asarray(channel).astype(np.int16) for channel in image.split())
    apart = np.maximum(abs(red - green), abs(green - blue))
    return bool((apart > COLOUR).mean() > 0.001)


def blacken(grey: NDArray[np.uint8], boxes: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """A copy of an image with `boxes` [left, top, right, bottom] black; the image without any.

    Raises ValueError for a box that lies outside the image.
    """
    height, width = grey.shape
    grey = grey.copy() if boxes else grey
    for left, top, right, bottom in boxes:
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"mask [{left}, {top}, {right}, {bottom}] exceeds {width}x{height} px")
        grey[top:bottom, left:right] = 0
    return grey


def find_fan(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.bool_]:
    """The ultrasound sector bool [H, W]: the largest region that changes between the images.

    Badges and scales do not change; clocks and curves are smaller. Raises ValueError where nothing
    changes.
    """
    first, *others = images
    low, high = first, first
    for image in others:
        low, high = np.minimum(low, image), np.maximum(high, image)
    changes = ndimage.binary_opening(high.astype(np.int16) - low > 16)
    reach = max(2, min(changes.shape) // 50)
    changes = np.pad(changes, reach)  # so that closing erodes nothing at the border
    changes = ndimage.binary_closing(changes, iterations=reach)[reach:-reach, reach:-reach]
    regions, count = ndimage.label(changes)
    if not count:
        raise ValueError("nothing changes between the images, so that no fan is found; use pad")
    largest = 1 + np.bincount(regions.ravel())[1:].argmax()
    return ndimage.binary_fill_holes(regions == largest)


def to_square(
    grey: NDArray[np.uint8], rule: str, fan: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """A square image uint8 [S, S] by the rule "pad", "crop" or "fan" (with `fan` bool [H, W])."""
    if rule == "fan":
        if fan is None:
            raise ValueError("no fan is known for it; use square: pad or crop")
        rows, columns = np.flatnonzero(fan.any(1)), np.flatnonzero(fan.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        grey = np.where(fan, grey, 0).astype(np.uint8)[box]
    height, width = grey.shape
    if rule == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return grey[top : top + side, left : left + side]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(grey, ((top, side - height - top), (left, side - width - left)))


def cache_folder(cache: str | Path | None = None) -> Path:
    """Folder of decoded frames: `cache`, $DREAMER_CACHE, $XDG_CACHE_HOME/dreamer or
    ~/.cache/dreamer; without a home, in the system's temporary folder."""
    if named := cache or os.environ.get("DREAMER_CACHE"):
        return Path(named)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and a user that the system does not know
        home = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return home / "dreamer"


def store_frames(
    folder: Path,
    paths: Sequence[str],
    scans: Sequence[str],
    count: int,
    size: int | None,
    reading: Reading,
    problems: list[str],
    cache: str | Path | None = None,
) -> Stored | None:
    """Frames of the image files `paths`, from the cache or decoded into it; None with `problems`.

    Args:
        folder: names the cache files, one pair per folder, size and way of reading.
        paths: image files; equal images share a row.
        scans: scan of each path; a fan is found per scan.
        count: number of different frames, for the check of the disk.
        size: pixels that frames are resized to; None keeps their own.
        reading: bits, mask and square.
        problems: receives the files that cannot be used, and why.

    The cache serves while size, times and inode of every file are unchanged and samples of its
    content agree with their checksums; otherwise it is made anew. Raises OSError where the disk is
    too full.
    """
    scan_of = dict(zip(paths, scans, strict=True))
    place = {path: number for number, path in enumerate(scan_of)}
    stats = np.zeros((len(place), 4), np.int64)
    for path, number in place.items():
        try:
            found = os.stat(path)
            stats[number] = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
        except OSError:
            hint = "; its link leads nowhere: fetch its content" if os.path.islink(path) else ""
            problems.append(f"{path}: image missing or not readable{hint}")
    if problems:
        return None
    root = cache_folder(cache)
    root.mkdir(parents=True, exist_ok=True)
    key = f"{_hash(str(folder.resolve()), 6)}-{size or 'own'}-{_hash(_rules(reading), 3)}"
    index = {"format": FORMAT, "files": _hash("\n".join(place), 16), "stats": stats}
    stored = _open(root, key, index)
    if stored is None:
        _decode(root, key, index, scan_of, count, size, reading, problems)
        if problems:
            return None
        stored = _open(root, key, index)
    for note in stored.notes:
        log.warning("%s: %s", folder, note)
    return stored._replace(rows=stored.rows[[place[path] for path in paths]])


def _rules(reading: Reading) -> str:
    return reading.model_dump_json(include={"bits", "mask", "square"})


def _hash(content: str, size: int) -> str:
    content = content.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def _open(root: Path, key: str, index: dict) -> Stored | None:
    """The cached frames that fit `index`; None where there are none, or they are broken."""
    try:
        with np.load(root / f"{key}.npz", allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
        if not all(np.array_equal(found[name], value) for name, value in index.items()):
            return None
        digest, shape = str(found["digest"]), tuple(found["shape"].tolist())
        file = root / f"{key}-{digest}.raw"
        if file.stat().st_size != np.prod(shape):
            raise ValueError(f"{file.name} has another size")
        frames = np.memmap(file, np.uint8, "r", shape=shape)
        if not np.array_equal(_checksums(frames), found["checksums"]):
            raise ValueError(f"{file.name} has another content")
        return Stored(frames, found["blank"], found["rows"], digest, found["notes"].tolist())
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a broken file makes its reader raise
        log.warning("frame cache %s is broken (%s); it is made anew", root / key, error)
        return None


def _checksums(frames: NDArray[np.uint8]) -> NDArray[np.int64]:
    chosen = np.unique(np.linspace(0, len(frames) - 1, SAMPLES).astype(int))
    return np.array([zlib.crc32(frames[row].tobytes()) for row in chosen])


class _Frame(NamedTuple):
    """A frame as it is stored; digest and shape of its image before it became square."""

    frame: NDArray[np.uint8]
    digest: bytes
    shape: tuple[int, int]
    notes: list[str]
    peak: int


def _frame(content: bytes, size: int | None, reading: Reading, fan) -> _Frame:
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("a Git LFS pointer; fetch its content with git lfs pull")
    image = read_image(io.BytesIO(content), reading.bits)
    grey = blacken(image.grey, reading.mask)
    frame = to_square(grey, reading.square, fan)
    if size and len(frame) != size:
        resized = Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR)
        frame = np.asarray(resized)
    return _Frame(frame, _blake(grey.tobytes()), grey.shape, image.notes, image.peak)


def _blake(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _in_threads(work: Callable, items: Sequence, description: str) -> Iterator[tuple]:
    """(item, result or exception) in order, with a progress bar; few results wait in memory."""

    def attempt(item):
        try:
            return work(item)
        except Exception as error:  # a decoder raises anything on a broken file
            return error

    bar = tqdm(total=len(items), desc=description, unit="file", delay=2)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            yield from zip(chunk, pool.map(attempt, chunk), strict=True)
            bar.update(len(chunk))


def _fans(scan_of: dict[str, str], reading: Reading) -> dict[str, NDArray[np.bool_]]:
    """The fan of each scan, from up to 48 of its images."""
    fans = {}
    for scan in dict.fromkeys(scan_of.values()):
        paths = [path for path, owner in scan_of.items() if owner == scan]
        chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, 48).astype(int))]
        try:
            images = [read_image(path, reading.bits).grey for path in chosen]
            fans[scan] = find_fan(blacken(image, reading.mask) for image in images)
        except Exception as error:  # a broken file is named when its turn comes
            log.warning("scan %s: no fan found (%s)", scan, error)
    return fans


def _decode(
    root: Path,
    key: str,
    index: dict,
    scan_of: dict[str, str],
    count: int,
    size: int | None,
    reading: Reading,
    problems: list[str],
) -> None:
    """Decode the images into the cache as they come, or note the problems of those that fail."""
    fans = _fans(scan_of, reading) if reading.square == "fan" else {}
    row_of_file: dict[bytes, int] = {}
    row_of_image: dict[bytes, int] = {}
    rows, blank, notes, peak, first = [], [], Counter(), 0, None

    def load(path: str) -> tuple[bytes, _Frame | None]:
        content = Path(path).read_bytes()
        file = _blake(content)
        known = file in row_of_file  # frame 2 of a record is often frame 1 of the next
        return file, None if known else _frame(content, size, reading, fans.get(scan_of[path]))

    with _partial(root) as part:
        for path, loaded in _in_threads(load, list(scan_of), "frames"):
            if isinstance(loaded, Exception):
                problems.append(f"{path}: not a readable image ({loaded})")
                continue
            file, image = loaded
            if image is not None:
                first = first or image
                if (image.shape, len(image.frame)) != (first.shape, len(first.frame)):
                    problems.append(
                        f"{path}: {_pixels(image.shape)} pixels, others {_pixels(first.shape)}; "
                        "bring all frames to one size"
                    )
                if not blank:
                    _refuse_full_disk(root, count * image.frame.size)
                if image.digest not in row_of_image and not problems:
                    part.write(image.frame.tobytes())
                    blank.append(bool(image.frame.min() == image.frame.max()))
                    notes.update(image.notes)
                    peak = max(peak, image.peak)
                row_of_file[file] = row_of_image.setdefault(image.digest, len(row_of_image))
            rows.append(row_of_file[file])
        if problems:
            return
        part.flush()
        frames = np.memmap(part.name, np.uint8, "r", shape=(len(blank), *first.frame.shape))
        digest = _hash(_rules(reading) + b"".join(sorted(row_of_image)).hex(), 12)
        index = index | {
            "rows": np.array(rows),
            "blank": np.array(blank),
            "shape": np.array(frames.shape),
            "digest": digest,
            "checksums": _checksums(frames),
            "notes": np.array(
                summary(notes, peak, first.shape, reading.square, reading.bits), dtype=str
            ),
        }
        os.replace(part.name, root / f"{key}-{digest}.raw")
    content = io.BytesIO()
    np.savez(content, **index)
    write_whole(root / f"{key}.npz", content.getvalue())
    for old in root.glob(f"{key}-*.raw"):
        if old.name != f"{key}-{digest}.raw":
            old.unlink(missing_ok=True)


@contextmanager
def _partial(root: Path) -> Iterator[BinaryIO]:
    """A file to write beside the cache; it goes unless it is renamed."""
    with tempfile.NamedTemporaryFile(dir=root, suffix=".part", delete=False) as part:
        try:
            yield part
        finally:
            Path(part.name).unlink(missing_ok=True)


def _refuse_full_disk(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed + SPARE:
        raise OSError(
            f"{root}: {free / 2**20:.0f} MiB free, {(needed + SPARE) / 2**20:.0f} needed for the "
            "frame cache; free some, or point DREAMER_CACHE elsewhere"
        )


def summary(
    notes: Counter, peak: int, shape: tuple[int, int], square: str, bits: int = 0
) -> list[str]:
    """What was changed in images [H, W] when they were read, in words."""
    changes = [f"{number} of the images: {note}" for note, number in notes.items()]
    if peak and not bits and peak < 2**12:
        changes.append(
            f"no 16-bit image exceeds grey level {peak} of 65535, so frames are dark; if fewer "
            f"bits are in use, state them (bits: {max(peak.bit_length(), 8)})"
        )
    if square == "fan" or shape[0] != shape[1]:
        rule = {
            "pad": "padded to a square with black",
            "crop": "cropped to their central square",
            "fan": "black outside the fan, cut to its box and padded to a square",
        }
        changes.append(f"images of {_pixels(shape)} pixels are {rule[square]}")
    return changes


def _pixels(shape: tuple[int, int]) -> str:
    return f"{shape[1]}x{shape[0]}"
