"""Cardiac Dreamer: a guidance model with a world model inside, in one class for both variants.

    image [B, 1, H, W] -> Backbone -> map [B, C, h, w]
    map, action [B, 6] -> WorldModel -> reconstruction and next_features, maps [B, C, h, w]
    next_features, mean over space -> GuidanceHead -> pose [B, 6]

Sizes follow the published Cardiac-Dreamer system (65,188,584 parameters with channel tokens,
66,256,262 with patch tokens); backbone: He et al., CVPR 2016; blocks: Vaswani et al., NeurIPS 2017,
normalised after each branch as there, or before it (`norm_first`: Xiong et al., ICML 2020).
Options beyond that system, off by default: `Positions`, `Pooling`, `TwoLevelTokens`, `BothTokens`,
token dropout (`WorldModel`).
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

from dreamer.data import Statistics
from dreamer.tokens import MAPS, BothTokens, ChannelTokens, PatchTokens, TwoLevelTokens

STRIDE = {"resnet34": 32, "compact": 16}
STAGES = {"resnet34": 5, "compact": 3}  # the stem, then the residual stages
TOKENS = {"patch": PatchTokens, "channel": ChannelTokens, "both": BothTokens}
QUERIES = 8  # of attention pooling; 8 divides the channels of every backbone


class ModelConfig(BaseModel):
    """Architecture. Unknown fields and values out of range are refused (pydantic.ValidationError).

    `token_type` none is the "direct" control: no transformer, the frame's own map is pooled.
    `weights`: "none", "imagenet" (ResNet34 only, downloaded by torchvision) or a file with a
    ResNet34 state dict (.safetensors, or .pt/.pth read with weights_only). `freeze`: how many
    backbone stages, stem first, keep their weights. `image_size`: pixels, a square. `hierarchy`:
    side of a window in fine tokens, which come from the stage before the last; 0 is off.
    `token_dropout`: share of the map's tokens that training leaves out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_type: Literal["patch", "channel", "both", "none"] = "patch"
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
    positions: Literal["sinusoidal", "learned", "learned-2d", "none"] = "sinusoidal"
    hierarchy: int = Field(0, ge=0)
    pooling: Literal["mean", "attention", "generalised-mean", "action"] = "mean"
    token_dropout: float = Field(0.0, ge=0, lt=1)

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

    @model_validator(mode="after")
    def _options_make_sense(self):
        if self.positions == "learned-2d" and self.token_type in ("channel", "both"):
            raise ValueError("positions learned-2d: a channel token has no row and no column")
        if self.hierarchy and self.token_type in ("channel", "both"):
            raise ValueError("hierarchy is for patch tokens: a channel token lies in no window")
        if self.hierarchy and 2 * self.grid[0] % self.hierarchy:
            raise ValueError(
                f"hierarchy: windows of {self.hierarchy} do not divide the fine level's side of "
                f"{2 * self.grid[0]} tokens"
            )
        asked = {
            "positions": self.positions != "sinusoidal", "hierarchy": self.hierarchy > 0,
            "pooling action": self.pooling == "action", "token_dropout": self.token_dropout > 0,
        }  # fmt: skip
        if self.token_type == "none" and any(asked.values()):
            names = ", ".join(name for name, on in asked.items() if on)
            raise ValueError(f"{names}: token_type none has no tokens")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // STRIDE[self.backbone]
        return side, side

    @property
    def fine(self) -> int:
        """Channels of the fine level, the stage before the last; 0 without `hierarchy`."""
        return 0 if not self.hierarchy else 256 if self.backbone == "resnet34" else 2 * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the map, the action's not counted."""
        cells = self.grid[0] * self.grid[1]
        patch = 5 * cells if self.hierarchy else cells
        both = patch + self.channels
        return {"patch": patch, "channel": self.channels, "both": both, "none": 0}[self.token_type]


