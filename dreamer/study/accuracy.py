"""How far off: predictions per frame, errors with units and intervals, and their controls.

All accuracy tables report the *single-frame prediction*, the pose imagined under the zero action.
mm and degrees stay apart. Intervals come from resampling whole patients (cluster bootstrap:
Davison & Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8), since frames of
one person are not independent of each other.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dreamer import poses
from dreamer.data import Split, Transitions
from dreamer.model import CardiacDreamer

TRUE = [f"true_{axis}" for axis in poses.AXES]
PREDICTED = [f"predicted_{axis}" for axis in poses.AXES]
UNITS = dict(zip(poses.AXES, poses.UNITS, strict=True)) | {"translation": "mm", "rotation": "deg"}


def _frames(data: Transitions, indices: NDArray[np.int64], split: Split) -> pd.DataFrame:
    rows, pose, origin = data.singles(indices)
    group = data.patient[origin]
    if split.kind == "blocks":  # one person: what is least dependent is a stretch of time
        starts = indices[np.diff(indices, prepend=indices[0] - 2) > 1]
        block = np.searchsorted(starts, origin, side="right")
        group = np.array([f"{g} block {b}" for g, b in zip(group, block, strict=True)])
    table = pd.DataFrame({"group": group, "row": rows})
    table[TRUE] = pose.numpy()
    return table


def predict(
    model: CardiacDreamer, data: Transitions, indices: NDArray[np.int64], split: Split
) -> pd.DataFrame:
    """Single-frame predictions for the distinct frames of the transitions `indices`.

    One row a frame: `group` (the patient, or the block of time in a one-scan split), `row` in
    `data.frames`, true_* and predicted_* poses in mm and degrees.
    """
    table = _frames(data, indices, split)
    device, found = model.pose_mean.device, []
    with torch.no_grad():
        for rows in _chunks(table["row"].to_numpy()):
            image = data.images(rows).to(device).float() / 255
            found.append(model(image, torch.zeros(len(rows), 6, device=device)).pose.cpu())
    table[PREDICTED] = torch.cat(found).numpy()
    return table


def predict_constant(data: Transitions, indices: NDArray[np.int64], split: Split) -> pd.DataFrame:
    """The mean pose of the training part, said of every frame; a table as `predict` gives it."""
    table = _frames(data, indices, split)
    table[PREDICTED] = data.singles(split.train)[1].mean(0).numpy()
    return table


def errors(predictions: pd.DataFrame) -> pd.DataFrame:
    """Absolute errors per frame: the six axes, `translation` (mm), `rotation` (geodesic, deg)."""
    predicted, true = (torch.from_numpy(predictions[c].to_numpy()) for c in (PREDICTED, TRUE))
    error = poses.errors(predicted, true)
    table = pd.DataFrame(error.axes.numpy(), columns=list(poses.AXES))
    return table.assign(
        group=predictions["group"].to_numpy(),
        translation=error.translation.numpy(),
        rotation=error.rotation.numpy(),
    )


def bootstrap(
    values: ArrayLike, groups: ArrayLike, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `values` [N] over all frames, and its percentile interval over resampled `groups`.

    Returns (mean, low, high). With a single group nothing can be resampled: the interval is NaN.
    Raises ValueError on values that are not finite, or lengths that differ.
    """
    values, groups = np.asarray(values, dtype=float), np.asarray(groups)
    if values.shape != groups.shape or values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"finite values [N] and groups [N] are needed, got {values.shape}")
    _, owner = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    if len(counts) < 2:
        return float(values.mean()), np.nan, np.nan
    picks = np.random.default_rng(seed).integers(len(counts), size=(draws, len(counts)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def accuracy(predictions: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean absolute errors of several predictors on the same frames, one row per figure.

    `predictions` maps a name (patch, channel, direct, constant) to a table of `predict`. Columns:
    predictor, measure, unit, error, low, high (95%, over groups), ratio (to `constant`, where it is
    there), frames, groups. Raises ValueError where the frames differ.
    """
    reference = next(iter(predictions.values()))
    rows = []
    for name, table in predictions.items():
        if not np.array_equal(table[["row", *TRUE]], reference[["row", *TRUE]]):
            raise ValueError(f"{name}: predictions are of other frames than the first table's")
        error = errors(table)
        for measure, unit in UNITS.items():
            value, low, high = bootstrap(error[measure], error["group"])
            rows.append((name, measure, unit, value, low, high, len(table), error.group.nunique()))
    columns = ["predictor", "measure", "unit", "error", "low", "high", "frames", "groups"]
    result = pd.DataFrame(rows, columns=columns)
    if "constant" in predictions:
        base = result[result.predictor == "constant"].set_index("measure")["error"]
        result.insert(6, "ratio", result["error"] / result["measure"].map(base))
    return result


def by_seed(
    predictions: Mapping[str, pd.DataFrame], seeds: Mapping[str, int]
) -> list[pd.DataFrame]:
    """Predictions of a variant's runs, one table a training seed: a seed's folds are put together.

    `predictions` maps a run to its table of `predict`, `seeds` a run to its seed. Raises ValueError
    where a frame is predicted by two folds of a seed, or the seeds cover different frames.
    """
    folds: dict[int, list[pd.DataFrame]] = {}
    for run, table in predictions.items():
        folds.setdefault(seeds[run], []).append(table)
    place = ["group", "row"]
    tables = [
        pd.concat(folds[seed]).sort_values(place, kind="stable", ignore_index=True)
        for seed in sorted(folds)
    ]
    for seed, table in zip(sorted(folds), tables, strict=True):
        if sum(t["group"].nunique() for t in folds[seed]) > table["group"].nunique():
            raise ValueError(f"seed {seed}: two of its runs were tested on the same people")
        if not table[place].equals(tables[0][place]):
            raise ValueError(f"seed {seed} was tested on other frames than seed {min(folds)}")
    return tables


def difference(
    first: Sequence[pd.DataFrame],
    second: Sequence[pd.DataFrame],
    measure: str,
    margin: float,
    draws: int = 4000,
) -> dict[str, float | str]:
    """Difference second - first of a mean error, over seeds and patients, and what it shows.

    `first`, `second`: a table of `errors` per training seed, all on the same frames. Patients are
    resampled for both alike and seeds for each (percentile bootstrap). Equivalent (two one-sided
    tests, Schuirmann 1987): the 90% interval lies inside +-`margin`, in the measure's unit.
    Returns estimate, low and high (95%), and verdict: equivalent, first better, second better or
    not shown. Raises ValueError on other frames, or fewer than two groups.
    """
    group = first[0]["group"]
    if not all(np.array_equal(table["group"], group) for table in (*first, *second)):
        raise ValueError("the tables are of different frames")
    if group.nunique() < 2:
        raise ValueError("a difference needs at least two patients (or blocks)")
    means = [  # [seeds, patients]: a patient's frames are averaged first
        np.stack([table.groupby("group")[measure].mean().to_numpy() for table in tables])
        for tables in (first, second)
    ]
    draw = np.random.default_rng(0)
    patients = draw.integers(means[0].shape[1], size=(draws, means[0].shape[1]))
    sides = []
    for side in means:
        seeds = draw.integers(len(side), size=(draws, len(side)))
        sides.append(side[seeds[:, :, None], patients[:, None, :]].mean((1, 2)))
    gap = sides[1] - sides[0]
    low, high = np.quantile(gap, [0.025, 0.975])
    inner = np.quantile(gap, [0.05, 0.95])
    if np.abs(inner).max() < margin:
        verdict = "equivalent"
    elif low > 0 or high < 0:
        verdict = "first better" if low > 0 else "second better"
    else:
        verdict = "not shown"
    estimate = float(means[1].mean() - means[0].mean())
    return {"estimate": estimate, "low": float(low), "high": float(high), "verdict": verdict}


def epochs_to(level: float, metrics: pd.DataFrame, column: str = "val_loss") -> pd.Series:
    """The first row of a run's metrics whose `column` is at `level` or below.

    Raises ValueError where the run never gets there.
    """
    reached = metrics[metrics[column] <= level]
    if reached.empty:
        raise ValueError(
            f"{column} never falls to {level:.4g}; its least is {metrics[column].min()}"
        )
    return reached.iloc[0]


def welch(first: ArrayLike, second: ArrayLike) -> dict[str, float]:
    """Difference of means second - first of independent runs, with Welch's 95% interval."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    if min(len(first), len(second)) < 2 or np.ptp(first) + np.ptp(second) == 0:
        return {"estimate": second.mean() - first.mean(), "low": np.nan, "high": np.nan}
    interval = stats.ttest_ind(second, first, equal_var=False).confidence_interval()
    return {"estimate": second.mean() - first.mean(), "low": interval.low, "high": interval.high}


def imagination(
    model: CardiacDreamer, data: Transitions, indices: NDArray[np.int64], seed: int = 0
) -> pd.DataFrame:
    """What the world model adds, per transition: errors for frame 2, seen only through frame 1.

    Ways: `imagined` (the true action), `wrong action` (another transition's), `no action` (frame 1
    taken for frame 2) and `composed` (the frame's own pose, then the motion by geometry alone).
    Columns: group, motion, way, translation (mm), rotation (deg), and `feature`, the squared error
    of the map over the variance of frame 2's (copying frame 1's map stands under `no action`).
    """
    tables, device = [], model.pose_mean.device
    shuffled = np.random.default_rng(seed).permutation(indices)
    with torch.no_grad():
        for at, other in zip(_chunks(indices), _chunks(shuffled), strict=True):
            batch, wrong = data.batch(at), data.action[other]
            here, there = (
                model.encode(image.to(device).float() / 255)
                for image in (batch.image1, batch.image2)
            )
            spread = there.var(dim=(0, 2, 3)).mean()
            still = torch.zeros_like(batch.action)
            dreams = {
                name: model.imagine(here, action.to(device))
                for name, action in (("imagined", batch.action), ("wrong action", wrong),
                                     ("no action", still))
            }  # fmt: skip
            said = {name: dream.pose.cpu() for name, dream in dreams.items()}
            said["composed"] = poses.compose(said["no action"], batch.action)
            maps = {name: dream.next_features for name, dream in dreams.items()}
            maps |= {"no action": here}
            for name, pose in said.items():
                error = poses.errors(pose, batch.pose2)
                table = pd.DataFrame({"group": data.patient[at], "motion": data.motion[at]})
                table["way"] = name
                table["translation"], table["rotation"] = error.translation, error.rotation
                if name in maps:
                    square = (maps[name] - there).square().mean((1, 2, 3)) / spread
                    table["feature"] = square.cpu().numpy()
                tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _chunks(indices: NDArray[np.int64], size: int = 64) -> list[NDArray[np.int64]]:
    return np.split(indices, range(size, len(indices), size))


def predict_action_only(
    data: Transitions, split: Split, motion: str | None = None, steps: int = 400
) -> pd.DataFrame:
    """The control without sight: a small network that sees the action alone and says pose 1.

    Trained on the training part, asked about the test part; with `motion`, on transitions of that
    kind alone. One row a transition, as in `predict`. Better than constant, it shows a leak.
    """
    train, test = _of_kind(data, split, motion)
    mean, spread = data.pose1[train].mean(0), data.pose1[train].std(0).clamp_min(1e-6)
    unit = data.action[train].std(0).clamp_min(1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.GELU(), torch.nn.Linear(64, 6))
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1)
        for _ in range(steps):
            pick = torch.from_numpy(train)[torch.randint(len(train), (256,))]
            said = net(data.action[pick] / unit)
            loss = torch.nn.functional.smooth_l1_loss(said, (data.pose1[pick] - mean) / spread)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        said = (net(data.action[test] / unit) * spread + mean).numpy()
    return _starts(data, test, said)


def predict_constant_start(
    data: Transitions, split: Split, motion: str | None = None
) -> pd.DataFrame:
    """The mean pose 1 of the training part, on the rows of `predict_action_only`."""
    train, test = _of_kind(data, split, motion)
    return _starts(data, test, data.pose1[train].mean(0).numpy())


def _of_kind(data: Transitions, split: Split, motion: str | None) -> tuple[NDArray, NDArray]:
    kept = data.motion == motion if motion is not None else np.full(len(data), True)
    return split.train[kept[split.train]], split.test[kept[split.test]]


def _starts(data: Transitions, test: NDArray, said: NDArray) -> pd.DataFrame:
    table = pd.DataFrame({"group": data.patient[test], "row": data.rows[test, 0]})
    table[TRUE] = data.pose1[test].numpy()
    table[PREDICTED] = said
    return table


def ratio(
    errors: pd.DataFrame, base: pd.DataFrame, measure: str, draws: int = 2000
) -> dict[str, float]:
    """Mean error over a control's on the same rows: `ratio`, `low`, `high` (95%, over groups)."""
    _, owner = np.unique(errors["group"], return_inverse=True)
    above, below = (np.bincount(owner, table[measure]) for table in (errors, base))
    picks = np.random.default_rng(0).integers(len(above), size=(draws, len(above)))
    low, high = np.quantile(above[picks].sum(1) / below[picks].sum(1), [0.025, 0.975])
    return {"ratio": above.sum() / below.sum(), "low": float(low), "high": float(high)}
