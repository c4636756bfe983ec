"""Formats of laboratories become transitions: the same sweep from each, written after their
specifications, agrees with scipy; samples and settings that are wrong are dropped or refused."""

import io
import json
import os
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import yaml
from PIL import Image
from scipy.spatial.transform import Rotation

from dreamer.data import Transitions, split_by_blocks
from dreamer.images import to_grey, to_square
from dreamer.importers import (
    Clip,
    Sweep,
    Track,
    check,
    check_rigid,
    join,
    pair,
    read_calibration,
    read_clip,
    read_hdf5,
    read_sequence,
    read_track,
    relative,
    write_scan,
)
from dreamer.pipeline import known_parameters


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))


def shared(root: Path, name: str) -> Path:
    folder = Path(os.environ.get("DREAMER_SHARED", root.parent / "shared")) / "data" / name
    if not folder.exists():
        pytest.skip(f"no {folder}; DREAMER_SHARED names another place of shared/")
    return folder


def made(count: int = 24) -> SimpleNamespace:
    """A sweep with large rotations: images [H, W], positions in mm, rotations, seconds."""
    draw = np.random.default_rng(5)
    turn = np.cumsum(draw.normal(size=(count, 3)) * 8, 0) + np.array([170, -40, 100])
    return SimpleNamespace(
        images=[draw.integers(0, 256, (36, 48), dtype=np.uint8) for _ in range(count)],
        position=np.cumsum(draw.normal(size=(count, 3)) * 4, 0) + np.array([180, 330, 1500]),
        rotation=Rotation.from_euler("xyz", turn, degrees=True),
        times=np.arange(count) * 0.05 + 7,
    )


@pytest.fixture(params=["made", "ultrabones"])
def sweep(request, root):
    if request.param == "made":
        return made()
    folder = shared(root, "ultrabones_sweep")
    log = pd.read_csv(folder / "tracking.csv").sort_values("timestamp")[::20]
    files = [folder / "UltrasoundImages" / f"{stamp}.png" for stamp in log["timestamp"]]
    angles = log[["euler_x", "euler_y", "euler_z"]].to_numpy()
    return SimpleNamespace(
        images=[np.asarray(Image.open(file)) for file in files],
        position=log[["x", "y", "z"]].to_numpy(),
        rotation=Rotation.from_euler("xyz", angles, degrees=True),
        times=log["timestamp"].to_numpy() / 1000,
    )


def by_scipy(sweep, target: int = -1) -> np.ndarray:
    """Poses relative to a frame [N, 6], computed from rotations and vectors alone."""
    home = sweep.rotation[target].inv()
    angles = (home * sweep.rotation).as_euler("ZYX", degrees=True)[:, ::-1]
    return np.hstack([home.apply(sweep.position - sweep.position[target]), angles])


def agree(pose, expected, tolerance=1e-8):
    gap = pose - expected
    gap[:, 3:] = (gap[:, 3:] + 180) % 360 - 180
    return np.abs(gap).max() < tolerance


def matrices(sweep) -> np.ndarray:
    pose = np.tile(np.eye(4), (len(sweep.position), 1, 1))
    pose[:, :3, :3], pose[:, :3, 3] = sweep.rotation.as_matrix(), sweep.position
    return pose


def image_folder(sweep, folder: Path) -> Path:
    (folder / "images").mkdir()
    for number, image in enumerate(sweep.images):
        Image.fromarray(image).save(folder / "images" / f"image_{number}.png")
    return folder / "images"


# One format each: written by the test, read by the importer


def euler_degrees(sweep, folder):
    table = pd.DataFrame(sweep.position, columns=["x", "y", "z"])
    table[["a", "b", "c"]] = sweep.rotation.as_euler("xyz", degrees=True) % 360
    table.insert(0, "time", sweep.times)
    table.to_csv(folder / "log.csv", index=False)
    track = read_track(folder / "log.csv", ["X", "y", "z"], ["a", "b", "c"], "xyz")
    return read_clip(image_folder(sweep, folder)), track


def euler_radians_of_another_order(sweep, folder):
    values = np.hstack([sweep.rotation.as_euler("YXZ"), sweep.position / 10])
    np.savetxt(folder / "log.txt", values, header="yaw pitch roll and centimetres")
    track = read_track(folder / "log.txt", [3, 4, 5], [0, 1, 2], "YXZ", units="cm rad")
    return read_clip(image_folder(sweep, folder)), track


def quaternions(sweep, folder):
    values = np.hstack([sweep.position, sweep.rotation.as_quat()])
    lines = [";".join(f"{v:.12f}".replace(".", ",") for v in row) for row in values]
    text = "tx;ty;tz;qx;qy;qz;qw\n" + "\n".join(lines)
    (folder / "log.csv").write_text(text, encoding="utf-16")  # as a German spreadsheet saves it
    names = ["tx", "ty", "tz"], ["qx", "qy", "qz", "qw"]
    return read_clip(image_folder(sweep, folder)), read_track(folder / "log.csv", *names, "xyzw")