class Dream(NamedTuple):
    """What the model says of a frame and a motion. Maps are [B, C, h, w] (with `hierarchy`
    [B, C + 4 F, h, w], see `TwoLevelTokens`), `pooled` is [B, C]; `pose` in mm and deg."""

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
    """Frame [B, 1, H, W] -> feature map [B, C, H/stride, W/stride].

    ResNet34 (stride 32, 512 channels) without its classifier, or `compact` (stride 16), small
    enough for a CPU. Frozen stages keep their weights and their batch statistics. With `hierarchy`
    the map of the stage before the last follows in further channels, four of its cells to a place.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.backbone == "resnet34":
            from torchvision.models import resnet34  # seconds, which `compact` need not wait

            net = resnet34()
            net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
            net.fc = nn.Identity()
            if config.weights != "none":
                self._load(net, config.weights)
            stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
            self.stages = nn.ModuleList([stem, net.layer1, net.layer2, net.layer3, net.layer4])
        else:
            w, c = config.width, config.channels
            stem = nn.Sequential(
                nn.Conv2d(1, w, 7, stride=4, padding=3, bias=False), nn.GroupNorm(4, w), nn.ReLU()
            )
            self.stages = nn.ModuleList([stem, _Residual(w, 2 * w), _Residual(2 * w, c)])
        self.frozen, self.two_levels = config.freeze, config.hierarchy > 0
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
        for stage in self.stages[:-1]:
            image = stage(image)
        last = self.stages[-1](image)
        return torch.cat((last, F.pixel_unshuffle(image, 2)), 1) if self.two_levels else last


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D]; `sees` [(B, 1,) N, N], who may look at whom.

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

    def forward(self, x: Tensor, sees: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        p = self.dropout if self.training else 0.0
        if self.recorded:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            weights = self.softmax(scores if sees is None else scores.where(sees, -torch.inf))
            mixed = F.dropout(weights, p) @ v  # [B, heads, N, D/heads]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, dropout_p=p)
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

    def forward(self, x: Tensor, sees: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.drop(self.attention(self.norm1(x), sees))
            return x + self.drop(self.feedforward(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attention(x, sees)))
        return self.norm2(x + self.drop(self.feedforward(x)))


def sinusoids(count: int, width: int) -> Tensor:
    """Fixed positions [1, count, width], sine and cosine in turn (Vaswani et al., section 3.5)."""
    place = torch.arange(count, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack((torch.sin(place * rate), torch.cos(place * rate)), -1).flatten(1)[None]


class Positions(nn.Module):
    """What is added to the action's token and the map's tokens [1, 1 + tokens, D] to tell places.

    Sinusoids, fixed; `learned`: one vector a token; `learned-2d`: the sum of a row's and a column's
    (the fine level of a hierarchy has its own); `none`: zeros. All that is learned begins at
    sinusoids, in the two-dimensional case half of the width for rows and half for columns.
    """

    def __init__(self, config: ModelConfig):
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
        places = [(row[:, None] + column).flatten(0, 1) for row, column in levels]  # [h * w, D]
        return torch.cat((self.action, *places))[None]


class WorldModel(nn.Module):
    """Map [B, C, h, w] and action [B, 6] (in units of its spread) -> the two restored maps, and the
    action's token [B, D] after the blocks.

    embed -> positions -> norm -> blocks -> restore. Token 0 is the action's; the maps are read from
    the map's own tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        if config.hierarchy:
            self.tokens = TwoLevelTokens(config.channels, config.fine, config.grid, d)
        else:
            self.tokens = TOKENS[config.token_type](config.channels, config.grid, d)
        sees = self.tokens.windows(config.hierarchy) if config.hierarchy else None
        self.register_buffer("sees", sees, persistent=False)
        self.action = nn.Sequential(
            nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, d)
        )
        self.positions = Positions(config)
        self.norm = nn.LayerNorm(d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.left_out = min(round(config.token_dropout * config.tokens), config.tokens - 1)

    def forward(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.cat((self.action(action)[:, None], self.tokens.embed(features)), dim=1)
        x = self.norm(x + self.positions())  # [B, 1 + tokens, D]
        x = self._some(x) if self.training and self.left_out else self._all(x, self.sees)
        return *(self.tokens.restore(x[:, 1:], head) for head in MAPS), x[:, 0]

    def _all(self, x: Tensor, sees: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, sees)
        return x

    def _some(self, x: Tensor) -> Tensor:
        """The blocks with `left_out` tokens of each frame really left out, never the action's.

        The maps need every token: one that was left out moves as the kept ones did on average, so
        that a pooled map is as large as without. After PatchDropout (Liu et al., WACV 2023).
        """
        order = torch.rand(x.shape[:2], device=x.device)
        order[:, 0] = -1  # the action's token comes first
        kept = order.argsort(1)[:, : x.shape[1] - self.left_out]  # [B, kept]
        sees = None if self.sees is None else self.sees[kept[:, :, None], kept[:, None]][:, None]
        index = kept[:, :, None].expand(-1, -1, x.shape[2])
        before = x.gather(1, index)
        after = self._all(before, sees)
        moved = (after - before)[:, 1:].mean(1, keepdim=True)
        return (x + moved).to(after.dtype).scatter(1, index, after)


class Pooling(nn.Module):
    """Map [B, C or more, h, w] and action token [B, D] -> [B, C], what the guidance head is given.

    `mean` over places; `attention`: a softmax over places for each of 8 groups of channels, by a
    query that looks at all of them; `generalised-mean` with a learned exponent (GeM: Radenovic et
    al., TPAMI 2019); `action`: the action's token, brought to C values. The first three begin as
    the mean. Of two levels the coarse one is pooled.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind, self.channels = config.pooling, config.channels
        if self.kind == "attention":
            self.queries = nn.Parameter(torch.zeros(QUERIES, config.channels))
        elif self.kind == "generalised-mean":
            # Its logarithm: weight decay draws the exponent to 1, the mean, and not to 0.
            self.log_exponent = nn.Parameter(torch.zeros(()))
        elif self.kind == "action":
            self.read = nn.Linear(config.d_model, config.channels)

    def forward(self, features: Tensor, action: Tensor | None) -> Tensor:
        features = features[:, : self.channels]
        if self.kind == "action":
            return self.read(action)
        if self.kind == "attention":
            places = features.flatten(2)  # [B, C, h * w]
            scores = self.queries @ places / math.sqrt(self.channels)  # [B, 8, h * w]
            groups = rearrange(places, "b (k c) p -> b k c p", k=QUERIES)
            return (groups @ scores.softmax(-1)[..., None]).flatten(1)
        if self.kind == "generalised-mean":
            # Restored maps have signs: the power is odd. The summand bounds its slope at zero.
            power = lambda x, p: x * (x.abs() + 1e-4) ** (p - 1)  # noqa: E731
            p = self.log_exponent.exp()
            return power(power(features.float(), p).mean((2, 3)), 1 / p)
        return features.mean(dim=(2, 3))


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
        self.pooling = Pooling(config)
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
        reconstruction, next_features, told = (
            (features, features, None)
            if self.world is None
            else self.world(features, action / self.action_std)
        )
        pooled = self.pooling(next_features, told)  # [B, C]
        return Dream(features, reconstruction, next_features, pooled, self.guide(pooled))

    def guide(self, pooled: Tensor) -> Tensor:
        """Pooled maps [B, C] -> poses [B, 6] in mm and degrees."""
        return self.head(pooled).float() * self.pose_std + self.pose_mean

    def forward(self, image: Tensor, action: Tensor) -> Dream:
        return self.imagine(self.encode(image), action)
