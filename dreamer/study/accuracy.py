"""Pose errors on unseen patients: predictions per frame, their errors, and the controls.

Accuracy means the *single-frame prediction*: the pose that the model imagines under the zero
action. Millimetres and degrees stay apart. A mean error weighs patients equally, whatever their
number of frames; intervals are those of `dreamer.study.stats`.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamer import poses
from dreamer.data import Split, Transitions, mean_pose
from dreamer.model import CardiacDreamer
from dreamer.study import stats
from dreamer.study.results import BASELINE

TRUE = [f"true_{axis}" for axis in poses.AXES]
PREDICTED = [f"predicted_{axis}" for axis in poses.AXES]
UNITS = dict(zip(poses.AXES, poses.UNITS, strict=True)) | {"translation": "mm", "rotation": "deg"}
NEAR = {"translation": (5.0, 10.0), "rotation": (15.0, 30.0)}  # limits of three distances, mm, deg


def predict(
    model: CardiacDreamer, data: Transitions, indices: NDArray[np.int64], split: Split
) -> pd.DataFrame:
    """Single-frame predictions for the distinct frames of the transitions `indices`.

    One row per frame: `patient`, `row` in `data.frames`, true_* and predicted_* poses in mm and
    degrees. With a split by blocks of one scan, `patient` is a block of time.
    """
    table = _frames(data, indices, split)
    device = model.pose_mean.device
    predicted = []
    with torch.no_grad():
        for rows in _chunks(table["row"].to_numpy()):
            still = torch.zeros(len(rows), 6, device=device)
            predicted.append(model(data.images(rows).to(device), still).pose.cpu())
    table[PREDICTED] = torch.cat(predicted).numpy()
    return table


def predict_mean_pose(data: Transitions, indices: NDArray[np.int64], split: Split) -> pd.DataFrame:
    """The mean-pose baseline, a table like that of `predict`: the training part's mean pose."""
    table = _frames(data, indices, split)
    table[PREDICTED] = mean_pose(data.singles(split.train)[1]).numpy()
    return table


def errors(predictions: pd.DataFrame) -> pd.DataFrame:
    """Absolute errors per frame: the six axes, `translation` (mm), `rotation` (geodesic, deg).

    `patient` is that of the predictions.
    """
    predicted, true = (torch.from_numpy(predictions[c].to_numpy()) for c in (PREDICTED, TRUE))
    error = poses.errors(predicted, true)
    table = pd.DataFrame(error.axes.numpy(), columns=list(poses.AXES))
    table.insert(0, "patient", predictions["patient"].to_numpy())
    return table.assign(translation=error.translation.numpy(), rotation=error.rotation.numpy())


