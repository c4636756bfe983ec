"""What both variants cost: counts by formula, and what a fresh process measures; and `fast`.

The published table (Cardiac-Dreamer, patch variant) gives, for batch 4 at 224 px: 1.0947 s with
channel tokens and 0.0474 s with patch tokens, "95.7% faster"; 65,188,584 and 66,256,262 parameters;
260.9 and 263.5 MB on the GPU; 513 and 50 tokens. Its times are one unwarmed pass each, channel
tokens first, by `time.time()` without waiting for the device, so that the first variant also paid
for the start. A FLOP is one multiplication or one addition; a MiB has 2^20 bytes.
"""

import copy
import itertools
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dreamer.model import CardiacDreamer, Dream, ModelConfig
from dreamer.runs import has_bf16

VARIANTS = ("channel", "patch")  # in the order of the published measurement
BATCH, LESS_TIME = 4, 0.957  # the published batch, and how much less time patch tokens take there
CLAIM = {  # tokens include the action token
    "channel": {"parameters": 65_188_584, "tokens": 513, "seconds": 1.0947, "memory": 260.9},
    "patch": {"parameters": 66_256_262, "tokens": 50, "seconds": 0.0474, "memory": 263.5},
}
PARTS = ("backbone", "tokens", "attention", "feed-forward", "head")
RESNET34 = ((64, 64, 3, 4), (64, 128, 4, 8), (128, 256, 6, 16), (256, 512, 3, 32))
WORKSPACE = 2 * 4096 + 8 * 16  # KiB that cuBLAS allocates by default, except on Hopper
MIB = 2**20


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where available. Raises ValueError for others."""
    available = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if name not in ("auto", *available):
        raise ValueError(f"device: {name!r} is not available; use auto or {' or '.join(available)}")
    return torch.device(available[-1] if name == "auto" else name)


def configs(shapes: Mapping[str, Any]) -> dict[str, ModelConfig]:
    """The configuration of each variant; `shapes` are fields that differ from the published."""
    return {v: ModelConfig(**{**shapes, "token_type": v}) for v in VARIANTS}


def build(config: ModelConfig, device: torch.device | str = "cpu") -> CardiacDreamer:
    """A model in evaluation mode with random weights, the same at every call."""
    torch.manual_seed(0)
    return CardiacDreamer(config).eval().to(device)


def inputs(
    config: ModelConfig, batch: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random frames [B, 1, S, S] and actions [B, 6]."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 1, config.image_size, config.image_size, generator=generator)
    return image.to(device), torch.randn(batch, 6, generator=generator).to(device)


# Counts


def parameters(model: CardiacDreamer) -> dict[str, int]:
    """Number of parameters of each of PARTS; a block's norms count with the layer before them."""
    world = model.world
    modules = {
        "backbone": [model.backbone],
        "tokens": [world.tokens, world.action, world.positions, world.norm],
        "attention": [m for block in world.blocks for m in (block.attention, block.norm1)],
        "feed-forward": [m for block in world.blocks for m in (block.feedforward, block.norm2)],
        "head": [model.pooling, model.head],
    }
    return {
        part: sum(p.numel() for module in members for p in module.parameters())
        for part, members in modules.items()
    }


def flops(config: ModelConfig, batch: int = 1) -> dict[str, float]:
    """FLOP of a forward pass in evaluation, for each of PARTS: matrix products and convolutions.

    A block of N tokens of width d takes 2 N (4 + 2 f) d^2 in its linear layers, f the widening of
    the feed-forward layer, and 4 N^2 d in attention; masked pairs are computed too.
    """
    c, d, cells = config.channels, config.d_model, math.prod(config.grid)
    n, transformer = 1 + config.tokens, config.token_type != "none"
    first, second = config.guidance
    values = cells * (c + 4 * config.fine_channels)  # of the feature map
    linear = (6 if config.token_type == "both" else 3) * values * d  # one embeds, two restore
    pooling = {"attention": 9 * c * cells, "action": d * c}.get(config.pooling, 0)
    macs = {
        "backbone": _backbone_macs(config),
        "tokens": transformer * (linear + 6 * 64 + 64 * 256 + 256 * d),
        "attention": transformer * config.num_layers * (4 * n * d**2 + 2 * n**2 * d),
        "feed-forward": transformer * config.num_layers * 2 * config.feedforward * n * d**2,
        "head": pooling + c * first + first * second + 6 * second,
    }
    return {part: 2.0 * batch * count for part, count in macs.items()}


def _backbone_macs(config: ModelConfig) -> float:
    """Multiplications of the convolutions for one frame, each with an addition."""
    side, c, w = config.image_size, config.channels, config.width
    if config.backbone == "resnet34":
        macs = 49 * 64 * (side / 2) ** 2
        for inputs_, outputs, blocks, stride in RESNET34:
            shortcut = inputs_ * outputs if inputs_ != outputs else 0
            kernels = 9 * inputs_ * outputs + 9 * outputs**2 * (2 * blocks - 1) + shortcut
            macs += kernels * (side / stride) ** 2
        return macs
    macs = 49 * w * (side / 4) ** 2
    for inputs_, outputs, stride in ((w, 2 * w, 8), (2 * w, c, 16)):
        macs += (9 * inputs_ * outputs + 9 * outputs**2 + inputs_ * outputs) * (side / stride) ** 2
    return macs


