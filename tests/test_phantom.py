"""The phantom: anatomy in its stated ranges, honest speckle and shadows, poses that do not leak."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from phantom_checklist import failures
from PIL import Image
from scipy import ndimage

from dreamer import poses
from dreamer.phantom import (
    LABEL,
    STRUCTURES,
    TARGETS,
    Patient,
    generate,
    read_card,
    render,
    speckle_ratio,
    trajectories,
)
from dreamer.phantom.generate import DRAWS
from dreamer.phantom.patient import ANATOMY
from dreamer.phantom.render import TISSUE
from dreamer.phantom.sector import GRID, pixel_to_probe, probe_to_pixel, sector

TREE = Path(__file__).resolve().parents[1]
HOME = torch.zeros(6, dtype=torch.float64)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def ventricle_volume(patient: Patient, phase: float) -> float:
    """Millilitres of left ventricular blood and papillary muscle, counted on a 2 mm grid."""
    axes = [torch.arange(lo, hi, 2.0) for lo, hi in ((-45, 45), (-45, 45), (-5, 105))]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    label = patient.scene(grid, grid * 0 + 500, torch.tensor([phase]), 1).label
    names = ("left_ventricle", "papillary_muscles", "mitral_valve", "chordae")
    return sum(int((label == LABEL[n]).sum()) for n in names) * 8 / 1000


# Anatomy


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_ventricle_ejects_what_was_drawn(seed):
    patient = Patient(seed)
    full, empty = ventricle_volume(patient, 0.0), ventricle_volume(patient, 0.36)
    assert 15 < empty < full < 220  # adults, ml
    assert 1 - empty / full == pytest.approx(patient.size.ejection_fraction, abs=0.06)


def test_measures_lie_in_the_adult_range():
    people = [Patient((7, n)).size for n in range(60)]
    for name, low, high in (
        ("lv_diameter", 37, 59),
        ("wall", 6, 11),
        ("ejection_fraction", 0.52, 0.74),
        ("aortic_sinus", 24, 40),
        ("rv_basal", 25, 41),
    ):
        values = [getattr(p, name) for p in people]
        assert low <= min(values) < max(values) <= high, name
    assert len({p.lv_diameter for p in people}) > 50  # drawn, not copied


def test_motion_keeps_end_diastole_and_lowers_the_base_in_systole():
    patient = Patient(3)
    length, drop = patient.size.lv_length, patient.size.descent
    x, y, z = (torch.tensor([[v]]) for v in (10.0, 5.0, 40.0))
    still = patient.heart.motion(x, y, z, torch.zeros(1, 1))
    assert torch.allclose(torch.stack(still), torch.stack((x, y, z)), atol=1e-5)
    zero = torch.zeros(1, 1)
    base = patient.heart.motion(zero, zero, zero + length - drop, torch.ones(1, 1))[2]
    assert float(base) == pytest.approx(length, abs=0.05)  # at the base: from above, by `descent`
    assert float(patient.heart.motion(zero, zero, zero - 30, torch.ones(1, 1))[2]) == -30


def test_valves_open_in_their_time():
    squeeze, mitral, aortic = Patient(0).beat(torch.tensor([0.0, 0.2, 0.36, 0.5, 1.0]).double())
    assert squeeze.tolist() == pytest.approx([0, 0.587, 1, 0.59, 0], abs=0.01)
    assert (mitral > 0.1).tolist() == [False, False, False, True, False]
    assert (aortic > 0.5).tolist() == [False, True, False, False, False]
    assert not ((mitral > 0.05) & (aortic > 0.05)).any()


@pytest.mark.parametrize("target", TARGETS)
def test_target_planes_show_what_a_standard_view_must_show(target):
    """Five patients over the cycle; `benchmarks/phantom_checklist.py` checks fifty."""
    found = [failures(Patient((22, number)), target) for number in range(5)]
    assert sum(not items for items in found) >= 4, found
    placed = Patient(0).place(target)[:3, :3]
    assert torch.allclose(placed @ placed.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert float(torch.linalg.det(placed)) == pytest.approx(1)


def test_a_plane_off_its_landmarks_fails_the_checklist(monkeypatch):
    """Fanned towards the aorta: a five-chamber view is no four-chamber view."""
    monkeypatch.setattr("phantom_checklist.PHASES", (0.0,))
    patient = Patient((22, 0))
    place = patient.place("a4c") @ poses.to_matrix(torch.tensor([0, 0, 0, 14.0, 0, 0]).double())
    monkeypatch.setattr(patient, "place", lambda target: place)
    assert "no aorta" in {item for _, item in failures(patient, "a4c")}


def test_anatomy_factors_change_the_measures_they_name():
    normal = Patient(3).size
    for name, change in ANATOMY.items():
        other = Patient(3, {"anatomy": name}).size
        for measure, factor in change.items():
            assert getattr(other, measure) == pytest.approx(getattr(normal, measure) * factor)
    assert ventricle_volume(Patient(3, {"anatomy": "dilated"}), 0.0) > 1.5 * ventricle_volume(
        Patient(3), 0.0
    )


def test_apical_frame_is_the_standard_display():
    """Apex up, left heart on the right of the image, mitral annulus beyond the tricuspid one."""
    label = render(Patient(5), HOME, 0.0, size=112).label

    def centre(name: str) -> np.ndarray:
        return np.argwhere(label.numpy() == LABEL[name]).mean(0)  # row, column

    assert centre("left_ventricle")[1] > centre("right_ventricle")[1]
    assert centre("left_atrium")[1] > centre("right_atrium")[1]
    assert centre("left_atrium")[0] > centre("left_ventricle")[0] + 20
    assert centre("mitral_valve")[0] > centre("tricuspid_valve")[0]


# Image


def test_speckle_is_fully_developed_in_homogeneous_tissue():
    assert speckle_ratio() == pytest.approx(1.91, abs=0.05)


def test_speckle_moves_with_the_tissue():
    grid = sector(64)
    here = tuple(torch.rand(3, 500, generator=torch.Generator().manual_seed(1)) * 90)
    same = grid.lookup(here, 3)[0]
    assert torch.equal(same, grid.lookup(here, 3)[0])
    moved = grid.lookup(tuple(axis + 5 for axis in here), 3)[0]
    assert abs(float(torch.corrcoef(torch.stack((same, moved)))[0, 1])) < 0.15


def test_sector_is_that_of_the_real_scan():
    frame = render(Patient(0), HOME, 0.0, size=224)
    row, column = torch.meshgrid(*[torch.arange(224.0)] * 2, indexing="ij")
    r, angle = torch.hypot(column - 111.5, row + 1), torch.atan2(column - 111.5, row + 1)
    sure_in = (r < 220) & (angle.abs() < math.radians(30.5))
    sure_out = (r > 222) | (angle.abs() > math.radians(30.9))
    assert (frame.label[sure_in] > 0).all()
    assert (frame.label[sure_out] == 0).all() and (frame.image[sure_out] == 0).all()


def test_occupancy_is_the_share_of_each_cell():
    frame = render(Patient(0), HOME, 0.3, size=56)
    shares = frame.occupancy
    assert shares.shape == (len(STRUCTURES), GRID, GRID)
    by_hand = (frame.label[16:24, 24:32] == LABEL["left_ventricle"]).float().mean()
    assert float(shares[LABEL["left_ventricle"] - 1, 2, 3]) == pytest.approx(float(by_hand))
    assert float(shares.sum(0).max()) == pytest.approx(1)


def test_ribs_and_lost_contact_darken():
    """Slid under a rib or lifted off the skin, the deep picture goes; pressed home, it is there."""
    slid, lifted = HOME.clone(), HOME.clone()
    slid[1], lifted[2] = 14.0, -12.0
    frames = render(Patient(2), torch.stack((HOME, slid, lifted)), 0.2)
    deep = frames.image[:, 40:].float().mean((1, 2))
    assert deep[1] < 0.5 * deep[0]
    assert frames.image[2].float()[frames.label[2] > 0].mean() < 8  # nearly black


def test_lost_contact_and_gain_do_not_hide_the_truth():
    frames = render(Patient(2), torch.stack((HOME, HOME)), torch.tensor([0.1, 0.1]))
    assert torch.equal(frames.image[0], frames.image[1])  # same arguments, same picture


def test_grey_levels_and_texture_are_those_of_the_real_scan():
    """Percentiles 50 to 99 of a real apical scan: 13, 31, 68, 100, 177; its lateral correlation."""
    frames = []
    for n in range(16):
        plan = trajectories.plan([0, n, 1], 8)
        pose, phase = torch.from_numpy(plan.pose), torch.from_numpy(plan.phase)
        frames.append(render(Patient((0, n)), pose, phase, size=224).image)
    frames = torch.cat(frames)
    inside = frames.flatten(1)[:, sector(224).inside].numpy()
    found = np.percentile(inside, (50, 75, 90, 95, 99))
    assert found == pytest.approx([13, 31, 68, 100, 177], rel=0.25, abs=3)
    real = {0.5: 0.92, 1.0: 0.72, 1.5: 0.50, 2.0: 0.29}  # by lag in degrees, measured likewise
    bright = frames.numpy()[inside.mean(1) > 15][::4]
    for lag, value in lateral_correlation(bright).items():
        assert value == pytest.approx(real[lag], abs=0.1), lag


def lateral_correlation(frames: np.ndarray) -> dict[float, float]:
    """Correlation of the fine structure between beams, by their distance in degrees."""
    angle, r = np.radians(np.arange(-28, 28, 0.5)), np.arange(44.0, 152.0, 0.73)
    x, z = r[:, None] * np.sin(angle), r[:, None] * np.cos(angle)
    places = np.stack(probe_to_pixel(x, z))
    products = {lag: [] for lag in (1, 2, 3, 4)}
    for frame in frames:
        polar = ndimage.map_coordinates(frame.astype(float), places, order=1)
        mean = ndimage.uniform_filter(polar, 15)
        fine, tissue = polar - mean, (mean > 25) & (mean < 180)
        for lag, found in products.items():
            both = tissue[:, :-lag] & tissue[:, lag:]
            a, b = fine[:, :-lag][both], fine[:, lag:][both]
            if len(a) > 3000:
                found.append((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return {lag * 0.5: float(np.mean(found)) for lag, found in products.items()}


def test_pixels_and_probe_coordinates_are_inverse():
    row, column = np.mgrid[:112, :112].astype(float)
    x, z = pixel_to_probe(row, column, 112, 140.0)
    back = probe_to_pixel(x, z, 112, 140.0)
    assert np.allclose(back, (row, column))
    assert pixel_to_probe(-1.0, 111.5) == (0.0, 0.0)  # the apex, in the frame it is given in
    assert pixel_to_probe(220.0, 111.5)[1] == pytest.approx(160.0)


def test_shadows_are_marked_apart():
    slid = HOME.clone()
    slid[1] = 14.0  # under a rib
    frames = render(Patient(2), torch.stack((HOME, slid)), 0.2)
    inside_ = frames.label > 0
    share = (frames.visible & inside_).sum((1, 2)) / inside_.sum((1, 2))
    assert share[0] > 0.75 and share[1] < 0.6 * share[0]
    hidden = inside_[1] & ~frames.visible[1]
    muscle = (frames.label[1] == LABEL["myocardium"]) | (frames.label[1] == LABEL["septum"])
    seen, dark = (frames.image[1][muscle & where].float() for where in (frames.visible[1], hidden))
    assert len(dark) > 100 and (len(seen) < 50 or dark.mean() < 0.6 * seen.mean())


@pytest.mark.parametrize(
    ("vary", "brighter"),
    [({"gain": 6}, True), ({"gain": -6}, False), ({"contact": 6}, False), ({"noise": 20}, True),
     ({"dynamic_range": -15}, False), ({"rib_shadow": 9}, False)],
)  # fmt: skip
def test_a_factor_changes_the_frame_and_not_the_truth(vary, brighter):
    patient = Patient(6)
    plain, other = render(patient, HOME, 0.1), render(patient, HOME, 0.1, vary=vary)
    again = render(Patient(6, vary), HOME, 0.1)
    assert torch.equal(other.image, again.image)
    assert (other.image.float().mean() > plain.image.float().mean()) == brighter
    if "rib_shadow" not in vary:
        assert torch.equal(plain.label, other.label)


def test_depth_phase_and_time_gain_are_factors():
    patient = Patient(6)
    plain = render(patient, HOME, 0.0)
    later = render(patient, HOME, 0.0, vary={"heart_phase": 0.36})
    assert torch.equal(later.label, render(patient, HOME, 0.36).label)
    deep = render(patient, HOME, 0.0, vary={"depth": 40})
    ventricle = LABEL["left_ventricle"]
    shrunk = (deep.label == ventricle).sum() / (plain.label == ventricle).sum()
    assert float(shrunk) == pytest.approx((160 / 200) ** 2, abs=0.04)
    curves = [Patient(6, {"time_gain": number}).time_gain for number in (0, 1)]
    assert not np.allclose(*curves)
    faster = Patient(6, {"heart_rate": 20}).heart_rate - patient.heart_rate
    assert faster == pytest.approx(20)


@pytest.mark.parametrize(
    "vary",
    [{"gein": 6}, {"gain": "high"}, {"gain": float("nan")}, {"anatomy": "giant"}, {"depth": 200},
     {"time_gain": 0.5}],
)  # fmt: skip
def test_unknown_factors_are_refused(vary):
    with pytest.raises(ValueError, match=next(iter(vary))):
        Patient(0, vary)


def test_brightness_does_not_depend_on_depth_but_through_the_time_gain_curve():
    """Tissue of one kind everywhere: grey follows the patient's curve and nothing else, in dB."""
    patient = Patient(6)
    mean = []
    for number in (1, 2):
        other = Patient(6, {"time_gain": number})
        frame = render(other, HOME, 0.0, size=224)
        mean.append((frame.image.float(), other.time_gain))
    rows = slice(60, 200)
    change = (mean[1][0] - mean[0][0])[rows].sum(1)
    curve = np.interp(np.arange(60, 200) * 160 / 221, np.arange(9) * 25, mean[1][1] - mean[0][1])
    assert np.corrcoef(change.numpy(), curve)[0, 1] > 0.5
    assert torch.equal(render(patient, HOME, 0.0, size=224).label, frame.label)


