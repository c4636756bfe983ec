import numpy as np
import pandas as pd
import pytest
import torch
from scans import write_scan

from dreamer.data import Transitions, split_by_blocks, split_by_patient
from dreamer.study.accuracy import (
    PREDICTED,
    TRUE,
    accuracy,
    bootstrap,
    by_seed,
    difference,
    epochs_to,
    errors,
    imagination,
    predict,
    predict_action_only,
    predict_constant,
    welch,
)
from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.poses import AXES


def table(predicted, true=(0, 0, 0, 0, 0, 0), groups=("a", "b")):
    frame = pd.DataFrame({"group": groups, "row": range(len(groups))})
    frame[TRUE] = np.broadcast_to(np.array(true, dtype=float), (len(groups), 6))
    frame[PREDICTED] = np.broadcast_to(np.array(predicted, dtype=float), (len(groups), 6))
    return frame


def test_errors_by_hand():
    error = errors(table([3, 4, 0, 0, 0, 20])).iloc[0]
    assert (error.x, error.y, error.yaw) == (3, 4, pytest.approx(20))
    assert error.translation == pytest.approx(5) and error.rotation == pytest.approx(20)


def test_accuracy_by_hand():
    result = accuracy({"patch": table([1] * 6), "constant": table([4] * 6)})
    cell = result.set_index(["predictor", "measure"])
    assert cell.loc[("patch", "yaw"), "error"] == pytest.approx(1)
    assert cell.loc[("patch", "yaw"), "ratio"] == pytest.approx(0.25)
    assert cell.loc[("constant", "translation"), "error"] == pytest.approx(48**0.5)
    assert cell.loc[("patch", "x"), "unit"] == "mm" and (result.frames == 2).all()


def test_accuracy_refuses_other_frames():
    with pytest.raises(ValueError, match="other frames"):
        accuracy({"patch": table([1] * 6), "channel": table([1] * 6, true=[9] * 6)})


def test_bootstrap_covers_the_truth_at_its_rate():
    draw, hits = np.random.default_rng(0), 0
    for trial in range(300):
        patient = draw.normal(size=30)
        values = np.repeat(patient, 8) + draw.normal(size=240) * 0.3
        _, low, high = bootstrap(values, np.repeat(np.arange(30), 8), draws=400, seed=trial)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.98
    # Taking frames for independent would cover far less: the reason for resampling patients.
    _, low, high = bootstrap(values, np.arange(240))
    assert high - low < 0.6 * np.ptp(bootstrap(values, np.repeat(np.arange(30), 8))[1:])


def test_bootstrap_of_one_group_has_no_interval():
    mean, low, high = bootstrap([1.0, 3.0], ["a", "a"])
    assert mean == 2 and np.isnan(low) and np.isnan(high)


@pytest.mark.parametrize(("values", "groups"), [([1.0, np.nan], [0, 1]), ([1.0], [0, 1])])
def test_bootstrap_refuses(values, groups):
    with pytest.raises(ValueError, match="finite values"):
        bootstrap(values, groups)


def seeds(values, groups):
    """Tables of one measure, one a seed, from [seeds, frames]."""
    return [pd.DataFrame({"group": groups, "rotation": row}) for row in values]


@pytest.mark.parametrize(
    ("shift", "noise", "verdict"),
    [
        (0.0, 0.2, "equivalent"),
        (1.0, 0.2, "first better"),
        (-1.0, 0.2, "second better"),
        (0.0, 5.0, "not shown"),
    ],
)
def test_difference_says_what_was_made(shift, noise, verdict):
    draw, groups = np.random.default_rng(1), np.repeat(np.arange(24), 5)
    first = draw.random((3, 120))
    second = first + np.repeat(draw.normal(shift, noise, 24), 5)
    found = difference(seeds(first, groups), seeds(second, groups), "rotation", margin=0.5)
    assert found["verdict"] == verdict and found["low"] < found["estimate"] < found["high"]


def test_seeds_that_disagree_widen_the_interval():
    draw, groups = np.random.default_rng(3), np.arange(40)
    first = draw.random((3, 40))
    calm = difference(seeds(first, groups), seeds(first + 0.3, groups), "rotation", 0.1)
    shifts = np.array([[-2.0], [0.3], [2.6]])
    wild = difference(seeds(first, groups), seeds(first + shifts, groups), "rotation", 0.1)
    assert calm["verdict"] == "first better" and wild["verdict"] == "not shown"


def test_equivalence_is_wrongly_claimed_at_most_at_its_rate():
    draw, claims, groups = np.random.default_rng(2), 0, np.arange(20)
    first = seeds(np.zeros((1, 20)), groups)
    for _ in range(200):  # a true difference on the very margin
        second = seeds(draw.normal(0.5, 0.6, (1, 20)), groups)
        found = difference(first, second, "rotation", margin=0.5, draws=500)
        claims += found["verdict"] == "equivalent"
    assert claims / 200 <= 0.10


def test_folds_of_a_seed_come_together():
    first, second = table([1] * 6, groups=("a", "b")), table([2] * 6, groups=("c", "d"))
    whole = table([3] * 6, groups=("a", "b", "c", "d")).assign(row=[0, 1, 0, 1])
    given = {"f0": second, "f1": first, "whole": whole}
    pooled, other = by_seed(given, {"f0": 0, "f1": 0, "whole": 1})
    assert list(pooled["group"]) == ["a", "b", "c", "d"] and len(other) == 4
    assert list(pooled["predicted_x"]) == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="two of its runs were tested on the same people"):
        by_seed({"f0": first, "f1": first}, {"f0": 0, "f1": 0})
    with pytest.raises(ValueError, match="seed 1 was tested on other frames than seed 0"):
        by_seed({"f0": first, "f1": second}, {"f0": 0, "f1": 1})


