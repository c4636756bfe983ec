"""Shared by the tests of maps: models whose attributions are known by hand."""

import pytest
import torch
from torch import nn

from dreamer.model import CardiacDreamer, Dream, ModelConfig, as_input

C, H = 8, 3


class Additive(nn.Module):
    """A model whose pose is linear in the map: pose = sum over (c, y, x) of weight · feature."""

    def __init__(self, bend: float = 0.0):
        super().__init__()
        self.config = ModelConfig(backbone="compact", channels=C, image_size=48, d_model=16,
                                  num_heads=2, num_layers=1, guidance=(8, 8))  # fmt: skip
        self.weight = torch.randn(6, C, H, H, generator=torch.Generator().manual_seed(1))
        self.bend = bend
        self.register_buffer("image_mean", torch.tensor(0.25))

    def encode(self, image):
        """Each cell's mean grey level, in all channels."""
        return nn.functional.adaptive_avg_pool2d(as_input(image), H).expand(-1, C, -1, -1)

    def imagine(self, features, action):
        pose = torch.einsum("bcyx,icyx->bi", features, self.weight)
        pose = pose + self.bend * features.pow(4).sum((1, 2, 3))[:, None]
        return Dream(features, features, features, features.mean((2, 3)), pose)


@pytest.fixture
def additive():
    return Additive()


@pytest.fixture
def features():
    return torch.rand(4, C, H, H, generator=torch.Generator().manual_seed(2)) + 0.1


def tiny(**fields):
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="compact", channels=C, width=4, image_size=48, d_model=16, num_heads=2,
        num_layers=2, guidance=(16, 8), **fields,
    )  # fmt: skip
    net = CardiacDreamer(config).eval()
    with torch.no_grad():  # attention that is far from even
        for block in net.world.blocks if net.world is not None else ():
            block.attention.qkv.weight.mul_(4)
    return net


@pytest.fixture(scope="module", params=["patch", "channel"])
def model(request):
    return tiny(token_type=request.param)


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 1, 48, 48), generator=torch.Generator().manual_seed(3),
                         dtype=torch.uint8)  # fmt: skip
