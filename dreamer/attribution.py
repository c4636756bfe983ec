"""What a model looks at on the grid of its feature map, by attention and by attribution.

Attributions take the feature map [B, C, h, w] as the input of a head model, so that the backbone
runs once and both variants are asked alike: summed over channels a map is a grid [h, w], summed
over space a score per channel. Methods are Captum's: integrated gradients (Sundararajan et al.,
ICML 2017), Grad-CAM (Selvaraju et al., ICCV 2017; signed here, since a pose has no class), Shapley
sampling (Strumbelj & Kononenko 2010), ablation and occlusion. Rollout: Abnar & Zuidema, ACL 2020.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from captum.attr import (
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    Occlusion,
    ShapleyValueSampling,
)
from einops import rearrange, reduce
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from tqdm.auto import tqdm

from dreamer import poses
from dreamer.model import CardiacDreamer

log = logging.getLogger(__name__)

TARGETS = (*poses.AXES, "translation", "rotation")
UNIT = dict(zip(TARGETS, (*poses.UNITS, "mm", "deg"), strict=True))
METHODS = (
    "integrated_gradients", "gradient_x_activation", "grad_cam", "shapley", "ablation", "occlusion"
)  # fmt: skip
ATTENTION = ("rollout", "action_attention")
BASELINES = ("zero", "mean", "blurred")
TOLERANCE = 0.05  # of f(x) - f(baseline) that integrated gradients may miss
LIMIT = 64  # steps of integrated gradients at most
MEMORY = 2**30  # bytes of activations that one pass may keep


def known(name: str, kind: str, choices: Sequence[str]) -> str:
    if name not in choices:
        raise ValueError(f"{kind} {name!r} is unknown; one of {', '.join(choices)}")
    return name


def answer(pose: Tensor, target: str) -> Tensor:
    """One number [...] of poses [..., 6]: an axis, or distance (mm) or turn (deg) to the plane."""
    if known(target, "target", TARGETS) in poses.AXES:
        return pose[..., poses.AXES.index(target)]
    if target == "translation":
        return pose[..., :3].norm(dim=-1)
    r = poses.to_matrix(pose)[..., :3, :3]
    sine = torch.stack((r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0],
                        r[..., 1, 0] - r[..., 0, 1]), dim=-1).norm(dim=-1)  # fmt: skip
    return torch.rad2deg(torch.atan2(sine, r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1))


class Question(nn.Module):
    """The model past its backbone, asked for one number: maps [B, C, h, w], actions -> [B]."""

    def __init__(self, model: CardiacDreamer, target: str):
        super().__init__()
        self.model, self.target = model, known(target, "target", TARGETS)
        self.features = nn.Identity()  # the layer that Grad-CAM reads

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        return answer(self.model.imagine(self.features(features), action).pose, self.target)


class Cells(nn.Module):
    """The same question as a game of the grid's cells: masks [B, 1, h, w], 1 the frame's cell and
    0 the baseline's."""

    def __init__(self, question: Question):
        super().__init__()
        self.question = question

    def forward(self, mask: Tensor, features: Tensor, baseline: Tensor, action: Tensor) -> Tensor:
        return self.question(torch.lerp(baseline, features, mask), action)


class Maps(NamedTuple):
    """Signed maps in the target's unit: `grid` [B, h, w], `channels` [B, C] (None for methods that
    play with whole cells); `error` [B], the share of f(x) - f(baseline) missed, `steps` [B]."""

    grid: Tensor
    channels: Tensor | None
    error: Tensor
    steps: Tensor


