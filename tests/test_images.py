"""Image files become grey square frames, or are refused; the cache of decoded frames."""

import io
import logging
import os

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from scans import write_scan

from dreamer.data import DataError, Reading, Transitions
from dreamer.images import blacken, cache_folder, find_fan, read_image, to_square, to_uint8

GREY = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)


def saved(image, **options):
    """An image, written and read again."""
    stream = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(stream, **({"format": "PNG"} | options))
    stream.seek(0)
    return read_image(stream)


# One image


def test_grey_and_grey_stored_as_colour_stay_as_they_are():
    rgb = Image.fromarray(GREY).convert("RGB")
    palette = Image.fromarray(GREY).convert("P")
    for image in (GREY, rgb, palette):
        found = saved(image)
        assert np.array_equal(found.grey, GREY) and not found.notes


def test_16_bits_are_scaled_by_their_depth():
    deep = GREY.astype(np.uint16) * 257
    for format in ("PNG", "TIFF"):
        found = saved(deep, format=format)
        assert np.array_equal(found.grey, GREY)
        assert "16 to 8 bits" in found.notes[0] and found.peak == deep.max()
    stream = io.BytesIO()
    Image.fromarray(GREY.astype(np.uint16) * 16).save(stream, "PNG")  # 12 bits in use
    assert np.abs(read_image(stream, bits=12).grey.astype(int) - GREY).max() <= 1
    with pytest.raises(ValueError, match="do not fit into 8 bits"):
        read_image(stream, bits=8)


@pytest.mark.parametrize("mode", ["I", "F", "1", "CMYK"])
def test_other_depths_are_refused_by_name(mode):
    with pytest.raises(ValueError, match=f"pixels of type {mode}"):
        saved(Image.fromarray(GREY).convert(mode), format="TIFF")


@pytest.mark.parametrize("values", [np.full((2, 2), 0.5), np.full((2, 2), -1, np.int16)])
def test_levels_that_are_no_levels_are_refused(values):
    with pytest.raises(ValueError, match="grey levels"):
        to_uint8(values)


def test_transparency_that_hides_content_is_refused():
    black = Image.new("L", (32, 24))
    hidden = Image.merge("LA", (black, Image.fromarray(GREY)))
    opaque = Image.merge("LA", (Image.fromarray(GREY), Image.new("L", (32, 24), 255)))
    assert np.array_equal(saved(opaque).grey, GREY)
    with pytest.raises(ValueError, match="is transparent"):
        saved(hidden)
    with pytest.raises(ValueError, match="is transparent"):  # a palette's transparent colour
        saved(Image.fromarray(GREY).convert("P"), transparency=3)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PNG", "WEBP"])
def test_several_frames_in_one_file_are_refused(format):
    other = Image.fromarray(255 - GREY)
    with pytest.raises(ValueError, match="holds 2 frames"):
        saved(Image.fromarray(GREY), format=format, save_all=True, append_images=[other])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(("turn", "quarters"), [(3, 2), (6, 3), (8, 1)])
def test_orientation_is_applied_and_noted(format, turn, quarters):
    exif = Image.Exif()
    exif[0x0112] = turn
    found = saved(GREY, format=format, exif=exif, **({"quality": 100} if format == "JPEG" else {}))
    gap = found.grey.astype(int) - np.rot90(GREY, quarters)
    assert np.abs(gap).max() <= 3 and "EXIF" in found.notes[0]


def test_colour_is_noted_and_the_noise_of_jpeg_is_not():
    tinted = np.stack([GREY, GREY, np.zeros_like(GREY)], -1)
    assert "coloured" in saved(tinted).notes[0]
    smooth = np.tile(np.arange(32, dtype=np.uint8) * 6, (24, 1))
    assert not saved(Image.fromarray(smooth).convert("RGB"), format="JPEG").notes


# Square, mask, fan


def test_pad_and_crop_make_squares_about_the_centre():
    padded, cropped = to_square(GREY, "pad"), to_square(GREY, "crop")
    assert padded.shape == (32, 32) and np.array_equal(padded[4:28], GREY)
    assert not padded[:4].any() and not padded[28:].any()
    assert np.array_equal(cropped, GREY[:, 4:28])
    assert np.array_equal(to_square(GREY.T, "crop"), GREY.T[4:28])


