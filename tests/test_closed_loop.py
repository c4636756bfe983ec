"""Closed loop: motion by hand, policies that must and must not reach the plane, Gymnasium."""

import json
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from pydantic import ValidationError

from dreamer import poses
from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.phantom.generate import CODE
from dreamer.study import closed_loop, stats
from dreamer.study.closed_loop import (
    Control,
    Follow,
    NavigationConfig,
    Person,
    Plan,
    Probes,
    Searches,
    Start,
    away,
    draw_start,
    draw_starts,
    limited,
    measure,
    measure_controls,
    policy,
    score,
    search,
    settled,
    unseen_patients,
)
from dreamer.study.environment import ProbeEnv

STEADY = NavigationConfig(steps=12, hand_mm=0, hand_deg=0, breath_mm=0)
PEOPLE = [Person("a", (5, 0)), Person("b", (5, 1)), Person("c", (5, 2))]
TINY = ModelConfig(
    backbone="compact", image_size=32, channels=16, width=4, d_model=16, num_heads=2, num_layers=1,
    guidance=(32, 16),
)  # fmt: skip
FRAME = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)


def tensor(*values):
    return torch.tensor([values], dtype=torch.float64)


def probe_at(*pose, config=STEADY, count=1):
    return Probes([Start(PEOPLE[0], np.array(pose), 7)] * count, size=32, config=config)


class Exact:
    """A model that predicts a given pose, whatever the frame, and imagines motions exactly."""

    def __init__(self, pose):
        self.pose, self.pose_mean, self.world = pose, torch.zeros(6), True

    def encode(self, image):
        return self.pose

    def imagine(self, features, action):
        return type("Dream", (), {"pose": poses.compose(features.double(), action.double())})


# Probes


def test_limits_of_a_hand_by_hand():
    cut = limited(tensor(30, 40, 0, 0, 0, 90), STEADY)
    torch.testing.assert_close(cut, tensor(3, 4, 0, 0, 0, 10))
    free = tensor(1, -2, 2, 3, 0, 0)
    torch.testing.assert_close(limited(free, STEADY), free)
    torch.testing.assert_close(limited(tensor(*[0.0] * 6), STEADY), tensor(*[0.0] * 6))
    mm, deg = away(tensor(3, 0, 4, 0, -25, 0))
    assert mm.item() == pytest.approx(5) and deg.item() == pytest.approx(25)


def test_a_small_motion_is_a_stop():
    config = NavigationConfig(hold_mm=2, hold_deg=3)
    motions = tensor([1, 1, 1, 0, 0, 2], [1, 1, 1, 0, 0, 4], [2, 1, 0, 0, 0, 0])[0]
    assert settled(motions, config).any(1).tolist() == [False, True, True]


def test_a_probe_moves_in_its_own_frame():
    probes = probe_at(0, 0, 0, 0, 0, 90)
    probes.move(tensor(4, 0, 0, 0, 0, 0), [0])  # its x is the plane's y
    torch.testing.assert_close(probes.pose, tensor(0, 4, 0, 0, 0, 90))
    made = probes.move(tensor(0, 0, 0, 0, 0, -30), [0])  # the hand turns by 10 degrees at most
    torch.testing.assert_close(made, tensor(0, 0, 0, 0, 0, -10))
    torch.testing.assert_close(probes.pose, tensor(0, 4, 0, 0, 0, 80))
    edge = probe_at(58, 0, 0, 0, 0, 0)
    torch.testing.assert_close(edge.move(tensor(5, 0, 0, 0, 0, 0), [0]), tensor(2, 0, 0, 0, 0, 0))


def test_the_heart_beats_and_breathing_shifts_the_patient():
    config = NavigationConfig(seconds=0.25, beats_per_minute=60, breath_seconds=2, breath_mm=3)
    probes = probe_at(0, 0, 0, 0, 0, 0, config=config)
    first, depth = probes.seen()[1], []
    for _ in range(16):
        probes.move(torch.zeros(1, 6), [0])
        pose, phase = probes.seen()
        depth.append(float((pose - probes.pose).norm()))
    torch.testing.assert_close(phase, first)  # sixteen quarters of a beat
    assert 2 < max(depth) <= 3 + 1e-9 and min(depth) < 0.5


