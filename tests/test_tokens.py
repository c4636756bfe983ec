import pytest
import torch
from torch import nn

from dreamer.tokens import MAPS, ChannelTokens, PatchTokens


def identity(tokens):
    for layer in (tokens.embedding, *tokens.heads.values()):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return tokens


@pytest.mark.parametrize(("kind", "count", "length"), [(PatchTokens, 6, 5), (ChannelTokens, 5, 6)])
def test_round_trip_with_identity_weights(kind, count, length):
    # A grid that is not square and a number of channels unlike either side: no axis can hide.
    features = torch.arange(2 * 5 * 2 * 3, dtype=torch.float32).reshape(2, 5, 2, 3)
    tokens = identity(kind(5, (2, 3), width=length))
    assert (tokens.count, tokens.token_length) == (count, length)
    embedded = tokens.embed(features)
    assert embedded.shape == (2, count, length)
    for head in MAPS:
        torch.testing.assert_close(tokens.restore(embedded, head), features, rtol=0, atol=0)


def test_what_a_token_holds():
    features = torch.arange(5 * 2 * 3, dtype=torch.float32).reshape(1, 5, 2, 3)
    patch, channel = PatchTokens(5, (2, 3), 4), ChannelTokens(5, (2, 3), 4)
    # Patch token 4 is row 1, column 1, of every channel; channel token 4 is all of channel 4.
    torch.testing.assert_close(patch.split(features)[0, 4], features[0, :, 1, 1])
    torch.testing.assert_close(channel.split(features)[0, 4], features[0, 4].flatten())


@pytest.mark.parametrize("kind", [PatchTokens, ChannelTokens])
def test_refuses_another_map(kind):
    with pytest.raises(ValueError, match=r"expected a feature map \[B, 5, 2, 3\].*\[1, 5, 3, 2\]"):
        kind(5, (2, 3), 4).embed(torch.zeros(1, 5, 3, 2))
