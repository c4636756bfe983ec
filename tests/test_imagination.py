"""A world model that is exact by construction, one that ignores its action, and real ones."""

from copy import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from maps import tiny

from dreamer import poses
from dreamer.data import Split, Transitions, split_by_patient
from dreamer.model import Dream
from dreamer.phantom import generate
from dreamer.study import imagination

STEPS, FREE, PEOPLE = 6, 4, 3  # of each patient: search transitions, independent pairs


class World:
    """A model whose map is the pose: [B, 6, 1, 1]. It moves it by `share` of the action."""

    def __init__(self, pose, share=1.0):
        self.pose, self.share, self.world = pose, share, True
        self.pose_mean = self.image_mean = torch.zeros(6)

    def encode(self, image):
        return self.pose[image[:, 0, 0, 0].long()][:, :, None, None]

    def imagine(self, features, action):
        pose = poses.compose(features[..., 0, 0], self.share * action)
        return Dream(features, features, pose[:, :, None, None], pose, pose)


@pytest.fixture
def scans(tmp_path):
    """Transitions whose image is the number of the frame, and the pose of each frame."""
    draw, pairs, pose, motion = torch.Generator().manual_seed(0), [], [], []
    for _ in range(PEOPLE):
        first = len(pose)
        pose += torch.randn(STEPS + 1 + 2 * FREE, 6, generator=draw).mul(5).unbind()
        pairs += [(first + k, first + k + 1) for k in range(STEPS)]
        pairs += [(first + STEPS + 1 + 2 * k, first + STEPS + 2 + 2 * k) for k in range(FREE)]
        motion += ["search"] * STEPS + ["independent"] * FREE
    pose, rows = torch.stack(pose), np.array(pairs)
    one, two = pose[rows[:, 0]], pose[rows[:, 1]]
    person = np.repeat([f"p{n}" for n in range(PEOPLE)], STEPS + FREE)
    data = SimpleNamespace(
        rows=rows, frame_id=rows, pose1=one, pose2=two, action=poses.relative(one, two),
        patient=person, scan=person, motion=np.array(motion), folder=tmp_path,
        images=lambda chosen: torch.tensor(np.array(chosen)).float()[:, None, None, None],
    )  # fmt: skip
    everything = np.arange(len(rows))
    return data, everything, Split(everything, everything, everything, "patient"), pose


def value(table, measure):
    """Means by condition."""
    return table[table["measure"] == measure].groupby("condition")["value"].mean()


def test_pairs_are_free_of_leaks_and_a_wrong_action_is_of_like_size(scans):
    data, everything, split, pose = scans
    found = imagination.pairs(World(pose), data, everything, split, each=3)
    assert set(data.motion[found.index]) == {"independent"}
    assert pd.Series(found.patient).value_counts().tolist() == [3] * PEOPLE
    mm, deg = (v.numpy() for v in poses.errors(found.action, torch.zeros(9, 6))[1:])
    size = mm / mm.mean() + deg / deg.mean()
    small, medium, large = (size[found.size == name] for name in imagination.SIZES)
    assert len(small) == len(medium) == len(large) == 3
    assert small.max() < medium.min() and medium.max() < large.min()
    wrong = poses.relative(found.pose1, found.pose["wrong action"])  # the action that was used
    gap = (wrong[:, None] - found.action).abs().amax(2)
    source = gap.argmin(1).numpy()
    assert gap.amin(1).max() < 1e-2 and (source != np.arange(9)).all()
    assert (found.size[source] == found.size).all() and len(set(source)) == 9