def test_several_structures_can_be_left_out():
    chest = ("ribs", "chest_wall", "lung", "liver", "mediastinum")
    heart = [name for name in STRUCTURES if name not in chest]
    plain, empty = render(Patient(1), HOME, 0.2), render(Patient(1), HOME, 0.2, without=heart)
    assert set(empty.label.unique().tolist()) <= {0, *(LABEL[name] for name in chest)}
    assert not torch.equal(plain.image, empty.image)


@pytest.mark.parametrize("structure", ["left_atrium", "mitral_valve", "septum", "ribs"])
def test_a_counterfactual_changes_the_picture_only_where_the_structure_was(structure):
    """Every changed pixel lies on the structure, within the point spread of it, or behind it."""
    pose = HOME.clone()
    pose[1] = 13.0 if structure == "ribs" else 0.0
    patient, size = Patient(4), 112
    whole = render(patient, pose, 0.3, size=size)
    gone = render(patient, pose, 0.3, without=structure, size=size)
    assert not (gone.label == LABEL[structure]).any()
    there = (whole.label == LABEL[structure]).numpy()
    changed = (whole.image.int() - gone.image.int()).abs().numpy() > 3
    assert there.sum() > 5 and changed.sum() > 5
    row, column = np.mgrid[:size, :size]
    r, angle = np.hypot(column - 55.75, row + 0.75), np.arctan2(column - 55.75, row + 0.75)
    near = np.zeros_like(there)
    for y, x in np.argwhere(there):
        beside = np.abs(angle - angle[y, x]) < math.radians(8) + 3 / np.maximum(r, 12)
        near |= beside & (r > r[y, x] - 6)
    assert not (changed & ~near).any()
    if structure == "left_atrium":  # nothing but a shadow or its end lies behind blood
        assert changed[there].mean() > 0.3


