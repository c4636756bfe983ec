"""Transitions: what is read, batches, statistics, frames and scans that occur twice, splits."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scans import edit, write_scan

from dreamer import poses
from dreamer.data import (
    DataError,
    Transitions,
    find_patients,
    folds,
    mean_pose,
    split_by_blocks,
    split_by_patient,
    statistics,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        write_scan(tmp_path / "scans", f"p{number}", seed=number)
    return tmp_path / "scans"


def problems(folder, **options):
    with pytest.raises(DataError) as caught:
        Transitions(folder, **options)
    return str(caught.value)


def test_reads_what_was_written(folder):
    data = Transitions(folder)
    record = json.loads((folder / "p2" / "transitions_dataset.json").read_text())[5]
    at = np.flatnonzero(data.scan == "p2")[5]
    torch.testing.assert_close(data.pose1[at], torch.tensor(record["at1_6dof"]))
    back = poses.compose(data.pose1[at], data.action[at])
    torch.testing.assert_close(back, torch.tensor(record["at2_6dof"]), atol=1e-4, rtol=1e-4)
    batch = data.batch(np.array([at]))
    stored = Image.open(folder / "p2" / "ft1" / f"{record['frame_t1']}.png").convert("L")
    assert np.array_equal(batch.image1[0, 0], np.asarray(stored))
    # 4 scans of 12 transitions hold 13 distinct frames each: frame 2 of one is frame 1 of the next.
    assert (len(data), len(data.frames), batch.image1.dtype) == (48, 52, torch.uint8)
    assert batch.image2.equal(data.batch(np.array([at + 1])).image1)


def test_both_conventions_of_the_action_give_the_same_motion(tmp_path):
    write_scan(tmp_path / "a", "s", seed=3)
    write_scan(tmp_path / "b", "s", seed=3, convention="motion")
    a, b = Transitions(tmp_path / "a"), Transitions(tmp_path / "b")
    torch.testing.assert_close(a.action, b.action)


def test_resizes_on_request(folder):
    assert Transitions(folder, image_size=16).frames.shape[1:] == (16, 16)


def test_reversed_batches(folder):
    data = Transitions(folder)
    plain, both = (np.arange(2), None), (np.arange(2), None, np.array([True, False]))
    there, back = data.batch(*plain), data.batch(*both)
    assert torch.equal(back.image1[0], there.image2[0])
    assert torch.equal(back.image2[0], there.image1[0])
    assert torch.equal(back.pose1[0], there.pose2[0])
    torch.testing.assert_close(poses.compose(back.pose1, back.action), back.pose2)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(there, back, strict=True))


def test_identity_batches(folder):
    data = Transitions(folder)
    batch = data.batch(np.array([3, 4]), np.array([True, False]))
    assert batch.image1[0].equal(batch.image2[0]) and not batch.image1[1].equal(batch.image2[1])
    assert batch.action[0].eq(0).all() and batch.pose2[0].equal(batch.pose1[0])
    assert batch.pose2[1].equal(data.pose2[4])


def test_statistics_come_from_the_given_part_alone(folder):
    data = Transitions(folder)
    split = split_by_patient(data, val=["p0"], test=["p1"])
    stats = statistics(data, split.train)
    pixels = data.frames[np.unique(data.rows[split.train])] / 255
    both = torch.cat((data.pose1[split.train], data.pose2[split.train])).double()
    assert stats.image_mean == pytest.approx(pixels.mean())
    assert stats.image_std == pytest.approx(pixels.std(), rel=1e-4)
    np.testing.assert_allclose(stats.pose_mean, both.mean(0), rtol=1e-6)  # no angle near 180
    np.testing.assert_allclose(stats.pose_std, both.std(0, correction=0), rtol=1e-6)
    data.pose1[split.test] += 100
    assert statistics(data, split.train) == stats


def test_an_axis_that_never_moves_has_a_spread_of_one(folder):
    data = Transitions(folder)
    data.pose1[:, 2] = data.pose2[:, 2] = 4.0
    stats = statistics(data, np.arange(len(data)))
    assert (stats.pose_mean[2], stats.pose_std[2]) == (4.0, 1.0)


def test_means_of_angles_go_round_the_circle(folder):
    data = Transitions(folder)
    before = statistics(data, np.arange(len(data)))
    shift = torch.tensor([0.0, 0, 0, 178, 0, -175])
    for pose in (data.pose1, data.pose2):
        pose += shift
        pose[:, 3:] = poses.wrap(pose[:, 3:])
    after = statistics(data, np.arange(len(data)))
    assert data.pose1[:, 3].max() - data.pose1[:, 3].min() > 300  # both sides of 180
    turned = poses.wrap(torch.tensor(after.pose_mean) - torch.tensor(before.pose_mean) - shift)
    assert turned.abs().max() < 1e-4
    np.testing.assert_allclose(after.pose_std, before.pose_std, rtol=1e-4)
    assert mean_pose(torch.tensor([[0, 0, 0, 350.0, -170, 179], [0, 0, 0, 20, 170, -179]]))[
        3:
    ].tolist() == pytest.approx([5, -180, -180], abs=1e-4)


# Splits


def test_split_keeps_patients_whole(folder):
    people = {"p0": "Ann", "p1": "Ann", "p2": "Ben", "p3": "Cleo"}
    data = Transitions(folder, patients=people)
    split = split_by_patient(data, val=1, test=1, seed=4)
    parts = [set(data.patient[part]) for part in split[:3]]
    assert set.union(*parts) == {"Ann", "Ben", "Cleo"} and sum(map(len, parts)) == 3
    assert sorted(np.concatenate(split[:3])) == list(range(len(data)))
    drawn = [tuple(data.patient[split_by_patient(data, 1, 1, s).test][:1]) for s in range(9)]
    assert len(set(drawn)) > 1 and drawn[4] == tuple(data.patient[split.test][:1])
    named = split_by_patient(data, val=["Ben"], test=["Ann"])
    assert set(data.scan[named.test]) == {"p0", "p1"} and set(data.scan[named.train]) == {"p3"}


@pytest.mark.parametrize(
    ("val", "test", "message"),
    [
        (["p0"], ["p0"], "patient p0 is in both"),
        (["nobody"], 1, "no patient nobody"),
        (2, 2, "none is left for train"),
        (["p0", "p1", "p2", "p3"], 1, "none is left for test, train"),
        (0, 1, "none is left for val"),
    ],
)
def test_refuses_splits(folder, val, test, message):
    with pytest.raises(ValueError, match=message):
        split_by_patient(Transitions(folder), val, test)


def test_numbers_name_patients_too(folder):
    data = Transitions(folder, patients={"p0": 1, "p1": 2, "p2": 3, "p3": 3})
    split = split_by_patient(data, val=[1], test=["2"])
    assert set(data.scan[split.train]) == {"p2", "p3"}
    json.dumps(dict(zip(data.scan.tolist(), data.patient.tolist(), strict=True)))


def test_folds_are_dealt_over_patients(folder):
    people = {"p0": "Ann", "p1": "Ann", "p2": "Ben", "p3": "Cleo"}
    data = Transitions(folder, patients=people)
    tested = []
    for fold in folds(data, 3):
        split = split_by_patient(data, **fold)
        assert len({*data.patient[split.test]} | {*data.patient[split.val]}) == 2
        tested += sorted(set(data.scan[split.test]))
    assert sorted(tested) == ["p0", "p1", "p2", "p3"]
    assert folds(find_patients(folder, people), 3) == folds(["Ann", "Ben", "Cleo"], 3)
    assert folds(data, 3) == folds(people, 3)
    for k in (2, 4):
        with pytest.raises(ValueError, match=f"{k} folds need 3 or more"):
            folds(people, k)


def frames_of(data, part):
    return set(data.frame_id[part].ravel())


def test_blocks_keep_their_distance(tmp_path):
    write_scan(tmp_path / "s", "only", count=119)
    data = Transitions(tmp_path / "s")
    split = split_by_blocks(data, blocks=12, gap=2)
    part = np.full(120, -1)
    for number, indices in enumerate(split[:3]):
        part[sorted(frames_of(data, indices))] = number
    # 120 frames in blocks of ten, of which numbers 1 and 7 test, 4 and 10 validate; two frames are
    # dropped on either side of a cut.
    expected = np.zeros(120, int)
    for block, number in ((1, 2), (7, 2), (4, 1), (10, 1)):
        expected[block * 10 : block * 10 + 10] = number
        for cut in (block * 10, block * 10 + 10):
            expected[cut - 2 : cut + 2] = -1
    assert np.array_equal(part, expected)
    # A block of six frames holds five transitions, one of eight frames at the ends seven, and two
    # neighbouring blocks for training fifteen.
    assert [len(indices) for indices in split[:3]] == [7 + 3 * 15 + 7, 10, 10]


def pairs(scan: Path, chosen) -> None:
    """Replace the records of a chain of frames by others, pairs of numbers."""
    file = scan / "transitions_dataset.json"
    chain = json.loads(file.read_text())
    last = chain[-1]
    start = [r["at1_6dof"] for r in chain] + [last["at2_6dof"]]
    names = [r["frame_t1"] for r in chain] + [last["frame_t2"]]
    records = [
        {
            "frame_t1": names[a], "frame_t2": names[b],
            "ft1_image_path": f"ft1/{names[a]}.png", "ft2_image_path": f"ft2/{names[b]}.png",
            "at1_6dof": start[a], "at2_6dof": start[b],
            "action_change_6dof": np.subtract(start[b], start[a]).tolist(),
        }
        for a, b in chosen
    ]  # fmt: skip
    file.write_text(json.dumps(records))


def no_frame_is_in_two_parts(data, split):
    parts = [frames_of(data, indices) for indices in split[:3]]
    rows = [set(data.rows[indices].ravel()) for indices in split[:3]]
    assert all(parts)
    for sets in (parts, rows):
        assert not (sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2])


@pytest.mark.parametrize("kind", ["ten apart", "independent", "backwards", "shuffled"])
def test_blocks_share_no_frame_whatever_the_pairs(tmp_path, kind, caplog):
    scan = write_scan(tmp_path / "s", "only", count=239)
    draw = np.random.default_rng(0)
    pairs(scan, {
        "ten apart": [(i, i + 10) for i in range(230)],
        "independent": draw.integers(0, 240, (400, 2)),
        "backwards": [(i + 1, i) for i in reversed(range(239))],
        "shuffled": [(i, i + 3) for i in draw.permutation(237)],
    }[kind])  # fmt: skip
    data = Transitions(tmp_path / "s")
    split = split_by_blocks(data, blocks=6 if kind == "independent" else 12, gap=2)
    no_frame_is_in_two_parts(data, split)
    dropped = len(data) - sum(map(len, split[:3]))
    assert f"{dropped} of {len(data)} transitions dropped" in caplog.text
    # Blocks are stretches of time: frames of a part come in runs, whatever the records' order.
    numbers = np.sort([int(n[-4:]) for n in set(data.frame[split.test].ravel())])
    assert (np.diff(numbers) > 1).sum() <= 4 if kind != "independent" else len(numbers) > 10


def test_time_is_that_of_the_records_where_names_say_nothing(tmp_path):
    scan = write_scan(tmp_path / "s", "only", count=119)
    file = scan / "transitions_dataset.json"
    names = np.random.default_rng(0).permutation(120)
    text = file.read_text()
    for number, other in enumerate(names):
        text = text.replace(f'"frame_only_{number:04d}"', f'"frame_x{other}"')
    file.write_text(text)
    data = Transitions(tmp_path / "s")
    test = sorted(frames_of(data, split_by_blocks(data, 12, 2).test))
    assert (np.diff(test) > 1).sum() == 1  # two blocks


@pytest.mark.parametrize(("blocks", "gap"), [(5, 0), (12, 6)])
def test_refuses_blocks_that_leave_nothing(tmp_path, blocks, gap):
    write_scan(tmp_path / "s", "only", count=60)
    with pytest.raises(ValueError, match="at least 6 blocks, or a smaller gap"):
        split_by_blocks(Transitions(tmp_path / "s"), blocks, gap)


def copy_image(folder, scan, number, other, into):
    """The image of a frame becomes that of another scan's, written with other bytes."""
    source = folder / scan / "ft1" / f"frame_{scan}_{number:04d}.png"
    for side in ("ft1", "ft2"):
        target = folder / other / side / f"frame_{other}_{into:04d}.png"
        Image.open(source).convert("L").save(target, compress_level=0)


