"""The layout on disk: where scans are found, how records are written, units, patients' names."""

import datetime
import json
import logging
import shutil
import unicodedata

import numpy as np
import pytest
import torch
import yaml
from scans import edit, write_scan

from dreamer import poses
from dreamer.data import DataError, Transitions, find_patients, find_scans
from dreamer.records import natural, parse_units

RECORDS = "transitions_dataset.json"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        write_scan(tmp_path / "scans", f"p{number}", count=6, seed=number)
    return tmp_path / "scans"


def problems(folder, **options):
    with pytest.raises(DataError) as caught:
        Transitions(folder, **options)
    return str(caught.value)


def records_of(scan):
    return json.loads((scan / RECORDS).read_text())


def same(data, expected):
    """Whether two readings hold the same transitions, whatever their names."""
    return (
        torch.equal(data.pose1, expected.pose1)
        and torch.allclose(data.action, expected.action)
        and np.array_equal(data.frames[data.rows], expected.frames[expected.rows])
    )


# Where scans are


def test_refuses_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        Transitions(tmp_path / "nowhere")


def test_refuses_a_folder_without_scans_and_names_what_could_be_one(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no scans" in problems(tmp_path / "empty")
    for scan in folder.iterdir():
        (scan / RECORDS).rename(scan / "transitions.json")
    assert "if p0/transitions.json, p1/transitions.json" in problems(folder)


def test_scans_may_lie_in_folders_of_patients(folder, tmp_path, caplog):
    before = Transitions(folder)
    for name, patient in (("p0", "Ann"), ("p1", "Ann"), ("p2", "Ben")):
        (tmp_path / "deep" / patient).mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder / name, tmp_path / "deep" / patient / name)
    caplog.clear()
    data = Transitions(tmp_path / "deep")
    assert list(dict.fromkeys(data.scan)) == ["Ann/p0", "Ann/p1", "Ben/p2"]
    assert set(data.patient) == {"Ann", "Ben"} and "one patient" not in caplog.text
    assert same(data, before)
    assert find_patients(tmp_path / "deep")["Ann/p1"] == "Ann"
    # Three levels (site, patient, scan) are read too, but whose they are must be stated.
    assert "name the patient of each scan" in problems(tmp_path)
    people = {scan: scan[-1] for scan in find_scans(tmp_path)}
    assert "deep/Ann/p0" in people and "copy" in problems(tmp_path, patients=people)


def test_a_scan_given_itself_is_the_only_one(folder, caplog):
    data = Transitions(folder / "p1")
    assert set(data.scan) == {"p1"} and len(data) == 6 and "is a scan itself" in caplog.text


def test_hidden_folders_are_no_scans(folder):
    shutil.copytree(folder / "p0", folder / ".cache" / "p0")
    shutil.copytree(folder / "p0", folder / "_old")
    assert list(find_scans(folder)) == ["p0", "p1", "p2"]


# How records are written


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8"]
)
def test_unicode_is_read_with_and_without_a_mark(folder, encoding):
    before = Transitions(folder)
    file = folder / "p1" / RECORDS
    file.write_bytes(file.read_text().replace("frame_p1_0003", "Bild_ä").encode(encoding))
    for side in ("ft1", "ft2"):
        (folder / "p1" / side / "frame_p1_0003.png").rename(folder / "p1" / side / "Bild_ä.png")
    assert same(Transitions(folder), before)


def test_other_encodings_are_named(folder):
    file = folder / "p1" / RECORDS
    file.write_bytes(file.read_text().replace("frame_p1_0003", "Bild_ä").encode("latin-1"))
    assert "no Unicode text" in problems(folder) and "save it as UTF-8" in problems(folder)