def test_every_structure_has_a_tissue_and_can_be_removed():
    assert set(TISSUE) == set(STRUCTURES)
    for name in STRUCTURES:
        if name != "mediastinum":
            assert not (render(Patient(1), HOME, 0.2, name, size=32).label == LABEL[name]).any()


def test_batches_change_nothing():
    plan = trajectories.plan(3, 6)
    pose, phase = torch.from_numpy(plan.pose), torch.from_numpy(plan.phase)
    together = render(Patient(1), pose, phase, size=64)
    alone = render(Patient(1), pose[5], phase[5], size=64)
    assert (together.image[5].int() - alone.image.int()).abs().max() <= 1
    assert (together.label[5] != alone.label).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"target": "a5c"}, "a5c"),
        ({"size": 10}, "size"),
        ({"size": 112.0}, "size"),
        ({"without": "spleen"}, "spleen"),
        ({"pose": torch.full((6,), float("nan"))}, "finite"),
        ({"pose": torch.zeros(5)}, "6"),
    ],
)
def test_render_refuses(change, told):
    arguments = {"patient": Patient(0), "pose": HOME, "phase": 0.0} | change
    with pytest.raises(ValueError, match=told):
        render(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_the_same_picture():
    plan = trajectories.plan(3, 6)
    pose, phase = torch.from_numpy(plan.pose), torch.from_numpy(plan.phase)
    cpu = render(Patient(1), pose, phase)
    gpu = render(Patient(1), pose, phase, device="cuda")
    assert (cpu.label != gpu.label.cpu()).float().mean() < 5e-3
    assert (cpu.image.float() - gpu.image.cpu().float()).abs().mean() < 1.0


# Poses


def all_plans(patients: int = 150) -> list[trajectories.Plan]:
    return [trajectories.plan([0, n, 1], 40) for n in range(patients)]


def test_poses_spread_like_the_real_scan():
    plans = all_plans()
    starts = np.concatenate([p.pose[p.pairs[:, 0]] for p in plans])
    assert starts.std(0) == pytest.approx([4, 5.5, 3, 18, 6, 15], rel=0.15)
    assert np.abs(starts.mean(0) / starts.std(0)).max() < 0.4
    gaps = np.concatenate([p.number[p.pairs[:, 1]] - p.number[p.pairs[:, 0]] for p in plans])
    assert set(gaps.tolist()) == {1, 2, 3}
    assert all(p.motion.count("independent") == 20 for p in plans)


def test_searches_end_at_the_plane():
    plans = all_plans()
    first = np.stack([p.pose[0] for p in plans]) / trajectories.SPREAD
    last = np.stack([p.pose[20] for p in plans]) / trajectories.SPREAD
    assert np.abs(last).mean() < 0.2 * np.abs(first).mean()


def test_independent_actions_do_not_tell_the_pose():
    """A small network that sees the action alone, either way of writing it, on unseen patients."""
    torch.manual_seed(0)
    picks = [
        (n, p.pose[a], p.pose[b])
        for n, p in enumerate(all_plans(200))
        for (a, b), motion in zip(p.pairs, p.motion, strict=True)
        if motion == "independent"
    ]
    group = torch.tensor([n for n, _, _ in picks])
    start, end = (torch.from_numpy(np.stack([x[k] for x in picks])).float() for k in (1, 2))
    mean, std = start[group < 140].mean(0), start[group < 140].std(0)
    target = (start - mean) / std
    train, test = group < 140, group >= 140
    for action in (poses.relative(start, end), end - start):
        seen = action / action[train].std(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(6, 48), torch.nn.ReLU(), torch.nn.Linear(48, 48), torch.nn.ReLU(),
            torch.nn.Linear(48, 6),
        )  # fmt: skip
        optimiser = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.05)
        for _ in range(150):
            loss = torch.nn.functional.smooth_l1_loss(net(seen[train]), target[train])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            ratio = (net(seen[test]) - target[test]).abs().mean() / target[test].abs().mean()
        assert float(ratio) >= 0.97