def quaternions_scalar_first(sweep, folder):
    values = np.hstack([-sweep.rotation.as_quat(scalar_first=True), sweep.position])
    np.savetxt(folder / "log.tsv", values, delimiter="\t", fmt="%.12f")
    track = read_track(folder / "log.tsv", [-3, -2, -1], [0, 1, 2, 3], "wxyz")
    return read_clip(image_folder(sweep, folder)), track


def rotation_vectors(sweep, folder):
    values = np.hstack([sweep.position, sweep.rotation.as_rotvec()])
    np.savetxt(folder / "log.csv", values, delimiter=", ", fmt="%.12f")
    track = read_track(folder / "log.csv", [0, 1, 2], [3, 4, 5], "rotvec", units="mm rad")
    return read_clip(image_folder(sweep, folder)), track


def matrices_in_metres(sweep, folder):
    pose = matrices(sweep)
    pose[:, :3, 3] /= 1000
    np.savetxt(folder / "log.txt", pose.reshape(-1, 16), fmt="%.15f")
    track = read_track(folder / "log.txt", [], list(range(16)), "matrix", units="m deg")
    return read_clip(image_folder(sweep, folder)), track


def igt_header(sweep, **changes) -> tuple[dict, np.ndarray]:
    """Header and pixels of a sequence metafile as the PlusToolkit's user manual describes it."""
    images = np.stack(sweep.images)
    header = {
        "ObjectType": "Image", "NDims": 3, "AnatomicalOrientation": "RAI", "BinaryData": True,
        "BinaryDataByteOrderMSB": False, "CenterOfRotation": "0 0 0", "CompressedData": False,
        "DimSize": " ".join(map(str, images.shape[::-1])), "ElementNumberOfChannels": 1,
        "ElementSpacing": "1 1 1", "ElementType": "MET_UCHAR", "Kinds": "domain domain list",
        "Offset": "0 0 0", "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "UltrasoundImageOrientation": "MF", "UltrasoundImageType": "BRIGHTNESS",
    }  # fmt: skip
    for number, (pose, time) in enumerate(zip(matrices(sweep), sweep.times, strict=True)):
        frame = f"Seq_Frame{number:04d}_"
        header[frame + "FrameNumber"] = number
        header[frame + "ProbeToTrackerTransform"] = " ".join(map(repr, pose.ravel().tolist()))
        header[frame + "ProbeToTrackerTransformStatus"] = "OK"
        header[frame + "Timestamp"] = time
        header[frame + "ImageStatus"] = "OK"
    return header | changes, images


def write_igt(file: Path, header: dict, pixels: bytes) -> Path:
    if header["CompressedData"]:
        pixels = zlib.compress(pixels)
        header = header | {"CompressedDataSize": len(pixels)}
    text = "".join(f"{name} = {value}\n" for name, value in header.items())
    file.write_bytes(text.encode() + b"ElementDataFile = LOCAL\n" + pixels)
    return file


def igt_sequence(sweep, folder):
    header, images = igt_header(sweep)
    return read_sequence(write_igt(folder / "sweep.igs.mha", header, images.tobytes()))


def igt_compressed_and_deep(sweep, folder):
    header, images = igt_header(sweep, CompressedData=True, ElementType="MET_USHORT")
    pixels = (images.astype(np.uint16) * 257).tobytes()
    return read_sequence(write_igt(folder / "sweep.mha", header, pixels), "ProbeToTracker")


def igt_by_simpleitk(sweep, folder):
    itk = pytest.importorskip("SimpleITK")
    header, images = igt_header(sweep)
    image = itk.GetImageFromArray(images)
    for name, value in header.items():
        if name.startswith(("Seq_", "Ultrasound")):
            image.SetMetaData(name, str(value))
    itk.WriteImage(image, folder / "sweep.mha", useCompression=True)
    return read_sequence(folder / "sweep.mha")


def igt_in_two_files(sweep, folder):
    header, images = igt_header(sweep)
    file = write_igt(folder / "sweep.mhd", header, b"")
    file.write_text(file.read_text().replace("LOCAL", "sweep.raw"))
    (folder / "sweep.raw").write_bytes(images.tobytes())
    return read_sequence(file)


def hdf5(sweep, folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "sweep.h5", "w") as file:  # as TUS-REC describes its files
        file["frames"] = np.stack(sweep.images)
        file["tforms"] = matrices(sweep)
    return read_hdf5(folder / "sweep.h5")


FORMATS = [
    euler_degrees, euler_radians_of_another_order, quaternions, quaternions_scalar_first,
    rotation_vectors, matrices_in_metres, igt_sequence, igt_compressed_and_deep, igt_by_simpleitk,
    igt_in_two_files, hdf5,
]  # fmt: skip


