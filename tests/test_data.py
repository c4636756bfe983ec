import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scans import edit, write_scan

from dreamer import poses
from dreamer.data import (
    DataError,
    Transitions,
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


def test_frames_are_decoded_once_and_again_after_a_change(folder, cache, monkeypatch):
    before = Transitions(folder).frames.copy()
    (file,) = cache.glob("*.npy")
    monkeypatch.setattr("dreamer.data._decode", None)  # a second decoding would fail
    assert np.array_equal(Transitions(folder).frames, before)
    monkeypatch.undo()
    monkeypatch.setenv("DREAMER_CACHE", str(cache))
    png = next((folder / "p0" / "ft1").glob("*.png"))
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(png)
    assert len(Transitions(folder).frames) == len(before) + 1
    assert [f != file for f in cache.glob("*.npy")] == [True]


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
    np.testing.assert_allclose(stats.pose_mean, both.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.pose_std, both.std(0, correction=0), rtol=1e-6)
    data.pose1[split.test] += 100
    assert statistics(data, split.train) == stats


def test_an_axis_that_never_moves_has_a_spread_of_one(folder):
    data = Transitions(folder)
    data.pose1[:, 2] = data.pose2[:, 2] = 4.0
    stats = statistics(data, np.arange(len(data)))
    assert (stats.pose_mean[2], stats.pose_std[2]) == (4.0, 1.0)


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


def test_without_a_mapping_each_scan_is_a_person_and_this_is_said(folder, caplog):
    Transitions(folder)
    assert "each of the 4 scans counts as one person" in caplog.text


@pytest.mark.parametrize(
    ("val", "test", "told"),
    [
        (["p0"], ["p0"], "patient p0 is in both"),
        (["nobody"], 1, "no patient nobody"),
        (2, 2, "none is left for train"),
        (["p0", "p1", "p2", "p3"], 1, "none is left for test, train"),
        (0, 1, "none is left for val"),
    ],
)
def test_refuses_splits(folder, val, test, told):
    with pytest.raises(ValueError, match=told):
        split_by_patient(Transitions(folder), val, test)


def test_blocks_keep_their_distance(tmp_path):
    write_scan(tmp_path / "s", "only", count=120)
    split = split_by_blocks(Transitions(tmp_path / "s"), blocks=12, gap=2)
    where = np.full(120, -1)
    for number, part in enumerate(split[:3]):
        assert (where[part] == -1).all()
        where[part] = number
    # Between records of two parts lie four dropped ones, a gap of two on either side of the cut.
    used = np.flatnonzero(where >= 0)
    steps = np.diff(used)[np.diff(where[used]) != 0]
    assert set(steps) == {5}
    # Blocks of ten: eight train and touch one cut each, two validate and two test between two.
    assert [len(part) for part in split[:3]] == [64, 12, 12]


@pytest.mark.parametrize(("blocks", "gap"), [(5, 0), (12, 6)])
def test_refuses_blocks_that_leave_nothing(tmp_path, blocks, gap):
    write_scan(tmp_path / "s", "only", count=60)
    with pytest.raises(ValueError, match="at least 6 blocks, or a smaller gap"):
        split_by_blocks(Transitions(tmp_path / "s"), blocks, gap)


# What a folder is refused for, each with a broken folder


def test_refuses_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        Transitions(tmp_path / "nowhere")


def test_refuses_a_folder_without_scans(tmp_path):
    assert "no scans" in problems(tmp_path)


def test_refuses_json_that_does_not_parse(folder):
    (folder / "p1" / "transitions_dataset.json").write_text('[{"frame_t1": ')
    assert re.search(r"p1/transitions_dataset.json: not valid JSON", problems(folder))


@pytest.mark.parametrize("content", ["{}", "[]", "[3]"])
def test_refuses_json_of_another_form(folder, content):
    (folder / "p1" / "transitions_dataset.json").write_text(content)
    assert re.search("p1/transitions_dataset.json.*expected", problems(folder))


@pytest.mark.parametrize(
    "value", [[0, 0, 0], [0, 0, 0, 0, 0, float("nan")], [0, 0, 0, 0, 0, float("inf")], "six", None]
)
@pytest.mark.parametrize("field", ["at1_6dof", "action_change_6dof"])
def test_refuses_poses(folder, field, value):
    edit(folder / "p1", 3, **{field: value})
    assert f"record 3, {field}: six finite numbers" in problems(folder)


def test_refuses_an_action_that_fits_no_convention(folder):
    edit(folder / "p3", 7, action_change_6dof=[1.0, 2, 3, 4, 5, 6])
    assert "p3/transitions_dataset.json, record 7, action_change_6dof: off by" in problems(folder)


def test_refuses_a_missing_image(folder):
    next((folder / "p0" / "ft2").glob("*0004.png")).unlink()
    told = problems(folder)
    assert "1 problem\n" in told and "_0004.png: image missing" in told


def test_refuses_an_image_that_does_not_decode(folder):
    file = next((folder / "p0" / "ft1").glob("*0004.png"))
    file.write_bytes(file.read_bytes()[:300])
    assert "_0004.png: not a readable image" in problems(folder)


def test_refuses_mixed_sizes_and_oblongs(folder):
    for file in (folder / "p2").glob("ft*/*0004.png"):
        Image.new("L", (48, 48)).save(file)
    assert "_0004.png: 48x48 pixels, others 32x32" in problems(folder)
    shutil.rmtree(folder)
    write_scan(folder, "wide", count=2)
    for file in folder.glob("*/ft*/*.png"):
        Image.new("L", (48, 32)).save(file)
    assert "48x32 pixels; crop or pad to a square" in problems(folder)


def test_refuses_an_image_outside_its_scan(folder):
    edit(folder / "p1", 0, ft1_image_path="..\\p0\\ft1\\frame_p0_0000.png")
    assert "lies outside its scan" in problems(folder)


@pytest.mark.parametrize("place", ["/etc/x.png", "C:\\x.png", "ft1/../../p0/x.png", ".."])
def test_refuses_other_ways_out(folder, place):
    edit(folder / "p1", 0, ft2_image_path=place)
    assert f"image {place} lies outside its scan" in problems(folder)


def test_refuses_links_that_lead_out_of_the_scan(folder):
    file = next((folder / "p1" / "ft1").glob("*0004.png"))
    file.unlink()
    file.symlink_to(next((folder / "p0" / "ft1").glob("*0004.png")))
    assert "0004.png lies outside its scan" in problems(folder)
    file.unlink()
    file.symlink_to(next((folder / "p1" / "ft1").glob("*0003.png")))
    Transitions(folder)
    shutil.rmtree(folder / "p1" / "ft1")
    (folder / "p1" / "ft1").symlink_to(folder / "p0" / "ft1")
    assert "lies outside its scan" in problems(folder)


def test_refuses_an_incomplete_mapping(folder):
    assert "no patient given for scan p2, p3" in problems(folder, patients={"p0": "A", "p1": "B"})


def test_refuses_too_little_disk(folder, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match=r"MiB free, .* needed"):
        Transitions(folder)


def test_lists_the_first_ten_problems_and_counts_all(folder):
    for number in range(12):
        edit(folder / "p1", number, at1_6dof=[0])
    (folder / "p3" / "transitions_dataset.json").write_text("[")
    told = problems(folder)
    assert "13 problems" in told and told.count("\n  - ") == 10 and "and 3 more" in told