def test_a_plan_needs_no_search():
    plan = trajectories.plan(0, 1)
    assert plan.pose.shape == (2, 6) and plan.motion == ["independent"]


# The folder

SMALL = {"patients": 3, "frames": 4, "size": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("phantom") / "made", **SMALL, device="cpu")


def test_the_layout_is_the_published_one(made):
    assert sorted(p.name for p in made.iterdir()) == [
        "patient_0000", "patient_0001", "patient_0002", "phantom.json",
    ]  # fmt: skip
    scan = made / "patient_0001"
    records = json.loads((scan / "transitions_dataset.json").read_text())
    assert [r["motion"] for r in records] == ["search"] * 2 + ["independent"] * 2
    for record in records:
        change = np.subtract(record["at2_6dof"], record["at1_6dof"])
        assert record["action_change_6dof"] == pytest.approx(change.tolist(), abs=1e-5)
        for part, name in (("ft1", "frame_t1"), ("ft2", "frame_t2")):
            path = record[f"{part}_image_path"]
            assert path == f"{part}/{record[name]}.png" and "\\" not in path
            with Image.open(scan / path) as picture:
                assert picture.size == (32, 32)
    assert records[0]["frame_t2"] == records[1]["frame_t1"]
    card = json.loads((made / "phantom.json").read_text())
    assert card["arguments"] == SMALL | {"target": "a4c", "seed": 0}
    assert card["structures"] == list(STRUCTURES) and len(card["code"]) == 16