@pytest.mark.parametrize("written", FORMATS, ids=lambda f: f.__name__)
def test_every_format_gives_the_same_transitions(sweep, tmp_path, written):
    clip, track = written(sweep, tmp_path)
    joined = join(clip, track)
    pose = relative(joined)
    assert len(joined.index) == len(sweep.images) and not any(joined.dropped.values())
    assert agree(pose, by_scipy(sweep), 1e-6)
    write_scan(tmp_path / "own" / "scan", joined, pose, gaps=[1, 3])
    data = Transitions(tmp_path / "own")
    count = len(sweep.images)
    assert len(data) == 2 * count - 4
    first = np.array([int(name.split("_")[1]) for name in data.frame[:, 0]])
    assert agree(data.pose1.numpy().astype(float), by_scipy(sweep)[first], 1e-3)
    for at in (0, len(data) - 1):
        assert np.array_equal(
            data.frames[data.rows[at, 0]], to_square(sweep.images[first[at]], "pad")
        )
    motion = sweep.rotation[0].inv() * sweep.rotation[3]  # of the second record, frames 0 and 3
    way = sweep.rotation[0].inv().apply(sweep.position[3] - sweep.position[0])
    expected = np.hstack([way, motion.as_euler("ZYX", degrees=True)[::-1]])
    assert agree(data.action[1:2].numpy().astype(float), expected[None], 1e-3)


def test_subtracted_angles_are_another_rotation(sweep):
    """Why poses are never subtracted: what the rigid motion is against what is left of angles."""
    angles = sweep.rotation.as_euler("xyz", degrees=True)
    left = Rotation.from_euler("xyz", angles - angles[-1], degrees=True)
    true = sweep.rotation[-1].inv() * sweep.rotation
    assert np.median(np.degrees((left.inv() * true).magnitude())) > 10


def test_a_log_of_quaternions_without_images(root):
    file = shared(root, "tracker_log") / "Demo_pos.txt"
    track = read_track(file, [2, 3, 4], [5, 6, 7, 8], "xyzw", status=1)
    raw = np.loadtxt(file)
    log = SimpleNamespace(position=raw[:, 2:5], rotation=Rotation.from_quat(raw[:, 5:]))
    clip = Clip([f"f{n}" for n in range(len(raw))], None, None)
    joined = join(clip, track)
    assert len(joined.index) == 109
    assert agree(relative(joined), by_scipy(log)) and agree(relative(joined, 20), by_scipy(log, 20))
    assert relative(joined, "f20")[20] == pytest.approx(0, abs=1e-9)


def test_time_stamps_in_file_names_match_those_of_the_log(root):
    folder = shared(root, "ultrabones_sweep")
    clip = read_clip(folder / "UltrasoundImages", times="name", time_unit="ms")
    columns = ["x", "y", "z"], ["euler_x", "euler_y", "euler_z"], "xyz"
    track = read_track(folder / "tracking.csv", *columns, time="timestamp")
    joined = join(clip, track, largest_gap=0.001)
    assert len(joined.index) == 139 and joined.names[0] == "162005"
    table, warnings = check(joined, relative(joined))
    assert len(table) == 139 and (table["gap_s"][1:] > 0).all()
    assert any("gaps over five times" in text for text in warnings)
    assert any("longer than 30 mm" in text for text in warnings)


# Clips


def frames_of(clip: Clip) -> list[np.ndarray]:
    return [clip.read(number).grey for number in range(len(clip))]


def same_images(clip, images):
    return len(clip) == len(images) and all(map(np.array_equal, frames_of(clip), images))


def test_folders_are_read_in_the_order_of_numbers(tmp_path, caplog):
    sweep = made(12)
    folder = image_folder(sweep, tmp_path)  # image_10 after image_9
    (folder / "notes.txt").write_text("x")
    clip = read_clip(folder)
    assert same_images(clip, sweep.images) and clip.names[10] == "image_10"
    assert "1 other file ignored" in caplog.text
    Image.fromarray(sweep.images[0]).save(folder / "image_3.jpg")
    with pytest.raises(ValueError, match="image_3 in several formats"):
        read_clip(folder)


def test_time_stamps_are_the_last_number_of_a_file_name(tmp_path):
    for stamp in (1500, 250, 3000.5):
        Image.new("L", (4, 4)).save(tmp_path / f"sweep2_{stamp}.png")
    clip = read_clip(tmp_path, times="name")
    assert clip.times.tolist() == [0.25, 1.5, 3.0005] and clip.names[0] == "sweep2_250"


def test_file_names_without_a_number_are_no_time_stamps(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "left.png")
    with pytest.raises(ValueError, match="left holds no time stamp"):
        read_clip(tmp_path, times="name")


@pytest.mark.parametrize("suffix", ["tif", "jpg", "bmp"])
def test_images_of_other_kinds(tmp_path, suffix):
    smooth = np.add.outer(np.arange(36), np.arange(48)).astype(np.uint8) * 2
    for number in range(3):
        Image.fromarray(smooth + number).save(tmp_path / f"{number}.{suffix}", quality=95)
    found = frames_of(read_clip(tmp_path))
    assert all(np.abs(f.astype(int) - smooth - n).max() <= 3 for n, f in enumerate(found))


def test_a_stack_of_16_bits(tmp_path):
    sweep = made(5)
    deep = [Image.fromarray(image.astype(np.uint16) * 16) for image in sweep.images]
    deep[0].save(tmp_path / "stack.tif", save_all=True, append_images=deep[1:])
    found = frames_of(read_clip(tmp_path / "stack.tif", bits=12))
    assert all(
        np.abs(f.astype(int) - i).max() <= 1 for f, i in zip(found, sweep.images, strict=True)
    )


