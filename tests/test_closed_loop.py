"""Closed loop: physics by hand, Gymnasium's own checker, policies that must and must not arrive."""

import json
import re
import warnings

import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from pydantic import ValidationError
from safetensors.torch import save_file

from dreamer import poses
from dreamer.study import arrivals
from dreamer.study.explore import Explorer, say
from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.study.closed_loop import (
    Follow,
    NavigationConfig,
    Person,
    Plan,
    ProbeEnv,
    Probes,
    away,
    draw_start,
    limited,
)
from dreamer.phantom import Patient

STEADY = NavigationConfig(steps=12, hand_mm=0, hand_deg=0, breath_mm=0)
PEOPLE = [Person("a", (5, 0)), Person("b", (5, 1))]
TINY = ModelConfig(
    backbone="compact", image_size=32, channels=16, width=4, d_model=16, num_heads=2, num_layers=1,
    guidance=(32, 16),
)  # fmt: skip


def tensor(*values):
    return torch.tensor([values], dtype=torch.float64)


def probes(pose, config=STEADY, seed=0):
    return Probes([Patient((5, 0))], pose, [np.random.default_rng(seed)], config, size=32)


class Sees:
    """A model that says the pose it is given, and imagines a motion exactly."""

    def __init__(self, pose):
        self.pose = pose
        self.world, self.config = True, TINY

    def __call__(self, image, action):
        return self.imagine(self.pose, action)

    def encode(self, image):
        return self.pose

    def imagine(self, features, action):
        return type("Dream", (), {"pose": poses.compose(features.double(), action.double())})


def test_limits_of_a_hand_by_hand():
    cut = limited(tensor(30, 40, 0, 0, 0, 90), mm=5, deg=10)
    torch.testing.assert_close(cut, tensor(3, 4, 0, 0, 0, 10))
    free = tensor(1, -2, 2, 3, 0, 0)
    torch.testing.assert_close(limited(free, 5, 10), free)
    mm, deg = away(tensor(3, 0, 4, 0, -25, 0))
    assert mm.item() == pytest.approx(5) and deg.item() == pytest.approx(25)


def test_probe_moves_in_its_own_frame():
    probe = probes(tensor(0, 0, 0, 0, 0, 90))
    probe.move(tensor(4, 0, 0, 0, 0, 0))  # its x is the plane's y
    torch.testing.assert_close(probe.pose, tensor(0, 4, 0, 0, 0, 90))
    probe.move(tensor(0, 0, 0, 0, 0, -30))
    torch.testing.assert_close(probe.pose, tensor(0, 4, 0, 0, 0, 80))
    for _ in range(40):
        probe.move(tensor(0, 5, 0, 0, 0, 0))
    assert probe.pose.abs().max() <= 90, "the workspace ends"


def test_heart_beats_and_breath_moves():
    config = NavigationConfig(seconds=0.25, beats_per_minute=60, breath_seconds=2, breath_mm=3)
    probe = probes(torch.zeros(1, 6).double(), config)
    before, depth = probe.phase.item(), []
    probe.move(tensor(*[0.0] * 6))
    assert (probe.phase.item() - before) % 1 == pytest.approx(0.25)
    for _ in range(16):
        depth.append((probe.seen() - probe.pose)[0, :3].norm().item())
        probe.move(tensor(*[0.0] * 6))
    assert max(depth) <= 3 + 1e-9 and max(depth) > 2 and min(depth) < 0.5


def test_contact_is_lost_off_the_skin():
    there = probes(torch.zeros(1, 6).double()).contact().item()
    lifted = probes(tensor(0, 0, -20, 0, 0, 0)).contact().item()
    assert there == 1 and lifted == 0


def test_starts_lie_where_told():
    config = NavigationConfig(nearest_mm=10, nearest_deg=10)
    for k in range(50):
        mm, deg = away(torch.from_numpy(draw_start(np.random.default_rng(k), config)))
        assert mm <= 30 and deg <= 30 and (mm > 10 or deg > 10)
    with pytest.raises(ValueError, match="no start"):
        draw_start(np.random.default_rng(0), NavigationConfig(spread=1e-3))


def test_environment_passes_gymnasiums_checker():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized.*")  # mm, degrees
        env = gymnasium.make("dreamer/Probe-v0", size=32, render_mode="rgb_array")
        check_env(env.unwrapped)
    env.close()


