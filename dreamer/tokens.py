"""The ways of cutting a feature map into tokens. All that differs between the variants.

A map [B, C, h, w] is either h*w patch tokens of C values (one per place, as in ViT: Dosovitskiy et
al., ICLR 2021) or C channel tokens of h*w values (one per feature). `embed` lifts them to the
transformer's width, `restore` brings tokens back to a map by one of two named linear heads. Two
sorts of tokens can share a sequence: patch and channel tokens, or patch tokens of two levels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MAPS = ("reconstruction", "next_features")


class _Tokens(nn.Module):
    """Shared plumbing; a variant names its rearrangement and knows its token's length."""

    pattern: str  # tokens in terms of the map's axes b c h w

    def __init__(self, channels: int, grid: tuple[int, int], width: int):
        super().__init__()
        self.channels, self.grid = channels, tuple(grid)
        length = self.token_length
        self.embedding = nn.Linear(length, width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, length) for name in MAPS})
        for layer in (self.embedding, *self.heads.values()):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def split(self, features: Tensor) -> Tensor:
        """Map [B, C, h, w] -> raw tokens [B, tokens, values]; a mere change of view."""
        expected = (self.channels, *self.grid)
        if tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"expected a feature map [B, {', '.join(map(str, expected))}], "
                f"got {list(features.shape)}"
            )
        return rearrange(features, f"b c h w -> {self.pattern}")

    def join(self, tokens: Tensor) -> Tensor:
        """Raw tokens [B, tokens, values] -> map [B, C, h, w]; undoes `split`."""
        h, w = self.grid
        return rearrange(tokens, f"{self.pattern} -> b c h w", h=h, w=w)

    def embed(self, features: Tensor) -> Tensor:
        """Map [B, C, h, w] -> tokens [B, tokens, width]."""
        return self.embedding(self.split(features))

    def restore(self, tokens: Tensor, head: str) -> Tensor:
        """Tokens [B, tokens, width] -> the map [B, C, h, w] that `head` (see MAPS) reads off."""
        return self.join(self.heads[head](tokens))


class PatchTokens(_Tokens):
    """One token per place of the grid: [B, h*w, C]. 7x7 gives 49 tokens of 512 values."""

    pattern = "b (h w) c"

    @property
    def token_length(self) -> int:
        return self.channels

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]


class ChannelTokens(_Tokens):
    """One token per feature channel: [B, C, h*w]. 512 channels give 512 tokens of 49 values."""

    pattern = "b c (h w)"

    @property
    def token_length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def count(self) -> int:
        return self.channels


class BothTokens(nn.Module):
    """Patch tokens, then channel tokens, of one map in one sequence: [B, h*w + C, width].

    Restored by the mean of both restorations: any other weighting is in reach of the linear heads.
    One sequence and not alternating attention (DaViT: Ding et al., ECCV 2022), because the blocks
    stay the same and what patches read of channels can be seen in the weights.
    """

    def __init__(self, channels: int, grid: tuple[int, int], width: int):
        super().__init__()
        self.patch = PatchTokens(channels, grid, width)
        self.channel = ChannelTokens(channels, grid, width)
        self.count = self.patch.count + self.channel.count

    def embed(self, features: Tensor) -> Tensor:
        """Map [B, C, h, w] -> tokens [B, h*w + C, width]."""
        return torch.cat((self.patch.embed(features), self.channel.embed(features)), dim=1)

    def restore(self, tokens: Tensor, head: str) -> Tensor:
        """Tokens [B, h*w + C, width] -> the map [B, C, h, w] that `head` (see MAPS) reads off."""
        patch, channel = tokens.split((self.patch.count, self.channel.count), dim=1)
        return (self.patch.restore(patch, head) + self.channel.restore(channel, head)) / 2


class TwoLevelTokens(nn.Module):
    """Patch tokens of the coarse map, then of the finer one of twice its side.

    The map [B, C + 4 F, h, w] carries both: the coarse level's C channels, then the fine level
    [B, F, 2h, 2w] with its four cells to a place (`pixel_unshuffle`). [B, 5*h*w, width].
    """

    def __init__(self, channels: int, fine: int, grid: tuple[int, int], width: int):
        super().__init__()
        self.coarse = PatchTokens(channels, grid, width)
        self.fine = PatchTokens(fine, (2 * grid[0], 2 * grid[1]), width)
        self.count = self.coarse.count + self.fine.count

    def embed(self, features: Tensor) -> Tensor:
        """Map [B, C + 4 F, h, w] -> tokens [B, 5*h*w, width]."""
        coarse, fine = features.tensor_split((self.coarse.channels,), dim=1)
        return torch.cat(
            (self.coarse.embed(coarse), self.fine.embed(F.pixel_shuffle(fine, 2))), dim=1
        )

    def restore(self, tokens: Tensor, head: str) -> Tensor:
        """Tokens [B, 5*h*w, width] -> the map [B, C + 4 F, h, w] that `head` reads off."""
        coarse, fine = tokens.split((self.coarse.count, self.fine.count), dim=1)
        fine = F.pixel_unshuffle(self.fine.restore(fine, head), 2)
        return torch.cat((self.coarse.restore(coarse, head), fine), dim=1)

    def windows(self, side: int) -> Tensor:
        """Who may look at whom [1 + tokens, 1 + tokens], the action's token first.

        A fine token looks at those of its window of `side` x `side`, at the coarse level and at the
        action (as in Swin: Liu et al., ICCV 2021, but never shifted: the coarse level joins them).
        """
        h, w = self.fine.grid
        row, column = torch.meshgrid(
            torch.arange(h) // side, torch.arange(w) // side, indexing="ij"
        )
        window = (row * w + column).flatten()
        sees = torch.ones(1 + self.count, 1 + self.count, dtype=torch.bool)
        sees[-len(window) :, -len(window) :] = window[:, None] == window
        return sees