@pytest.mark.parametrize(
    ("suffix", "codec", "pixels"), [("mkv", "ffv1", "gray"), ("mp4", "mpeg4", "yuv420p")]
)
def test_videos_with_their_times(tmp_path, suffix, codec, pixels):
    av = pytest.importorskip("av")
    smooth = np.add.outer(np.arange(36), np.arange(48)) * 2
    images = [(smooth + 9 * n).astype(np.uint8) for n in range(9)]
    with av.open(str(tmp_path / f"clip.{suffix}"), "w") as container:
        stream = container.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt = 48, 36, pixels
        stream.bit_rate = 4_000_000
        for image in images:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="gray")):
                container.mux(packet)
        container.mux(stream.encode())
    clip = read_clip(tmp_path / f"clip.{suffix}")
    np.testing.assert_allclose(clip.times, np.arange(9) / 20, atol=2e-3)
    limit = 0 if codec == "ffv1" else 8
    for number in (0, 3, 8, 2, 2):  # forwards, backwards, twice
        assert np.abs(clip.read(number).grey.astype(int) - images[number]).max() <= limit


def write_dicom(file, images, **fields):
    """An ultrasound multi-frame image; `images` [N, H, W] or [N, H, W, 3]."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SOPClassUID, data.Modality = data.file_meta.MediaStorageSOPClassUID, "US"
    images = np.asarray(images)
    data.NumberOfFrames, data.Rows, data.Columns = images.shape[:3]
    data.SamplesPerPixel = 3 if images.ndim == 4 else 1
    if images.ndim == 4:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "RGB" if images.ndim == 4 else "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * images.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
    data.PixelData = images.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(file, enforce_file_format=True)
    return file


def test_dicom_cine_loops(tmp_path):
    images = made(4).images
    clip = read_clip(write_dicom(tmp_path / "a.dcm", images, FrameTime="33.3"))
    assert same_images(clip, images) and np.allclose(clip.times, np.arange(4) * 0.0333)
    vector = write_dicom(tmp_path / "IM0001", images, FrameTimeVector=["0", "10", "20", "30"])
    assert np.allclose(read_clip(vector).times, [0, 0.01, 0.03, 0.06])  # no suffix, known by magic
    assert read_clip(write_dicom(tmp_path / "b.dcm", images)).times is None
    inverted = 255 - np.stack(images)
    file = write_dicom(tmp_path / "c.dcm", inverted, PhotometricInterpretation="MONOCHROME1")
    assert same_images(read_clip(file), images)
    colour = np.repeat(np.stack(images)[..., None], 3, -1)
    assert same_images(read_clip(write_dicom(tmp_path / "d.dcm", colour)), images)
    deep = np.stack(images).astype(np.uint16) * 16
    file = write_dicom(tmp_path / "e.dcm", deep, BitsStored=12, HighBit=11)
    found = frames_of(read_clip(file))
    assert all(np.abs(f.astype(int) - i).max() <= 1 for f, i in zip(found, images, strict=True))


def test_compressed_dicom(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    smooth = (np.add.outer(np.arange(36), np.arange(48)) * 2).astype(np.uint8)
    parts = []
    for number in range(3):
        stream = io.BytesIO()
        Image.fromarray(smooth + number).convert("RGB").save(stream, "JPEG", quality=95)
        parts.append(stream.getvalue())
    file = write_dicom(tmp_path / "a.dcm", np.zeros((3, 36, 48, 3), np.uint8),
                       PhotometricInterpretation="YBR_FULL_422", CineRate="25")  # fmt: skip
    data = pydicom.dcmread(file)
    data.PixelData = pydicom.encaps.encapsulate(parts)
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    data.save_as(file, enforce_file_format=True)
    clip = read_clip(file)
    assert np.allclose(clip.times, [0, 0.04, 0.08])
    assert all(np.abs(clip.read(n).grey.astype(int) - smooth - n).max() <= 4 for n in range(3))


def test_a_folder_of_dicom_files_follows_their_numbers(tmp_path):
    images = made(3).images
    for number, image in enumerate(images):
        write_dicom(tmp_path / f"{9 - number}.dcm", image[None], InstanceNumber=number + 1)
    assert same_images(read_clip(tmp_path), images)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.xyz").write_text("x" * 200)
    with pytest.raises(ValueError, match=r"a\.xyz is no image, video or DICOM"):
        read_clip(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="holds no image"):
        read_clip(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_clip(tmp_path / "none")


# Logs


def log(tmp_path, text: str) -> Path:
    (tmp_path / "log.csv").write_text(text)
    return tmp_path / "log.csv"


POSITION, QUATERNION = ["x", "y", "z"], ["a", "b", "c", "d"]
HEADER = "t,x,y,z,a,b,c,d,state,image\n"


def test_invalid_samples_are_dropped_and_counted(tmp_path):
    file = log(tmp_path, HEADER + "\n".join([
        "0.0,1,2,3,0,0,0,1,OK,frame_0.png",
        "0.1,1,2,3,0,0,0,1,MISSING,frame_1.png",  # by its status
        "0.2,-3.7e28,-3.7e28,-3.7e28,0,0,0,1,OK,frame_2.png",  # a bad float
        "0.3,1,2,3,0,0,0,0,OK,frame_3.png",  # no rotation
        "0.4,MISSING,2,3,0,0,0,1,OK,frame_4.png",
        "0.5,nan,2,3,0,0,0,1,OK,frame_5.png",
        "0.6,,2,3,0,0,0,1,OK,frame_6.png",
        "0.7,4,2,3,0,0,0,1,OK,frame_7.png",
    ]))  # fmt: skip
    track = read_track(file, POSITION, QUATERNION, "xyzw", time="t", time_unit="s", status="state",
                       frame="image")  # fmt: skip
    assert track.valid.tolist() == [True] + [False] * 6 + [True]
    assert track.names[7] == "frame_7" and track.times[7] == 0.7
    joined = join(Clip([f"frame_{n}" for n in range(8)], None, None), track)
    assert joined.dropped == {"invalid samples": 6, "frames without a pose": 6}
    assert relative(joined)[0] == pytest.approx([-3, 0, 0, 0, 0, 0])


def test_status_may_be_a_number(tmp_path):
    rows = [f"{n},{n % 2},0,0,0,0,0,0,1" for n in range(4)]
    file = log(tmp_path, "# made by a tracker\n" + "\n".join(rows))
    options = dict(position=[2, 3, 4], rotation=[5, 6, 7, 8], kind="xyzw", status=1)
    assert read_track(file, **options).valid.tolist() == [True, False] * 2
    assert read_track(file, **options, ok=[1]).valid.tolist() == [False, True] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": ["x", "y", "depth"]}, "no column 'depth' among 10: t, x, y, z"),
        ({"position": [1, 2, 99]}, "no column 99 among 10"),
        ({"kind": "euler"}, "4 of rotation do not fit 'euler'"),
        ({"kind": "xyz"}, "4 of rotation do not fit 'xyz'"),
        ({"kind": "matrix"}, "do not fit 'matrix'"),
        ({"units": "inch deg"}, "units 'inch deg': give a length"),
    ],
)
def test_settings_that_do_not_fit_a_log_are_refused(tmp_path, change, message):
    file = log(tmp_path, HEADER + "0.0,1,2,3,0,0,0,1,OK,a\n")
    options = {"position": POSITION, "rotation": QUATERNION, "kind": "xyzw"} | change
    with pytest.raises(ValueError, match=message):
        read_track(file, **options)


@pytest.mark.parametrize("wrong", ["columns", "scaled", "mirrored"])
def test_matrices_that_are_no_rigid_motions_are_refused(tmp_path, wrong):
    pose = matrices(made(3))
    if wrong == "columns":
        pose = pose.swapaxes(1, 2)
    else:
        pose[:, :3, :3] *= 1.2 if wrong == "scaled" else np.array([1, 1, -1])
    np.savetxt(tmp_path / "log.txt", pose.reshape(-1, 16))
    with pytest.raises(ValueError, match="matrix 0 is no rigid motion"):
        read_track(tmp_path / "log.txt", [], list(range(16)), "matrix")
    if wrong == "columns":  # the remedy that the message names
        rows = [4 * column + row for row in range(4) for column in range(4)]
        track = read_track(tmp_path / "log.txt", [], rows, "matrix")
        np.testing.assert_allclose(track.pose, matrices(made(3)))


def test_an_empty_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        read_track(log(tmp_path, "# nothing\n\n"), [0, 1, 2], [3, 4, 5], "xyz")


# Sequences and HDF5


def test_frames_of_a_sequence_with_another_status_are_dropped(tmp_path):
    sweep = made(6)
    header, images = igt_header(sweep)
    header["Seq_Frame0001_ProbeToTrackerTransformStatus"] = "INVALID"
    header["Seq_Frame0003_ImageStatus"] = "INVALID"
    del header["Seq_Frame0004_ProbeToTrackerTransform"]
    joined = join(*read_sequence(write_igt(tmp_path / "a.mha", header, images.tobytes())))
    assert joined.index.tolist() == [0, 2, 5]
    assert joined.dropped == {"invalid samples": 3, "frames without a pose": 3}
    assert agree(relative(joined), by_scipy(sweep)[[0, 2, 5]])


def test_poses_relative_to_a_marker_on_the_patient(tmp_path):
    """The patient moves: poses seen from its marker do not change."""
    sweep, still = made(6), made(6)
    away = Rotation.from_euler("xyz", np.arange(18).reshape(6, 3) * 5, degrees=True)
    shift = np.arange(18).reshape(6, 3) * 3.0
    sweep.rotation, sweep.position = away * sweep.rotation, away.apply(sweep.position) + shift
    header, images = igt_header(sweep)
    marker = SimpleNamespace(rotation=away, position=shift)
    for number, pose in enumerate(matrices(marker)):
        text = " ".join(map(repr, pose.ravel().tolist()))
        header[f"Seq_Frame{number:04d}_ReferenceToTrackerTransform"] = text
    file = write_igt(tmp_path / "a.mha", header, images.tobytes())
    with pytest.raises(ValueError, match="It holds ProbeToTracker, ReferenceToTracker"):
        read_sequence(file)
    with pytest.raises(ValueError, match="transform StylusToTracker"):
        read_sequence(file, "StylusToTracker")
    joined = join(*read_sequence(file, "ProbeToTracker", "ReferenceToTracker"))
    assert agree(relative(joined), by_scipy(still), 1e-6)


@pytest.mark.parametrize(
    ("code", "turn"),
    [("MF", np.array), ("UF", np.fliplr), ("MN", np.flipud), ("UN", lambda i: i[::-1, ::-1])],
)
def test_images_of_a_sequence_are_brought_to_one_orientation(tmp_path, code, turn):
    sweep = made(3)
    header, images = igt_header(sweep, UltrasoundImageOrientation=code)
    clip, _ = read_sequence(write_igt(tmp_path / "a.mha", header, images.tobytes()))
    assert same_images(clip, [turn(image) for image in sweep.images])


def test_other_metafiles_are_refused(tmp_path):
    header, images = igt_header(made(3), UltrasoundImageOrientation="FM")
    with pytest.raises(ValueError, match="orientation FM"):
        read_sequence(write_igt(tmp_path / "a.mha", header, images.tobytes()))
    header, images = igt_header(made(3), ElementType="MET_FLOAT")
    with pytest.raises(ValueError, match="8 or 16 bits"):
        read_sequence(write_igt(tmp_path / "a.mha", header, images.tobytes()))
    (tmp_path / "a.mha").write_bytes(b"not a metafile")
    with pytest.raises(ValueError, match="no MetaImage"):
        read_sequence(tmp_path / "a.mha")


def test_big_endian_and_coloured_sequences(tmp_path):
    sweep = made(3)
    header, images = igt_header(sweep, ElementType="MET_USHORT", BinaryDataByteOrderMSB=True)
    pixels = (images.astype(">u2") * 257).astype(">u2").tobytes()
    clip, _ = read_sequence(write_igt(tmp_path / "a.mha", header, pixels))
    assert same_images(clip, sweep.images)
    header, images = igt_header(sweep, ElementNumberOfChannels=3)
    pixels = np.repeat(images[..., None], 3, -1).tobytes()
    clip, _ = read_sequence(write_igt(tmp_path / "b.mha", header, pixels))
    assert same_images(clip, sweep.images)


def test_other_hdf5_files_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["tforms"] = (
            np.zeros((3, 4, 4), np.uint8),
            np.tile(np.eye(4), (2, 1, 1)),
        )
    with pytest.raises(ValueError, match="no frames; it holds images, tforms"):
        read_hdf5(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="do not correspond"):
        read_hdf5(tmp_path / "a.h5", "images")


# Joining


def track_of(sweep, times=None) -> Track:
    pose = matrices(sweep)
    return Track(pose, np.ones(len(pose), bool), sweep.times if times is None else times)


def clip_of(sweep, times=None) -> Clip:
    names = [f"frame_{n}" for n in range(len(sweep.images))]
    return Clip(names, times, lambda number: to_grey(sweep.images[number]))


def test_frames_take_the_nearest_sample_within_the_largest_gap():
    sweep = made(6)  # samples at 7.00, 7.05, ... 7.25 s
    times = np.array([7.0, 7.06, 7.08, 7.19, 7.31, 7.9])
    joined = join(clip_of(sweep, times), track_of(sweep), largest_gap=0.025)
    assert joined.index.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(joined.pose, matrices(sweep)[[0, 1, 2, 4]])
    assert joined.dropped["frames without a pose"] == 2
    late = join(clip_of(sweep, sweep.times - 100), track_of(sweep), delay=100.0)
    np.testing.assert_array_equal(late.pose, matrices(sweep))


def test_samples_out_of_order_and_invalid_ones_are_passed_over():
    sweep = made(6)
    order = np.array([3, 1, 5, 0, 4, 2])
    track = track_of(sweep)
    track = Track(track.pose[order], order != 2, track.times[order])
    joined = join(clip_of(sweep, sweep.times), track, largest_gap=0.01)
    assert joined.index.tolist() == [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(joined.pose, matrices(sweep)[[0, 1, 3, 4, 5]])


def test_a_frame_with_two_samples_is_refused(tmp_path):
    file = log(tmp_path, HEADER + "0,1,2,3,0,0,0,1,OK,f_1.png\n1,2,2,3,0,0,0,1,OK,f_1.png\n")
    track = read_track(file, POSITION, QUATERNION, "xyzw", frame="image")
    with pytest.raises(ValueError, match="frame f_1 has two samples"):
        join(Clip(["f_1", "f_2"], None, None), track)


def test_samples_without_a_time_are_not_valid(tmp_path):
    file = log(tmp_path, HEADER + "0,1,2,3,0,0,0,1,OK,a\n,2,2,3,0,0,0,1,OK,b\n")
    track = read_track(file, POSITION, QUATERNION, "xyzw", time="t")
    assert track.valid.tolist() == [True, False]


def test_what_does_not_correspond_is_refused():
    sweep = made(6)
    with pytest.raises(ValueError, match=r"frames 0.000 to 0.250 s; samples 7.000 to 7.250 s"):
        join(clip_of(sweep, sweep.times - 7), track_of(sweep))
    track = Track(track_of(sweep).pose[:5], np.ones(5, bool))
    with pytest.raises(ValueError, match="6 frames and 5 samples; match them by time"):
        join(clip_of(sweep), track)


def test_targets_by_frame_name_and_pose():
    sweep = made(6)
    joined = join(clip_of(sweep), track_of(sweep))
    assert agree(relative(joined, 2), by_scipy(sweep, 2))
    assert agree(relative(joined, "frame_4"), by_scipy(sweep, 4))
    angles = sweep.rotation[1].as_euler("ZYX", degrees=True)[::-1]
    goal = [*sweep.position[1], *angles]
    assert agree(relative(joined, goal), by_scipy(sweep, 1))
    with pytest.raises(ValueError, match="no frame 77 with a pose; frame_0 to frame_5"):
        relative(joined, 77)


def test_a_calibration_moves_the_pose_to_the_image_and_its_axes(tmp_path):
    """Tilting the image about its lateral axis is roll, whatever the marker's own axes are."""
    calibration = np.eye(4)
    calibration[:3, :3] = Rotation.from_euler("xyz", [20, -70, 130], degrees=True).as_matrix()
    calibration[:3, 3] = [10, -40, 90]
    image = np.tile(np.eye(4), (4, 1, 1))  # in the tracker: x right, y down
    image[1, :3, :3] = Rotation.from_euler("x", 15, degrees=True).as_matrix()
    image[2, :3, 3] = [3, 0, 0]
    image[3, :3, 3] = [0, 7, 0]
    marker = image @ np.linalg.inv(calibration)
    sweep = Sweep(Clip(list("abcd"), None, None), np.arange(4), marker)
    scaled = calibration @ np.diag([0.054, 0.06, 1, 1])  # image pixels of unequal size
    np.savetxt(tmp_path / "calibration.txt", scaled)
    pose = relative(sweep, 0, read_calibration(tmp_path / "calibration.txt"))
    expected = [[0] * 6, [0, 0, 0, 15, 0, 0], [3, 0, 0, 0, 0, 0], [0, 0, 7, 0, 0, 0]]
    np.testing.assert_allclose(pose, expected, atol=1e-9)