def test_a_hand_errs_by_its_standard_deviation():
    config = NavigationConfig(steps=1, hand_mm=0.4, hand_deg=1.0)
    starts = [Start(PEOPLE[0], np.zeros(6), seed) for seed in range(300)]
    probes = Probes(starts, size=32, config=config)
    made = probes.move(torch.zeros(300, 6), range(300))
    torch.testing.assert_close(made, probes.pose)
    np.testing.assert_allclose(made.std(0), [0.4] * 3 + [1.0] * 3, rtol=0.15)
    np.testing.assert_allclose(made.mean(0), 0, atol=0.2)


def test_starts_lie_between_nearest_and_farthest():
    config = NavigationConfig(nearest_mm=10, nearest_deg=10)
    starts = draw_starts([Person(str(n), (5, n)) for n in range(40)], config)
    for start in starts:
        mm, deg = away(torch.from_numpy(start.pose))
        assert mm <= 30 and deg <= 30 and (mm > 10 or deg > 10)
    again = draw_starts([Person("7", (5, 7))], config)
    np.testing.assert_array_equal(again[0].pose, starts[7].pose)  # whoever the others are
    with pytest.raises(ValueError, match="no start"):
        draw_start(np.random.default_rng(0), NavigationConfig(spread=1e-3))


def test_patients_are_new_and_the_plane_is_that_of_the_data(tmp_path):
    people, target = unseen_patients(tmp_path, 2)
    assert [p.seed for p in people] == [(1_000_000, 0), (1_000_000, 1)] and target == "a4c"
    card = {"arguments": {"seed": 4, "target": "plax"}, "structures": [], "format": 2, "code": "x"}
    (tmp_path / "phantom.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="drawn by other code"):
        unseen_patients(tmp_path, 2)
    (tmp_path / "phantom.json").write_text(json.dumps(card | {"code": CODE}))
    assert unseen_patients(tmp_path, 1) == ([Person("virtual_0000", (1_000_004, 0))], "plax")


# Policies


def test_exact_guidance_is_followed_to_a_stop():
    pose = tensor(8, -6, 2, 20, 0, -15)
    motion = Follow(Exact(pose), STEADY)(FRAME)
    torch.testing.assert_close(motion, poses.remaining(pose))
    assert not Follow(Exact(tensor(1, 0, 0, 0, 2, 0)), STEADY)(FRAME).any()


def test_a_filter_averages_poses_carried_on_by_known_motions():
    filtered = Follow(Exact(tensor(2, 0, 0, 0, 0, 0)), STEADY, memory=2)
    torch.testing.assert_close(filtered(FRAME), tensor(-2, 0, 0, 0, 0, 0))
    # The model predicts 2 again; the first prediction and a motion of -1 give 1.
    motion = filtered(FRAME, moved=tensor(-1, 0, 0, 0, 0, 0))
    torch.testing.assert_close(motion, tensor(-1.5, 0, 0, 0, 0, 0))
    # Two frames are remembered: half of 0.5, half of 2. The rest is too small to move.
    assert not filtered(FRAME, moved=tensor(-1, 0, 0, 0, 0, 0)).any()
    turned = Follow(Exact(tensor(0, 0, 0, 0, 0, 40)), STEADY, memory=4)
    turned(FRAME)
    turned(FRAME, moved=tensor(0, 0, 0, 0, 0, -20))
    motion = turned(FRAME, moved=tensor(0, 0, 0, 0, 0, 0))
    angles = np.radians([20, 40, 40])  # the nearest rotation to the sum of their matrices
    mean = np.degrees(np.arctan2(np.sin(angles).sum(), np.cos(angles).sum()))
    torch.testing.assert_close(motion, tensor(0, 0, 0, 0, 0, -mean))


def test_planning_with_an_exact_world_model_nears_the_plane():
    pose = torch.cat((tensor(3, -2, 1, 6, 0, -5), tensor(-3, 1, 0, 0, 4, 5)))
    motion = Plan(Exact(pose), STEADY, candidates=64, elites=8, rounds=4)(FRAME)
    mm, deg = away(poses.compose(pose, motion))
    assert (mm < 1.5).all() and (deg < 4).all()
    single = Plan(Exact(pose[:1]), STEADY, candidates=64, elites=8, rounds=4)(FRAME)
    torch.testing.assert_close(single, motion[:1])


def test_the_oracle_stops_at_the_plane_and_other_controls_do_not():
    config = NavigationConfig(breath_mm=1)
    people = [Person(str(n), (5, n)) for n in range(12)]
    rows = measure_controls(torch.tensor([0, 8, 0, 12.0, 0, 0]), people, config=config)
    assert list(rows) == ["measure", "condition", "patient", "value"]
    cells = rows.pivot_table("value", "condition", "measure")
    assert cells.loc["oracle", ["reached_5", "stopped"]].tolist() == [1, 1]
    assert (cells["reached_10"].drop("oracle") <= 0.2).all()
    assert cells.loc["stay", ["steps", "path_mm", "stopped"]].tolist() == [0, 0, 1]
    assert cells.loc["random", ["steps", "stopped"]].tolist() == [20, 0]
    # 8 mm and 12 degrees are two motions of a hand.
    assert cells.loc["mean pose", "stopped"] == 1 and 2 <= cells.loc["mean pose", "steps"] <= 4
    reached = rows[rows["measure"] == "reached_10"].assign(seed=0)
    assert stats.matrix(reached[reached["condition"] == "oracle"], "value").shape == (1, 12)


def test_each_probe_is_steered_as_if_alone():
    """Probes that stop earlier leave the others' estimates in their places."""
    starts = [Start(PEOPLE[k], np.array([x, 0, 0, 0, 0, 0.0]), k) for k, x in enumerate((3, 12, 7))]

    class Tells(Follow):
        sees = False  # reads the pose from where the true one is passed

        def __call__(self, frames, pose, moved=None, left=slice(None)):
            self.model.pose = pose + tensor(0.5, 0, 0, 0, 0, 0)
            return super().__call__(torch.zeros(len(pose), 1, 32, 32), pose, moved, left)

    steering = Tells(Exact(None), NavigationConfig(hand_mm=0.3), memory=2)
    config = steering.config
    together = search(steering, Probes(starts, size=32, config=config))
    for k, start in enumerate(starts):
        alone = search(steering, Probes([start], size=32, config=config))
        torch.testing.assert_close(alone.pose[:, 0], together.pose[:, k])
        assert alone.steps[0] == together.steps[k]
    assert together.stopped.all() and len(set(together.steps.tolist())) > 1


def test_scores_by_hand():
    # Two searches: 12, 6, 3 and 3 mm with 12 degrees, never stopped; 4 mm, stopped at once.
    one = [(12, 0), (6, 0), (3, 0), (3, 12)]
    pose = torch.zeros(4, 2, 6, dtype=torch.float64)
    pose[:, 0, 0], pose[:, 0, 3] = torch.tensor(one, dtype=torch.float64).T
    pose[:, 1, 0] = 4
    found = Searches(pose, torch.tensor([3, 0]), torch.tensor([False, True]))
    first, second = score(found).round(6).to_dict("records")
    assert (first["reached_5"], first["reached_10"]) == (0, 0)
    assert (first["stopped"], first["steps"]) == (0, 3)
    assert (first["passed_5"], first["steps_to_5"], first["steps_to_10"]) == (1, 2, 1)
    assert (first["start_mm"], first["final_mm"], first["final_deg"]) == (12, 3, 12)
    assert (first["nearest_mm"], first["nearest_deg"]) == (3, 0)
    assert (first["path_mm"], first["path_deg"]) == (9, 12)
    assert (second["reached_5"], second["stopped"], second["steps_to_5"]) == (1, 1, 0)


def test_a_model_is_measured():
    config = NavigationConfig(steps=2)
    torch.manual_seed(0)
    model = CardiacDreamer(TINY).eval()
    rows = measure(model, PEOPLE, config=config, planned=2)
    assert rows.groupby("condition")["patient"].nunique().to_dict() == {
        "filter": 3, "follow": 3, "follow of the planned": 2, "plan": 2,
    }  # fmt: skip
    assert np.isfinite(rows["value"]).all()
    pd.testing.assert_frame_equal(rows, measure(model, PEOPLE, config=config, planned=2))
    none = CardiacDreamer(TINY.model_copy(update={"token_type": "none"})).eval()
    assert set(measure(none, PEOPLE[:1], config=config)["condition"]) == {"follow", "filter"}


def test_it_is_measured_without_gymnasium():
    code = "import sys; sys.modules['gymnasium'] = None; import dreamer.study.closed_loop as loop"
    done = subprocess.run([sys.executable, "-c", f"{code}; print(loop.measure.__name__)"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "measure\n"


# The environment


def env_at(*pose, config=STEADY, seed=7):
    env = ProbeEnv(size=32, config=config)
    env.reset(options={"start": Start(PEOPLE[0], np.array(pose, float), seed)})
    return env


def test_the_registered_environment_passes_gymnasiums_checker():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized.*")  # mm, degrees
        env = gymnasium.make(
            "dreamer/Probe-v0", size=32, config={"steps": 3}, render_mode="rgb_array"
        )
        check_env(env.unwrapped)
        several = gymnasium.make_vec("dreamer/Probe-v0", num_envs=2, size=32)
        assert several.reset(seed=0)[0].shape == (2, 1, 32, 32)
    several.close()
    env.close()


def test_an_episode_by_hand():
    env = env_at(8, 0, 0, 0, 0, 0)
    frame, reward, terminated, truncated, info = env.step([-4, 0, 0, 0, 0, 0])
    assert frame.shape == (1, 32, 32) and frame.any() and info["patient"] == "a"
    assert reward == pytest.approx(4) and info["translation"] == pytest.approx(4)
    assert not terminated and not truncated
    assert env.step(np.zeros(6))[2:4] == (True, False), "no motion is a stop"
    env = env_at(8, 0, 0, 0, 0, 0)
    ends = [env.step(np.ones(6))[3] for _ in range(STEADY.steps)]
    assert ends == [False] * (STEADY.steps - 1) + [True]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.ones(6))


def test_a_search_is_seen_again_in_the_environment():
    config = NavigationConfig(steps=3)
    torch.manual_seed(0)
    steering = policy("filter", CardiacDreamer(TINY).eval(), config)
    [start] = draw_starts(PEOPLE[:1], config)
    found = search(steering, Probes([start], size=32, config=config))
    env = ProbeEnv(size=32, config=config)
    frame, info = env.reset(options={"start": start})
    steering.reset()
    moved = None
    for _ in range(config.steps):
        before = torch.from_numpy(info["pose"])
        motion = steering(torch.from_numpy(frame)[None], moved=moved)[0]
        frame, *_, info = env.step(motion.numpy())
        moved = poses.relative(before, torch.from_numpy(info["pose"]))[None]
    np.testing.assert_allclose(info["pose"], found.pose[-1, 0], atol=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Probes([], size=32), "starts"),
        (lambda: Probes(draw_starts(PEOPLE, STEADY), target="none"), "target 'none'"),
        (lambda: probe_at(*[np.nan] * 6), "finite"),
        (lambda: probe_at(*[0] * 6).move(torch.full((1, 6), np.inf), [0]), "finite"),
        (lambda: probe_at(*[0] * 6).move(torch.zeros(6), [0]), "1, 6"),
        (lambda: ProbeEnv(people=[]), "people"),
        (lambda: ProbeEnv(target="none"), "target 'none'"),
        (lambda: ProbeEnv(size=32).reset(options={"pos": 1}), "unknown pos"),
        (lambda: Follow(None, STEADY, 0), "memory"),
        (lambda: Plan(CardiacDreamer(TINY.model_copy(update={"token_type": "none"})), STEADY),
         "no world model"),
        (lambda: Plan(CardiacDreamer(TINY), STEADY, elites=9), "elites"),
        (lambda: Control("drift", torch.zeros(6), STEADY), "drift"),
        (lambda: measure(CardiacDreamer(TINY), PEOPLE, policies=["drift"]), "drift"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_configuration_refuses_nonsense():
    for wrong in ({"step": 3}, {"limit_mm": 0}, {"limit_deg": 120}):
        with pytest.raises(ValidationError):
            NavigationConfig(**wrong)
    with pytest.raises(gymnasium.error.ResetNeeded):
        ProbeEnv(size=32).step(np.zeros(6))
    assert closed_loop.POLICIES == ("follow", "filter", "plan")
