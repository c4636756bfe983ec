"""Attention and attribution, reduced to the 7x7 grid of the feature map.

Common ground of both variants is the feature map [B, C, h, w] as the input of a head model: there
an attribution summed over channels is a grid [h, w], and summed over space a score per channel. The
methods are Captum's: integrated gradients (Sundararajan et al., ICML 2017), gradient x activation,
Grad-CAM (Selvaraju et al., ICCV 2017; signed here, since a pose is no class), Shapley sampling
(Strumbelj & Kononenko 2010), ablation and occlusion. Rollout: Abnar & Zuidema, ACL 2020.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from einops import rearrange, reduce
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from dreamer import poses
from dreamer.model import CardiacDreamer, as_input

log = logging.getLogger(__name__)

TARGETS = (*poses.AXES, "translation", "rotation")
UNIT = dict(zip(TARGETS, (*poses.UNITS, "mm", "deg"), strict=True))
METHODS = (
    "integrated gradients", "gradient x activation", "Grad-CAM", "Shapley", "ablation", "occlusion",
)  # fmt: skip
ATTENTION = ("rollout", "action attention")
BASELINES = ("zero", "mean", "blurred")
TOLERANCE = 0.05  # of f(x) - f(baseline) that integrated gradients may miss without a warning
MEMORY = 2**30  # bytes of activations that one pass may keep


def choose(name: str, kind: str, choices: tuple[str, ...]) -> str:
    """`name`, or ValueError where it is none of the choices."""
    if name not in choices:
        raise ValueError(f"{kind} {name!r} is unknown; one of {', '.join(choices)}")
    return name


def pose_target(pose: Tensor, target: str) -> Tensor:
    """One number [...] of poses [..., 6]: an axis, or the translation (mm) or rotation (deg) that
    remains to the target plane. Differentiable."""
    if choose(target, "target", TARGETS) in poses.AXES:
        return pose[..., poses.AXES.index(target)]
    if target == "translation":
        return pose[..., :3].norm(dim=-1)
    r = poses.to_matrix(pose)[..., :3, :3]
    skew = (
        r[..., 2, 1] - r[..., 1, 2],
        r[..., 0, 2] - r[..., 2, 0],
        r[..., 1, 0] - r[..., 0, 1],
    )
    sine = torch.stack(skew, dim=-1).norm(dim=-1)
    return torch.rad2deg(torch.atan2(sine, r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1))


class Head(nn.Module):
    """The model after its backbone: maps [B, C, h, w] (and actions [B, 6]) -> one number [B].

    Without actions the motion is zero, so that the number describes the frame itself.
    """

    def __init__(self, model: CardiacDreamer, target: str):
        super().__init__()
        self.model, self.target = model, choose(target, "target", TARGETS)
        self.features = nn.Identity()  # the layer that Grad-CAM reads

    def forward(self, features: Tensor, action: Tensor | None = None) -> Tensor:
        action = features.new_zeros(len(features), 6) if action is None else action
        return pose_target(self.model.imagine(self.features(features), action).pose, self.target)


class CellGame(nn.Module):
    """The head model as a game of cells: masks [B, 1, h, w], 1 the frame's cell, 0 the baseline's.

    Features and baseline [B, C, h, w] are further arguments.
    """

    def __init__(self, head: Head):
        super().__init__()
        self.head = head

    def forward(self, mask: Tensor, features: Tensor, baseline: Tensor) -> Tensor:
        return self.head(torch.lerp(baseline, features, mask))


def frames_at_once(model: CardiacDreamer, recorded: bool = False) -> int:
    """How many frames one pass with gradients may take within MEMORY."""
    c = model.config
    tokens = 1 + (c.tokens or c.channels)
    kept = 16 * tokens * c.d_model + (3 * c.num_heads * tokens**2 if recorded else 0)
    return int(np.clip(MEMORY // (4 * kept * c.num_layers), 1, 512))


@torch.no_grad()
def encode(model: CardiacDreamer, images: Tensor) -> Tensor:
    """Feature maps [N, C, h, w] of frames [N, 1, S, S], 64 at a time."""
    device = model.image_mean.device
    return torch.cat([model.encode(part.to(device)) for part in images.split(64)])


def baseline_map(
    model: CardiacDreamer, name: str, images: Tensor, training: Tensor | None = None
) -> Tensor:
    """Feature maps that represent "nothing seen": [1, C, h, w], or [N, C, h, w] if blurred.

    `zero`: no activation; `mean`: the mean map of `training` frames [M, 1, S, S]; `blurred`: the
    map of each frame blurred by an eighth of its width. Raises ValueError for other names.
    """
    if choose(name, "baseline", BASELINES) == "zero":
        return torch.zeros_like(encode(model, images[:1]))
    if name == "mean":
        if training is None:
            raise ValueError("baseline mean: give `training` frames")
        return encode(model, training).mean(0, keepdim=True)
    sigma = images.shape[-1] / 8
    soft = as_input(images).cpu().numpy()
    soft = gaussian_filter(soft, sigma, mode="mirror", truncate=1.5, axes=(2, 3))
    return encode(model, torch.from_numpy(soft))


def warn_if_not_converged(head: Head, features: Tensor, baseline: Tensor, delta: Tensor) -> Tensor:
    """The share [N] of f(x) - f(baseline) that attributions miss; logs how many miss over 5%.

    `delta` [N] is Captum's convergence delta.
    """
    with torch.no_grad():
        change = head(features) - head(baseline.expand_as(features))
    missed = delta.detach().abs() / change.abs().clamp_min(1e-6)
    if count := int((missed > TOLERANCE).sum()):
        log.warning(
            "%d of %d maps (%s) miss more than %.0f%% of f(x) - f(baseline); take more steps",
            count, len(missed), head.target, 100 * TOLERANCE,
        )  # fmt: skip
    return missed


def attribute(
    model: CardiacDreamer,
    features: Tensor,
    target: str,
    method: str,
    baseline: Tensor,
    images: Tensor | None = None,
    steps: int = 16,
    permutations: int = 8,
    seed: int = 0,
) -> Tensor:
    """Signed grids [N, h, w], in the unit of the target, by one of METHODS.

    Args:
        features: maps [N, C, h, w].
        baseline: maps [1 or N, C, h, w] that represent "nothing seen".
        images: frames [N, 1, S, S], which occlusion covers with grey boxes of a cell's size.
        steps: of integrated gradients; permutations: of Shapley sampling, drawn with `seed`.

    For tables over many frames; notebook 06 calls Captum itself. Raises ValueError for unknown
    names.
    """
    from captum import attr

    choose(method, "method", METHODS)
    if method == "occlusion" and images is None:
        raise ValueError("occlusion covers parts of the frames: give `images`")
    head, grids, missed = Head(model, target), [], []
    rows = frames_at_once(model)
    size = max(1, rows // steps) if method == "integrated gradients" else min(rows, 64)
    base = baseline.expand_as(features)
    for start in range(0, len(features), size):
        x, b = features[start : start + size], base[start : start + size]
        if method == "integrated gradients":
            maps, delta = attr.IntegratedGradients(head).attribute(
                x, b, n_steps=steps, return_convergence_delta=True
            )
            missed.append((x, b, delta))
        elif method == "gradient x activation":
            maps = attr.InputXGradient(head).attribute(x.clone().requires_grad_())
        elif method == "Grad-CAM":
            maps = attr.LayerGradCam(head, head.features).attribute(
                x.clone().requires_grad_(), attr_dim_summation=False
            )
        elif method == "occlusion":
            maps = _occlusion(head, x, images[start : start + size])
        else:
            cells = torch.arange(x[0, 0].numel(), device=x.device).view(1, 1, *x.shape[2:])
            game = CellGame(head)
            given = {"perturbations_per_eval": max(1, rows // len(x))}
            if method == "Shapley":
                torch.manual_seed(seed)
                game, given["n_samples"] = attr.ShapleyValueSampling(game), permutations
            else:
                game = attr.FeatureAblation(game)
            ones = torch.ones_like(x[:, :1])
            with torch.no_grad():
                maps = game.attribute(
                    ones, 0, additional_forward_args=(x, b), feature_mask=cells, **given
                )
        grids.append(maps.detach().sum(1))
    if missed:
        x, b, delta = (torch.cat(part) for part in zip(*missed, strict=True))
        warn_if_not_converged(head, x, b, delta)
    return torch.cat(grids)


@torch.no_grad()
def _occlusion(head: Head, features: Tensor, images: Tensor) -> Tensor:
    """[B, 1, h, w]: the change of the number when a grey box covers that cell's part of a frame."""
    from captum.attr import Occlusion

    h, w = features.shape[2:]
    images = as_input(images.to(features.device))
    box = (1, images.shape[2] // h, images.shape[3] // w)
    pixels = Occlusion(lambda frames: head(head.model.encode(frames))).attribute(
        images,
        box,
        strides=box,
        baselines=head.model.image_mean.item(),
        perturbations_per_eval=max(1, 64 // len(images)),
    )
    return reduce(pixels, "b 1 (h y) (w x) -> b 1 h w", "mean", h=h, w=w)


# Attention


@contextmanager
def recorder(model: CardiacDreamer) -> Iterator[list[Tensor]]:
    """Within: a list that receives every layer's weights [B, heads, N, N] in each pass, in order.

    Leaves the model as it was, also after an error. Raises ValueError for a model without tokens.
    """
    if model.world is None:
        raise ValueError("token_type none has no attention to record; use a patch or channel run")
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
    """All weights [layers, B, heads, N, N]; token 0 is the action token, each row sums to one.

    Memory grows with N²: use few frames of a large model at once.
    """
    action = features.new_zeros(len(features), 6) if action is None else action
    with recorder(model) as weights:
        model.imagine(features, action)
    return torch.stack(weights)


def rollout(weights: Tensor) -> Tensor:
    """Attention through all layers so far [layers, B, N, N] of weights [layers, B, heads, N, N].

    Heads are averaged, and half of each layer passes through the shortcut.
    """
    step = weights.mean(2) / 2 + torch.eye(weights.shape[-1], device=weights.device) / 2
    flow = [step[0]]
    for layer in step[1:]:
        flow.append(layer @ flow[-1])
    return torch.stack(flow)


def to_grid(share: Tensor, features: Tensor, token_type: str) -> Tensor:
    """Shares of tokens [..., B, tokens] as grids [..., B, h, w]; the total is kept.

    A patch token lies on its cell, one of a finer level on the cell around it. A channel token's
    share spreads over that channel's own map in [B, C, h, w], by magnitude (evenly where the
    channel is silent).
    """
    (h, w), kinds = features.shape[2:], ("patch", "channel", "both")
    if choose(token_type, "token_type", kinds) == "both":
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
    spread = torch.where(total > 0, size / total.clamp_min(1e-12), 1 / (h * w))
    return torch.einsum("...bc,bchw->...bhw", share, spread)


def attention_grid(model: CardiacDreamer, features: Tensor, kind: str = "rollout") -> Tensor:
    """Grids [N, h, w]: the rollout to the map's tokens, from which the guidance is pooled, or the
    action token's attention, averaged over layers and heads."""
    choose(kind, "attention", ATTENTION)
    grids = []
    for part in features.split(frames_at_once(model, recorded=True)):
        weights = attention(model, part)
        if kind == "rollout":
            share = rollout(weights)[-1][:, 1:, 1:].mean(1)
        else:
            share = weights[..., 0, 1:].mean((0, 2))
        grids.append(to_grid(share, part, model.config.token_type))
    return torch.cat(grids)
