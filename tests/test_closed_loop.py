"""Closed loop: motion by hand, Gymnasium's own checker, policies that must and must not arrive."""

import json
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
from dreamer.study import closed_loop
from dreamer.study.closed_loop import (
    Follow,
    NavigationConfig,
    Person,
    Plan,
    ProbeEnv,
    Probes,
    away,
    draw_start,
    draw_starts,
    limited,
    navigate,
    policy,
    score,
    search,
    unseen_patients,
)

STEADY = NavigationConfig(steps=12, hand_mm=0, hand_deg=0, breath_mm=0)
PEOPLE = [Person("a", (5, 0)), Person("b", (5, 1))]
TINY = ModelConfig(
    backbone="compact", image_size=32, channels=16, width=4, d_model=16, num_heads=2, num_layers=1,
    guidance=(32, 16),
)  # fmt: skip
FRAME = np.zeros((1, 1, 32, 32), np.uint8)


def tensor(*values):
    return torch.tensor([values], dtype=torch.float64)


def env_at(pose, config=STEADY, seed=0, **options):
    env = ProbeEnv(people=PEOPLE, size=32, config=config)
    env.reset(seed=seed, options={"pose": pose, **options})
    return env


class Exact:
    """A model that predicts a given pose, whatever the frame, and imagines motions exactly."""

    def __init__(self, pose):
        self.pose = pose
        self.world, self.config = True, TINY

    def encode(self, image):
        return self.pose

    def imagine(self, features, action):
        return type("Dream", (), {"pose": poses.compose(features.double(), action.double())})


# The environment


def test_limits_of_a_hand_by_hand():
    cut = limited(tensor(30, 40, 0, 0, 0, 90), mm=5, deg=10)
    torch.testing.assert_close(cut, tensor(3, 4, 0, 0, 0, 10))
    free = tensor(1, -2, 2, 3, 0, 0)
    torch.testing.assert_close(limited(free, 5, 10), free)
    torch.testing.assert_close(limited(tensor(*[0.0] * 6), 5, 10), tensor(*[0.0] * 6))
    mm, deg = away(tensor(3, 0, 4, 0, -25, 0))
    assert mm.item() == pytest.approx(5) and deg.item() == pytest.approx(25)


def test_probe_moves_in_its_own_frame():
    env = env_at([0, 0, 0, 0, 0, 90])
    *_, info = env.step([4, 0, 0, 0, 0, 0])  # its x is the plane's y
    np.testing.assert_allclose(info["pose"], [0, 4, 0, 0, 0, 90], atol=1e-9)
    *_, info = env.step([0, 0, 0, 0, 0, -30])  # the hand turns by 10 degrees at most
    np.testing.assert_allclose(info["pose"], [0, 4, 0, 0, 0, 80], atol=1e-9)
    for _ in range(20):
        *_, info = env.step([5, 0, 0, 0, 0, 0])
    assert info["pose"][1] == 60, "the workspace ends"


def test_heart_beats_and_breathing_shifts_the_patient():
    config = NavigationConfig(seconds=0.25, beats_per_minute=60, breath_seconds=2, breath_mm=3)
    env = ProbeEnv(people=PEOPLE, size=32, config=config)
    _, first = env.reset(seed=0)
    depth = []
    for _ in range(16):
        *_, info = env.step(np.zeros(6))
        depth.append(np.linalg.norm(info["seen"][:3] - info["pose"][:3]))
    assert info["phase"] == pytest.approx(first["phase"])  # sixteen quarters of a beat
    assert 2 < max(depth) <= 3 + 1e-9 and min(depth) < 0.5


def test_hand_errs_by_its_standard_deviation():
    config = NavigationConfig(steps=1, hand_mm=0.4, hand_deg=1.0)
    probes = Probes(300, PEOPLE, size=32, config=config, black=[True] * 300)
    frames, _ = probes.reset(seed=0, options={"patient": [0] * 300, "pose": np.zeros((300, 6))})
    *_, infos = probes.step(np.zeros((300, 6)))
    assert not frames.any()
    np.testing.assert_allclose(infos["pose"].std(0), [0.4] * 3 + [1.0] * 3, rtol=0.15)
    np.testing.assert_allclose(infos["pose"].mean(0), 0, atol=0.2)


def test_contact_is_lost_off_the_skin():
    env = ProbeEnv(people=PEOPLE, size=32, config=STEADY)
    assert env.reset(options={"pose": [0] * 6})[1]["contact"] == 1
    assert env.reset(options={"pose": [0, 0, -20, 0, 0, 0]})[1]["contact"] == 0