def test_refuses_splits_that_share_an_image(folder):
    copy_image(folder, "p0", 3, "p1", 7)
    forced = Transitions(folder, reading={"force": True})
    with pytest.raises(ValueError, match=r"both train and test hold 1 image, for example frame"):
        split_by_patient(forced, val=["p2"], test=["p1"])
    no_frame_is_in_two_parts(forced, split_by_patient(forced, val=["p2"], test=["p3"]))
    one = Transitions(folder, patients={"p0": "A", "p1": "A", "p2": "B", "p3": "C"})
    no_frame_is_in_two_parts(one, split_by_patient(one, 1, 1))


def test_refuses_blocks_with_a_frozen_image(tmp_path):
    write_scan(tmp_path / "s", "only", count=119)
    copy_image(tmp_path / "s", "only", 5, "only", 15)  # trains and tests
    with pytest.raises(ValueError, match="both train and test hold 1 image"):
        split_by_blocks(Transitions(tmp_path / "s"), 12, 2)


def test_frames_without_content_may_be_in_two_parts(folder, caplog):
    for scan in ("p0", "p1"):
        for side in ("ft1", "ft2"):
            Image.new("L", (32, 32), 4).save(folder / scan / side / f"frame_{scan}_0005.png")
    data = Transitions(folder)
    assert data.blank.sum() == 1 and "2 frames of a single grey level" in caplog.text
    split_by_patient(data, val=["p0"], test=["p1"])