def test_the_truth_lies_beside_the_pictures(made):
    with np.load(made / "patient_0001" / "truth.npz", allow_pickle=False) as truth:
        assert {k: v.shape for k, v in truth.items()} == {
            "labels": (7, 32, 32), "visible": (7, 32, 32),
            "occupancy": (7, len(STRUCTURES), 7, 7), "frames": (7,), "pose": (7, 6), "phase": (7,),
        }  # fmt: skip
        record = json.loads((made / "patient_0001" / "transitions_dataset.json").read_text())[3]
        row = truth["frames"].tolist().index(record["frame_t2"])
        assert truth["pose"][row].tolist() == record["at2_6dof"]
        again = render(
            Patient((0, 1)), torch.from_numpy(truth["pose"][row]), truth["phase"][row], size=32
        )
        with Image.open(made / "patient_0001" / record["ft2_image_path"]) as picture:
            assert np.abs(np.asarray(picture).astype(int) - again.image.numpy()).max() <= 1
        assert np.mean(truth["labels"][row] == again.label.numpy()) > 0.99


def test_another_seed_makes_other_patients(made, tmp_path):
    other = generate(tmp_path / "other", **(SMALL | {"patients": 1}), seed=1, device="cpu")
    mine, theirs = contents(made / "patient_0000"), contents(other / "patient_0000")
    assert all(mine[name] != theirs[name] for name in ("truth.npz", "transitions_dataset.json"))
    pictures = {data for name, data in mine.items() if name.endswith("png")}
    assert not pictures & {data for name, data in theirs.items() if name.endswith("png")}


