"""The transitions layout on disk: find scans, read their records, check poses, units and names.

What is wrong is noted with file, record, field and remedy, so that all of it is shown at once; what
is changed on reading is logged. data/README.md describes the layout.
"""

import json
import logging
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from dreamer.images import Reading

log = logging.getLogger(__name__)

RECORDS = ("transitions_dataset.json", "transitions_dataset.jsonl")
IMAGES, FRAMES = ("ft1_image_path", "ft2_image_path"), ("frame_t1", "frame_t2")
VECTORS = ("at1_6dof", "action_change_6dof", "at2_6dof")
LENGTHS = {"mm": 1.0, "cm": 10.0, "m": 1000.0}  # in mm
ANGLES = {"deg": 1.0, "rad": 180 / math.pi}  # in degrees
TOLERANCE = 1e-2  # mm and degrees: how far a recorded action may lie from its two poses
FARTHEST = 2000.0  # mm from the target plane
WIDEST = 1080.0  # degrees: three turns
METRES = 0.5  # a scan that stays within as many mm was probably recorded in metres


class DataError(ValueError):
    """A folder of scans that cannot be used; the text lists its problems, file by file."""

    def __init__(self, folder: Path, problems: Sequence[str]):
        shown = "\n".join(f"  - {text}" for text in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"{folder}: {len(problems)} {noun}\n{shown}{more}")


def find_scans(folder: str | Path) -> dict[str, Path]:
    """The file of records of each scan, by the scan's name `scan` or `patient/scan`.

    `folder` holds the scans, up to three levels deep, or is a scan itself. Hidden folders and those
    that begin with "_" are skipped. Raises FileNotFoundError without a folder, DataError without
    scans.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data: no folder {folder}; see data/README.md")
    for name in RECORDS:
        if (folder / name).is_file():
            log.warning("%s is a scan itself; it is read as the only one", folder)
            return {folder.resolve().name: folder / name}
    found = {}
    for pattern in ("*", "*/*", "*/*/*"):
        for name in RECORDS:
            for file in sorted(folder.glob(f"{pattern}/{name}")):
                scan = file.parent.relative_to(folder)
                if not any(part.startswith((".", "_")) for part in scan.parts):
                    found.setdefault(scan.as_posix(), file)
    if not found:
        other = [str(f.relative_to(folder)) for f in sorted(folder.glob("*/*.json*"))[:3]]
        hint = f"; if {', '.join(other)} holds records, rename it {RECORDS[0]}" if other else ""
        raise DataError(
            folder,
            [f"no scans: no {RECORDS[0]} in its sub-folders{hint}; notebook 00_import brings other "
             "formats into this layout, see data/README.md"],
        )  # fmt: skip
    return dict(sorted(found.items()))


def find_patients(folder: str | Path, patients: Mapping[str, str] | None = None) -> dict[str, str]:
    """The patient of each scan: by `patients` or the folder's reading.yaml, else the sub-folder
    that holds the scan, else the scan itself. Raises DataError where the mapping lacks a scan."""
    _, stated = load_reading(folder)
    scans, problems = find_scans(folder), []
    found = patients_of(list(scans), patients or stated, problems)
    if problems:
        raise DataError(Path(folder), problems)
    return found


def load_reading(
    folder: str | Path, reading: Reading | Mapping[str, Any] | None = None
) -> tuple[Reading, dict | None]:
    """How a folder is read, and its patients: `reading`, over what <folder>/reading.yaml states.

    Links are followed on request of the reader alone (DREAMER_FOLLOW_LINKS=1, or a field of
    `reading`), not of the folder. Raises ValueError for unknown fields.
    """
    file, stated = Path(folder, "reading.yaml"), {}
    if file.is_file():
        try:
            stated = yaml.safe_load(file.read_text(encoding="utf-8-sig")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{file}: not valid YAML ({error})") from error
        if not isinstance(stated, dict) or "follow_links" in stated:
            raise ValueError(f"{file}: expected fields of dreamer.images.Reading but follow_links")
    patients = stated.pop("patients", None)
    if isinstance(reading, Reading):
        reading = reading.model_dump(exclude_unset=True)
    if os.environ.get("DREAMER_FOLLOW_LINKS") == "1":
        stated["follow_links"] = True
    return Reading(**(stated | dict(reading or {}))), patients


def folds(patients: Any, k: int) -> list[dict[str, list[str]]]:
    """`k` folds over patients, each {"test": [...], "val": [...]}: every patient is tested once.

    `patients`: the data (`Transitions`), a mapping scan -> patient (`find_patients`) or names. The
    patients of the next fold validate. Raises ValueError unless 3 <= k <= number of patients.
    """
    if isinstance(patients, Mapping):
        patients = patients.values()
    names = sorted({str(name) for name in getattr(patients, "patient", patients)})
    if not 3 <= k <= len(names):
        raise ValueError(f"{k} folds need 3 or more, and at least as many patients ({len(names)})")
    return [{"test": names[n::k], "val": names[(n + 1) % k :: k]} for n in range(k)]


def as_text(name: Any) -> str:
    """An identifier as text, whatever its type, blanks and way of writing accents."""
    return unicodedata.normalize("NFC", str(name)).strip()


def count(items: Sized | int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    number = items if isinstance(items, int | np.integer) else len(items)
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def natural(name: str) -> list:
    """A key that sorts names by the numbers in them: frame_2 before frame_10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def patients_of(scans: list[str], patients: Mapping | None, problems: list[str]) -> dict[str, str]:
    if not patients:
        deep = [scan for scan in scans if scan.count("/") > 1]
        if deep:
            problems.append(f"{deep[0]}: name the patient of each scan (patients: ...)")
        if all("/" not in scan for scan in scans):
            log.warning("patients: each of %s counts as one patient", count(scans, "scan"))
        return {scan: as_text(scan.split("/")[0]) for scan in scans}
    given = {as_text(scan): as_text(name) for scan, name in patients.items() if name is not None}
    odd = [repr(scan) for scan in patients if not isinstance(scan, str)]
    missing = [scan for scan in scans if as_text(scan) not in given]
    if missing:
        hint = (
            f"; {', '.join(odd)} is no text: YAML reads names such as 0513_01, 12:30 or no as "
            "numbers or switches, quote them ('0513_01': ...)"
        )
        named = f"patients: no patient given for scan {', '.join(missing)}"
        problems.append(named + (hint if odd else ""))
    if absent := sorted(set(given) - {as_text(scan) for scan in scans}):
        log.warning("patients: no scan is named %s", ", ".join(absent))
    similar = {}
    for name in dict.fromkeys(given.values()):
        if (other := similar.setdefault(name.casefold(), name)) != name:
            problems.append(f"patients: {other} and {name} differ only in case; write them alike")
    return {scan: given.get(as_text(scan), "") for scan in scans}