# What occurs twice


def test_refuses_a_frame_with_two_poses(folder):
    edit(folder / "p1", 4, at1_6dof=[1.0, 2, 3, 20, 5, 6], action_change_6dof=[0.0] * 6,
         at2_6dof=[1.0, 2, 3, 20, 5, 6])  # fmt: skip
    message = problems(folder)
    assert "scan p1, frame frame_p1_0004: two poses, in record 3 and record 4" in message
    assert "scan p1, frame frame_p1_0005: two poses, in record 4 and record 5" in message


def test_a_pose_in_other_numbers_is_the_same_pose(folder):
    record = json.loads((folder / "p1" / "transitions_dataset.json").read_text())[4]
    turned = np.add(record["at1_6dof"], [0, 0, 0, 360, 0, -360])
    change = np.subtract(record["at2_6dof"], turned)
    edit(folder / "p1", 4, at1_6dof=turned.tolist(), action_change_6dof=change.tolist())
    Transitions(folder)


def test_refuses_a_frame_with_two_images(folder):
    Image.new("L", (32, 32)).save(folder / "p2" / "ft2" / "frame_p2_0004.png")
    assert "scan p2, frame frame_p2_0004: two images, in record 3 and record 4" in problems(folder)


def test_refuses_two_images_that_differ_in_their_folder_alone(folder):
    """Without names of frames a file's name is the frame's: two cameras are two frames."""
    (folder / "p2" / "other").mkdir()
    shutil.copy(folder / "p0" / "ft1" / "frame_p0_0002.png",
                folder / "p2" / "other" / "frame_p2_0004.png")  # fmt: skip
    for number in range(12):
        edit(folder / "p2", number, frame_t1=None, frame_t2=None)
    edit(folder / "p2", 4, ft1_image_path="other/frame_p2_0004.png")
    assert "frame frame_p2_0004: two images" in problems(folder)


