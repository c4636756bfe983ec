"""Cardiac Dreamer: a guidance model with a world model inside, in one class for both variants.

    image [B, 1, H, W] -> Backbone -> map [B, C, h, w]
    map, action [B, 6] -> WorldModel -> reconstruction and next_features, maps [B, C, h, w]
    next_features, mean over space -> GuidanceHead -> pose [B, 6]

Sizes follow the published Cardiac-Dreamer system (65,188,584 parameters with channel tokens,
66,256,262 with patch tokens); backbone: He et al., CVPR 2016; blocks: Vaswani et al., NeurIPS 2017,
normalised after each branch as there, or before it (`norm_first`: Xiong et al., ICML 2020).
"""

import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamer.data import Statistics
from dreamer.tokens import ChannelTokens, PatchTokens

STRIDE = {"resnet34": 32, "compact": 16}
STAGES = {"resnet34": 5, "compact": 3}  # the stem, then the residual stages
TOKENS = {"patch": PatchTokens, "channel": ChannelTokens}


class ModelConfig(BaseModel):
    """Architecture. Unknown fields and values out of range are refused (pydantic.ValidationError).

    `token_type` none is the "direct" control: no transformer, the frame's own map is pooled.
    `weights`: "none", "imagenet" (ResNet34 only, downloaded by torchvision) or a file with a
    ResNet34 state dict (.safetensors, or .pt/.pth read with weights_only). `freeze`: how many
    backbone stages, stem first, keep their weights. `image_size`: pixels, a square.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_type: Literal["patch", "channel", "none"] = "patch"
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
        return self

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // STRIDE[self.backbone]
        return side, side


class Dream(NamedTuple):
    """What the model says of a frame and a motion. Maps are [B, C, h, w]; `pose` in mm and deg."""

    features: Tensor
    reconstruction: Tensor
    next_features: Tensor
    pooled: Tensor
    pose: Tensor


class _Residual(nn.Module):
    """Two 3x3 convolutions and a short cut. GroupNorm: a frame never depends on its batch."""

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


def _resnet_weights(source: str) -> dict[str, Tensor]:
    """State dict of a ResNet34 for one grey channel: the three colour filters averaged."""
    if source == "imagenet":
        try:
            state = torchvision.models.ResNet34_Weights.DEFAULT.get_state_dict(check_hash=True)
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
    """Frame [B, 1, H, W] -> feature map [B, C, H/stride, W/stride].

    ResNet34 (stride 32, 512 channels) without its classifier, or `compact` (stride 16), small
    enough for a CPU. Frozen stages keep their weights and their batch statistics.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.backbone == "resnet34":
            net = torchvision.models.resnet34()
            net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
            net.fc = nn.Identity()
            if config.weights != "none":
                self._load(net, config.weights)
            stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
            self.stages = nn.ModuleList([stem, net.layer1, net.layer2, net.layer3, net.layer4])
        else:
            w, c = config.width, config.channels
            stem = nn.Sequential(
                nn.Conv2d(1, w, 5, stride=2, padding=2, bias=False), nn.MaxPool2d(2),
                nn.GroupNorm(4, w), nn.ReLU(),
            )  # fmt: skip
            self.stages = nn.ModuleList([stem, _Residual(w, 4 * w), _Residual(4 * w, c)])
        self.frozen = config.freeze
        for stage in self.stages[: self.frozen]:
            stage.requires_grad_(False)

    @staticmethod
    def _load(net: nn.Module, source: str):
        try:
            net.load_state_dict(_resnet_weights(source))
        except RuntimeError as error:
            raise RuntimeError(f"weights: {source} does not fit ResNet34: {error}") from error

    def train(self, mode: bool = True):
        super().train(mode)
        for stage in self.stages[: self.frozen]:
            stage.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        for stage in self.stages:
            image = stage(image)
        return image


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D].

    Fused by default; with `recorded` the weights [B, heads, N, N] pass through `softmax`, where a
    forward hook can read them. Both ways agree to 1e-5.
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

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        p = self.dropout if self.training else 0.0
        if self.recorded:
            weights = self.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))
            mixed = F.dropout(weights, p) @ v  # [B, heads, N, D/heads]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Attention and feed-forward, each with a short cut, over tokens [B, N, D]."""

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

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.drop(self.attention(self.norm1(x)))
            return x + self.drop(self.feedforward(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attention(x)))
        return self.norm2(x + self.drop(self.feedforward(x)))