def test_an_exact_world_model(scans):
    data, everything, split, pose = scans
    model = World(pose)
    found = imagination.pairs(model, data, everything, split, each=4)
    maps = imagination.imagined_maps(found, pose.mean(0)[:, None, None])
    error = value(maps, "imagined_map_error")
    variance = found.pose2.var(dim=0).mean()  # of one cell and six channels
    copied = (found.pose1 - found.pose2).square().mean() / variance
    assert error["imagined"] == pytest.approx(0, abs=1e-6)
    assert error["copy"] == pytest.approx(copied.item()) == error["zero action"]
    assert error["mean map"] == pytest.approx(
        ((pose.mean(0) - found.pose2).square().mean() / variance).item()
    )
    assert value(maps, "map_copy_minus_right")[""] == pytest.approx(copied.item(), rel=1e-4)
    wrong = value(maps, "map_wrong_minus_right")[""]
    assert wrong == pytest.approx(error["wrong action"], rel=1e-4)
    parts = [f"copy, {size} motion" for size in imagination.SIZES]
    assert error[parts].between(0, 10).all() and "large motion" in value(maps, "motion_deg")
    table = imagination.imagined_poses(found)
    mm = value(table, "imagined_translation_mm")
    assert mm[["imagined", "exact geometry", "see frame 2"]].max() < 1e-4
    still = (found.pose1 - found.pose2)[:, :3].norm(dim=1).mean().item()
    assert mm["ignore the motion"] == pytest.approx(still) and mm["wrong action"] > 1
    back = imagination.there_and_back(model, found)
    assert value(back, "return_map_error")["returned"] < 1e-6
    assert value(back, "return_rotation_deg")["returned"] < 1e-2
    assert value(back, "return_translation_mm")["moved"] > 1
    regret = imagination.choice(model, data, found)
    for unit in ("mm", "deg"):
        assert value(regret, f"choice_regret_{unit}")["imagined"] < 1e-4
        assert value(regret, f"choice_regret_{unit}")["random"] > 1
        assert value(regret, f"choice_best_{unit}")["exact geometry"] == 1


def test_a_world_model_that_ignores_its_action(scans):
    data, everything, split, pose = scans
    model = World(pose, share=0.0)
    found = imagination.pairs(model, data, everything, split)
    maps = imagination.imagined_maps(found)
    for name in ("wrong", "copy"):
        assert value(maps, f"map_{name}_minus_right").abs().max() < 1e-5
    table = imagination.imagined_poses(found)
    rotation = value(table, "imagined_rotation_deg")
    assert rotation["imagined"] == rotation["ignore the motion"] > 1
    assert value(imagination.there_and_back(model, found), "return_map_error").max() < 1e-5


def test_rollouts_by_hand(scans, caplog):
    data, everything, split, pose = scans
    found = imagination.rollout(World(pose), data, everything, split, steps=STEPS)
    error = value(found, "rollout_map_error")
    for k in range(1, STEPS + 1):
        whole = [f"in one step, step {k}"] if k > 1 else []
        assert error[[f"imagined, step {k}", *whole]].max() < 1e-6
    paths = [pose[n * (STEPS + 1 + 2 * FREE) :][: STEPS + 1] for n in range(PEOPLE)]
    paths[1] = paths[1].flip(0)  # every other one is walked backwards
    path = torch.stack(paths)
    copied = (path[:, 0] - path[:, 2]).square().mean() / path[:, 2].var(dim=0).mean()
    assert error["copy, step 2"] == pytest.approx(copied.item())
    mm = value(found, "rollout_translation_mm")
    assert mm["ignore the motion, step 6"] == pytest.approx(
        (path[:, 0] - path[:, 6])[:, :3].norm(dim=1).mean().item()
    )
    assert mm[[f"exact geometry, step {k}" for k in range(1, STEPS + 1)]].max() < 1e-3
    idle = imagination.rollout(World(pose, 0.0), data, everything, split, steps=2)
    idle = value(idle, "rollout_map_error")
    assert idle["imagined, step 2"] == pytest.approx(idle["copy, step 2"])
    assert imagination.rollout(World(pose), data, everything, split, steps=STEPS + 1).empty
    assert "no path of 7 consecutive transitions" in caplog.text