def test_environment_ends_at_the_plane_and_in_time():
    env = ProbeEnv(PEOPLE, size=32, config=STEADY)
    image, info = env.reset(seed=1, options={"patient": 1, "pose": [8, 0, 0, 0, 0, 0]})
    assert image.shape == (1, 32, 32) and image.any() and info["patient"] == 1
    _, reward, done, cut, info = env.step(np.array([-4, 0, 0, 0, 0, 0]))
    assert done and not cut and reward == pytest.approx(4 / 5)
    assert info["translation"] == pytest.approx(4) and info["rotation"] == pytest.approx(0)
    env.reset(seed=1, options={"pose": [8, 0, 0, 0, 0, 0]})
    ends = [env.step(np.zeros(6))[3] for _ in range(STEADY.steps)]
    assert ends == [False] * (STEADY.steps - 1) + [True]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ProbeEnv(target="none"), "target 'none'"),
        (lambda: ProbeEnv([]), "people"),
        (lambda: ProbeEnv(size=32).reset(options={"pos": 1}), "unknown pos"),
        (lambda: ProbeEnv(size=32).reset(options={"patient": 9}), "patient"),
        (lambda: ProbeEnv(size=32).reset(options={"pose": [0, 0]}), "pose"),
        (lambda: probes(torch.full((1, 6), torch.nan)), "finite"),
        (lambda: probes(torch.zeros(1, 6)).move(torch.full((1, 6), torch.inf)), "finite"),
        (lambda: Follow(None, STEADY, 0), "window"),
        (lambda: Plan(CardiacDreamer(TINY.model_copy(update={"token_type": "none"})), STEADY),
         "no world model"),
        (lambda: arrivals.policy("drift", None, STEADY), "drift"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_configuration_refuses_nonsense():
    for wrong in ({"step": 3}, {"limit_mm": 0}, {"nearest_mm": 40}):
        with pytest.raises(ValidationError):
            NavigationConfig(**wrong)
    with pytest.raises(gymnasium.error.ResetNeeded):
        ProbeEnv(size=32).step(np.zeros(6))


def test_following_a_true_word_arrives_and_an_average_halves_a_slip():
    pose = tensor(8, -6, 2, 20, 0, -15)
    follow = Follow(Sees(pose), STEADY)
    follow.reset([])
    asked = follow(torch.zeros(1, 1, 32, 32), None)
    torch.testing.assert_close(asked, limited(poses.remaining(pose), 5, 10))
    model = Sees(tensor(2, 0, 0, 0, 0, 0))
    average = Follow(model, STEADY, window=2)
    average.reset([])
    moved = average(torch.zeros(1, 1, 32, 32), None)  # 2 mm back: now it should be at zero
    torch.testing.assert_close(moved, tensor(-2, 0, 0, 0, 0, 0))
    average(torch.zeros(1, 1, 32, 32), None)  # says 2 again, the first word carried on says 0
    torch.testing.assert_close(average.estimate, tensor(1, 0, 0, 0, 0, 0))


def test_planning_with_a_true_world_model_nears_the_plane():
    pose = torch.cat((tensor(3, -2, 1, 6, 0, -5), tensor(-3, 1, 0, 0, 4, 5)))
    plan = Plan(Sees(pose), STEADY, candidates=64, elites=8, rounds=4)
    plan.reset([])
    asked = plan(torch.zeros(2, 1, 32, 32), None)
    mm, deg = away(poses.compose(pose, asked))
    assert (mm < 1.5).all() and (deg < 4).all()
    plan.reset([])
    alone = Plan(Sees(pose[:1]), STEADY, candidates=64, elites=8, rounds=4)
    alone.reset([])
    torch.testing.assert_close(alone(torch.zeros(1, 1, 32, 32), None), asked[:1])


def test_oracle_arrives_controls_do_not():
    config = NavigationConfig(breath_mm=1)
    model = CardiacDreamer(TINY)
    dealt = arrivals.starts(PEOPLE, 24, config, 0)
    names = ("oracle", "stay", "random")
    policies = {name: arrivals.policy(name, model, config) for name in names}
    table = arrivals.search(policies, dealt, config, size=32)
    scores = arrivals.score(table.assign(run="r", variant="v", target="a4c"))
    found = dict(list(scores.groupby("policy")))
    assert found["oracle"]["arrived_5"].mean() == 1
    assert found["stay"]["arrived_10"].mean() <= 0.1 and found["random"]["arrived_10"].mean() <= 0.1
    assert (found["oracle"]["detour"] >= 0.5).all()


def test_scores_by_hand():
    rows = [(0, 12.0, 0.0), (1, 6.0, 0.0), (2, 6.0, 8.0), (3, 3.0, 8.0)]
    table = pd.DataFrame([
        {"patient": "a", "start": 0, "step": s, "x": x, "y": 0.0, "z": 0.0, "roll": r, "pitch": 0.0,
         "yaw": 0.0, "translation": x, "rotation": r, "contact": 1.0 if s < 3 else 0.2}
        for s, x, r in rows
    ]).assign(run="r", variant="patch", policy="follow", target="a4c")  # fmt: skip
    (one,) = arrivals.score(table).to_dict("records")
    assert (one["arrived_5"], one["arrived_10"], one["passed_10"]) == (0, 1, 1)
    assert one["path_mm"] == pytest.approx(9) and one["path_deg"] == pytest.approx(8, abs=1e-4)
    assert one["detour"] == pytest.approx(0.75) and one["lost"] == 0.25


@pytest.fixture
def run(tmp_path):
    """A run's folder with an untrained model."""
    folder = tmp_path / "runs" / "patch-seed0"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    from dreamer.runs import TrainingConfig

    config = {"model": TINY.model_dump(mode="json"),
              "training": TrainingConfig().model_dump(mode="json"), "data": {}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    split = {"kind": "patient", "train": ["patient_0001"], "val": [], "test": ["patient_0003"]}
    (folder / "split.json").write_text(json.dumps(split))
    save_file(CardiacDreamer(TINY).state_dict(), folder / "model.safetensors")
    return folder


def test_searches_are_kept_repeatable_and_independent_of_their_parts(run, tmp_path):
    config = NavigationConfig(steps=2)
    given = ([run], PEOPLE, "a4c", 3, config, ["follow", "plan", "stay"])
    first = arrivals.navigate(*given)
    files = {f: f.stat().st_mtime_ns for f in (run / "navigation").iterdir()}
    assert len(files) == 3 and set(first["policy"]) == {"follow", "plan", "stay"}
    again = arrivals.navigate(*given)
    pd.testing.assert_frame_equal(first, again)
    assert files == {f: f.stat().st_mtime_ns for f in (run / "navigation").iterdir()}
    parted = arrivals.navigate(*given, part=2)
    keys = ["policy", "patient", "start", "step"]
    one, two = (t.sort_values(keys, ignore_index=True) for t in (first, parted))
    pd.testing.assert_frame_equal(one, two, atol=1e-3)
    next(iter(files)).unlink()
    pd.testing.assert_frame_equal(first, arrivals.navigate(*given))
    with pytest.raises(ValueError, match="drift is unknown"):
        arrivals.navigate(*given[:5], ["drift"])


def test_guidance_is_said_as_a_hand_moves():
    said = say(tensor(6.2, -3, 0.4, 0, 5, -8)[0])
    assert (
        said == "slide 6 mm right, slide 3 mm away from you, rock 5° right, rotate 8° anticlockwise"
    )
    assert say(torch.zeros(6)).startswith("hold")
    # Rocked to the right, the middle beam points to the picture's right; fanned, out of it.
    beam = poses.to_matrix(torch.tensor([[0, 0, 0, 0, 5, 0], [0, 0, 0, 5, 0, 0.0]]))[:, :3, 2]
    assert beam[0, 0] > 0 and beam[1, 1] < 0


def test_explorer_computes_only_what_changed(run, tmp_path):
    explorer = Explorer([str(run), "nowhere"], str(tmp_path), people=2)
    assert explorer.missing == ["nowhere"] and list(explorer.models) == ["patch"]
    drawn, asked = explorer._frame.cache_info().misses, explorer._answer.cache_info().misses
    explorer.shown.value = "attribution"
    explorer.shown.value = "none"
    assert explorer._frame.cache_info().misses == drawn
    assert explorer._answer.cache_info().misses == asked
    before = explorer.picture.value
    explorer.sliders["yaw"].value += 5
    assert explorer._frame.cache_info().misses == drawn + 1 and explorer.picture.value != before
    explorer.go()
    assert re.match(r"stopped after \d+ steps; error: [\d.]+ mm", explorer.report.value)
    assert not explorer.load("nowhere") and "not loaded" in explorer.report.value
    explorer.plane.value = "plax"
    assert explorer.target == "plax" and "apical four-chamber plane alone" in explorer.text.value
    blind = Explorer([], str(tmp_path))
    blind.go()
    assert "nobody guides" in blind.report.value


def test_people_are_unseen(run, tmp_path):
    data = tmp_path / "phantom"
    data.mkdir()
    fresh, target = arrivals.unseen_people([run], data, 2)
    assert [p.seed for p in fresh] == [(1_000_000, 0), (1_000_000, 1)] and target == "a4c"
    (data / "phantom.json").write_text('{"arguments": {"seed": 4, "target": "plax"}}')
    people, target = arrivals.unseen_people([run], data, 5)
    assert people == [Person("patient_0003", (4, 3))] and target == "plax"


def test_comparison_says_who_arrives():
    rows = [
        {"variant": v, "policy": p, "run": run, "patient": f"p{k}",
         "arrived_10": float(good or k == 0)}
        for v, p, good in (("patch", "plan", True), ("patch", "follow", False))
        for run in ("a", "b") for k in range(8)
    ]  # fmt: skip
    found = arrivals.compare(pd.DataFrame(rows), ("patch", "follow"), ("patch", "plan"))
    assert found["verdict"] == "second better" and found["estimate"] == pytest.approx(7 / 8)
    assert 0 < found["low"] <= found["estimate"] <= found["high"] <= 1