def predicted_memory(config: ModelConfig, batch: int = BATCH) -> dict[str, float]:
    """MiB that CUDA's allocator holds after the published pass, by kind, by arithmetic.

    Weights and buffers, the input, the five outputs (in units of 512 bytes), cuBLAS's workspace.
    """
    with torch.device("meta"):
        model = CardiacDreamer(config)
        maps = torch.empty(3, batch, config.channels + 4 * config.fine_channels, *config.grid)
        pooled, pose = torch.empty(batch, config.channels), torch.empty(batch, 6)
    kinds = {
        "parameters": model.parameters(),
        "buffers": model.buffers(),
        "input": inputs(config, batch, "meta"),
        "outputs": (*maps, pooled, pose),
    }
    held = {
        kind: sum(math.ceil(t.nbytes / 512) * 512 for t in tensors) / MIB
        for kind, tensors in kinds.items()
    }
    return held | {"cuBLAS workspace": WORKSPACE / 1024}


def crossing(sizes: Sequence[float], patch: Sequence[float], channel: Sequence[float]) -> float:
    """Image size in px at which both variants cost the same, log-linear between `sizes`.

    NaN where patch tokens are not cheaper first and dearer later.
    """
    gap = [math.log(p / c) for p, c in zip(patch, channel, strict=True)]
    for i in range(1, len(gap)):
        if gap[i - 1] < 0 <= gap[i]:
            return sizes[i - 1] + (sizes[i] - sizes[i - 1]) * gap[i - 1] / (gap[i - 1] - gap[i])
    return math.nan


# Ways to run a model


def fast(model: CardiacDreamer, dtype: torch.dtype | None = None) -> CardiacDreamer:
    """A copy of `model` for inference that takes less time, with the same inputs and outputs.

    Batch norms are fused into the convolutions before them (Jacob et al., CVPR 2018, section 3.2),
    feature maps lie channels-last, and backbone and transformer compute in `dtype` (default: bf16
    where the machine has it), without the casts of autocast. Pooling, head, and a compact backbone,
    whose few channels would lose accuracy, stay in fp32. The blocks stay ours, so that every option
    works: cast to bf16 they took 0.81 to 1.04 times as long as the fused path of
    nn.TransformerEncoder, less with channel tokens.

    In bf16 the poses of briefly trained models move by 0.3 to 0.7% of `pose_std` on average and by
    2.6% at most; under autocast by 0.3% and 2.1% (notebook 03 measures both).

    Raises ValueError for a dtype other than float32 and bfloat16.
    """
    if dtype is None:
        dtype = torch.bfloat16 if has_bf16() else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: {dtype} is not supported; use torch.float32 or torch.bfloat16")
    quick = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(quick.backbone.modules()):
        for (name, conv), (next_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, next_name, nn.Identity())
    quick.backbone.to(memory_format=torch.channels_last)
    if dtype == torch.bfloat16:
        if model.config.backbone == "resnet34":
            _compute_in(quick.backbone, dtype)
        if quick.world is not None:
            _compute_in(quick.world, dtype)
    return quick


def _compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a module's weights and, at each call, inputs to `dtype`, and its results to fp32."""

    def cast(_, given):
        return tuple(x.to(dtype) for x in given)

    def restore(_, __, result):
        return result.float() if isinstance(result, Tensor) else tuple(x.float() for x in result)

    module.to(dtype)
    module.register_forward_pre_hook(cast)
    module.register_forward_hook(restore)


class _Encoder(nn.Module):
    """Blocks of the world model as PyTorch's own encoder, with the same weights."""

    def __init__(self, blocks: nn.ModuleList, config: ModelConfig):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            config.d_model,
            config.num_heads,
            config.feedforward * config.d_model,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=config.norm_first,
        )
        self.encoder = nn.TransformerEncoder(layer, len(blocks), enable_nested_tensor=False)
        for theirs, ours in zip(self.encoder.layers, blocks, strict=True):
            theirs.self_attn.in_proj_weight = ours.attention.qkv.weight
            theirs.self_attn.in_proj_bias = ours.attention.qkv.bias
            theirs.self_attn.out_proj.load_state_dict(ours.attention.out.state_dict())
            theirs.linear1, theirs.linear2 = ours.feedforward[0], ours.feedforward[3]
            theirs.norm1, theirs.norm2 = ours.norm1, ours.norm2

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x, None if mask is None else ~mask)