def test_calibrations_in_two_steps_and_wrong_ones(tmp_path):
    turn = Rotation.from_euler("xyz", [20, -70, 130], degrees=True).as_matrix()
    rigid = np.eye(4)
    rigid[:3, :3], rigid[:3, 3] = turn, [10, -40, 90]
    lines = ["scaling_from_pixel_to_mm"]
    lines += [",".join(map(str, row)) for row in np.diag([0.23, 0.24, 1, 1])]
    lines += ["spatial_calibration_from_image_coordinate_system_to_tracking_tool"]
    lines += [",".join(map(str, row)) for row in rigid]
    (tmp_path / "calib_matrix.csv").write_text("\n".join(lines))
    np.testing.assert_allclose(read_calibration(tmp_path / "calib_matrix.csv"), rigid)
    np.testing.assert_allclose(read_calibration(rigid.tolist()), rigid)
    for wrong in (np.diag([1, 1, -1, 1]), rigid.T, rigid + np.eye(4)[:, [1, 0, 2, 3]]):
        with pytest.raises(ValueError, match="is no rigid motion"):
            read_calibration(wrong)
    check_rigid(rigid[None], "calibration")


def test_pairs_are_frames_of_the_clip_so_many_apart():
    sweep = made(8)
    track = track_of(sweep)
    track.valid[[2, 5]] = False
    joined = join(clip_of(sweep, sweep.times), track, largest_gap=0.01)
    assert joined.index.tolist() == [0, 1, 3, 4, 6, 7]
    of_clip = joined.index[pair(joined, [1, 3])]
    assert of_clip.tolist() == [[0, 1], [0, 3], [1, 4], [3, 4], [3, 6], [4, 7], [6, 7]]
    with pytest.raises(ValueError, match="no two frames"):
        pair(joined, [50])


