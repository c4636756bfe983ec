"""Everything beyond the published system, off by default and switched on by `ModelConfig`.

Small backbone, learned positions, two levels of patch tokens, both kinds of tokens in one sequence,
other poolings, token dropout. `dreamer.model` asks the `make_...` functions for its parts; with the
default configuration they return the published ones.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dreamer.tokens import ChannelTokens, PatchTokens, sinusoids

QUERIES = 8  # of attention pooling; 8 divides the channels of every backbone


def check(config) -> None:
    """Raise ValueError where the options of a ModelConfig do not fit together."""
    if config.positions == "learned-2d" and config.token_type in ("channel", "both"):
        raise ValueError("positions learned-2d: a channel token has no row and no column")
    if config.hierarchy and config.token_type in ("channel", "both"):
        raise ValueError("hierarchy is for patch tokens: a channel token lies in no window")
    if config.hierarchy and 2 * config.grid[0] % config.hierarchy:
        raise ValueError(
            f"hierarchy: windows of {config.hierarchy} do not divide the fine level's side of "
            f"{2 * config.grid[0]} tokens"
        )
    if config.reads == "action" and (config.hierarchy or config.token_type == "both"):
        raise ValueError("reads action: for patch or channel tokens of one level only")
    needs_tokens = {
        "positions": config.positions != "sinusoidal",
        "hierarchy": config.hierarchy > 0,
        "pooling action": config.pooling == "action",
        "token_dropout": config.token_dropout > 0,
        "reads action": config.reads == "action",
    }
    if config.token_type == "none" and any(needs_tokens.values()):
        names = ", ".join(name for name, wanted in needs_tokens.items() if wanted)
        raise ValueError(f"{names}: token_type none has no tokens")


# Backbone


class ResidualStage(nn.Module):
    """Two 3x3 convolutions with a shortcut, stride 2: [B, inputs, h, w] -> [B, outputs, h/2, w/2].

    GroupNorm, so that a frame's features never depend on the other frames of its batch.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def compact_stages(width: int, channels: int) -> list[nn.Module]:
    """Stem and two residual stages, stride 16: small enough to train on a CPU."""
    stem = nn.Sequential(
        nn.Conv2d(1, width, 7, stride=4, padding=3, bias=False), nn.GroupNorm(4, width), nn.ReLU()
    )
    return [stem, ResidualStage(width, 2 * width), ResidualStage(2 * width, channels)]


def two_levels(fine: Tensor, coarse: Tensor) -> Tensor:
    """One map [B, C + 4 F, h, w] of levels [B, F, 2h, 2w] and [B, C, h, w] (`hierarchy`)."""
    return torch.cat((coarse, F.pixel_unshuffle(fine, 2)), dim=1)


# Tokens


class BothTokens(nn.Module):
    """Patch tokens, then channel tokens, of one map in one sequence: [B, h*w + C, width].

    The map is restored as the mean of both restorations; the linear heads can learn any other
    weighting. One sequence instead of alternating attention (DaViT: Ding et al., ECCV 2022), so
    that the blocks stay the same and attention between the kinds can be read from the weights.
    """

    mask = None

    def __init__(self, channels: int, grid: tuple[int, int], width: int):
        super().__init__()
        self.patch = PatchTokens(channels, grid, width)
        self.channel = ChannelTokens(channels, grid, width)
        self.count = self.patch.count + self.channel.count

    def embed(self, features: Tensor) -> Tensor:
        return torch.cat((self.patch.embed(features), self.channel.embed(features)), dim=1)

    def restore(self, tokens: Tensor, head: str) -> Tensor:
        patch, channel = tokens.split((self.patch.count, self.channel.count), dim=1)
        return (self.patch.restore(patch, head) + self.channel.restore(channel, head)) / 2


class TwoLevelTokens(nn.Module):
    """Patch tokens of the coarse map, then of the finer map of twice its side: [B, 5*h*w, width].

    The map [B, C + 4 F, h, w] carries both levels, see `two_levels`. `mask` [1 + tokens,
    1 + tokens] lets a fine token attend to its window of `window` x `window` fine tokens, to the
    coarse level and to the action token (as in Swin: Liu et al., ICCV 2021, but never shifted: the
    coarse level connects the windows).
    """

    def __init__(self, channels: int, fine: int, grid: tuple[int, int], width: int, window: int):
        super().__init__()
        self.coarse = PatchTokens(channels, grid, width)
        self.fine = PatchTokens(fine, (2 * grid[0], 2 * grid[1]), width)
        self.count = self.coarse.count + self.fine.count
        h, w = self.fine.grid
        row, column = torch.meshgrid(
            torch.arange(h) // window, torch.arange(w) // window, indexing="ij"
        )
        member = (row * w + column).flatten()
        mask = torch.ones(1 + self.count, 1 + self.count, dtype=torch.bool)
        mask[-len(member) :, -len(member) :] = member[:, None] == member
        self.register_buffer("mask", mask, persistent=False)

    def embed(self, features: Tensor) -> Tensor:
        coarse, fine = features.tensor_split((self.coarse.channels,), dim=1)
        coarse = self.coarse.embed(coarse)
        return torch.cat((coarse, self.fine.embed(F.pixel_shuffle(fine, 2))), dim=1)

    def restore(self, tokens: Tensor, head: str) -> Tensor:
        coarse, fine = tokens.split((self.coarse.count, self.fine.count), dim=1)
        return two_levels(self.fine.restore(fine, head), self.coarse.restore(coarse, head))