def accuracy(predictions: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean absolute errors of several predictors on the same frames, one row per measure.

    `predictions` maps a name (patch, channel, none, mean pose) to a table of `predict`. Columns:
    predictor, measure, unit, error, low, high (95%, over patients), ratio, ratio_low, ratio_high
    (to the mean-pose baseline, where it is given), frames, patients. Raises ValueError where the
    frames differ.
    """
    reference = next(iter(predictions.values()))
    means = {}
    for name, table in predictions.items():
        if not np.array_equal(table[["row", *TRUE]], reference[["row", *TRUE]]):
            raise ValueError(f"{name}: the predictions are not of the first table's frames")
        means[name] = errors(table).groupby("patient").mean()
    rows = []
    for name, table in means.items():
        for measure, unit in UNITS.items():
            found = stats.interval(table[measure])
            row = {"predictor": name, "measure": measure, "unit": unit}
            row |= {"error": found.estimate, "low": found.low, "high": found.high}
            if BASELINE in means:
                ratio = stats.ratio(table[measure], means[BASELINE][measure])
                row |= {"ratio": ratio.estimate, "ratio_low": ratio.low, "ratio_high": ratio.high}
            rows.append(row)
    return pd.DataFrame(rows).assign(frames=len(reference), patients=len(means[name]))


def measure(
    model: CardiacDreamer,
    train_data: Transitions,
    split: Split,
    test_data: Transitions | None = None,
) -> pd.DataFrame:
    """Single-frame errors of one run by patient: measure, condition, patient, value.

    Of the six axes, translation_mm and rotation_deg over all frames, and of the last two by
    distance from the target ("over 10 mm"); beside each the mean-pose baseline's ("mean pose, over
    10 mm"). `test_data`: transitions of unseen patients to test on, all of them, in place of the
    test part of `train_data`.
    """
    data, indices = tested(train_data, split, test_data)
    frames = predict(model, data, indices, split)
    mean = dict(zip(PREDICTED, mean_pose(train_data.singles(split.train)[1]).tolist(), strict=True))
    true = torch.from_numpy(frames[TRUE].to_numpy())
    away = dict(zip(NEAR, poses.errors(true, torch.zeros_like(true))[1:], strict=True))
    tables = []
    for name, table in (("", frames), (BASELINE, frames.assign(**mean))):
        error = errors(table).melt("patient", var_name="kind")
        error["measure"] = error["kind"] + "_" + error["kind"].map(UNITS)
        tables.append(error.assign(condition=name))
        for kind, (low, high) in NEAR.items():
            words = np.array([f"to {low:g}", f"{low:g} to {high:g}", f"over {high:g}"])
            place = pd.Series(words[np.digitize(away[kind], (low, high))]) + f" {UNITS[kind]}"
            place = (f"{name}, " + place).str.removeprefix(", ").to_numpy()
            tables.append(error[error["kind"] == kind].assign(condition=place))
    keys = ["measure", "condition", "patient"]
    return pd.concat(tables).groupby(keys, sort=False)["value"].mean().reset_index()


def predict_action_only(
    data: Transitions, split: Split, motion: str | None = None, steps: int = 400
) -> pd.DataFrame:
    """The action-only control: pose 1 predicted by a small network that sees no image.

    Trained on the training part, tested on the test part; with `motion`, on transitions of that
    kind alone. One row per transition, columns as in `predict`. Errors below the mean-pose
    baseline's (`predict_mean_start`) show that the action leaks the pose.
    """
    train, test = _of_kind(data, split, motion)
    mean = mean_pose(data.pose1[train])
    offset = _difference(data.pose1[train], mean)
    pose_scale = offset.square().mean(0).sqrt().clamp_min(1e-6)
    action_scale = data.action[train].std(0).clamp_min(1e-6)
    action, target = data.action[train] / action_scale, offset / pose_scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.GELU(), torch.nn.Linear(64, 6))
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1)
        for _ in range(steps):
            pick = torch.randint(len(train), (256,))
            loss = torch.nn.functional.smooth_l1_loss(net(action[pick]), target[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        predicted = net(data.action[test] / action_scale) * pose_scale + mean
    return _starts(data, test, predicted)


def predict_mean_start(data: Transitions, split: Split, motion: str | None = None) -> pd.DataFrame:
    """The mean-pose baseline for pose 1, on the rows of `predict_action_only`."""
    train, test = _of_kind(data, split, motion)
    return _starts(data, test, mean_pose(data.pose1[train]))


def patients(
    data: Transitions, chosen: NDArray[np.int64], indices: NDArray[np.int64], split: Split
) -> NDArray[np.str_]:
    """Patients of the `chosen` of the transitions `indices`, or the blocks of time of one patient.

    Blocks are separated by gaps in `indices`.
    """
    patient = data.patient[chosen]
    if split.kind != "blocks":
        return patient
    starts = indices[np.diff(indices, prepend=indices[0] - 2) > 1]
    block = np.searchsorted(starts, chosen, side="right")
    return np.array([f"{p} block {b}" for p, b in zip(patient, block, strict=True)])


def tested(
    train_data: Transitions, split: Split, test_data: Transitions | None
) -> tuple[Transitions, NDArray[np.int64]]:
    """The data to test on and their transitions: all of `test_data`, or the split's test part."""
    if test_data is None:
        return train_data, split.test
    return test_data, np.arange(len(test_data))


def _frames(data: Transitions, indices: NDArray[np.int64], split: Split) -> pd.DataFrame:
    rows, pose, origin = data.singles(indices)
    table = pd.DataFrame({"patient": patients(data, origin, indices, split), "row": rows})
    table[TRUE] = pose.numpy()
    return table


def _starts(data: Transitions, test: NDArray[np.int64], predicted: Tensor) -> pd.DataFrame:
    table = pd.DataFrame({"patient": data.patient[test], "row": data.rows[test, 0]})
    table[TRUE], table[PREDICTED] = data.pose1[test].numpy(), predicted.numpy()
    return table


def _of_kind(
    data: Transitions, split: Split, motion: str | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    kept = np.full(len(data), True) if motion is None else data.motion == motion
    return split.train[kept[split.train]], split.test[kept[split.test]]


def _difference(pose: Tensor, origin: Tensor) -> Tensor:
    """Element-wise differences [N, 6] of poses, angles the short way round."""
    difference = pose - origin
    return torch.cat((difference[:, :3], poses.wrap(difference[:, 3:])), dim=1)


def _chunks(indices: NDArray[np.int64], size: int = 64) -> list[NDArray[np.int64]]:
    return np.split(indices, range(size, len(indices), size))