def test_refuses_a_scan_under_two_names(folder, caplog):
    shutil.copytree(folder / "p1", folder / "copy")
    message = problems(folder)
    assert "scans copy and p1 share 13 images, for example frame frame_p1_0000 and frame" in message
    assert "belong" not in message and "one patient (now copy and p1)" in message
    same = {"p0": "A", "p1": "B", "p2": "C", "p3": "D", "copy": "B"}
    assert "scans copy and p1 share 13 images" in problems(folder, patients=same)
    assert len(Transitions(folder, reading={"force": True})) == 60
    assert "scans copy and p1 share 13 images" in caplog.text


def test_warns_of_a_copy_whose_images_were_written_anew(folder, caplog):
    shutil.copytree(folder / "p1", folder / "copy")
    for file in (folder / "copy").rglob("*.png"):
        grey = np.asarray(Image.open(file).convert("L"))
        Image.fromarray(np.clip(grey, 0, 250) + np.uint8(2)).save(file)
    Transitions(folder)
    assert "scans copy and p1 share 13 poses: is one a copy of the other?" in caplog.text


def test_warns_of_single_images_that_scans_of_one_patient_share(folder, caplog):
    copy_image(folder, "p0", 3, "p1", 7)
    Transitions(folder, patients={"p0": "A", "p1": "A", "p2": "B", "p3": "C"})
    assert "share 1 image, for example frame frame_p0_0003 and frame frame_p1_0007" in caplog.text
    assert "share 1 image" in problems(folder)  # of two patients: refused