def sinusoids(count: int, width: int) -> Tensor:
    """Fixed positions [1, count, width], sine and cosine in turn (Vaswani et al., section 3.5)."""
    place = torch.arange(count, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack((torch.sin(place * rate), torch.cos(place * rate)), -1).flatten(1)[None]


class WorldModel(nn.Module):
    """Map [B, C, h, w] and action [B, 6] (in units of its spread) -> the two restored maps.

    embed -> positions -> norm -> blocks -> restore. Token 0 is the action's; the maps are read from
    the map's own tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.tokens = TOKENS[config.token_type](config.channels, config.grid, d)
        self.action = nn.Sequential(
            nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, d)
        )
        self.register_buffer("positions", sinusoids(1 + self.tokens.count, d), persistent=False)
        self.norm = nn.LayerNorm(d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat((self.action(action)[:, None], self.tokens.embed(features)), dim=1)
        x = self.norm(x + self.positions)  # [B, 1 + tokens, D]
        for block in self.blocks:
            x = block(x)
        return tuple(self.tokens.restore(x[:, 1:], head) for head in self.tokens.heads)


class GuidanceHead(nn.Sequential):
    """Pooled map [B, C] -> pose [B, 6] in units of the training poses' spread."""

    def __init__(self, config: ModelConfig):
        first, second = config.guidance
        super().__init__(
            nn.Linear(config.channels, first), nn.ReLU(), nn.Dropout(config.dropout),
            nn.Linear(first, second), nn.ReLU(), nn.Dropout(config.dropout),
            nn.Linear(second, 6),
        )  # fmt: skip
        for layer in self:  # the library's start shrinks a signal by half a layer: slow to wake
            if isinstance(layer, nn.Linear):
                gain = "linear" if layer.out_features == 6 else "relu"
                nn.init.kaiming_normal_(layer.weight, nonlinearity=gain)
                nn.init.zeros_(layer.bias)


class CardiacDreamer(nn.Module):
    """image [B, 1, H, W] in [0, 1] and action [B, 6] in mm and degrees -> `Dream`.

    The zero action asks about the frame itself. `statistics` (of the training part) put pictures,
    actions and poses into the units the networks work in; they are saved with the weights. Raises
    ValueError on any other shape.
    """

    def __init__(self, config: ModelConfig, statistics: Statistics | None = None):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.world = None if config.token_type == "none" else WorldModel(config)
        self.head = GuidanceHead(config)
        for name, value in (statistics or Statistics.identity())._asdict().items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))

    def encode(self, image: Tensor) -> Tensor:
        """Frames [B, 1, H, W] -> feature maps [B, C, h, w]."""
        size = self.config.image_size
        if image.ndim != 4 or tuple(image.shape[1:]) != (1, size, size):
            raise ValueError(f"expected images [B, 1, {size}, {size}], got {list(image.shape)}")
        return self.backbone((image - self.image_mean) / self.image_std)

    def imagine(self, features: Tensor, action: Tensor) -> Dream:
        """Feature maps [B, C, h, w] and actions [B, 6] -> `Dream`: all but the backbone."""
        if tuple(action.shape) != (len(features), 6):
            raise ValueError(f"expected actions [{len(features)}, 6], got {list(action.shape)}")
        reconstruction, next_features = (
            (features, features)
            if self.world is None
            else self.world(features, action / self.action_std)
        )
        pooled = next_features.mean(dim=(2, 3))  # [B, C]
        return Dream(features, reconstruction, next_features, pooled, self.guide(pooled))

    def guide(self, pooled: Tensor) -> Tensor:
        """Pooled maps [B, C] -> poses [B, 6] in mm and degrees."""
        return self.head(pooled).float() * self.pose_std + self.pose_mean

    def forward(self, image: Tensor, action: Tensor) -> Dream:
        return self.imagine(self.encode(image), action)
