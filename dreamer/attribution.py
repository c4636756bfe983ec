"""Attention and attribution, reduced to the 7x7 grid of the feature map.

Common ground of both variants is the feature map [B, C, h, w] as the input of a head model: there
an attribution summed over channels is a grid [h, w], and summed over space a score per channel. The
methods are Captum's: integrated gradients (Sundararajan et al., ICML 2017), GradientShap (expected
gradients: Erion et al., Nat Mach Intell 2021), Grad-CAM (Selvaraju et al., ICCV 2017; signed here,
since a pose is no class), Shapley sampling (Strumbelj & Kononenko 2010), ablation and occlusion.
Rollout: Abnar & Zuidema, ACL 2020.
"""

import logging
from collections.abc import Iterator, Sequence
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
    "integrated gradients", "GradientShap", "Grad-CAM", "Shapley", "ablation", "occlusion",
)  # fmt: skip
ATTENTION = ("rollout", "action attention")
BASELINES = ("zero", "mean", "blurred")
TOLERANCE = 0.05  # of f(x) - f(baseline) that integrated gradients may miss without a warning
MEMORY = 2**28  # bytes of activations that one pass may keep


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
    """The model after its backbone: maps [B, C, h, w] (and actions [B, 6]) -> [B, targets].

    Without actions the motion is zero, so that the numbers describe the frame itself.
    """

    def __init__(self, model: CardiacDreamer, targets: Sequence[str]):
        super().__init__()
        self.model = model
        self.targets = [choose(target, "target", TARGETS) for target in targets]
        self.features = nn.Identity()  # the layer that Grad-CAM reads

    def forward(self, features: Tensor, action: Tensor | None = None) -> Tensor:
        action = features.new_zeros(len(features), 6) if action is None else action
        pose = self.model.imagine(self.features(features), action).pose
        return torch.stack([pose_target(pose, target) for target in self.targets], dim=-1)


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