def test_starts_lie_between_nearest_and_farthest():
    config = NavigationConfig(nearest_mm=10, nearest_deg=10)
    starts = draw_starts(PEOPLE, 51, config)
    assert [start.person.name for start in starts] == ["a"] * 26 + ["b"] * 25
    for start in starts:
        mm, deg = away(torch.from_numpy(start.pose))
        assert mm <= 30 and deg <= 30 and (mm > 10 or deg > 10)
    with pytest.raises(ValueError, match="no start"):
        draw_start(np.random.default_rng(0), NavigationConfig(spread=1e-3))


@pytest.mark.parametrize("name", ["dreamer/Probe-v0", "dreamer.study.closed_loop:dreamer/Probe-v0"])
def test_registered_environment_passes_gymnasiums_checker(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized.*")  # mm, degrees
        env = gymnasium.make(name, size=32, config={"steps": 3}, render_mode="rgb_array")
        check_env(env.unwrapped)
    env.close()


def test_episode_and_reward_by_hand():
    env = ProbeEnv(people=PEOPLE, size=32, config=STEADY)
    frame, info = env.reset(seed=1, options={"patient": 1, "pose": [8, 0, 0, 0, 0, 0]})
    assert frame.shape == (1, 32, 32) and frame.any() and info["patient"] == 1
    _, reward, terminated, truncated, info = env.step([-4, 0, 0, 0, 0, 0])
    assert reward == pytest.approx(4 / 5) and info["translation"] == pytest.approx(4)
    assert not terminated and not truncated, "nothing shows that the plane is reached"
    ends = [env.step(np.zeros(6))[3] for _ in range(STEADY.steps - 1)]
    assert ends == [False] * (STEADY.steps - 2) + [True]


def test_probes_together_are_single_probes():
    starts = draw_starts(PEOPLE, 4, NavigationConfig())
    together = gymnasium.make_vec("dreamer/Probe-v0", num_envs=4, people=PEOPLE, size=32)
    options = {"patient": [0, 0, 1, 1], "pose": [start.pose for start in starts]}
    together.reset(seed=[start.seed for start in starts], options=options)
    frames, rewards, _, _, infos = together.step(np.full((4, 6), 2.0))
    for k, start in enumerate(starts):
        env = env_at(start.pose, NavigationConfig(), start.seed, patient=k // 2)
        frame, reward, _, _, info = env.step(np.full(6, 2.0))
        np.testing.assert_array_equal(info["pose"], infos["pose"][k])
        assert info["phase"] == infos["phase"][k] and reward == pytest.approx(rewards[k])
        assert np.abs(frame.astype(int) - frames[k]).max() <= 1
    drawn = [together.reset(seed=3)[1]["pose"] for _ in range(2)]
    np.testing.assert_array_equal(*drawn)
    assert len(np.unique(drawn[0][:, 0])) == 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ProbeEnv(target="none"), "target 'none'"),
        (lambda: ProbeEnv(people=[]), "people"),
        (lambda: ProbeEnv(size=32).reset(options={"pos": 1}), "unknown pos"),
        (lambda: ProbeEnv(size=32).reset(options={"patient": 9}), "patient"),
        (lambda: ProbeEnv(size=32).reset(options={"pose": [0, 0]}), "pose"),
        (lambda: env_at([np.nan] * 6), "finite"),
        (lambda: env_at([0.0] * 6).step([np.inf] * 6), "finite"),
        (lambda: Follow(None, STEADY, 0), "window"),
        (lambda: Plan(CardiacDreamer(TINY.model_copy(update={"token_type": "none"})), STEADY),
         "no world model"),
        (lambda: policy("drift", None, STEADY), "drift"),
        (lambda: draw_starts(PEOPLE, 0, STEADY), "starts"),
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


# Policies


def test_exact_guidance_is_followed_and_an_average_halves_an_error():
    pose = tensor(8, -6, 2, 20, 0, -15)
    motion = Follow(Exact(pose), STEADY)(FRAME)
    torch.testing.assert_close(motion, limited(poses.remaining(pose), 5, 10))
    average = Follow(Exact(tensor(2, 0, 0, 0, 0, 0)), STEADY, window=2)
    torch.testing.assert_close(average(FRAME), tensor(-2, 0, 0, 0, 0, 0))
    average(FRAME)  # predicts 2 again, where the first prediction and the motion give 0
    torch.testing.assert_close(average.estimate, tensor(1, 0, 0, 0, 0, 0))


def test_planning_with_an_exact_world_model_nears_the_plane():
    pose = torch.cat((tensor(3, -2, 1, 6, 0, -5), tensor(-3, 1, 0, 0, 4, 5)))
    motion = Plan(Exact(pose), STEADY, candidates=64, elites=8, rounds=4)(FRAME)
    mm, deg = away(poses.compose(pose, motion))
    assert (mm < 1.5).all() and (deg < 4).all()
    single = Plan(Exact(pose[:1]), STEADY, candidates=64, elites=8, rounds=4)(FRAME)
    torch.testing.assert_close(single, motion[:1])


def test_oracle_reaches_the_plane_and_controls_do_not():
    config = NavigationConfig(breath_mm=1)
    model = CardiacDreamer(TINY)
    model.pose_mean += torch.tensor([0, 8, 0, 12.0, 0, 0])
    policies = {name: policy(name, model, config) for name in closed_loop.CONTROLS}
    table = search(policies, draw_starts(PEOPLE, 24, config), config, size=32)
    scores = score(table.assign(run="r", seed=0, variant="control", target="a4c"))
    reached = scores.groupby("policy")["reached_10"].mean()
    assert scores[scores["policy"] == "oracle"]["reached_5"].all()
    assert (reached[["stay", "random", "mean pose"]] <= 0.1).all()
    means = closed_loop.cells(scores, "control", "oracle")
    assert means.to_dict() == {"a": 1.0, "b": 1.0}


def test_scores_by_hand():
    rows = [(0, 12.0, 0.0), (1, 6.0, 0.0), (2, 3.0, 0.0), (3, 3.0, 12.0)]
    table = pd.DataFrame([
        {"patient": "a", "start": 0, "step": s, "x": x, "y": 0.0, "z": 0.0, "roll": r, "pitch": 0.0,
         "yaw": 0.0, "translation": x, "rotation": r, "contact": 1.0 if s < 3 else 0.2}
        for s, x, r in rows
    ]).assign(run="r", seed=0, variant="patch", policy="follow", target="a4c")  # fmt: skip
    (one,) = score(table).to_dict("records")
    assert (one["reached_5"], one["reached_10"]) == (0, 0)
    assert (one["passed_5"], one["passed_10"], one["steps_10"]) == (1, 1, 1)
    assert one["path_mm"] == pytest.approx(9) and one["path_deg"] == pytest.approx(12, abs=1e-4)
    assert (one["start_mm"], one["final_deg"], one["lost"]) == (12, 12, 0.25)


# Kept searches


@pytest.fixture
def run(untrained, tmp_path):
    return untrained(tmp_path / "patch-seed0", TINY)


def test_searches_are_kept_repeatable_and_independent_of_their_parts(run):
    config = NavigationConfig(steps=2)
    given = ([run], draw_starts(PEOPLE, 3, config), "a4c", config, ["follow", "plan", "stay"])
    first = navigate(*given)
    files = {f: f.stat().st_mtime_ns for f in (run / "navigation").iterdir()}
    assert len(files) == 3 and set(first["policy"]) == {"follow", "plan", "stay"}
    pd.testing.assert_frame_equal(first, navigate(*given))
    assert files == {f: f.stat().st_mtime_ns for f in (run / "navigation").iterdir()}
    parted = navigate(*given, part=2)
    keys = ["policy", "patient", "start", "step"]
    one, two = (t.sort_values(keys, ignore_index=True) for t in (first, parted))
    pd.testing.assert_frame_equal(one, two, atol=1e-3)
    next(iter(files)).unlink()
    pd.testing.assert_frame_equal(first, navigate(*given))
    changed = config.model_copy(update={"hand_mm": 1.0})
    assert not navigate(*given[:3], changed, ["stay"])["x"].equals(first.query("policy == 'stay'"))
    with pytest.raises(ValueError, match="drift is unknown"):
        navigate(*given[:4], ["drift"])


def test_a_kept_search_is_seen_again_in_a_single_environment(run):
    from dreamer.runs import load_run

    config = NavigationConfig(steps=3)
    [start] = draw_starts(PEOPLE[:1], 1, config)
    table = navigate([run], [start], "a4c", config, ["follow"])
    env = ProbeEnv(people=PEOPLE, size=32, config=config)
    frame, info = env.reset(seed=start.seed, options={"patient": 0, "pose": start.pose})
    follow, truncated = policy("follow", load_run(run), config), False
    while not truncated:
        motion = follow(frame[None])[0]
        frame, _, _, truncated, info = env.step(motion)
    last = table.iloc[-1][list(poses.AXES)].to_numpy(float)
    np.testing.assert_allclose(info["pose"], last, atol=1e-3)


def test_patients_are_unseen(run, tmp_path):
    data = tmp_path / "phantom"
    data.mkdir()
    fresh, target = unseen_patients([run], data, 2)
    assert [p.seed for p in fresh] == [(1_000_000, 0), (1_000_000, 1)] and target == "a4c"
    (data / "phantom.json").write_text('{"arguments": {"seed": 4, "target": "plax"}}')
    people, target = unseen_patients([run], data, 5)
    assert people == [Person("patient_0003", (4, 3))] and target == "plax"
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps(split | {"val": ["patient_0003"]}))
    with pytest.raises(ValueError, match="no patient"):
        unseen_patients([run], data, 5)