def in_a_process(folder: Path, **arguments) -> subprocess.Popen:
    call = ", ".join(f"{k}={v!r}" for k, v in (SMALL | {"device": "cpu"} | arguments).items())
    code = f"from dreamer.phantom import generate; generate({str(folder)!r}, {call})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=TREE, stderr=subprocess.DEVNULL)


def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
    """A process killed in the middle, finished here, against a run undisturbed on one thread."""
    arguments = {"patients": 14, "frames": 8, "threads": 2}
    process = in_a_process(tmp_path / "killed", **arguments)
    for _ in range(3000):
        if len(list(tmp_path.glob("killed/patient_*"))) >= 2:
            break
        assert process.poll() is None, "the generator ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    left = {p.name for p in (tmp_path / "killed").glob("patient_*")}
    assert 2 <= len(left) < 14
    arguments = SMALL | arguments | {"device": "cpu"}
    generate(tmp_path / "killed", **arguments)
    generate(tmp_path / "whole", **(arguments | {"threads": 1}))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(made):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    generate(made, **SMALL, device="cpu")
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


def test_it_refuses_a_folder_that_is_not_its_own(made, tmp_path):
    with pytest.raises(ValueError, match=r"other arguments \(frames 4\)"):
        generate(made, **(SMALL | {"frames": 5}))
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match="holds something else"):
        generate(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="file"):
        generate(tmp_path / "thesis.txt", **SMALL)
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "phantom.json").write_text("[]")
    with pytest.raises(ValueError, match="card"):
        generate(tmp_path / "card", **SMALL)
    assert os.listdir(tmp_path / "card") == ["phantom.json"]


