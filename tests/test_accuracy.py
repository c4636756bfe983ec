"""Predictions, their errors and the controls: by hand, and on small scans."""

import numpy as np
import pandas as pd
import pytest
import torch
from scans import TINY, write_scan
from scipy import stats as scipy_stats

from dreamer.data import Transitions, split_by_blocks, split_by_patient
from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.poses import AXES
from dreamer.study import imagination
from dreamer.study.accuracy import (
    PREDICTED,
    TRUE,
    accuracy,
    errors,
    measure,
    predict,
    predict_action_only,
    predict_mean_pose,
    predict_mean_start,
)


def table(predicted, true=(0, 0, 0, 0, 0, 0), patients=("a", "b")):
    frame = pd.DataFrame({"patient": patients, "row": range(len(patients))})
    frame[TRUE] = np.broadcast_to(np.array(true, dtype=float), (len(patients), 6))
    frame[PREDICTED] = np.broadcast_to(np.array(predicted, dtype=float), (len(patients), 6))
    return frame


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    for number in range(6):
        write_scan(tmp_path / "scans", f"p{number}", seed=number, count=20)
    return Transitions(tmp_path / "scans")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CardiacDreamer(ModelConfig(**TINY)).eval()


def test_errors_by_hand():
    error = errors(table([3, 4, 0, 0, 0, 20])).iloc[1]
    assert (error.patient, error.x, error.y, error.yaw) == ("b", 3, 4, pytest.approx(20))
    assert error.translation == pytest.approx(5) and error.rotation == pytest.approx(20)


def test_accuracy_by_hand():
    frames = table([[1] * 6, [3] * 6, [5] * 6, [3] * 6], patients=list("aabc"))
    baseline = table([[4] * 6, [4] * 6, [10] * 6, [6] * 6], patients=list("aabc"))
    cell = accuracy({"patch": frames, "mean pose": baseline}).set_index(["predictor", "measure"])
    found = cell.loc[("patch", "yaw")]
    # A patient's frames are averaged first: 2, 5 and 3, not 1, 3, 5 and 3.
    limits = scipy_stats.ttest_1samp([2.0, 5, 3], 0).confidence_interval()
    assert (found.error, found.low, found.high) == pytest.approx((10 / 3, limits.low, limits.high))
    # The ratios per patient (2/4, 5/10, 3/6) agree, although the errors do not.
    assert (found.ratio, found.ratio_low, found.ratio_high) == pytest.approx((0.5, 0.5, 0.5))
    assert cell.loc[("mean pose", "translation"), "error"] == pytest.approx(20 / 3 * 3**0.5)
    assert (found.unit, found.frames, found.patients) == ("deg", 4, 3)
    assert "ratio" not in accuracy({"patch": frames})


def test_accuracy_refuses_other_frames():
    with pytest.raises(ValueError, match="not of the first table's frames"):
        accuracy({"patch": table([1] * 6), "channel": table([1] * 6, true=[9] * 6)})


def test_mean_pose_is_that_of_the_training_part(data):
    split = split_by_patient(data, 1, 2)
    found = predict_mean_pose(data, split.test, split)
    _, pose, _ = data.singles(split.train)
    np.testing.assert_allclose(found[PREDICTED].iloc[7, :3].astype(float), pose[:, :3].mean(0))
    np.testing.assert_allclose(found[PREDICTED].iloc[7].astype(float), pose.mean(0), rtol=0.05)
    # 2 patients of 20 transitions: 21 distinct frames each.
    assert len(found) == 42 and found["patient"].nunique() == 2