def test_difference_refuses():
    one, two = seeds(np.zeros((1, 4)), [0, 0, 1, 1]), seeds(np.zeros((1, 4)), [0, 1, 1, 1])
    with pytest.raises(ValueError, match="different frames"):
        difference(one, two, "rotation", 1.0)
    with pytest.raises(ValueError, match="at least two patients"):
        difference(*[seeds(np.zeros((1, 4)), [0] * 4)] * 2, "rotation", 1.0)


def test_epochs_to_a_level_by_hand():
    metrics = pd.DataFrame({"epoch": [1, 2, 3, 4], "val_loss": [0.9, 0.5, 0.6, 0.2]})
    assert epochs_to(0.5, metrics)["epoch"] == 2 and epochs_to(0.4, metrics)["epoch"] == 4
    with pytest.raises(ValueError, match=r"never falls to 0\.1"):
        epochs_to(0.1, metrics)


def test_welch_by_hand():
    # Means 2 and 4, standard errors 1/sqrt(3) each: 2 +- t(0.975, 4) * sqrt(2/3) = 2 +- 2.267.
    found = welch([1, 2, 3], [3, 4, 5])
    assert found["estimate"] == 2
    assert (found["low"], found["high"]) == (
        pytest.approx(-0.267, abs=1e-3),
        pytest.approx(4.267, abs=1e-3),
    )
    assert np.isnan(welch([1.0], [2.0])["low"])


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    for number in range(6):
        write_scan(tmp_path / "scans", f"p{number}", seed=number, count=20)
    return Transitions(tmp_path / "scans")


def test_constant_predictor_is_the_training_mean(data):
    split = split_by_patient(data, 1, 2)
    found = predict_constant(data, split.test, split)
    _, pose, _ = data.singles(split.train)
    np.testing.assert_allclose(found[PREDICTED].iloc[7], pose.mean(0), rtol=1e-5)
    # 2 patients of 20 transitions: 21 distinct frames each.
    assert len(found) == 42 and found["group"].nunique() == 2


def test_predictions_stand_beside_their_frames(data):
    config = ModelConfig(backbone="compact", image_size=32, channels=8, width=4, d_model=8,
                         num_heads=2, num_layers=1, guidance=(8, 8))  # fmt: skip
    model, split = CardiacDreamer(config).eval(), split_by_patient(data, 1, 2)
    found = predict(model, data, split.test, split)
    row = found.iloc[30]
    image = data.images(np.array([row["row"]])).float() / 255
    alone = model(image, image.new_zeros(1, 6)).pose[0].detach().numpy()
    np.testing.assert_allclose(row[PREDICTED].to_numpy(float), alone, atol=1e-4)
    at = np.flatnonzero(data.rows[:, 0] == row["row"])
    np.testing.assert_allclose(row[TRUE].to_numpy(float), data.pose1[at[0]], atol=1e-5)


def test_blocks_of_one_scan_are_its_groups(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    write_scan(tmp_path / "one", "only", count=120)
    data = Transitions(tmp_path / "one")
    split = split_by_blocks(data, 12, 2)
    found = predict_constant(data, split.test, split)
    # Two test blocks of ten records less the gaps on both sides: six transitions, seven frames.
    assert found.groupby("group").size().to_dict() == {"only block 1": 7, "only block 2": 7}


def test_action_alone_predicts_the_pose_only_where_it_leaks(data):
    split, draw = split_by_patient(data, 1, 2), torch.Generator().manual_seed(0)
    data.pose1 = torch.randn(len(data), 6, generator=draw) * 5
    data.action = torch.randn(len(data), 6, generator=draw)
    base = (data.pose1[split.train].mean(0) - data.pose1[split.test]).abs().mean().item()
    honest = errors(predict_action_only(data, split))[list(AXES)].to_numpy().mean()
    data.action = -data.pose1  # goal-seeking: the action is the way to the target
    leaked = errors(predict_action_only(data, split))[list(AXES)].to_numpy().mean()
    assert honest > 0.95 * base and leaked < 0.4 * base


def test_imagination_and_its_controls(data):
    config = ModelConfig(backbone="compact", image_size=32, channels=8, width=4, d_model=8,
                         num_heads=2, num_layers=1, guidance=(8, 8))  # fmt: skip
    model, test = CardiacDreamer(config).eval(), np.arange(30)
    found = imagination(model, data, test).set_index("way")
    assert len(found) == 4 * 30 and found.loc["composed", "feature"].isna().all()
    batch = data.batch(test)
    with torch.no_grad():
        here = model(batch.image1.float() / 255, batch.action)
        there = model.encode(batch.image2.float() / 255)
    copied = (here.features - there).square().mean((1, 2, 3)) / there.var((0, 2, 3)).mean()
    np.testing.assert_allclose(found.loc["no action", "feature"], copied, rtol=1e-4)
    gap = (here.pose - batch.pose2)[:, :3].norm(dim=1)
    np.testing.assert_allclose(found.loc["imagined", "translation"], gap, rtol=1e-4)
    assert not np.allclose(found.loc["wrong action", "rotation"], found.loc["imagined", "rotation"])