def test_the_check_names_what_looks_wrong():
    sweep = made(40)
    joined = join(clip_of(sweep, sweep.times), track_of(sweep))
    table, warnings = check(joined, relative(joined))
    assert not [w for w in warnings if "pitch" not in w]
    step = np.linalg.norm(np.diff(sweep.position, axis=0), axis=1)
    np.testing.assert_allclose(table["step_mm"][1:], step)
    np.testing.assert_allclose(table["speed_mm_s"][1:], step / 0.05)
    turn = np.degrees((sweep.rotation[:-1].inv() * sweep.rotation[1:]).magnitude())
    np.testing.assert_allclose(table["step_deg"][1:], turn, atol=1e-6)

    sweep.position[20] += 400  # a jump and back
    track = track_of(sweep)
    track.pose[10] = track.pose[9]  # a sample that was repeated
    track.valid[25:35] = False
    joined = join(clip_of(sweep, sweep.times), track, largest_gap=0.001)
    _, warnings = check(joined, relative(joined))
    text = "\n".join(warnings)
    assert "3 steps longer than 30 mm" in text and "2 steps faster than 500 mm/s" in text
    assert "1 frame with exactly the pose of the one before" in text
    assert "1 gap over five times the usual 0.05 s" in text
    assert "10 of 40 frames without a pose" in text
    _, warnings = check(joined, relative(joined) / 2000)
    assert "probably metres" in "\n".join(warnings) and "probably radians" in "\n".join(warnings)