def make_tokens(config) -> nn.Module:
    """The tokens of a configuration: `embed`, `restore`, `count` and an attention `mask`."""
    if config.hierarchy:
        return TwoLevelTokens(
            config.channels, config.fine_channels, config.grid, config.d_model, config.hierarchy
        )
    kinds = {"patch": PatchTokens, "channel": ChannelTokens, "both": BothTokens}
    return kinds[config.token_type](config.channels, config.grid, config.d_model)


# Positions


class Positions(nn.Module):
    """Positions [1, 1 + tokens, D] that are added to the action token and the map's tokens.

    `sinusoidal`: fixed; `learned`: one vector per token; `learned-2d`: a row vector plus a column
    vector (the fine level of a hierarchy has its own); `none`: zeros. Learned positions start from
    sinusoids, in two dimensions half of the width for rows and half for columns.
    """

    def __init__(self, config):
        super().__init__()
        self.kind, d, half = config.positions, config.d_model, config.d_model // 2
        if self.kind == "learned-2d":
            side = config.grid[0]
            sides = (side, 2 * side) if config.hierarchy else (side,)
            waves = [sinusoids(n, d)[0, :, :half] for n in sides]
            self.rows = nn.ParameterList(F.pad(wave, (0, half)) for wave in waves)
            self.columns = nn.ParameterList(F.pad(wave, (half, 0)) for wave in waves)
            self.action = nn.Parameter(torch.zeros(1, d))
        elif self.kind == "learned":
            self.table = nn.Parameter(sinusoids(1 + config.tokens, d))
        else:
            table = sinusoids(1 + config.tokens, d) * (self.kind == "sinusoidal")
            self.register_buffer("table", table, persistent=False)

    def forward(self) -> Tensor:
        if self.kind != "learned-2d":
            return self.table
        levels = zip(self.rows, self.columns, strict=True)
        cells = [(row[:, None] + column).flatten(0, 1) for row, column in levels]  # [h * w, D]
        return torch.cat((self.action, *cells))[None]


# Token dropout


def drop_tokens(
    blocks: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, mask: Tensor | None, dropped: int
) -> Tensor:
    """`blocks(x, mask)` with `dropped` of each frame's tokens left out, never the action token.

    x [B, 1 + tokens, D]. The restored map needs every token, so a dropped token receives the mean
    update of the kept ones. After PatchDropout (Liu et al., WACV 2023).
    """
    order = torch.rand(x.shape[:2], device=x.device)
    order[:, 0] = -1  # keeps the action token
    kept = order.argsort(1)[:, : x.shape[1] - dropped]  # [B, kept]
    if mask is not None:
        mask = mask[kept[:, :, None], kept[:, None]][:, None]  # [B, 1, kept, kept]
    index = kept[:, :, None].expand(-1, -1, x.shape[2])
    before = x.gather(1, index)
    after = blocks(before, mask)
    update = (after - before)[:, 1:].mean(1, keepdim=True)
    return (x + update).to(after.dtype).scatter(1, index, after)


# Pooling


class Pooling(nn.Module):
    """Pooled features [B, C] of a map [B, C or more, h, w] and an action token [B, D].

    `mean` over space; `attention`: a softmax over cells for each of 8 groups of channels;
    `generalised-mean` with a learned exponent (GeM: Radenovic et al., TPAMI 2019); `action`: the
    action token, projected to C values. The first three start as the mean. Of two levels the coarse
    one is pooled.
    """

    def __init__(self, config):
        super().__init__()
        self.kind, self.channels = config.pooling, config.channels
        if self.kind == "attention":
            self.queries = nn.Parameter(torch.zeros(QUERIES, config.channels))
        elif self.kind == "generalised-mean":
            # The logarithm: weight decay pulls the exponent to 1, the mean, and not to 0.
            self.log_exponent = nn.Parameter(torch.zeros(()))
        elif self.kind == "action":
            self.read = nn.Linear(config.d_model, config.channels)

    def forward(self, features: Tensor, action_token: Tensor | None) -> Tensor:
        features = features[:, : self.channels]
        if self.kind == "action":
            return self.read(action_token)
        if self.kind == "attention":
            cells = features.flatten(2)  # [B, C, h * w]
            scores = self.queries @ cells / math.sqrt(self.channels)  # [B, 8, h * w]
            groups = rearrange(cells, "b (k c) p -> b k c p", k=QUERIES)
            return (groups @ scores.softmax(-1)[..., None]).flatten(1)
        if self.kind == "generalised-mean":
            p = self.log_exponent.exp()
            return odd_power(odd_power(features.float(), p).mean((2, 3)), 1 / p)
        return features.mean(dim=(2, 3))


def odd_power(x: Tensor, p: Tensor) -> Tensor:
    """sign(x) |x|^p: restored maps have signs. The summand bounds the slope at zero."""
    return x * (x.abs() + 1e-4) ** (p - 1)
