import pytest
import torch
from torch import nn

from dreamer.tokens import MAPS, BothTokens, ChannelTokens, PatchTokens, TwoLevelTokens


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


def test_both_sorts_share_a_sequence_and_are_restored_by_their_mean():
    features = torch.arange(5 * 2 * 3, dtype=torch.float32).reshape(1, 5, 2, 3)
    tokens = BothTokens(5, (2, 3), width=6)
    identity(tokens.patch), identity(tokens.channel)
    embedded = tokens.embed(features)
    assert tokens.count == 11 and embedded.shape == (1, 11, 6)
    for head in MAPS:
        torch.testing.assert_close(tokens.restore(embedded, head), features)
        patch_only = torch.cat((embedded[:, :6], torch.zeros(1, 5, 6)), dim=1)
        torch.testing.assert_close(tokens.restore(patch_only, head), features / 2)


def test_two_levels_round_trip_and_windows():
    fine = torch.arange(3 * 4 * 6, dtype=torch.float32).reshape(1, 3, 4, 6)
    coarse = -torch.arange(5 * 2 * 3, dtype=torch.float32).reshape(1, 5, 2, 3)
    features = torch.cat((coarse, torch.pixel_unshuffle(fine, 2)), dim=1)  # [1, 17, 2, 3]
    tokens = TwoLevelTokens(5, 3, (2, 3), width=5)
    identity(tokens.coarse), identity(tokens.fine)
    embedded = tokens.embed(features)
    assert tokens.count == 30 and embedded.shape == (1, 30, 5)
    torch.testing.assert_close(embedded[0, 6 + 7, :3], fine[0, :, 1, 1])  # row 1, column 1 of 6
    for head in MAPS:
        torch.testing.assert_close(tokens.restore(embedded, head), features)
    sees = tokens.windows(2)
    assert sees[:, :7].all() and sees[:7].all()
    assert sees[7:, 7:].sum(1).tolist() == [4] * 24 and torch.equal(sees, sees.T)
    assert sees[7, 7 + 7] and not sees[7, 7 + 2]
    with pytest.raises(ValueError, match=r"expected a feature map \[B, 5, 2, 3\]"):
        tokens.embed(features[:, :, :, :2])
