"""Figures as files."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from dreamer import plots


def test_frames_keep_their_grey_levels_and_drawings_get_a_palette(tmp_path):
    frame, ax = plt.subplots(figsize=(3, 3))
    plots.show_frame(ax, np.arange(256, dtype=np.uint8).reshape(16, 16))
    drawing, ax = plt.subplots()
    ax.plot([0, 1], [0, 1], color=plots.COLOURS["patch"])
    for name, fig in (("01_frame", frame), ("04_line", drawing)):
        assert plots.save(fig, tmp_path, name, "A caption.", "In words.", "1 frame") is None
        plt.close(fig)
    with Image.open(tmp_path / "01_frame.png") as image:
        levels = {r for _, (r, g, b) in image.getcolors(1 << 20) if r == g == b}
        assert image.mode == "RGB" and len(levels) > 200
    with Image.open(tmp_path / "04_line.png") as image:
        assert image.mode == "P"
        colours = {colour for _, colour in image.convert("RGB").getcolors()}
        assert (0, 0x72, 0xB2) in colours and (255, 255, 255) in colours
    assert json.loads((tmp_path / "04_line.json").read_text())["n"] == "1 frame"
    with pytest.raises(ValueError, match=r"needs its notebook's number, a caption"):
        plots.save(drawing, tmp_path, "line", "A caption.", "In words.")
