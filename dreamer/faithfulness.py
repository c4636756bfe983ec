"""Whether a map of what a model looks at is to be believed.

On any frames: deletion and insertion (Petsiuk et al., BMVC 2018), infidelity and max-sensitivity
(Yeh et al., NeurIPS 2019), randomised weights (Adebayo et al., NeurIPS 2018), rank agreement. On
the phantom, whose anatomy is known: pointing game (Zhang et al., ECCV 2016), relevance mass and
rank (Arras et al., Inf. Fusion 2022), and counterfactuals, frames rendered again with one structure
gone. Beside every score stand controls that know nothing of the model.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from captum.metrics import sensitivity_max
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from dreamer.attribution import (
    ATTENTION,
    Cells,
    Question,
    known,
    parts_of,
    answer,
    attention_grid,
    attribute,
    rows_at_once,
)
from dreamer.model import CardiacDreamer

CONTROLS = ("random", "edges", "centre")


def control(name: str, images: Tensor, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Maps [N, h, w] that know nothing of the model: random, the frame's edges, the centre."""
    n, (h, w) = len(images), grid
    if known(name, "control", CONTROLS) == "random":
        return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed))
    if name == "centre":
        y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        return torch.exp(-2 * (x**2 + y**2)).expand(n, h, w)
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    edges = F.conv2d(images.float(), torch.stack((sobel, sobel.T))[:, None], padding=1)
    return F.adaptive_avg_pool2d(edges.norm(dim=1), grid)


def rank_correlation(one: Tensor, other: Tensor) -> NDArray:
    """Spearman correlation [N] between the magnitudes of maps [N, ...]; nan where one is flat."""
    a, b = (rankdata(m.detach().abs().cpu().flatten(1).numpy(), axis=1) for m in (one, other))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


class Curves(NamedTuple):
    """`share` [K] of cells; `deletion`, `insertion` [targets, N, K]: how far the answer lies from
    the whole frame's, mm or deg, with that share of the cells hidden, or shown."""

    share: NDArray
    deletion: Tensor
    insertion: Tensor


@torch.no_grad()
def curves(
    model: CardiacDreamer,
    features: Tensor,
    grid: Tensor,
    targets: Sequence[str],
    baseline: Tensor,
    action: Tensor | None = None,
    points: int = 0,
) -> Curves:
    """`Curves` of cells hidden (from the frame) and shown (on the baseline), greatest |grid| first.

    `grid` [N, h, w]; ties fall at random. `points`: cell counts to try, denser at the start; 0
    tries every one. A true map has a high deletion curve and a low insertion curve.
    """
    n, cells = len(features), grid[0].numel()
    action = features.new_zeros(n, 6) if action is None else action
    counts = np.unique(np.geomspace(1, cells, points or 4 * cells).round().astype(int))
    shuffled = torch.randperm(cells, generator=torch.Generator().manual_seed(0))
    magnitude = grid.detach().abs().cpu().flatten(1)[:, shuffled]
    order = shuffled[magnitude.argsort(dim=1, descending=True, stable=True)]
    place = order.argsort(dim=1).view(n, 1, *grid.shape[1:]).to(features.device)
    base = baseline.expand_as(features)

    def ask(mask: Tensor) -> Tensor:
        parts = parts_of(n, rows_at_once(model), None)
        seen = [
            model.imagine(torch.lerp(base[p], features[p], mask[p]), action[p]).pose for p in parts
        ]
        return torch.stack([answer(torch.cat(seen), t) for t in targets])  # [targets, N]

    whole, empty = (ask((place < c).float()) for c in (cells, 0))
    down = [whole] + [ask((place >= c).float()) for c in counts[:-1]] + [empty]
    up = [empty] + [ask((place < c).float()) for c in counts[:-1]] + [whole]
    away = [(torch.stack(line, -1) - whole[..., None]).abs().cpu() for line in (down, up)]
    return Curves(np.concatenate(([0], counts)) / cells, *away)


@torch.no_grad()
def infidelity(
    model: CardiacDreamer,
    features: Tensor,
    grids: Mapping[str, Tensor],
    target: str,
    baseline: Tensor,
    samples: int = 32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Share [N] of the answer's change under random hiding that each map fails to predict.

    Captum's `infidelity(normalize=True)` over masks of cells, the same masks for every map of
    `grids`, relative to the mean squared change: 0 predicts all of it, 1 none.
    """
    n, (h, w) = len(features), features.shape[2:]
    draw = torch.Generator().manual_seed(seed)
    hide = torch.rand(samples, n, 1, h, w, generator=draw)
    hide = (hide < torch.rand(samples, n, 1, 1, 1, generator=draw) / 2).float().to(features.device)
    game, action = Cells(Question(model, target)), features.new_zeros(n, 6)
    base = baseline.expand_as(features)

    def ask(mask: Tensor) -> Tensor:
        parts = parts_of(n, rows_at_once(model), None)
        return torch.cat([game(mask[p], features[p], base[p], action[p]) for p in parts])

    change = ask(torch.ones_like(hide[0])) - torch.stack([ask(1 - m) for m in hide])  # [samples, N]
    scores = {}
    for name, grid in grids.items():
        told = (hide[:, :, 0] * grid.to(hide)).sum((2, 3))
        beta = (told * change).mean(0) / (told**2).mean(0).clamp_min(1e-20)
        scores[name] = ((beta * told - change) ** 2).mean(0) / (change**2).mean(0)
    return scores


def sensitivity(
    model: CardiacDreamer,
    features: Tensor,
    method: str,
    target: str,
    baseline: Tensor,
    radius: float = 0.1,
    samples: int = 4,
    seed: int = 0,
) -> Tensor:
    """Largest relative change [N] of a grid when the feature map trembles (Captum's
    `sensitivity_max`); `radius` in standard deviations of the maps."""

    def explain(inputs) -> tuple[Tensor]:
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        if method in ATTENTION:
            return (attention_grid(model, x, method).flatten(1),)
        base = baseline.repeat_interleave(len(x) // len(baseline), 0)
        return (attribute(model, x, target, method, base, steps=16, seed=seed).grid.flatten(1),)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sensitivity_max(
            explain, features, perturb_radius=radius * float(features.std()),
            n_perturb_samples=samples,
        )  # fmt: skip


def randomised(model: CardiacDreamer, seed: int = 0) -> Iterator[tuple[str, CardiacDreamer]]:
    """(stage, model) with the weights drawn anew from the guidance head down to the backbone's
    first stage, each stage on top of those before; the given model is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = CardiacDreamer(model.config.model_copy(update={"weights": "none"}))
    net = copy.deepcopy(model)
    stages = [("guidance", "head.")]
    if model.world is not None:
        blocks = range(len(model.world.blocks), 0, -1)
        stages += [("map heads", "world.tokens.heads.")]
        stages += [(f"block {i}", f"world.blocks.{i - 1}.") for i in blocks]
        stages += [("embedding", "world.")]
    count = range(len(model.backbone.stages), 0, -1)
    stages += [(f"backbone {i}", f"backbone.stages.{i - 1}.") for i in count]
    for name, prefix in stages:
        state = {k: v for k, v in fresh.state_dict().items() if k.startswith(prefix)}
        net.load_state_dict(state, strict=False)
        yield name, net.eval()
