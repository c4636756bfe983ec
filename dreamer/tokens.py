"""The two ways of cutting a feature map into tokens. All that differs between the variants.

A map [B, C, h, w] is either h*w patch tokens of C values (one per place, as in ViT: Dosovitskiy et
al., ICLR 2021) or C channel tokens of h*w values (one per feature). `embed` lifts them to the
transformer's width, `restore` brings tokens back to a map by one of two named linear heads.
"""

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
