"""The same answers sooner: a trained model made ready for inference on one machine.

    quick = fast(model)               # bf16 where the machine multiplies it in hardware
    quick = fast(model, compile=True) # and torch.compile, which pays for itself on a GPU

Batch norms go into the convolutions before them (Jacob et al., CVPR 2018, section 3.2), feature
maps lie channels-last, matrices are bf16, accumulations, norms, positions, the guidance head and
the compact backbone stay fp32. On x86 CPUs the linear layers keep their weights in oneDNN's own
order with the GELU inside, and attention goes over the queries in parts, because there the fused
kernel gains nothing from bf16 without matrix tiles (AMX): memory stays linear in tokens.
"""

import copy
import platform

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dreamer.model import CardiacDreamer, Dream
from dreamer.runs import has_bf16

QUERIES = 320  # at a time, where attention goes in parts
PAIRS = (("0", "1"), ("conv1", "bn1"), ("conv2", "bn2"))  # convolution and its norm, by name


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether linear layers can be kept in oneDNN's order: on x86 CPUs, bf16 only with AVX-512."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if device.type != "cpu" or not x86 or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Packed(nn.Module):
    """A linear layer, then `post` (none or gelu), its weight in oneDNN's own order."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, post: str = "none"):
        super().__init__()
        self.post, self.dtype = post, dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self.bias = linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rule = "none" if self.post == "gelu" else ""  # GELU's own, not its tanh approximation
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, self.post, [], rule
        )


class InParts(nn.Module):
    """`model.Attention` for inference, at most `QUERIES` queries at a time; without windows."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.heads, self.qkv, self.out = attention.heads, attention.qkv, attention.out

    def forward(self, x: Tensor, sees: Tensor | None = None) -> Tensor:
        if sees is not None:
            raise ValueError("attention in parts knows no windows; use `model.Attention`")
        qkv = rearrange(self.qkv(x), "b n (s h d) -> s (b h) n d", s=3, h=self.heads)
        q, k, v = qkv.contiguous()  # once, not again in every part
        mixed, nothing, scale = torch.empty_like(q), q.new_empty(()), q.shape[-1] ** -0.5
        parts = -(-q.shape[1] // QUERIES)
        for some, into in zip(q.chunk(parts, dim=1), mixed.chunk(parts, dim=1), strict=True):
            weights = torch.baddbmm(nothing, some, k.mT, beta=0, alpha=scale).softmax(dim=-1)
            torch.bmm(weights, v, out=into)
        return self.out(rearrange(mixed, "(b h) n d -> b n (h d)", h=self.heads))


class _Exact(nn.Module):
    """A module kept in fp32 within an autocast region."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.float()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.module(x.float())


class Fast(nn.Module):
    """A `CardiacDreamer` for inference: image [B, 1, H, W], action [B, 6] -> `Dream` in fp32."""

    def __init__(self, model: CardiacDreamer, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, image: Tensor, action: Tensor) -> Dream:
        low = self.dtype != torch.float32
        with torch.autocast(image.device.type, self.dtype, enabled=low):
            return Dream(*(part.float() for part in self.model(image, action)))

    def __call__(self, image: Tensor, action: Tensor) -> Dream:
        with torch.no_grad():
            return super().__call__(image, action)


def _fuse(backbone: nn.Module) -> None:
    for module in list(backbone.modules()):
        children = dict(module.named_children())
        for first, second in PAIRS:
            conv, norm = children.get(first), children.get(second)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())


def fast(
    model: CardiacDreamer, dtype: torch.dtype | None = None, compile: bool = False
) -> nn.Module:
    """A copy of `model`, on its device, for inference only: call it as the model itself.

    `dtype` float32 or bfloat16; None takes bfloat16 where the machine has it. `compile` costs tens
    of seconds at the first call of each batch size. Against fp32 the pose moves by less than 1% of
    the training poses' spread (1e-4 with float32). Raises ValueError for another dtype, or while
    attention is being recorded: its weights are not made here.
    """
    device = model.pose_std.device
    if dtype is None:
        dtype = torch.bfloat16 if has_bf16() else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: {dtype} is not offered; use torch.float32 or torch.bfloat16")
    blocks = () if model.world is None else model.world.blocks
    if any(block.attention.recorded for block in blocks):
        raise ValueError("attention is being recorded; use the model itself for attention maps")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    _fuse(model.backbone)
    model.backbone.to(memory_format=torch.channels_last)
    model.head = _Exact(model.head)
    low = [model.backbone, model.world]
    if model.config.backbone == "compact":  # in bf16 its few channels move the pose by over 1%
        model.backbone = _Exact(model.backbone)
        low = [model.world]
    for part in low:
        for module in () if part is None else part.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
    for block in model.world.blocks if packs(device, dtype) and model.world is not None else ():
        in_parts = dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
        if in_parts and not model.config.hierarchy:
            block.attention = InParts(block.attention)
        if not compile:  # the compiler packs by itself
            wide, _, _, narrow = block.feedforward
            block.feedforward = nn.Sequential(Packed(wide, dtype, "gelu"), Packed(narrow, dtype))
            for name in ("qkv", "out"):
                setattr(block.attention, name, Packed(getattr(block.attention, name), dtype))
    quick = Fast(model, dtype)
    if compile:
        quick.compile(**({"options": {"freezing": True}} if device.type == "cpu" else {}))
    return quick


@torch.no_grad()
def difference(model: CardiacDreamer, quick: nn.Module, image: Tensor, action: Tensor) -> float:
    """The largest difference over frames and axes between the poses of `quick` and `model`.

    In units of `pose_std`, the spread of the poses that `model` was trained on. Says something only
    of a model that has learnt to tell the frames [B, 1, S, S] apart.
    """
    expected, got = (m(image, action).pose / model.pose_std for m in (model, quick))
    return (got - expected).abs().max().item()