# Writing


def test_scans_are_written_whole_and_replaced_by_imports_alone(tmp_path):
    sweep = made(12)
    joined = join(clip_of(sweep), track_of(sweep))
    folder, pose = tmp_path / "own" / "scan", relative(joined)
    assert write_scan(folder, joined, pose, source="log.csv, mm") == [
        "images of 48x36 pixels are padded to a square with black"
    ]
    about = json.loads((folder / "import.json").read_text())
    assert (about["frames"], about["pairs"], about["source"]) == (12, 11, "log.csv, mm")
    write_scan(folder, joined, pose, gaps=[2], square="crop")  # replaces its own
    data = Transitions(tmp_path / "own")
    assert len(data) == 10 and data.frames.shape[1:] == (36, 36)

    def fails(number):
        raise OSError("disk full")

    broken = Sweep(Clip(joined.clip.names, None, fails), joined.index, joined.pose)
    with pytest.raises(OSError, match="disk full"):
        write_scan(folder, broken, pose)
    assert len(Transitions(tmp_path / "own")) == 10
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="exists and is no import"):
        write_scan(tmp_path / "mine", joined, pose)


def test_masks_and_fans_are_applied_when_writing(tmp_path):
    sweep = made(12)
    for image in sweep.images:
        image[:, :14] = 0
        image[:5, :5] = 255  # a badge
    joined = join(clip_of(sweep), track_of(sweep))
    pose = relative(joined)
    write_scan(tmp_path / "fan" / "scan", joined, pose, square="fan")
    write_scan(tmp_path / "mask" / "scan", joined, pose, mask=[[0, 0, 5, 5]])
    fan, mask = Transitions(tmp_path / "fan"), Transitions(tmp_path / "mask")
    assert fan.frames.shape[1:] == (36, 36) and fan.frames[:, 3:-3, 5:-3].max(0).min() > 100
    assert not mask.frames[:, :, :14].any() and mask.frames.shape[1:] == (48, 48)