# Images and links


def test_refuses_a_missing_image(folder):
    next((folder / "p0" / "ft2").glob("*0004.png")).unlink()
    message = problems(folder)
    assert "1 problem\n" in message and "_0004.png: image missing" in message


def test_refuses_an_image_that_does_not_decode(folder):
    file = next((folder / "p0" / "ft1").glob("*0004.png"))
    whole = file.read_bytes()
    for content in (whole[:300], b"", b"\x89PNG\r\n\x1a\n" + whole[9:]):
        file.write_bytes(content)
        assert "_0004.png: not a readable image" in problems(folder)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "_0004.png: not a readable image (a Git LFS pointer; " in problems(folder)


def test_refuses_mixed_sizes(folder):
    for file in (folder / "p2").glob("ft*/*0004.png"):
        Image.new("L", (48, 48)).save(file)
    assert "_0004.png: 48x48 pixels, others 32x32" in problems(folder)


@pytest.mark.parametrize(
    "place",
    ["..\\p0\\ft1\\frame_p0_0000.png", "/etc/x.png", "C:\\x.png", "ft1/../../p0/x.png", ".."],
)
def test_refuses_an_image_outside_its_scan(folder, place):
    edit(folder / "p1", 0, ft2_image_path=place)
    assert f"image {place} lies outside its scan" in problems(folder)
    assert "lies outside its scan" in problems(folder, reading={"follow_links": True})


def test_links_out_of_a_scan_are_followed_on_request(folder, tmp_path):
    before = Transitions(folder).frames.copy()
    store = tmp_path / "store"  # as a data manager keeps the content, with links into it
    store.mkdir()
    for number, file in enumerate(sorted((folder / "p1").rglob("*.png"))):
        shutil.move(file, store / f"{number}")
        file.symlink_to(store / f"{number}")
    message = problems(folder)
    assert (
        "p1: 24 images behind links out of the scan, for example ft1\\frame_p1_0000.png" in message
    )
    assert "DREAMER_FOLLOW_LINKS=1" in message
    assert np.array_equal(Transitions(folder, reading={"follow_links": True}).frames, before)
    shutil.move(folder / "p2" / "ft1", store / "ft1")  # a whole folder behind a link
    (folder / "p2" / "ft1").symlink_to(store / "ft1")
    assert "p2: 12 images behind links out of the scan" in problems(folder)
    assert np.array_equal(Transitions(folder, reading={"follow_links": True}).frames, before)
    (store / "3").unlink()
    assert "its link leads nowhere" in problems(folder, reading={"follow_links": True})


def test_links_inside_a_scan_are_no_matter(folder):
    for side in ("ft1", "ft2"):
        file = folder / "p1" / side / "frame_p1_0004.png"
        file.rename(folder / "p1" / f"{side}.png")
        file.symlink_to(folder / "p1" / f"{side}.png")
    Transitions(folder)


def test_lists_the_first_ten_problems_and_counts_all(folder):
    for number in range(12):
        edit(folder / "p1", number, at1_6dof=[0])
    (folder / "p3" / "transitions_dataset.json").write_text("[")
    message = problems(folder)
    assert "13 problems" in message and message.count("\n  - ") == 10 and "and 3 more" in message


# The real scan


@pytest.fixture
def real_scan(root):
    shared = Path(os.environ.get("DREAMER_SHARED", root.parent / "shared"))
    folder = Path(os.environ.get("DREAMER_REAL_SCAN", shared / "data" / "real_scan"))
    if not folder.is_dir():
        pytest.skip(f"no real scan at {folder}; DREAMER_REAL_SCAN names another place")
    return folder


def test_the_real_scan(real_scan, caplog):
    data = Transitions(real_scan)
    assert (len(data), data.frames.shape) == (464, (465, 224, 224))
    split = split_by_blocks(data)
    no_frame_is_in_two_parts(data, split)
    assert not any(word in caplog.text for word in ("wrapped", "coloured", "share", "grey level"))
    badge = (slice(None), slice(2, 8), slice(120, 130))
    assert data.frames[badge].max() > 60
    masked = Transitions(real_scan, reading={"mask": [[117, 0, 132, 12]]})
    assert masked.frames[badge].max() == 0
    assert np.array_equal(masked.frames[:, 12:], data.frames[:, 12:])
    assert Transitions(real_scan, 224, reading={"square": "fan"}).frames[badge].max() < 40