def test_mean_of_angles_is_circular(data):
    split = split_by_patient(data, 1, 2)
    signs = torch.where(torch.arange(len(data)) % 2 == 0, 1.0, -1.0)
    data.pose1[:, 3] = 180 - 10 * signs  # 170 and 190, that is 170 and -170
    data.pose1[signs < 0, 3] -= 360
    start = predict_mean_start(data, split)
    assert start["predicted_roll"].abs().to_numpy() == pytest.approx(180)
    assert errors(start)["roll"].to_numpy() == pytest.approx(10, abs=1e-3)
    # So is what the action-only control learns: noise in the action, so no better than the mean.
    data.action = torch.randn(len(data), 6, generator=torch.Generator().manual_seed(0))
    assert errors(predict_action_only(data, split))["roll"].mean() < 20


def test_predictions_stand_beside_their_frames(data, model):
    split = split_by_patient(data, 1, 2)
    found = predict(model, data, split.test, split)
    row = found.iloc[30]
    image = data.images(np.array([row["row"]]))
    alone = model(image, torch.zeros(1, 6)).pose[0].detach().numpy()
    np.testing.assert_allclose(row[PREDICTED].to_numpy(float), alone, atol=1e-4)
    at = np.flatnonzero(data.rows[:, 0] == row["row"])
    np.testing.assert_allclose(row[TRUE].to_numpy(float), data.pose1[at[0]], atol=1e-5)
    assert row["patient"] == data.patient[at[0]]


def test_blocks_of_one_scan_take_the_place_of_patients(tmp_path, monkeypatch, model):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    write_scan(tmp_path / "one", "only", count=120)
    data = Transitions(tmp_path / "one")
    split = split_by_blocks(data, 12, 2)
    found = predict_mean_pose(data, split.test, split)
    # Two test blocks of ten frames less the gaps on both sides: six frames, five transitions.
    assert found.groupby("patient").size().to_dict() == {"only block 1": 6, "only block 2": 6}
    pairs = imagination.pairs(model, data, split.test, split, each=4)
    names, counts = np.unique(pairs.patient, return_counts=True)
    assert names.tolist() == ["only block 1", "only block 2"] and counts.tolist() == [4, 4]


def test_measures_of_a_run_by_hand(data, model):
    split = split_by_patient(data, 1, 2)
    frames = predict(model, data, split.test, split)
    error = errors(frames)
    cells = measure(model, data, split).set_index(["measure", "condition", "patient"])["value"]
    patient = frames["patient"][0]
    mine = (frames["patient"] == patient).to_numpy()
    assert cells["rotation_deg", "", patient] == pytest.approx(error["rotation"][mine].mean())
    assert cells["x_mm", "", patient] == pytest.approx(error["x"][mine].mean())
    far = frames[[f"true_{axis}" for axis in "xyz"]].pow(2).sum(axis=1).to_numpy() ** 0.5
    near = error["translation"][mine & (far >= 5) & (far < 10)]
    assert cells["translation_mm", "5 to 10 mm", patient] == pytest.approx(near.mean())
    base = errors(predict_mean_pose(data, split.test, split))["translation"][mine].mean()
    assert cells["translation_mm", "mean pose", patient] == pytest.approx(base)
    # On other data all frames are tested; the mean pose stays that of the training part.
    new = measure(model, data, split, data).set_index(["measure", "condition", "patient"])["value"]
    assert new["translation_mm", "mean pose", patient] == pytest.approx(base)
    assert new.index.get_level_values("patient").nunique() == 6


def test_action_alone_predicts_the_pose_only_where_it_leaks(data):
    split, draw = split_by_patient(data, 1, 2), torch.Generator().manual_seed(0)
    data.pose1 = torch.randn(len(data), 6, generator=draw) * 5
    data.action = torch.randn(len(data), 6, generator=draw)
    base = errors(predict_mean_start(data, split))[list(AXES)].to_numpy().mean()
    honest = errors(predict_action_only(data, split))[list(AXES)].to_numpy().mean()
    data.action = -data.pose1  # goal-seeking: the action is the way to the target
    leaked = errors(predict_action_only(data, split))[list(AXES)].to_numpy().mean()
    assert honest > 0.95 * base and leaked < 0.4 * base
