"""Write a folder of virtual patients in the transitions layout, with the truth beside it.

<folder>/phantom.json               the arguments, structure names, format version, digest of the
                                    code that drew it
<folder>/patient_0007/transitions_dataset.json, ft1/*.png, ft2/*.png     as published, and
                     /truth.npz     of every frame: labels (1 + index in the card's structures, 0
                                    outside the sector), visible (False where shadowed),
                                    occupancy, frames, pose, phase
A patient's folder appears whole or not at all, and its bytes depend on the arguments alone.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dreamer.files import write_whole
from dreamer.phantom import trajectories
from dreamer.phantom.anatomy import STRUCTURES
from dreamer.phantom.patient import REST, Factors, Patient
from dreamer.phantom.render import check, render
from dreamer.phantom.sector import sector

FORMAT = 2
DRAWS = ("anatomy", "patient", "render", "sector", "trajectories")  # modules that shape the frames
CODE = hashlib.sha256(  # their digest, as they are imported
    "".join(Path(__file__).with_name(f"{name}.py").read_text("utf-8") for name in DRAWS).encode()
).hexdigest()[:16]
SCRAP = (".partial", ".part")  # endings of what an interrupted run leaves


@contextmanager
def alone() -> Iterator[None]:
    """Within it, torch computes on one core: small tensors gain nothing from a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def crew(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` threads, each on one core, so that sums are formed in one order.

    Jobs that have not begun are dropped when the block is left by an error.
    """
    with alone():
        pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def generate(
    folder: str | Path,
    patients: int,
    frames: int,
    target: str = "a4c",
    size: int = 112,
    seed: int = 0,
    device: str | torch.device | None = None,
    threads: int | None = None,
    vary: Mapping[str, float | str] | None = None,
    redraw: bool = False,
) -> Path:
    """Write `patients` virtual patients with `frames` transitions each; returns the folder.

    Half of each patient's transitions are a search for the plane `target`, half independent pairs
    (`"motion"` in each record).

    Args:
        folder: new, empty, or begun with the same arguments (then it is finished).
        size: edge of the frames, px.
        device: CUDA if available, when None. Bytes are the same for the same arguments on one kind
            of device, whatever `threads` is.
        vary: factors of variation by name, as shifts from each patient's own draw (`Factors`):
            `{"gain": 6}` gives the same patients, poses and phases 6 dB brighter.
        redraw: delete the patients in a folder with the same arguments that other code drew, and
            draw them anew. Without it such a folder is kept if three of its patients, drawn again,
            are the same byte for byte.

    Raises:
        ValueError: bad arguments, or a folder that holds anything else, was begun with other
            arguments, or holds frames that this code draws otherwise.
        OSError: too little disk.
    """
    arguments = {
        "patients": patients,
        "frames": frames,
        "target": target,
        "size": size,
        "seed": seed,
    }
    Factors.of(vary)
    if vary:
        arguments["vary"] = dict(vary)
    for name, least in (("patients", 1), ("frames", 1), ("seed", 0)):
        value = arguments[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads!r}")
    check(target, size)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads = threads or (min(os.cpu_count() or 1, 16) if device.type == "cpu" else 2)
    folder = Path(folder)
    todo = _begin(folder, arguments, device, redraw)
    needed = 3 * size**2 * frames * len(todo)  # frames twice and truth, as measured at 112 px
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            f"{folder}: {free / 2**20:.0f} MiB free, about {needed / 2**20:.0f} needed; free some, "
            "or ask for fewer patients or frames"
        )
    sector(size, str(device))  # made once, before the threads ask for it
    with (
        crew(threads) as pool,
        tqdm(total=patients, initial=patients - len(todo), desc="phantom", unit="patient") as bar,
    ):
        jobs = {pool.submit(_patient, folder, n, arguments, device) for n in todo}
        while jobs:
            done, jobs = wait(jobs, return_when=FIRST_EXCEPTION, timeout=0.5)
            for job in done:
                job.result()
            bar.update(len(done))
    return folder


def _name(number: int) -> str:
    return f"patient_{number:04d}"


def read_card(folder: str | Path, own: bool = True) -> dict | None:
    """What `phantom.json` records of a folder; None where there is none (recorded scans).

    Raises ValueError where the file is no phantom's card or, with `own`, where other code drew the
    folder: what is rendered now would not belong to its frames.
    """
    file = Path(folder, "phantom.json")
    if not file.is_file():
        return None
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        card["arguments"]["seed"], card["structures"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not a phantom's card; give another folder") from None
    if own and not _is_current(card):
        raise ValueError(
            f"{folder} was drawn by other code than this phantom's; call generate for it with the "
            "same arguments, which keeps it if the frames are still the same, or with redraw=True, "
            "which draws it anew (then train anew, too)"
        )
    return card


def _is_current(card: dict) -> bool:
    return (card.get("format"), card.get("code")) == (FORMAT, CODE)


def _draws_the_same(folder: Path, arguments: dict, device: torch.device) -> bool:
    """Whether three patients of a folder, drawn now, are those that lie there, byte for byte."""
    last = arguments["patients"] - 1
    with TemporaryDirectory() as scratch, alone():
        for number in {0, last // 2, last}:
            if (folder / _name(number)).is_dir():
                _patient(Path(scratch), number, arguments, device)
        files = [file for file in Path(scratch).rglob("*") if file.is_file()]
        there = [folder / file.relative_to(scratch) for file in files]
        pairs = zip(files, there, strict=True)
        return all(b.is_file() and a.read_bytes() == b.read_bytes() for a, b in pairs)


def _begin(folder: Path, arguments: dict, device: torch.device, redraw: bool) -> list[int]:
    """Claim the folder, or find in it what an interrupted run left to do. Returns the numbers."""
    names = {_name(n) for n in range(arguments["patients"])}
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another folder")
    file = folder / "phantom.json"
    present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    scrap = [n for n in present if n.startswith(".") and n.endswith(SCRAP)]
    other = [n for n in present if n not in names and n not in scrap and n != file.name]
    if card := read_card(folder, own=False):
        found = card["arguments"]
        differ = [k for k in arguments | found if found.get(k) != arguments.get(k)]
        if differ:
            given = ", ".join(f"{k} {found.get(k)}" for k in differ)
            raise ValueError(
                f"{folder} was made with other arguments ({given}); delete it or use a new folder"
            )
    if other or (present and not card and len(present) > len(scrap)):
        what = (other or present)[0]
        raise ValueError(f"{folder} holds something else ({what}); give an empty or new folder")
    if card and not _is_current(card):
        if not _draws_the_same(folder, arguments, device):
            if not redraw:
                read_card(folder)
            # The card goes last: a redraw that was interrupted is then taken up again.
            scrap, present = sorted(present, key=file.name.__eq__), []
        card = None
    folder.mkdir(parents=True, exist_ok=True)
    for name in scrap:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not card:
        record = {"format": FORMAT, "code": CODE, "arguments": arguments}
        text = json.dumps(record | {"structures": list(STRUCTURES)}, indent=1) + "\n"
        write_whole(file, text.encode())
    return [n for n in range(arguments["patients"]) if _name(n) not in present]


def _patient(folder: Path, number: int, arguments: dict, device: torch.device) -> None:
    """Render one patient and write it, whole or not at all."""
    seeds = [arguments["seed"], number]
    patient = Patient(seeds, arguments.get("vary"))
    plan = trajectories.plan([*seeds, 1], arguments["frames"], patient.heart_rate / REST)
    frames = render(
        patient,
        torch.from_numpy(plan.pose),
        torch.from_numpy(plan.phase),
        target=arguments["target"],
        size=arguments["size"],
        device=device,
    )
    names = [f"frames_{number:04d}_{n:04d}" for n in plan.number]
    scratch = folder / f".{_name(number)}.partial"
    for part in ("ft1", "ft2"):
        (scratch / part).mkdir(parents=True)
    images = [_png(image) for image in frames.image.cpu().numpy()]
    records = []
    for (first, second), motion in zip(plan.pairs.tolist(), plan.motion, strict=True):
        paths = f"ft1/{names[first]}.png", f"ft2/{names[second]}.png"
        (scratch / paths[0]).write_bytes(images[first])
        (scratch / paths[1]).write_bytes(images[second])
        start, end = plan.pose[first], plan.pose[second]
        records.append(
            {
                "frame_t1": names[first],
                "frame_t2": names[second],
                "ft1_image_path": paths[0],
                "ft2_image_path": paths[1],
                "at1_6dof": start.tolist(),
                "action_change_6dof": (end - start).round(6).tolist(),
                "at2_6dof": end.tolist(),
                "motion": motion,
            }
        )
    truth = {
        "labels": frames.label.cpu().numpy(),
        "visible": frames.visible.cpu().numpy(),
        "occupancy": frames.occupancy.cpu().numpy().astype(np.float16),
        "frames": np.array(names),
        "pose": plan.pose,
        "phase": plan.phase,
    }
    _write_arrays(scratch / "truth.npz", truth)
    text = json.dumps(records, indent=1) + "\n"
    (scratch / "transitions_dataset.json").write_text(text, encoding="utf-8")
    os.replace(scratch, folder / _name(number))


def _png(image: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An npz without time stamps, so that equal arrays are equal bytes; read it with np.load."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            stream = BytesIO()
            np.lib.format.write_array(stream, array, allow_pickle=False)
            archive.writestr(entry, stream.getvalue(), compresslevel=1)