def original(model: CardiacDreamer) -> CardiacDreamer:
    """The published implementation with a copy of the model's weights: torchvision's ResNet34 and
    nn.TransformerEncoder, which takes its fused path in evaluation. The yardstick for `fast`."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    encoder = _Encoder(reference.world.blocks, model.config)
    reference.world.blocks = nn.ModuleList([encoder])
    return reference.eval().requires_grad_(False).to(model.pose_std.device)


def under_autocast(model: CardiacDreamer) -> Callable[[Tensor, Tensor], Dream]:
    """The model's call under bf16 autocast."""

    def call(image: Tensor, action: Tensor) -> Dream:
        with torch.autocast(image.device.type, torch.bfloat16):
            return model(image, action)

    return call


@torch.no_grad()
def difference(
    model: CardiacDreamer,
    other: Callable[[Tensor, Tensor], Dream],
    image: Tensor,
    action: Tensor,
) -> Tensor:
    """Absolute difference between the poses of two models, in units of `pose_std`: [B, 6].

    Meaningful for trained weights only: random ones give every frame nearly the same pose.
    """
    return (other(image, action).pose - model(image, action).pose).abs() / model.pose_std


def discs(config: ModelConfig, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Speckled discs [B, 1, S, S] whose place, size, angle, shape and brightness are a pose [B, 6]
    of unit variance: a task that a model learns in seconds."""
    generator = torch.Generator().manual_seed(seed)
    pose = torch.rand(count, 6, generator=generator) * 2 - 1
    x, y, size, angle, shape, brightness = pose[:, :, None, None].unbind(1)
    axis = torch.linspace(-1, 1, config.image_size)
    dx, dy = axis - x / 2, axis[:, None] - y / 2
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    disc = torch.exp(-(u**2 * (2 + shape) + v**2 * 6) / (0.35 + 0.15 * size) ** 2)
    speckle = 0.5 + torch.rand(disc.shape, generator=generator) / 2
    return (disc * (0.7 + 0.3 * brightness) * speckle)[:, None], pose * math.sqrt(3)


def train_on_discs(config: ModelConfig, steps: int) -> CardiacDreamer:
    """A model after `steps` of 16 `discs` on the CPU, in evaluation mode."""
    model = build(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, steps)
    for step in range(steps):
        image, pose = discs(config, 16, seed=step)
        loss = F.smooth_l1_loss(model(image, torch.zeros_like(pose)).pose, pose)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# In a process of its own


def apart(task: Callable, *arguments: Any) -> Any:
    """`task(*arguments)` in a fresh process: its result, or its exception, raised here.

    The process is forked from a server that has only imported the libraries, so that no thread
    pool, kernel or page of weights is warm; where the system cannot fork, it is a new interpreter.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["dreamer.study.cost", "torchvision.models"])
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(task, *arguments).result()


@torch.no_grad()
def passes(configs: Sequence[ModelConfig], device: str, warm: int = 3) -> list[dict[str, Any]]:
    """A row for each configuration: one unwarmed pass at BATCH in this order, then warm ones.

    `clock`: s by the published protocol (time.time, not waiting for the device); `cold`: s until
    the result is there; `warm`: median s of `warm` later passes; in MiB above the imported
    libraries `rest` with weights only, and `peak`; `held`: MiB in CUDA's allocator after the pass.
    """
    start, rows = _memory(device), []
    for place, config in enumerate(configs):
        model, given = build(config, device), inputs(config, BATCH, device)
        rest = _memory(device) - start
        begun = time.time()
        dream = model(*given)
        clock = time.time() - begun
        held = torch.cuda.memory_allocated() / MIB if device == "cuda" else math.nan
        dream.pose.cpu()
        cold = time.time() - begun
        row = {"variant": config.token_type, "place": place, "clock": clock, "cold": cold}
        rows.append(row | {"rest": rest, "peak": _peak_memory(device) - start, "held": held})
        del model, given, dream  # the allocator then holds the next model alone
    for row, config in zip(rows, configs, strict=True):
        model, given = build(config, device), inputs(config, BATCH, device)
        seconds = [_seconds(model, *given) for _ in range(warm + 1)]
        row["warm"] = median(seconds[1:])
    return rows


def training(config: ModelConfig, device: str, low: bool, steps: int = 2) -> dict[str, Any]:
    """Median s of `steps` training steps at BATCH (forward, backward, AdamW) after a first one, and
    their peak in MiB above the imported libraries; `low`: under bf16 autocast."""
    start = _memory(device)
    model = build(config, device).train()
    image, action = inputs(config, BATCH, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=low):
            dream = model(image, action)
        loss = F.smooth_l1_loss(dream.pose, action) + dream.next_features.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    seconds = [_seconds(step) for _ in range(steps + 1)]
    peak = _peak_memory(device) - start
    return {"variant": config.token_type, "seconds": median(seconds[1:]), "peak": peak}


def _seconds(call: Callable, *arguments: Any) -> float:
    """Seconds of one call, until the device has finished."""
    begun = time.perf_counter()
    call(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _memory(device: str) -> float:
    """MiB in use: CUDA's allocator, or the process."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / MIB
    import psutil  # not needed by the reference study

    return psutil.Process().memory_info().rss / MIB


def _peak_memory(device: str) -> float:
    """MiB in use at most so far, in CUDA's allocator or the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_memory(device), peak / (MIB if sys.platform == "darwin" else 1024))