def attribute(
    model: CardiacDreamer,
    features: Tensor,
    targets: Sequence[str],
    method: str,
    baseline: Tensor,
    images: Tensor | None = None,
    steps: int = 16,
    permutations: int = 2,
    seed: int = 0,
) -> Tensor:
    """Signed grids [targets, N, h, w], in the unit of each target, by one of METHODS.

    Args:
        features: maps [N, C, h, w].
        targets: of TARGETS; methods that hide cells answer for all in the same passes.
        baseline: maps that represent "nothing seen", [1 or N, C, h, w]; for GradientShap a sample
            of maps [M, C, h, w], whose mean prediction is the reference.
        images: frames [N, 1, S, S], which occlusion covers with grey boxes of a cell's size.
        steps: of integrated gradients, samples of GradientShap; permutations: of Shapley sampling.
        seed: draws samples and permutations.

    For tables over many frames; notebook 06 calls Captum itself. Raises ValueError for unknown
    names. Logs how many maps of integrated gradients miss over 5% of f(x) - f(baseline).
    """
    choose(method, "method", METHODS)
    if method == "occlusion" and images is None:
        raise ValueError("occlusion covers parts of the frames: give `images`")
    head, grids = Head(model, targets), []
    sampled = method in ("integrated gradients", "GradientShap")
    size = max(1, frames_at_once(model) // (steps if sampled else 1))
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002, Captum draws from both
    for start in range(0, len(features), size):
        x = features[start : start + size]
        if method in ("Shapley", "ablation"):
            base = baseline.expand_as(features)[start : start + size]
            grids.append(_hide_cells(head, x, base, method, permutations))
        elif method == "occlusion":
            grids.append(_occlusion(head, x, images[start : start + size]))
        else:
            shared = method == "GradientShap" or len(baseline) == 1
            base = baseline if shared else baseline[start : start + size]
            each = [_gradients(head, x, base, method, k, steps) for k in range(len(targets))]
            grids.append(torch.stack(each))
    grid = torch.cat(grids, 1)
    if method == "integrated gradients":
        missed = incompleteness(head, features, head(baseline).detach(), grid)
        for target, share in zip(targets, missed, strict=True):
            if count := int((share > TOLERANCE).sum()):
                log.warning(
                    "%d of %d maps (%s) miss more than %.0f%% of f(x) - f(baseline); take more "
                    "steps", count, len(share), target, 100 * TOLERANCE,
                )  # fmt: skip
    return grid


@torch.no_grad()
def incompleteness(head: Head, features: Tensor, reference: Tensor, grid: Tensor) -> Tensor:
    """|sum of a map - (f(x) - reference)|, Captum's convergence delta, over the mean distance
    |f(x) - reference| of all frames: [targets, N] for grids [targets, N, h, w]. `reference`
    [1 or N, targets]: the predictions for the baseline."""
    size = frames_at_once(head.model)
    change = torch.cat([head(part) for part in features.split(size)]) - reference
    missed = grid.sum((-2, -1)).to(change) - change.T
    return missed.abs() / change.abs().mean(0)[:, None].clamp_min(1e-9)


def _gradients(
    head: Head, x: Tensor, baseline: Tensor, method: str, target: int, steps: int
) -> Tensor:
    """[B, h, w] by a method that takes gradients of the head's output number `target`."""
    from captum import attr

    if method == "integrated gradients":
        maps = attr.IntegratedGradients(head).attribute(x, baseline, target, n_steps=steps)
    elif method == "GradientShap":
        maps = attr.GradientShap(head).attribute(x, baseline, n_samples=steps, target=target)
    else:
        maps = attr.LayerGradCam(head, head.features).attribute(
            x.clone().requires_grad_(), target, attr_dim_summation=False
        )
    return maps.detach().sum(1)


@torch.no_grad()
def _hide_cells(head: Head, x: Tensor, baseline: Tensor, method: str, permutations: int) -> Tensor:
    """[targets, B, h, w] by a method that puts the baseline in the place of cells."""
    from captum import attr

    game, ones = CellGame(head), torch.ones_like(x[:, :1])
    given = {
        "additional_forward_args": (x, baseline),
        "feature_mask": torch.arange(ones[0].numel(), device=x.device).view(1, *ones.shape[1:]),
        "perturbations_per_eval": max(1, frames_at_once(head.model) // len(x)),
    }
    if method == "Shapley":
        maps = attr.ShapleyValueSampling(game).attribute(ones, 0, n_samples=permutations, **given)
        return rearrange(maps, "b t 1 h w -> t b h w")
    maps = attr.FeatureAblation(game).attribute(ones, 0, **given)
    return rearrange(maps, "(b t) 1 h w -> t b h w", b=len(x))


@torch.no_grad()
def _occlusion(head: Head, features: Tensor, images: Tensor) -> Tensor:
    """[targets, B, h, w]: the change when a grey box covers that cell's part of a frame."""
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
    return reduce(pixels, "(b t) 1 (h y) (w x) -> t b h w", "mean", b=len(images), h=h, w=w)


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


def on_grid(weights: Tensor, features: Tensor, model: CardiacDreamer, kind: str) -> Tensor:
    """Grids [B, h, w] of weights [layers, B, heads, N, N]: the rollout to the map's tokens, from
    which the guidance is pooled, or the action token's attention, averaged over layers and heads.
    """
    if choose(kind, "attention", ATTENTION) == "rollout":
        share = rollout(weights)[-1][:, 1:, 1:].mean(1)
    else:
        share = weights[..., 0, 1:].mean((0, 2))
    return to_grid(share, features, model.config.token_type)


def attention_grid(model: CardiacDreamer, features: Tensor, kind: str = "rollout") -> Tensor:
    """Grids [N, h, w] of maps [N, C, h, w] without motion, see `on_grid`."""
    choose(kind, "attention", ATTENTION)
    parts = features.split(frames_at_once(model, recorded=True))
    return torch.cat([on_grid(attention(model, part), part, model, kind) for part in parts])
