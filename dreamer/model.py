"""Cardiac Dreamer: a guidance model with a world model inside, one class for both variants.

    image [B, 1, H, W]  -> Backbone          -> feature map [B, C, h, w]
    map, action [B, 6]  -> WorldModel        -> reconstruction, next_features [B, C, h, w]
    next_features       -> mean over space   -> GuidanceHead -> pose [B, 6]

The published system: ResNet34 (He et al., CVPR 2016), six transformer blocks of width 768 (Vaswani
et al., NeurIPS 2017; normalised after each branch, or before it with `norm_first`: Xiong et al.,
ICML 2020). 65,188,584 parameters with channel tokens, 66,256,262 with patch tokens. Everything
beyond it is in `dreamer.options` and off by default.
"""

import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamer import options
from dreamer.data import Statistics

STRIDE = {"resnet34": 32, "compact": 16}
STAGES = {"resnet34": 5, "compact": 3}  # the stem, then the residual stages


class ModelConfig(BaseModel):
    """Architecture. Unknown fields and values out of range are refused (pydantic.ValidationError).

    `token_type` none: no transformer, the frame's own map is pooled. `reads`: the imagined map is
    read from the map's tokens, or, as in the first published version, from the action token alone,
    repeated for every token. `weights`: "none", "imagenet" (ResNet34, downloaded by torchvision) or
    a file with a ResNet34 state dict (.safetensors, or .pt/.pth read with weights_only). `freeze`:
    number of backbone stages, stem first, that keep their weights. `image_size`: pixels, square.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_type: Literal["patch", "channel", "both", "none"] = "patch"
    reads: Literal["tokens", "action"] = "tokens"
    d_model: int = Field(768, ge=2)
    num_heads: int = Field(12, ge=1)
    num_layers: int = Field(6, ge=1)
    feedforward: int = Field(4, ge=1, description="width of the feed-forward layer / d_model")
    dropout: float = Field(0.1, ge=0, lt=1)
    norm_first: bool = False
    backbone: Literal["resnet34", "compact"] = "resnet34"
    channels: int = Field(512, ge=8, description="channels of the feature map")
    width: int = Field(16, ge=4, description="channels of the compact backbone's stem")
    image_size: int = Field(224, ge=32)
    guidance: tuple[int, int] = (1024, 512)
    weights: str = "none"
    freeze: int = Field(0, ge=0)
    # Options beyond the published system: dreamer/options.py.
    positions: Literal["sinusoidal", "learned", "learned-2d", "none"] = "sinusoidal"
    hierarchy: int = Field(0, ge=0, description="side of a window of fine tokens; 0 is off")
    pooling: Literal["mean", "attention", "generalised-mean", "action"] = "mean"
    token_dropout: float = Field(0.0, ge=0, lt=1, description="share of tokens, in training")

    @model_validator(mode="after")
    def _fits(self):
        stride, stages = STRIDE[self.backbone], STAGES[self.backbone]
        if self.image_size % stride:
            raise ValueError(f"image_size must be a multiple of {stride} for {self.backbone}")
        if self.d_model % self.num_heads or self.d_model % 2:
            raise ValueError("d_model must be even and a multiple of num_heads")
        if self.backbone == "resnet34" and self.channels != 512:
            raise ValueError("channels is 512 for resnet34; choose backbone: compact for others")
        if self.backbone == "compact" and (self.channels % 8 or self.width % 4):
            raise ValueError("channels must be a multiple of 8 and width of 4 for compact")
        if self.backbone == "compact" and self.weights != "none":
            raise ValueError("weights are for resnet34; compact is trained from scratch")
        if self.freeze > stages:
            raise ValueError(f"freeze is at most {stages} for {self.backbone}")
        options.check(self)
        return self

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // STRIDE[self.backbone]
        return side, side

    @property
    def fine_channels(self) -> int:
        """Channels of the stage before the last, the fine level; 0 without `hierarchy`."""
        return 0 if not self.hierarchy else 256 if self.backbone == "resnet34" else 2 * self.width

    @property
    def tokens(self) -> int:
        """Number of the map's tokens, without the action token."""
        cells = self.grid[0] * self.grid[1]
        patch = 5 * cells if self.hierarchy else cells
        both = patch + self.channels
        return {"patch": patch, "channel": self.channels, "both": both, "none": 0}[self.token_type]