def test_effective_rank_by_hand():
    draw = torch.Generator().manual_seed(0)
    three = torch.zeros(5000, 8, 1, 1)
    three[:, :3, 0, 0] = 2 * torch.randn(5000, 3, generator=draw)
    found = imagination.spread(SimpleNamespace(there=three, maps={"imagined": three[:, :1]}))
    assert value(found, "map_rank")["see frame 2"] == pytest.approx(3, rel=0.01)
    assert value(found, "map_rank")["imagined"] == pytest.approx(1)
    assert value(found, "map_variance")["see frame 2"] == pytest.approx(4 * 3 / 8, rel=0.05)
    assert set(found["patient"]) == {""}


@pytest.mark.parametrize("kind", ["patch", "channel"])
def test_tokens_are_those_before_and_after_each_block(kind):
    net = tiny(token_type=kind)
    maps = torch.rand(3, 8, 3, 3)
    found = imagination._tokens(net, maps)
    assert list(found) == ["tokens", "tokens, block 1", "tokens, block 2"]
    last = found["tokens, block 2"].float().view(3, -1, 16)
    expected = net.imagine(maps, torch.zeros(3, 6)).next_features
    torch.testing.assert_close(net.world.tokens.restore(last, "next_features"), expected, atol=0.01,
                               rtol=0.01)  # fmt: skip
    assert not any(block._forward_hooks for block in net.world.blocks)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagination")
    generate(folder / "data", 5, 10, size=48)
    data = Transitions(folder / "data", cache=folder)
    return data, split_by_patient(data, 1, 2)


@pytest.mark.parametrize("kind", ["patch", "channel", "none"])
def test_all_measures_of_a_run(phantom, kind):
    data, split = phantom
    net = tiny(token_type=kind)
    table = imagination.measure(net, data, split, frames=12)
    assert list(table) == ["measure", "condition", "patient", "value"]
    assert not table.duplicated(["measure", "condition", "patient"]).any()
    assert np.isfinite(table["value"]).all()
    assert set(table["patient"]) == {"", *data.patient[split.test]}
    imagined = table["condition"].str.contains("imagined|wrong|zero action|in one step")
    assert imagined.any() == (kind != "none")
    measures = set(table["measure"])
    assert {"visible_ap", "contact_error", "choice_regret_contact"} <= measures
    assert value(table, "visible_ap")["see frame 2"] > 0
    assert ("return_map_error" in measures) == (kind != "none")
    other = imagination.measure(net, data, split, test_data=data, each=1, frames=12)
    assert set(other["patient"]) == {"", *data.patient}


@pytest.mark.parametrize("kind", ["channel", "none"])
def test_space_is_read_from_tokens_beside_pixels_and_prior(phantom, kind):
    data, split = phantom
    table = imagination.space(tiny(token_type=kind), data, split, frames=12)
    assert set(table["patient"]) == set(data.patient[split.test])
    tokens = ["tokens", "tokens, block 1", "tokens, block 2"] if kind == "channel" else []
    for measure in ("layer_translation_mm", "layer_rotation_deg", "layer_visible_ap"):
        assert set(value(table, measure).index) == {"pixels", "map", "prior", *tokens}
    other = imagination.space(tiny(token_type=kind), data, split, test_data=data, frames=12)
    assert set(other["patient"]) == set(data.patient)


def test_recorded_scans_have_no_contents(phantom, tmp_path):
    recorded, split = copy(phantom[0]), phantom[1]
    recorded.folder = tmp_path  # without a phantom's card
    net = tiny(token_type="patch")
    tables = [part(net, recorded, split, frames=12)
              for part in (imagination.measure, imagination.space)]  # fmt: skip
    found = pd.concat(tables)["measure"]
    assert not found.str.contains("_ap|contact").any()
    assert {"layer_rotation_deg", "choice_regret_deg"} <= set(found)