def parse_units(units: str) -> tuple[float, float]:
    """Factors to mm and degrees of units such as "m rad". Raises ValueError for others."""
    words = units.replace(",", " ").split()
    lengths, angles = ([w for w in words if w in known] for known in (LENGTHS, ANGLES))
    if (len(lengths), len(angles), len(words)) != (1, 1, 2):
        raise ValueError(
            f"units {units!r}: give a length ({', '.join(LENGTHS)}) and an angle "
            f"({', '.join(ANGLES)}), for example 'mm deg'"
        )
    return LENGTHS[lengths[0]], ANGLES[angles[0]]


def _parse(path: Path, problems: list[str]) -> tuple[list, str]:
    """Records and stated units of a file: a list, an object that holds one, or JSON lines; in
    UTF-8, UTF-16 or UTF-32, with or without a byte-order mark."""
    try:
        content = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        problems.append(f"{path}: no Unicode text ({error}); save it as UTF-8")
        return [], ""
    except json.JSONDecodeError as error:
        lines = [line for line in error.doc.split("\n") if line.strip()]
        try:
            content = [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            problems.append(f"{path}: not valid JSON ({error}); write it again")
            return [], ""
    units = ""
    if isinstance(content, dict):
        units = content.get("units", "")
        lists = [value for value in content.values() if isinstance(value, list)]
        if VECTORS[0] in content:
            content = [content]
        elif content and all(isinstance(value, dict) for value in content.values()):
            content = list(content.values())
        elif len(lists) == 1:
            content = lists[0]
    if not isinstance(content, list) or not content:
        problems.append(f"{path}: expected a list of records and at least one")
        return [], ""
    return content, units


def _read_records(path: Path, problems: list[str]) -> list[dict]:
    """The records of one scan that are complete; what is wrong with the others is noted."""
    records, units = _parse(path, problems)
    good = []
    for number, record in enumerate(records):
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            problems.append(f"{where}: expected an object, got {type(record).__name__}")
            continue
        images = [f for f in IMAGES if not isinstance(record.get(f), str)]
        vectors = [f for f in VECTORS if not _is_vector(record.get(f))]
        problems += [f"{where}, {f}: missing, or not a text" for f in images]
        problems += [f"{where}, {f}: six finite numbers are needed" for f in vectors]
        if not images and not vectors:
            for name, image in zip(FRAMES, IMAGES, strict=True):
                if record.get(name) is None:  # the published description has no names
                    record[name] = PureWindowsPath(record[image]).stem
            good.append({"units": units} | record)
    return good


def _is_vector(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 6:
        return False
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    return numbers and all(map(math.isfinite, value))


# Checking poses


def doubts(pose: NDArray) -> list[str]:
    """What speaks against mm and degrees as the units of poses [..., 6], in words."""
    far, wide = np.abs(pose[..., :3]).max(), np.abs(pose[..., 3:]).max()
    found = []
    if 0 < far <= METRES:
        found.append(
            f"no position is farther than {far:.3g} mm from the target plane, so that these are "
            "probably metres ('m deg'), if not in fact millimetres ('mm deg')"
        )
    if 0 < wide <= math.pi or (0 < wide <= 2 * math.pi and pose[..., 3:].min() >= 0):
        found.append(
            f"no angle is larger than {wide:.3g} degrees, so that these are probably radians "
            "('mm rad'), if not in fact degrees ('mm deg')"
        )
    return found


def _check_units(
    path: Path, vectors: NDArray, stated: str, reading: Reading, problems: list[str]
) -> NDArray:
    """`vectors` [N, 3, 6] in mm and degrees, by stated units; implausible ones are noted."""
    scale = np.repeat(parse_units(stated or "mm deg"), 3)
    vectors = vectors * scale
    pose = vectors[:, [0, 2]]
    far, wide = np.abs(pose[..., :3]), np.abs(pose[..., 3:])
    found = []
    for values, limit, unit in ((far, FARTHEST, "mm"), (wide, WIDEST, "degrees")):
        if values.max() > limit:
            number, largest = int(values.max((1, 2)).argmax()), values.max()
            found.append(
                f"{path}, record {number}: {largest:.4g} {unit} from the target plane; an invalid "
                "sample of the tracker, or other units (units: ...)"
            )
    if not stated:
        found += [f"{path}: {text}; state the right units (units: ...)" for text in doubts(pose)]
    report(found, reading, problems)
    return vectors


def report(found: Iterable[str], reading: Reading, problems: list[str]) -> None:
    """Note what is refused; with `force`, log it."""
    if not reading.force:
        problems.extend(found)
        return
    for text in found:
        log.warning("%s", text)


def _check_actions(path: Path, vectors: NDArray, problems: list[str]) -> None:
    """`vectors` [N, 3, 6]: start, recorded action, end. One convention must fit all of a scan."""
    import torch  # not above: the pipeline finds scans without it

    from dreamer import poses

    start, action, end = torch.from_numpy(vectors).unbind(1)

    def misfit(expected):
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


def _wrapped(path: Path, vectors: NDArray) -> NDArray:
    """Poses [N, 2, 6] with roll and yaw within -180 to 180 and pitch within -90 to 90 degrees."""
    import torch

    from dreamer import poses

    pose = torch.from_numpy(vectors[:, [0, 2]])
    wide = pose[..., 3:].abs() > 180
    wrapped = pose.clone()
    wrapped[..., 3:] = torch.where(wide, poses.wrap(pose[..., 3:]), pose[..., 3:])
    over = wrapped[..., 4].abs() > 90
    wrapped[over] = poses.from_matrix(poses.to_matrix(wrapped[over]))
    if changed := int((wide.any(-1) | over).sum()):
        log.warning(
            "%s: angles beyond 180 degrees (pitch: 90) in %s, wrapped", path, count(changed, "pose")
        )
    return wrapped.numpy()


def _image_paths(
    home: Path, texts: Iterable[str], follow_links: bool, problems: list[str]
) -> dict[str, str]:
    """The path of each image inside its scan's folder `home`; others are problems."""
    paths, linked, inside = {}, [], {}
    root = home.resolve()
    for text in texts:
        # As text: for thousands of frames Path takes longer than reading them.
        path = paths[text] = os.path.normpath(f"{home}{os.sep}" + text.replace("\\", "/"))
        if not path.startswith(os.path.normpath(home) + os.sep) or PureWindowsPath(text).anchor:
            problems.append(f"{home}: image {text} lies outside its scan; move it inside")
            continue
        folder = os.path.dirname(path)
        if folder not in inside:
            inside[folder] = Path(folder).resolve().is_relative_to(root)
        own = Path(path).resolve().is_relative_to(root) if os.path.islink(path) else inside[folder]
        if not own:
            linked.append(text)
    if linked and not follow_links:
        problems.append(
            f"{home}: {count(linked, 'image')} behind links out of the scan, for example "
            f"{linked[0]}; where you trust them, set DREAMER_FOLLOW_LINKS=1"
        )
    return paths


class Scan(NamedTuple):
    """One scan of N records: `name`, `frames` and `paths` [N][2], `pose` [N, 2, 6], `motion`."""

    name: str
    frames: list[list[str]]
    paths: list[list[str]]
    pose: NDArray[np.float64]
    motion: list[str]


def read_scan(name: str, file: Path, reading: Reading, problems: list[str]) -> Scan | None:
    records = _read_records(file, problems)
    if not records:
        return None
    vectors = np.array([[record[f] for f in VECTORS] for record in records], dtype=np.float64)
    stated = {str(record["units"]) for record in records}
    try:
        units = reading.units or stated.pop()
        if not reading.units and stated:
            raise ValueError("its records state different units")
        vectors = _check_units(file, vectors, units, reading, problems)
    except ValueError as error:
        problems.append(f"{file}: {error}")
        return None
    _check_actions(file, vectors, problems)
    texts = dict.fromkeys(record[f] for record in records for f in IMAGES)
    path = _image_paths(file.parent, texts, reading.follow_links, problems)
    return Scan(
        name,
        [[as_text(record[f]) for f in FRAMES] for record in records],
        [[path[record[f]] for f in IMAGES] for record in records],
        _wrapped(file, vectors),
        [str(record.get("motion", "recorded")) for record in records],
    )