def test_a_folder_drawn_by_other_code_is_refused_or_redrawn(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "made")
    card = json.loads((folder / "phantom.json").read_text())
    (folder / "phantom.json").write_text(json.dumps(card | {"code": "before"}))
    before = {p: p.stat().st_mtime_ns for p in folder.glob("patient*/*")}
    generate(folder, **SMALL, device="cpu")
    assert read_card(folder) == card, "the frames are still the same"
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("patient*/*")}
    (folder / "phantom.json").write_text(json.dumps(card | {"code": "before"}))
    (folder / "patient_0001" / "truth.npz").write_bytes(b"of other code")
    for call in (lambda: generate(folder, **SMALL), lambda: read_card(folder)):
        with pytest.raises(ValueError, match=rf"{folder} was drawn by other code.*redraw=True"):
            call()
    (folder / "notes.txt").write_text("three years of work")
    with pytest.raises(ValueError, match=r"something else \(notes.txt\)"):
        generate(folder, **SMALL, redraw=True)
    (folder / "notes.txt").unlink()
    generate(folder, **SMALL, device="cpu", redraw=True)
    assert contents(folder) == contents(made) and read_card(folder) == card
    assert read_card(tmp_path) is None, "recorded scans have no card"


def test_the_digest_covers_all_code_that_shapes_frames():
    package = TREE / "dreamer" / "phantom"
    assert {file.stem for file in package.glob("*.py")} - {"__init__", "generate"} == set(DRAWS)


@pytest.mark.parametrize(
    "change",
    [
        {"patients": 0}, {"patients": -2}, {"frames": 0}, {"frames": 1.5}, {"seed": -1},
        {"patients": True}, {"target": "a5c"}, {"size": 8}, {"threads": 0},
    ],
)  # fmt: skip
def test_it_refuses_bad_arguments_before_it_writes(change, tmp_path):
    with pytest.raises(ValueError, match=next(iter(change))):
        generate(tmp_path / "new", **(SMALL | change))
    assert not (tmp_path / "new").exists()


def test_it_refuses_too_little_disk(tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match=r"MiB free, about .* needed"):
        generate(tmp_path / "set", 4, 10, size=32)
    assert not list((tmp_path / "set").glob("patient*"))