def test_units_that_look_wrong_stop_the_import_unless_forced(tmp_path):
    """What was forced states its units, so that the loader does not ask again."""
    sweep = made(60)
    sweep.rotation = Rotation.from_euler("xyz", np.linspace(0, 2, 180).reshape(60, 3), degrees=True)
    joined = join(clip_of(sweep), track_of(sweep))
    pose = relative(joined)
    with pytest.raises(ValueError, match=r"no angle is larger than 2\.04 degrees, so that these"):
        write_scan(tmp_path / "own" / "scan", joined, pose)
    write_scan(tmp_path / "own" / "scan", joined, pose, gaps=[1, 4], force=True)
    data = Transitions(tmp_path / "own", 32)
    assert data.pose1[:, 3:].abs().max() < 3
    assert all(len(part) for part in split_by_blocks(data, 6, 1)[:3])


def test_the_examples_of_the_documentation_name_parameters_that_exist(root):
    text = (root / "data" / "README.md").read_text()
    known = known_parameters(root / "notebooks" / "00_import.ipynb")
    examples = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    assert len(examples) >= 6 and all(set(example) <= known for example in examples)


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"h5py is needed: pip install -e '.\[import\]'"):
        read_hdf5(tmp_path / "a.h5")


@pytest.mark.slow
def test_the_notebook_imports_its_example(root, tmp_path):
    """Without images it makes a sweep from the phantom, whose poses it must find again."""
    papermill.execute_notebook(
        root / "notebooks" / "00_import.ipynb", tmp_path / "out.ipynb", cwd=root,
        parameters={"scan": str(tmp_path / "own" / "scan"), "output": str(tmp_path / "figures")},
        progress_bar=False,
    )  # fmt: skip
    for name in ("00_check.csv", "00_square.png", "00_trajectory.png", "00_steps.png"):
        assert (tmp_path / "figures" / name).stat().st_size
    data = Transitions(tmp_path / "own")
    assert (len(data), len(data.frames)) == (24, 27)
    assert 80 < data.frames.shape[1] == data.frames.shape[2] < 120  # the fan alone
    last = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs[0]
    found = re.search(r"again within (\S+) mm and (\S+) degrees", last["data"]["text/markdown"])
    assert max(map(float, found.groups())) < 1e-9