def rows_at_once(model: CardiacDreamer, recorded: bool = False) -> int:
    """How many frames one pass with gradients may take to stay within MEMORY."""
    c = model.config
    tokens = 1 + (c.tokens or c.channels)
    kept = 16 * tokens * c.d_model + (3 * c.num_heads * tokens**2 if recorded else 0)
    return int(np.clip(MEMORY // (4 * kept * c.num_layers), 1, 512))


def parts_of(count: int, size: int, progress: str | None) -> Iterator[slice]:
    starts = range(0, count, max(1, size))
    for s in tqdm(starts, desc=progress, leave=False, disable=progress is None):
        yield slice(s, min(s + max(1, size), count))


@torch.no_grad()
def encode(model: CardiacDreamer, images: Tensor, progress: str | None = None) -> Tensor:
    """Feature maps [N, C, h, w] of frames uint8 or float in [0, 1], [N, 1, S, S]."""
    device, scale = model.image_mean.device, 1 if images.is_floating_point() else 255
    parts = parts_of(len(images), 64, progress)
    return torch.cat([model.encode(images[p].to(device).float() / scale) for p in parts])


def baseline_map(
    model: CardiacDreamer, name: str, images: Tensor, training: Tensor | None = None
) -> Tensor:
    """Feature maps that stand for "nothing seen": [1, C, h, w], or [N, C, h, w] if blurred.

    zero: no activation; mean: the mean map of `training` frames [M, 1, S, S]; blurred: the map of
    the frame blurred by an eighth of its width. Raises ValueError on other names.
    """
    if known(name, "baseline", BASELINES) == "zero":
        return torch.zeros_like(encode(model, images[:1]))
    if name == "mean":
        if training is None:
            raise ValueError("baseline mean: training frames are needed; give `training`")
        return encode(model, training).mean(0, keepdim=True)
    soft = images.float() / (1 if images.is_floating_point() else 255)
    sigma = images.shape[-1] / 8
    soft = gaussian_filter(soft.cpu().numpy(), sigma, mode="mirror", truncate=1.5, axes=(2, 3))
    return encode(model, torch.from_numpy(soft))


def attribute(
    model: CardiacDreamer,
    features: Tensor,
    target: str,
    method: str = "integrated_gradients",
    baseline: Tensor | None = None,
    action: Tensor | None = None,
    images: Tensor | None = None,
    steps: int = 32,
    limit: int = LIMIT,
    permutations: int = 8,
    seed: int = 0,
    progress: str | None = None,
) -> Maps:
    """`Maps` of what moves `target` on feature maps [N, C, h, w], by one of METHODS.

    `baseline` [1 or N, C, h, w]: zero without one. `action` [N, 6]: none by default, which asks
    about the frame itself. Integrated gradients takes `steps`, and as many for each half of a
    piece of the way while it misses more than TOLERANCE, up to `limit` (0 takes none more), and
    warns where it still does. Occlusion hides the frames `images` [N, 1, S, S] by grey boxes of a
    cell's size. ValueError on unknown names.
    """
    known(method, "method", METHODS)
    if method == "occlusion" and images is None:
        raise ValueError("occlusion hides parts of the frames: give `images`")
    n, by_cells = len(features), method in METHODS[3:]
    action = features.new_zeros(n, 6) if action is None else action
    base = torch.zeros_like(features[:1]) if baseline is None else baseline
    base = base.expand_as(features)
    ask, rows = Question(model, target), rows_at_once(model)
    size = min(rows, 64) if by_cells else rows
    draw, parts = torch.Generator().manual_seed(seed), []
    for p in parts_of(n, rows // steps if method == METHODS[0] else size, progress):
        x, b, a = features[p].detach(), base[p].detach(), action[p]
        error, used = x.new_full((len(x),), torch.nan), x.new_zeros(len(x))
        if method == "integrated_gradients":
            maps, error, used = _integrated(ask, x, b, a, steps, limit, rows)
        elif method == "gradient_x_activation":
            maps = InputXGradient(ask).attribute(x.requires_grad_(), additional_forward_args=a)
        elif method == "grad_cam":
            maps = LayerGradCam(ask, ask.features).attribute(
                x.requires_grad_(), additional_forward_args=a, attr_dim_summation=False
            )
        elif method == "occlusion":
            maps = _occlusion(ask, x, a, images[p])
        elif method == "ablation":
            maps = _game(FeatureAblation(Cells(ask)), x, b, a, rows)
        else:
            game = ShapleyValueSampling(Cells(ask))
            game.permutation_generator = lambda count, samples: (
                torch.randperm(count, generator=draw).tolist() for _ in range(samples)
            )
            maps = _game(game, x, b, a, rows, n_samples=permutations)
        parts.append((maps.detach(), error, used))
    maps, error, used = (torch.cat(part) for part in zip(*parts, strict=True))
    if limit and (missed := int((error > TOLERANCE).sum())):
        log.warning(
            "%d of %d maps (%s) miss more than %.0f%% of f(x) - f(baseline) after %d steps",
            missed, n, target, 100 * TOLERANCE, int(used.max()),
        )  # fmt: skip
    return Maps(maps.sum(1), None if by_cells else maps.sum((2, 3)), error, used)


def _integrated(ask, x, b, a, steps: int, limit: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integrated gradients, its relative error, its steps. Where the error is too large, the piece
    of the way from b to x that misses most is halved, and its halves are asked instead."""
    with torch.no_grad():
        ends = torch.stack((ask(b, a), ask(x, a)), 1)
    change = (ends[:, 1] - ends[:, 0]).abs().clamp_min(1e-6)
    method, pieces = IntegratedGradients(ask), [[] for _ in x]  # of each: missed, way, answers, map
    todo = [(k, x.new_tensor([0.0, 1.0]), ends[k]) for k in range(len(x))]
    while todo:
        for p in parts_of(len(todo), rows // steps, None):
            k, way, told = (list(values) for values in zip(*todo[p], strict=True))
            low, high = (_along(b[k], x[k], w) for w in torch.stack(way).unbind(1))
            found = method.attribute(
                high, low, additional_forward_args=a[k], n_steps=steps,
                internal_batch_size=max(rows, len(k)),
            ).detach()  # fmt: skip
            missed = found.sum((1, 2, 3)) - torch.stack(told).diff(dim=1)[:, 0]
            for number, *piece in zip(k, missed.tolist(), way, told, found, strict=True):
                pieces[number].append(piece)
        missed = x.new_tensor([sum(piece[0] for piece in own) for own in pieces]).abs() / change
        used = x.new_tensor([steps * (2 * len(own) - 1) for own in pieces])
        todo = []
        for k in torch.nonzero((missed > TOLERANCE) & (used + 2 * steps <= limit))[:, 0].tolist():
            worst = max(pieces[k], key=lambda piece: abs(piece[0]))
            pieces[k] = [piece for piece in pieces[k] if piece is not worst]
            todo.append((k, *worst[1:3]))
        todo = _halves(ask, x, b, a, todo)
    return torch.stack([sum(piece[3] for piece in own) for own in pieces]), missed, used


def _along(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Maps [B, C, h, w] at shares [B] of the way from `start` to `end`."""
    return torch.lerp(start, end, share[:, None, None, None])


@torch.no_grad()
def _halves(ask, x, b, a, pieces: list[tuple]) -> list[tuple]:
    """Both halves of pieces (row, way [2] as shares, answers [2] at its ends)."""
    if not pieces:
        return []
    k, way, _ = (list(values) for values in zip(*pieces, strict=True))
    middle = torch.stack(way).mean(1)
    value = ask(_along(b[k], x[k], middle), a[k])
    return [
        (row, torch.stack(ends), torch.stack(answers))
        for (row, way, told), at, said in zip(pieces, middle, value, strict=True)
        for ends, answers in (((way[0], at), (told[0], said)), ((at, way[1]), (said, told[1])))
    ]


@torch.no_grad()
def _occlusion(ask: Question, x: Tensor, a: Tensor, images: Tensor) -> Tensor:
    """[B, 1, h, w]: what moves when a grey box of one cell's size hides that part of the frame."""
    h, w = x.shape[2:]
    images = images.to(x.device).float() / (1 if images.is_floating_point() else 255)
    box = (1, images.shape[2] // h, images.shape[3] // w)
    whole = Occlusion(lambda frames, action: ask(ask.model.encode(frames), action))
    pixels = whole.attribute(
        images, box, strides=box, baselines=ask.model.image_mean.item(),
        additional_forward_args=a, perturbations_per_eval=max(1, 64 // len(x)),
    )  # fmt: skip
    return reduce(pixels, "b 1 (h y) (w x) -> b 1 h w", "mean", h=h, w=w)


@torch.no_grad()
def _game(game: ShapleyValueSampling | FeatureAblation, x, b, a, rows: int, **told) -> Tensor:
    """[B, 1, h, w]: Shapley values or ablation of the cells, as players who show themselves."""
    ones, (h, w) = x.new_ones(len(x), 1, *x.shape[2:]), x.shape[2:]
    players = torch.arange(h * w, device=x.device).view(1, 1, h, w)
    return game.attribute(
        ones, 0, additional_forward_args=(x, b, a), feature_mask=players,
        perturbations_per_eval=max(1, rows // len(x)), **told,
    )  # fmt: skip


# Attention


@contextmanager
def recorder(model: CardiacDreamer) -> Iterator[list[Tensor]]:
    """Within: a list to which each pass adds every layer's weights [B, heads, N, N], in order.

    Leaves the model as it was, whatever happens. Raises ValueError for a model without attention.
    """
    if model.world is None:
        raise ValueError("token_type none has no attention to record; take a patch or channel run")
    layers = [block.attention for block in model.world.blocks]
    before, weights, handles = [layer.recorded for layer in layers], [], []
    try:
        for layer in layers:
            keep = lambda module, inputs, output: weights.append(output.detach())  # noqa: E731
            handles.append(layer.softmax.register_forward_hook(keep))
            layer.recorded = True
        yield weights
    finally:
        for handle in handles:
            handle.remove()
        for layer, flag in zip(layers, before, strict=True):
            layer.recorded = flag


@torch.no_grad()
def attention(model: CardiacDreamer, features: Tensor, action: Tensor | None = None) -> Tensor:
    """All weights [layers, B, heads, N, N]; token 0 is the action's, each row sums to one.

    Memory grows with N²: give few frames of a large model at once.
    """
    action = features.new_zeros(len(features), 6) if action is None else action
    with recorder(model) as weights:
        model.imagine(features, action)
    return torch.stack(weights)


def rollout(weights: Tensor) -> Tensor:
    """Attention through all layers so far [layers, B, N, N], short cuts counted as half."""
    step = weights.mean(2) / 2 + torch.eye(weights.shape[-1], device=weights.device) / 2
    flow = [step[0]]
    for layer in step[1:]:
        flow.append(layer @ flow[-1])
    return torch.stack(flow)


def read(weights: Tensor, reader: str) -> Tensor:
    """How much of each token of the map is read [..., N-1]: by the action token, or by the map's
    own tokens on average, from which the guidance is pooled. `reader`: action or tokens."""
    known(reader, "reader", ("action", "tokens"))
    return weights[..., 0, 1:] if reader == "action" else weights[..., 1:, 1:].mean(-2)


def to_grid(share: Tensor, features: Tensor, token_type: str) -> Tensor:
    """Shares of tokens [..., B, tokens] on the grid [..., B, h, w]; the total is kept.

    A patch token lies on its cell, one of a finer level on the cell around it; a channel token's
    share spreads over that channel's own map in [B, C, h, w], by magnitude, and evenly where the
    channel is silent.
    """
    (h, w), known_types = features.shape[2:], ("patch", "channel", "both")
    if known(token_type, "token_type", known_types) == "both":
        patch, channel = share.tensor_split((h * w,), dim=-1)
        return to_grid(patch, features, "patch") + to_grid(channel, features, "channel")
    if token_type == "patch":
        coarse, fine = share.tensor_split((h * w,), dim=-1)
        grid = rearrange(coarse, "... (h w) -> ... h w", h=h)
        if fine.shape[-1]:
            grid = grid + reduce(fine, "... (h p w q) -> ... h w", "sum", h=h, w=w, p=2, q=2)
        return grid
    size = features.abs()
    total = size.sum((2, 3), keepdim=True)
    even = 1 / (features.shape[2] * features.shape[3])
    spread = torch.where(total > 0, size / total.clamp_min(1e-12), even)
    return torch.einsum("...bc,bchw->...bhw", share, spread)


def attention_grid(
    model: CardiacDreamer, features: Tensor, kind: str = "rollout", progress: str | None = None
) -> Tensor:
    """Grids [N, h, w] of ATTENTION: rollout to the map's tokens, or what the action token reads,
    mean over layers and heads."""
    known(kind, "attention", ATTENTION)
    grids = []
    for p in parts_of(len(features), rows_at_once(model, recorded=True), progress):
        weights = attention(model, features[p])
        if kind == "rollout":
            share = read(rollout(weights)[-1], "tokens")
        else:
            share = read(weights, "action").mean((0, 2))
        grids.append(to_grid(share, features[p], model.config.token_type))
    return torch.cat(grids)


def head_grids(model: CardiacDreamer, features: Tensor) -> Tensor:
    """What the map's tokens read in each head, [layers, heads, N, h, w]; give few frames."""
    share = rearrange(read(attention(model, features), "tokens"), "l b k t -> l k b t")
    return to_grid(share, features, model.config.token_type)


def rollout_grids(model: CardiacDreamer, features: Tensor) -> Tensor:
    """Rollout to the map's tokens after each layer [layers, N, h, w]; give few frames."""
    share = read(rollout(attention(model, features)), "tokens")
    return to_grid(share, features, model.config.token_type)


def strongest(share: Tensor, features: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [K], shares [K] and own maps [K, h, w] of the channels of largest |share| [C] in
    one feature map [C, h, w]."""
    numbers = share.abs().argsort(descending=True)[:count]
    return numbers.cpu(), share[numbers].cpu(), features[numbers].cpu()


def first_of_each(models: Mapping[str, CardiacDreamer]) -> dict[str, CardiacDreamer]:
    """The first model of each variant, patch before channel. ValueError where one has no tokens."""
    found: dict[str, CardiacDreamer] = {}
    for run, model in models.items():
        if model.config.token_type == "none":
            raise ValueError(f"runs: {run} has no tokens; give runs of patch or channel tokens")
        found.setdefault(model.config.token_type, model)
    return dict(sorted(found.items(), reverse=True))
