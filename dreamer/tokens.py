"""The two ways of cutting a feature map into tokens: all that differs between the variants.

A map [B, C, h, w] is either h*w patch tokens of C values, one per cell as in ViT (Dosovitskiy et
al., ICLR 2021), or C channel tokens of h*w values, one per feature. `embed` projects tokens to the
width of the transformer; `restore` projects them back and reassembles the map.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

MAPS = ("reconstruction", "next_features")  # the maps that are restored, each by its own head


class PatchTokens(nn.Module):
    """One token per cell of the grid: [B, h*w, C]. 7x7 gives 49 tokens of 512 values."""

    pattern = "b (h w) c"
    mask = None  # every token attends to every token

    def __init__(self, channels: int, grid: tuple[int, int], width: int):
        super().__init__()
        self.channels, self.grid = channels, tuple(grid)
        length = self.token_length
        self.embedding = nn.Linear(length, width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, length) for name in MAPS})
        for layer in (self.embedding, *self.heads.values()):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def token_length(self) -> int:
        return self.channels

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    def split(self, features: Tensor) -> Tensor:
        """Tokens [B, tokens, values] of a map [B, C, h, w]. Raises ValueError on another shape."""
        if tuple(features.shape[1:]) != (self.channels, *self.grid):
            expected = ", ".join(map(str, (self.channels, *self.grid)))
            raise ValueError(f"expected a feature map [B, {expected}], got {list(features.shape)}")
        return rearrange(features, f"b c h w -> {self.pattern}")

    def join(self, tokens: Tensor) -> Tensor:
        """The map [B, C, h, w] of tokens [B, tokens, values]; inverse of `split`."""
        h, w = self.grid
        return rearrange(tokens, f"{self.pattern} -> b c h w", h=h, w=w)

    def embed(self, features: Tensor) -> Tensor:
        """Embedded tokens [B, tokens, width] of a map [B, C, h, w]."""
        return self.embedding(self.split(features))

    def restore(self, tokens: Tensor, head: str) -> Tensor:
        """The map [B, C, h, w] that one of the heads in MAPS reads from [B, tokens, width]."""
        return self.join(self.heads[head](tokens))


class ChannelTokens(PatchTokens):
    """One token per feature channel: [B, C, h*w]. 512 channels give 512 tokens of 49 values."""

    pattern = "b c (h w)"

    @property
    def token_length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def count(self) -> int:
        return self.channels


def sinusoids(count: int, width: int) -> Tensor:
    """Fixed positions [1, count, width] (Vaswani et al., NeurIPS 2017, section 3.5)."""
    position = torch.arange(count, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    waves = torch.stack((torch.sin(position * rate), torch.cos(position * rate)), dim=-1)
    return waves.flatten(1)[None]