@pytest.mark.parametrize("form", ["object", "other key", "numbered", "lines", "jsonl", "one"])
def test_records_in_other_containers(folder, form):
    before = Transitions(folder)
    for scan in folder.iterdir():
        records = records_of(scan)
        lines = "\n".join(json.dumps(record) for record in records)
        text = {
            "object": json.dumps({"version": 1, "transitions": records}),
            "other key": json.dumps({"data": records}),
            "numbered": json.dumps(dict(enumerate(records))),
            "lines": lines + "\n\n",
            "jsonl": lines,
            "one": json.dumps(records),
        }[form]
        (scan / RECORDS).unlink()
        (scan / (RECORDS + "l" if form == "jsonl" else RECORDS)).write_text(text)
    assert same(Transitions(folder), before)


def test_a_single_record_may_stand_alone(folder):
    (folder / "p1" / RECORDS).write_text(json.dumps(records_of(folder / "p1")[0]))
    assert len(Transitions(folder)) == 13


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"a": [], "b": []}'])
def test_refuses_json_of_another_form(folder, content):
    (folder / "p1" / RECORDS).write_text(content)
    assert f"p1/{RECORDS}: expected a list of records" in problems(folder)


@pytest.mark.parametrize("content", ['[{"frame_t1": ', "[{}", '{"a": 1}\n{"b": '])
def test_refuses_json_that_does_not_parse(folder, content):
    (folder / "p1" / RECORDS).write_text(content)
    assert f"p1/{RECORDS}: not valid JSON" in problems(folder)


def test_frames_without_names_take_those_of_their_images(folder):
    before = Transitions(folder)
    for number in range(6):
        edit(folder / "p1", number, frame_t1=None, frame_t2=None)
    data = Transitions(folder)
    assert same(data, before) and np.array_equal(data.frame, before.frame)
    assert np.array_equal(data.frame_id, before.frame_id)


def test_frames_may_be_named_by_numbers(folder):
    for number in range(6):
        edit(folder / "p1", number, frame_t1=number, frame_t2=number + 1)
    data = Transitions(folder)
    assert data.frame[data.scan == "p1"][2].tolist() == ["2", "3"] and data.frame_id.max() == 20


@pytest.mark.parametrize(
    "value",
    [
        [0, 0, 0],
        [0, 0, 0, 0, 0, float("nan")],
        [0, 0, 0, 0, 0, float("inf")],
        "six",
        None,
        [True] * 6,
    ],
)
@pytest.mark.parametrize("field", ["at1_6dof", "action_change_6dof"])
def test_refuses_poses(folder, field, value):
    edit(folder / "p1", 3, **{field: value})
    assert f"record 3, {field}: six finite numbers" in problems(folder)


def test_refuses_an_action_that_fits_no_convention(folder):
    edit(folder / "p2", 4, action_change_6dof=[1.0, 2, 3, 4, 5, 6])
    assert f"p2/{RECORDS}, record 4, action_change_6dof: off by" in problems(folder)


# Units, and angles all round


def rescaled(folder, length, angle, **fields):
    for scan in folder.iterdir():
        records = records_of(scan)
        for record in records:
            for field in ("at1_6dof", "action_change_6dof", "at2_6dof"):
                value = np.array(record[field])
                record[field] = [*(value[:3] / length), *(value[3:] / angle)]
            record.update(fields)
        (scan / RECORDS).write_text(json.dumps(records))


RAD = 180 / np.pi