def sector(height=90, width=120):
    y, x = np.mgrid[:height, :width]
    return (np.abs(np.arctan2(x - 60, y + 1)) < 0.6) & (np.hypot(x - 60, y + 1) < 80)


def test_the_fan_is_found_without_badge_and_clock():
    draw, inside = np.random.default_rng(1), sector()
    images = []
    for number in range(12):
        image = np.where(inside, draw.integers(0, 120, inside.shape), 0).astype(np.uint8)
        image[2:8, 100:110] = 200  # a badge
        image[80:86, 4:8] = number * 20  # a clock
        images.append(image)
    fan = find_fan(images)
    assert (
        (fan == inside).mean() > 0.98 and not fan[2:8, 100:110].any() and not fan[80:86].any(0)[0]
    )
    frame = to_square(images[0], "fan", fan)
    assert frame.shape == (fan.any(1).sum(),) * 2 or frame.shape == (fan.any(0).sum(),) * 2
    with pytest.raises(ValueError, match="nothing changes"):
        find_fan([GREY, GREY])


def test_masks_are_black_and_must_lie_inside():
    found = blacken(GREY, [[2, 3, 6, 9]])
    assert not found[3:9, 2:6].any() and (found != GREY).sum() <= 24 and GREY[3:9, 2:6].any()
    with pytest.raises(ValueError, match="exceeds 32x24"):
        blacken(GREY, [[30, 0, 40, 5]])


def test_unknown_ways_of_reading_are_refused(tmp_path):
    for wrong in ({"square": "stretch"}, {"bits": 17}, {"rotate": 1}):
        with pytest.raises(ValidationError):
            Reading(**wrong)


# A folder of them


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    write_scan(tmp_path / "scans", "a", count=6)
    return tmp_path / "scans"


def rewrite(folder, change):
    """Every image file, changed; equal ones stay equal."""
    for file in folder.rglob("*.png"):
        change(np.asarray(Image.open(file).convert("L"))).save(file)


def test_deep_images_give_the_frames_of_shallow_ones(folder, caplog):
    before = Transitions(folder).frames.copy()
    rewrite(folder, lambda grey: Image.fromarray(grey.astype(np.uint16) * 257))
    assert np.array_equal(Transitions(folder).frames, before)
    assert "7 of the images: reduced from 16 to 8 bits" in caplog.text
    caplog.clear()
    for file in folder.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)) // 257).save(file)  # 8 bits in use
    Transitions(folder)
    assert "frames are dark; if fewer bits are in use, state them (bits: 8)" in caplog.text
    caplog.clear()
    assert np.array_equal(Transitions(folder, reading={"bits": 8}).frames, before)
    Transitions(folder, reading={"bits": 8})
    assert "reduced from 16" in caplog.text  # also where they come from the cache


def test_oblong_images_become_square_by_a_stated_rule(folder, caplog):
    rewrite(folder, lambda grey: Image.fromarray(np.pad(grey, ((0, 0), (8, 8)), mode="edge")))
    wide = np.asarray(Image.open(folder / "a" / "ft1" / "frame_a_0003.png"))
    for rule, side in (("pad", 48), ("crop", 32)):
        frames = Transitions(folder, reading={"square": rule}).frames
        assert frames.shape == (7, side, side)
        assert np.array_equal(frames[3], to_square(wide, rule))
    assert "images of 48x32 pixels are padded to a square" in caplog.text
    assert "cropped to their central square" in caplog.text


def test_the_fan_of_a_scan_is_kept_alone(folder):
    inside = sector()

    def scene(grey):
        noise = np.random.default_rng(int(grey.sum())).integers(20, 220, inside.shape)
        image = np.where(inside, noise, 0).astype(np.uint8)
        image[2:8, 100:110] = 255
        return Image.fromarray(image)

    rewrite(folder, scene)
    frames = Transitions(folder, 40, reading={"square": "fan"}).frames
    assert frames.shape[1:] == (40, 40) and frames[:, 1:4, 34:].max() < 30
    assert Transitions(folder, 40).frames[:, :10, 30:].max() > 100  # the badge, without the rule