class Dream(NamedTuple):
    """Prediction for frames and motions: `features`, `reconstruction`, `next_features` are maps
    [B, C, h, w] (with `hierarchy` [B, C + 4 F, h, w]), `pooled` [B, C], `pose` [B, 6] mm, deg."""

    features: Tensor
    reconstruction: Tensor
    next_features: Tensor
    pooled: Tensor
    pose: Tensor


def as_input(image: Tensor) -> Tensor:
    """Frames in [0, 1] of frames uint8 [..., H, W]; frames of floats are returned as they are."""
    return image if image.is_floating_point() else image.float() / 255


def resnet34_weights(source: str) -> dict[str, Tensor]:
    """State dict of a ResNet34 for one grey channel: the mean of the three colour filters.

    `source` as ModelConfig.weights. Raises FileNotFoundError, RuntimeError (no download) or
    ValueError (not a ResNet34).
    """
    if source == "imagenet":
        from torchvision.models import ResNet34_Weights

        try:
            state = ResNet34_Weights.DEFAULT.get_state_dict(check_hash=True)
        except OSError as error:
            raise RuntimeError(
                f"the ImageNet weights could not be downloaded ({error}); give a local file as "
                "`weights`, or `weights: none` to train from scratch"
            ) from error
    elif not Path(source).is_file():
        raise FileNotFoundError(f"weights: no file {source}; give none, imagenet or a file")
    elif source.endswith(".safetensors"):
        state = load_file(source)
    else:
        state = torch.load(source, map_location="cpu", weights_only=True)
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    if "conv1.weight" not in state:
        raise ValueError(f"weights: {source} is not a ResNet34 state dict (no conv1.weight)")
    state["conv1.weight"] = state["conv1.weight"].mean(dim=1, keepdim=True)
    return state


