"""The drawing of the README: one feature map cut both ways, and what the first version made of it.

    python benchmarks/tokens_drawing.py data/weights/patch figures

Frame, map and tokens are real; in the lower half the mean over space and one channel of this map
stand for the values that a model would read from its action token.
"""

import sys

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from matplotlib.patches import Rectangle

from dreamer import load_run, plots
from dreamer.phantom import Patient, render

BLUE, ORANGE = plots.COLOURS["patch"], plots.COLOURS["channel"]
CELL, LAYERS = (3, 3), 5  # the cell drawn as a token, and the channels drawn of the map


def image(fig, place, values, limit, ticks=False):
    """An axis without ticks at `place` [left, bottom, width, height] that shows values [h, w]."""
    ax = fig.add_axes(place)
    ax.imshow(values, cmap="rocket", vmin=0, vmax=limit, aspect="auto", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color="#888888", lw=0.5)
    return ax


def words(fig, x, y, text, **style):
    fig.text(x, y, text, **{"fontsize": 10, "va": "center", **style})


def arrow(fig, start, end):
    fig.add_artist(plt.matplotlib.patches.FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=12, color="#444444", lw=1,
        transform=fig.transFigure,
    ))  # fmt: skip


def draw_map(fig, frame, features, limit):
    """Upper half, left: the frame and its map as a stack of channels; the strongest is in front."""
    plots.show_frame(fig.add_axes([0.01, 0.63, 0.15, 0.27]), frame)
    words(fig, 0.085, 0.60, "one frame", ha="center")
    arrow(fig, (0.165, 0.76), (0.205, 0.76))
    strongest = features.sum((1, 2)).argsort()[-LAYERS:]
    for k, channel in enumerate(strongest):
        place = [0.285 - 0.018 * k, 0.72 - 0.028 * k, 0.11, 0.196]
        ax = image(fig, place, features[channel], limit)
        row, column = CELL
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=BLUE, lw=2))
    ax.spines[:].set(color=ORANGE, lw=2.5)
    words(fig, 0.30, 0.575, "its map: 7x7 cells, 512 channels", ha="center")
    return strongest[-1].item()


def draw_tokens(fig, features, channel, limit):
    """Upper half, right: the same numbers as 49 rows of 512, or as 512 rows of 49."""
    cell = CELL[0] * features.shape[2] + CELL[1]
    ax = image(fig, [0.47, 0.66, 0.29, 0.24], rearrange(features, "c h w -> (h w) c"), limit)
    ax.axhspan(cell - 0.5, cell + 0.5, fill=False, ec=BLUE, lw=2)
    words(fig, 0.47, 0.935, "49 patch tokens of 512 values", color=BLUE, weight="bold")
    words(fig, 0.47, 0.625, "one row: all channels of one place")
    ax = image(fig, [0.855, 0.58, 0.07, 0.32], rearrange(features, "c h w -> c (h w)"), limit)
    ax.axhspan(channel - 3, channel + 3, fill=False, ec=ORANGE, lw=2)
    style = {"color": ORANGE, "weight": "bold", "ha": "right"}
    words(fig, 0.995, 0.935, "512 channel tokens of 49 values", **style)
    words(fig, 0.885, 0.545, "one row: all places of one channel", ha="center")
    arrow(fig, (0.41, 0.78), (0.46, 0.78))
    arrow(fig, (0.765, 0.78), (0.845, 0.78))
    words(fig, 0.805, 0.81, "or", ha="center")


def draw_reading(fig, features, channel, limit):
    """Lower half: the first version repeats the action token in the place of every token."""
    words(fig, 0.01, 0.455, "The first published version reads the imagined map from the "
          "action token alone, repeated:", weight="bold")  # fmt: skip
    pooled, one = features.mean((1, 2)), features[channel].flatten()
    rows = (
        (0.30, BLUE, "patch tokens", pooled[None], "repeated in\n49 cells", pooled[None],
         "512 different numbers"),
        (0.11, ORANGE, "channel tokens", one[None], "repeated in\n512 channels",
         one.mean().expand(1, 512), "one number, 512 times"),
    )  # fmt: skip
    words(fig, 0.645, 0.405, "what the guidance head receives")
    for y, colour, kind, token, repeated, received, outcome in rows:
        width = 0.26 if token.shape[1] == 512 else 0.06
        words(fig, 0.01, y + 0.035, kind, color=colour, weight="bold")
        image(fig, [0.14, y, width, 0.07], token, token.max())
        words(fig, 0.14, y - 0.03, f"action token: {token.shape[1]} values")
        words(fig, 0.455, y + 0.035, repeated, ha="center")
        words(fig, 0.555, y + 0.035, "mean over\nspace", ha="center")
        arrow(fig, (0.60, y + 0.035), (0.635, y + 0.035))
        image(fig, [0.645, y, 0.345, 0.07], received, token.max())
        words(fig, 0.645, y - 0.03, outcome, color=colour, weight="bold")


def main(run: str, output: str) -> None:
    plots.theme()
    model = load_run(run)
    at = torch.zeros(1, 6, dtype=torch.float64)
    frame = render(Patient((1_000_000, 0)), at, 0.0, size=model.config.image_size).image
    with torch.no_grad():
        features = model.encode(frame[None])[0]  # [512, 7, 7]
    limit = features.quantile(0.995).item()
    fig = plt.figure(figsize=(10, 5.4))
    fig.set_layout_engine("none")
    channel = draw_map(fig, frame[0], features, features.max().item() / 2)
    draw_tokens(fig, features, channel, limit)
    draw_reading(fig, features, channel, limit)
    plots.save(
        fig, output, "00_tokens", n="1 frame of a virtual patient",
        caption="One feature map cut into patch tokens or channel tokens. Below: in the first "
        "published version the guidance head receives 512 different numbers with patch tokens, and "
        "one number 512 times with channel tokens.",
        alt="A frame, its map of 7x7 cells and 512 channels, the same numbers as 49 rows of 512 "
        "and as 512 rows of 49, and what the guidance head receives from a repeated action token.",
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
