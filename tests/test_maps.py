"""The table of maps of one run, and maps of the imagination known by hand."""

import copy

import numpy as np
import pytest
import torch
from maps import C, H, images, model, tiny  # noqa: F401, fixtures
from torch import nn

from dreamer import poses
from dreamer.data import Split, Transitions
from dreamer.model import CardiacDreamer, Dream, ModelConfig
from dreamer.phantom.generate import generate
from dreamer.study import faithfulness, ground_truth, maps


class Gated(nn.Module):
    """An imagined map whose change is the motion's x times cell (0, 0) of the map, in cell (2, 2),
    in addition to the motion's roll, in cell (1, 1)."""

    def __init__(self):
        super().__init__()
        self.config = ModelConfig(backbone="compact", channels=C, image_size=48, d_model=16,
                                  num_heads=2, num_layers=1, guidance=(8, 8))  # fmt: skip

    def imagine(self, features, action):
        after = features.clone()
        after[:, 0, 2, 2] = after[:, 0, 2, 2] + action[:, 0] * features[:, 0, 0, 0]
        after[:, 0, 1, 1] = after[:, 0, 1, 1] + action[:, 3]
        return Dream(features, features, after, features.mean((2, 3)), action)


def test_imagined_change_by_hand():
    features, action = torch.zeros(2, C, H, H), torch.zeros(2, 6)
    features[:, 0, 0, 0] = torch.tensor([2.0, 3.0])
    action[0, 0], action[1, 3] = 5.0, 7.0
    change = maps.Change(Gated())
    assert change(features, action)[:, 0].tolist() == [10, 7]
    assert change.where(features, action)[0, 0, 2, 2] == 10
    grid, numbers = maps.imagined_change(Gated(), features, action, 0 * features[:1])
    expected = torch.zeros(2, H, H)
    expected[0, 0, 0] = 10.0  # the first change depends on cell (0, 0), the second on no cell
    torch.testing.assert_close(grid, expected)
    shares = torch.zeros(2, 6)
    shares[0, 0], shares[1, 3] = 10.0, 7.0
    torch.testing.assert_close(numbers, shares)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six virtual patients, two of them to test."""
    folder = tmp_path_factory.mktemp("maps")
    found = Transitions(generate(folder / "data", 6, 4, size=48), cache=folder)
    test = np.flatnonzero(np.isin(found.patient, ["patient_0004", "patient_0005"]))
    train = np.setdiff1d(np.arange(len(found)), test)
    return found, Split(train, train[:1], test, "patient")


def test_table_of_a_run(data):
    found, split = data
    net = tiny(token_type="channel")
    table = maps.measure(net, found, split.test, split, frames=3, scored=2, tested=1)
    assert list(table) == ["measure", "condition", "patient", "value"]
    assert np.isfinite(table["value"]).all()
    assert not table.duplicated(["measure", "condition", "patient"]).any()
    assert set(table["patient"]) == {"", "patient_0004", "patient_0005"}
    measures = set(table["measure"])
    assert set(faithfulness.BETTER) <= measures
    assert {"relevance", "average_map", "incompleteness", "metric_agreement"} <= measures
    assert {"attention_shift", "imagined_change_rank", "shortcut_rotation_deg"} <= measures
    conditions = set(table["condition"])
    assert {"random | rotation", "Shapley | translation"} <= conditions
    assert not any("random 1" in name for name in conditions)
    shapley = table[table["condition"].eq("Shapley | rotation")].set_index("measure")["value"]
    assert shapley["incompleteness"].max() < 1e-3
    share = table[table["measure"] == "action_share"].groupby("patient")["value"].sum()
    assert share.to_numpy() == pytest.approx(1)
    whole = table[table["measure"] == "shortcut_rotation_deg"].set_index("condition")["value"]
    sample = ground_truth.draw(found, split.test, split, 3)
    error = poses.errors(ground_truth.predict(net, sample.images), sample.pose).rotation
    by_patient = [float(error[sample.patient == p].mean()) for p in set(sample.patient)]
    assert sorted(whole["whole"]) == pytest.approx(sorted(by_patient), rel=1e-4)


def test_without_transformer_and_truth_the_other_measures_remain(data, tmp_path, monkeypatch):
    found, split = data
    monkeypatch.setattr(found, "folder", tmp_path)
    config = ModelConfig(token_type="none", backbone="compact", channels=C, width=4, image_size=48,
                         guidance=(16, 8))  # fmt: skip
    net = CardiacDreamer(config).eval()
    table = maps.measure(net, found, split.test, split, 2, 2, 1, targets=["rotation"])
    measures = set(table["measure"])
    assert {"deletion", "frame_deletion", "randomisation_rank"} <= measures
    assert not {"relevance", "attention_shift", "action_share"} & measures
    assert not table["condition"].str.contains("rollout|action attention").any()


def test_even_attention(model, images):
    net = copy.deepcopy(model)
    for block in net.world.blocks:
        nn.init.zeros_(block.attention.qkv.weight)
    names = {"images": images, "patient": np.arange(5), "action": torch.rand(5, 6)}
    names["training"] = images
    table = maps.attention(faithfulness.view(net, type("S", (), names)))
    value = table.groupby(["measure", "condition"])["value"].agg(["min", "max"])
    for name in ("1 | 1", "2 | 2"):
        assert value.loc["attention_spread", name].tolist() == pytest.approx([1, 1])
    for name in ("still", "motion"):
        assert value.loc["attention_to_action", name].tolist() == pytest.approx([1, 1])
    for name in ("rollout", "action attention"):
        assert value.loc["attention_shift", name].tolist() == pytest.approx([0, 0], abs=1e-6)