@pytest.mark.parametrize(
    ("length", "angle", "units", "message"),
    [
        (1000, 1, "m deg", "probably metres ('m deg')"),
        (1, RAD, "mm rad", "probably radians ('mm rad')"),
        (1000, RAD, "rad, m", "probably metres"),
    ],
)
def test_metres_and_radians_are_refused_and_read_on_request(folder, length, angle, units, message):
    before = Transitions(folder)
    rescaled(folder, length, angle)
    assert message in problems(folder) and "p0" in problems(folder)
    data = Transitions(folder, reading={"units": units})
    torch.testing.assert_close(data.pose1, before.pose1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(data.action, before.action, rtol=1e-4, atol=1e-4)
    assert len(Transitions(folder, reading={"force": True})) == 18


def test_radians_without_a_sign_are_noticed_too(folder):
    rescaled(folder, 1, RAD)
    for scan in folder.iterdir():
        records = records_of(scan)
        for record in records:
            for field in ("at1_6dof", "at2_6dof"):
                record[field][3:] = np.mod(record[field][3:], 2 * np.pi).tolist()
            record["action_change_6dof"] = np.subtract(
                record["at2_6dof"], record["at1_6dof"]
            ).tolist()
        (scan / RECORDS).write_text(json.dumps(records))
    assert "probably radians" in problems(folder)


def test_a_scan_may_state_its_units(folder):
    before = Transitions(folder)
    rescaled(folder, 10, RAD, units="cm rad")
    data = Transitions(folder)
    torch.testing.assert_close(data.pose2, before.pose2, rtol=1e-5, atol=1e-5)
    for scan in folder.iterdir():
        records = records_of(scan)
        for record in records:
            record.pop("units")
        (scan / RECORDS).write_text(json.dumps({"units": "cm rad", "transitions": records}))
    assert same(Transitions(folder), data)


def test_small_motions_in_stated_units_are_no_mistake(folder):
    rescaled(folder, 1000, RAD)
    assert "if not in fact millimetres ('mm deg')" in problems(folder)
    assert Transitions(folder, reading={"units": "mm deg"}).pose1.abs().max() < 1


def test_different_or_unknown_units_are_refused(folder):
    edit(folder / "p1", 2, units="m deg")
    assert "p1/" in problems(folder) and "different units" in problems(folder)
    for wrong in ("mm", "mm cm", "inch deg", "mm deg rad"):
        with pytest.raises(ValueError, match="give a length"):
            parse_units(wrong)


@pytest.mark.parametrize(("axis", "value"), [(0, 1e30), (2, -9999.0), (4, 4e4), (1, 2500.0)])
def test_absurd_poses_are_refused_with_their_place(folder, axis, value):
    record = records_of(folder / "p1")[3]
    at2 = record["at2_6dof"]
    at2[axis] = value
    change = np.subtract(at2, record["at1_6dof"]).tolist()
    edit(folder / "p1", 3, at2_6dof=at2, action_change_6dof=change)
    assert f"p1/{RECORDS}, record 3: {abs(value):.4g}" in problems(folder)


def test_angles_from_0_to_360_are_wrapped(folder, caplog):
    before = Transitions(folder)
    for scan in folder.iterdir():
        records = records_of(scan)
        for record in records:
            for field in ("at1_6dof", "at2_6dof"):
                record[field][3:] = np.mod(record[field][3:], 360).tolist()
            record["action_change_6dof"] = np.subtract(
                record["at2_6dof"], record["at1_6dof"]
            ).tolist()
        (scan / RECORDS).write_text(json.dumps(records))
    data = Transitions(folder)
    torch.testing.assert_close(data.pose1, before.pose1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(data.action, before.action, rtol=1e-4, atol=1e-4)
    assert "angles beyond 180 degrees (pitch: 90)" in caplog.text


def test_the_other_three_angles_of_a_rotation_are_brought_to_the_usual_ones(folder):
    """Pitch beyond 90 degrees: roll and yaw half a turn further are the same rotation."""
    before = Transitions(folder)
    scan = folder / "p1"
    records = records_of(scan)
    for record in records:
        for field in ("at1_6dof", "at2_6dof"):
            x, y, z, roll, pitch, yaw = record[field]
            record[field] = [x, y, z, roll + 180, 180 - pitch, yaw - 180]
        record["action_change_6dof"] = poses.relative(
            *torch.tensor([record["at1_6dof"], record["at2_6dof"]], dtype=torch.float64)
        ).tolist()
    (scan / RECORDS).write_text(json.dumps(records))
    data = Transitions(folder)
    torch.testing.assert_close(data.pose1, before.pose1, rtol=1e-5, atol=1e-4)
    assert data.pose1[:, 4].abs().max() <= 90


# What a folder states about itself


def test_a_folder_states_how_it_is_read_and_whose_scans_it_holds(folder):
    before = Transitions(folder)
    rescaled(folder, 1000, RAD)
    people = "patients: {p0: Ann, p1: Ann, p2: Ben}"
    (folder / "reading.yaml").write_text(f"units: m rad\nmask: [[0, 0, 4, 4]]\n{people}\n")
    data = Transitions(folder)
    torch.testing.assert_close(data.pose1, before.pose1, rtol=1e-5, atol=1e-5)
    assert not data.frames[:, :4, :4].any() and set(data.patient) == {"Ann", "Ben"}
    assert find_patients(folder)["p1"] == "Ann"
    other = Transitions(folder, reading={"mask": []}, patients={"p0": 1, "p1": 2, "p2": 3})
    assert other.frames[:, :4, :4].any() and set(other.patient) == {"1", "2", "3"}
    assert other.digest != data.digest
    (folder / "reading.yaml").write_text("unit: m rad")
    with pytest.raises(ValueError, match="unit"):
        Transitions(folder)


def test_a_folder_cannot_allow_its_own_links(folder, tmp_path, monkeypatch):
    file = folder / "p0" / "ft1" / "frame_p0_0000.png"
    file.rename(tmp_path / "secret.png")
    file.symlink_to(tmp_path / "secret.png")
    (folder / "reading.yaml").write_text("follow_links: true")
    with pytest.raises(ValueError, match="but follow_links"):
        Transitions(folder)
    (folder / "reading.yaml").unlink()
    assert "behind links" in problems(folder)
    monkeypatch.setenv("DREAMER_FOLLOW_LINKS", "1")
    Transitions(folder)


# Names of patients


def test_each_scan_is_a_patient_and_this_is_logged(folder, caplog):
    data = Transitions(folder)
    assert set(data.patient) == {"p0", "p1", "p2"}
    assert "each of 3 scans counts as one patient" in caplog.text


def test_refuses_an_incomplete_mapping(folder):
    assert "no patient given for scan p1, p2" in problems(folder, patients={"p0": "A"})
    assert "no patient given for scan p1" in problems(
        folder, patients={"p0": "A", "p1": None, "p2": "B"}
    )


@pytest.mark.parametrize("name", ["0513_01", "1_000", "no", "2024-01-05", "12:30:00", "7"])
def test_names_that_yaml_reads_as_numbers_are_explained_or_matched(folder, name):
    (folder / "p1").rename(folder / name)
    mapping = yaml.safe_load(f"{{p0: 1, {name}: 2, p2: 3}}")
    key = next(key for key in mapping if key not in ("p0", "p2"))
    assert not isinstance(key, str)
    if str(key) == name:  # a plain number or a date still reads as it was written
        assert isinstance(key, int | datetime.date)
        assert find_patients(folder, mapping)[name] == "2"
    else:
        message = problems(folder, patients=mapping)
        assert f"no patient given for scan {name}" in message and "quote them" in message
    assert find_patients(folder, yaml.safe_load(f"{{p0: 1, '{name}': 2, p2: 3}}"))[name] == "2"


def test_names_match_however_accents_are_written(folder):
    (folder / "p1").rename(folder / unicodedata.normalize("NFD", "Müller"))
    found = Transitions(folder, patients={"p0": " Ann", "Müller": "Bén", "p2": "Be\u0301n "})
    assert set(found.patient) == {"Ann", "Bén"}


def test_refuses_names_that_differ_in_case_alone(folder):
    message = problems(folder, patients={"p0": "Ann", "p1": "ann", "p2": "Ben"})
    assert "patients: Ann and ann differ only in case" in message


def test_warns_of_patients_whose_scans_are_not_there(folder, caplog):
    with caplog.at_level(logging.WARNING):
        Transitions(folder, patients={"p0": 1, "p1": 2, "p2": 3, "p9": 4})
    assert "no scan is named p9" in caplog.text


def test_numbers_in_names_sort_as_numbers():
    assert sorted(["f10", "f9", "f009b", "a"], key=natural) == ["a", "f9", "f009b", "f10"]