class Backbone(nn.Module):
    """Frames [B, 1, H, W] -> feature map [B, C, h, w]: ResNet34 without its classifier, stride 32.

    Frozen stages keep their weights and their batch statistics.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.backbone == "compact":
            stages = options.compact_stages(config.width, config.channels)
        else:
            from torchvision.models import resnet34  # takes seconds to import

            net = resnet34()
            net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
            net.fc = nn.Identity()
            if config.weights != "none":
                try:
                    net.load_state_dict(resnet34_weights(config.weights))
                except RuntimeError as error:
                    raise RuntimeError(f"weights: {config.weights}: {error}") from error
            stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
            stages = [stem, net.layer1, net.layer2, net.layer3, net.layer4]
        self.stages, self.two_levels = nn.ModuleList(stages), config.hierarchy > 0
        self.frozen = config.freeze
        self.stages[: self.frozen].requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.stages[: self.frozen].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages[:-1]:
            x = stage(x)
        coarse = self.stages[-1](x)
        return options.two_levels(x, coarse) if self.two_levels else coarse


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D]; `mask` [(B, 1,) N, N], True may attend.

    Fused by default. While `recorded`, the weights [B, heads, N, N] pass through `softmax`, where a
    forward hook can read them; both ways agree to 1e-5.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout, self.recorded = heads, dropout, False
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        p = self.dropout if self.training else 0.0
        if self.recorded:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, heads, N, N]
            weights = self.softmax(scores if mask is None else scores.where(mask, -torch.inf))
            mixed = F.dropout(weights, p) @ v  # [B, heads, N, D / heads]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Attention and feed-forward layer, each with a shortcut, over tokens [B, N, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, hidden = config.d_model, config.feedforward * config.d_model
        self.norm_first = config.norm_first
        self.attention = Attention(d, config.num_heads, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.feedforward = nn.Sequential(
            nn.Linear(d, hidden), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(hidden, d)
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.drop(self.attention(self.norm1(x), mask))
            return x + self.drop(self.feedforward(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attention(x, mask)))
        return self.norm2(x + self.drop(self.feedforward(x)))


class WorldModel(nn.Module):
    """Map [B, C, h, w] and action [B, 6] (in units of its spread) -> reconstruction and
    next_features [B, C, h, w], and the action token [B, D] after the blocks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.tokens = options.make_tokens(config)  # PatchTokens or ChannelTokens
        self.action = nn.Sequential(
            nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, d)
        )
        self.positions = options.Positions(config)  # fixed sinusoids
        self.norm = nn.LayerNorm(d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.reads = config.reads
        self.dropped = min(round(config.token_dropout * config.tokens), config.tokens - 1)

    def forward(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        action_token = self.action(action)[:, None]  # [B, 1, D]
        x = torch.cat((action_token, self.tokens.embed(features)), dim=1)  # [B, 1 + tokens, D]
        x = self.norm(x + self.positions())
        if self.training and self.dropped:
            x = options.drop_tokens(self._blocks, x, self.tokens.mask, self.dropped)
        else:
            x = self._blocks(x, self.tokens.mask)
        action_token, tokens = x[:, :1], x[:, 1:]
        reconstruction = self.tokens.restore(tokens, "reconstruction")
        if self.reads == "action":  # one token, repeated: [B, tokens, D]
            tokens = action_token.expand_as(tokens)
        next_features = self.tokens.restore(tokens, "next_features")
        return reconstruction, next_features, action_token[:, 0]

    def _blocks(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


class GuidanceHead(nn.Sequential):
    """Pooled map [B, C] -> pose [B, 6] in units of the spread of the training poses."""

    def __init__(self, config: ModelConfig):
        first, second = config.guidance
        super().__init__(
            nn.Linear(config.channels, first),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(second, 6),
        )
        # PyTorch's default initialisation halves the signal at each layer, which delays learning.
        for layer in self:
            if isinstance(layer, nn.Linear):
                gain = "linear" if layer.out_features == 6 else "relu"
                nn.init.kaiming_normal_(layer.weight, nonlinearity=gain)
                nn.init.zeros_(layer.bias)


class CardiacDreamer(nn.Module):
    """image [B, 1, H, W] (uint8, or float in [0, 1]) and action [B, 6] (mm, deg) -> `Dream`.

    Under the zero action the pose is that of the frame itself, the single-frame prediction.
    `statistics` of the training part normalise frames, actions and poses and are saved with the
    weights. Raises ValueError on any other shape.
    """

    def __init__(self, config: ModelConfig, statistics: Statistics | None = None):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.world = None if config.token_type == "none" else WorldModel(config)
        self.pooling = options.Pooling(config)  # mean over space
        self.head = GuidanceHead(config)
        for name, value in (statistics or Statistics.identity())._asdict().items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))

    def encode(self, image: Tensor) -> Tensor:
        """Feature maps [B, C, h, w] of frames [B, 1, H, W], uint8 or float in [0, 1]."""
        size = self.config.image_size
        if image.ndim != 4 or tuple(image.shape[1:]) != (1, size, size):
            raise ValueError(f"expected images [B, 1, {size}, {size}], got {list(image.shape)}")
        return self.backbone((as_input(image) - self.image_mean) / self.image_std)

    def imagine(self, features: Tensor, action: Tensor) -> Dream:
        """`Dream` of feature maps [B, C, h, w] and actions [B, 6]: all but the backbone."""
        if tuple(action.shape) != (len(features), 6):
            raise ValueError(f"expected actions [{len(features)}, 6], got {list(action.shape)}")
        reconstruction, next_features, action_token = features, features, None
        if self.world is not None:
            reconstruction, next_features, action_token = self.world(
                features, action / self.action_std
            )
        pooled = self.pooling(next_features, action_token)  # [B, C]
        return Dream(features, reconstruction, next_features, pooled, self.guide(pooled))

    def guide(self, pooled: Tensor) -> Tensor:
        """Poses [B, 6] in mm and degrees of pooled maps [B, C]."""
        return self.head(pooled).float() * self.pose_std + self.pose_mean

    def forward(self, image: Tensor, action: Tensor) -> Dream:
        return self.imagine(self.encode(image), action)