def test_a_badge_is_masked_before_anything_else(folder):
    found = Transitions(folder, 16, reading={"mask": [[20, 0, 32, 12]]}).frames
    assert not found[:, :5, 11:].any() and found[:, 8:].any()


# The cache


def count_reads(monkeypatch):
    """A list that grows with every image that is decoded."""
    from dreamer import images

    decoded, true = [], images.read_image
    monkeypatch.setattr(images, "read_image", lambda *a: decoded.append(1) or true(*a))
    return decoded


def test_frames_are_decoded_once_and_files_are_not_read_again(folder, monkeypatch):
    decoded = count_reads(monkeypatch)
    first = Transitions(folder)
    assert len(first.frames) == 7 <= len(decoded) <= 12
    decoded.clear()
    monkeypatch.setattr("pathlib.Path.read_bytes", _only_json(monkeypatch))
    again = Transitions(folder)
    assert not decoded and again.digest == first.digest
    assert np.array_equal(again.frames, first.frames) and np.array_equal(again.rows, first.rows)


def _only_json(monkeypatch):
    from pathlib import Path

    true = Path.read_bytes

    def read(path):
        assert path.suffix.startswith(".json"), f"{path} was read again"
        return true(path)

    return read


def test_changed_images_are_noticed_whatever_their_date(folder, cache):
    first = Transitions(folder)
    file = sorted(folder.rglob("ft1/*.png"))[0]  # in one record alone
    dates = file.stat()
    changed = file.read_bytes()
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(file)
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    second = Transitions(folder)
    assert second.digest != first.digest and (second.frames == 9).all((1, 2)).sum() == 1
    file.unlink()
    file.write_bytes(changed)
    assert Transitions(folder).digest == first.digest
    assert len(list(cache.glob("*.raw"))) == 1  # the earlier one has gone


def test_ways_of_reading_and_sizes_have_caches_of_their_own(folder, cache, monkeypatch):
    Transitions(folder)
    Transitions(folder, 16)
    Transitions(folder, 16, reading={"mask": [[0, 0, 4, 4]]})
    decoded = count_reads(monkeypatch)
    Transitions(folder)
    Transitions(folder, 16, reading={"mask": [[0, 0, 4, 4]]})
    assert not decoded and len(list(cache.glob("*.raw"))) == 3


@pytest.mark.parametrize("broken", ["cut", "zeros", "index", "gone"])
def test_a_broken_cache_is_made_anew(folder, cache, broken, caplog):
    before = np.array(Transitions(folder).frames)
    (raw,), (index,) = cache.glob("*.raw"), cache.glob("*.npz")
    if broken == "cut":
        raw.write_bytes(raw.read_bytes()[:-1])
    elif broken == "zeros":
        raw.write_bytes(bytes(raw.stat().st_size))
    elif broken == "index":
        index.write_bytes(index.read_bytes()[:100])
    else:
        raw.unlink()
    assert np.array_equal(Transitions(folder).frames, before)
    assert ("made anew" in caplog.text) == (broken != "gone")


def test_nothing_stays_of_a_decoding_that_fails(folder, cache):
    file = next(folder.rglob("ft1/*0004.png"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="not a readable image"):
        Transitions(folder)
    assert not list(cache.iterdir())


def test_refuses_too_little_disk(folder, cache, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"MiB free, .* needed"):
        Transitions(folder)
    assert not list(cache.iterdir())


def test_many_frames_do_not_fill_the_memory(tmp_path, monkeypatch):
    import tracemalloc

    write_scan(tmp_path / "many", "a", count=400, size=128)
    tracemalloc.start()
    data = Transitions(tmp_path / "many")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(data.frames, np.memmap) and peak < data.frames.nbytes


def test_the_cache_has_a_place_without_a_home(monkeypatch, tmp_path):
    monkeypatch.delenv("DREAMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dreamer" and cache_folder("x").name == "x"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder().is_relative_to(tmp_path)


def test_notes_are_logged_as_warnings(folder, caplog):
    rewrite(folder, lambda grey: Image.fromarray(np.stack([grey, grey, grey * 0], -1)))
    with caplog.at_level(logging.WARNING):
        Transitions(folder)
    assert "7 of the images: coloured, of which only the luminance is kept" in caplog.text
