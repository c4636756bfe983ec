"""What the world model imagines: its maps and poses beside controls, and what can be read there.

Functions return rows of (measure, condition, patient, value): a patient's mean over its pairs, or
the value of a whole run (patient ""). `measure` and `space` collect all of one run; for
`token_type` none, which has no world model, the controls alone remain. Conditions that recur:

    imagined           by the world model, from frame 1 and the motion
    wrong action       the same with the motion of another pair, of about the same size
    zero action        the same without motion
    copy               frame 1's map in place of frame 2's
    mean map, prior    the mean over training frames (for a pose the mean-pose baseline)
    ignore the motion  frame 1's single-frame prediction in place of frame 2's pose
    exact geometry     frame 1's single-frame prediction composed with the true motion
    see frame 2        what the model makes of frame 2 itself, the ceiling

Map errors are squared and relative to the variance of the true maps (per channel, over frames and
cells), because each backbone makes maps of its own scale. Pairs are those of independent motions
where the data mark such: the motions of a search give its goal away.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dreamer import poses
from dreamer.attribution import encode
from dreamer.data import Split, Transitions
from dreamer.model import CardiacDreamer
from dreamer.study import accuracy
from dreamer.study.probes import (
    Known,
    Probe,
    average_precisions,
    card,
    contact,
    gaussian,
    known,
)

log = logging.getLogger(__name__)

SIZES = ("small", "medium", "large")
CANDIDATES = 8  # motions to choose from


class Pairs(NamedTuple):
    """N pairs of frames: transitions `index`, `patient`, `size` of the motion (of SIZES) [N]; true
    `action`, `pose1`, `pose2` [N, 6]; encoded maps `here`, `there`; imagined `maps` [N, C, h, w]
    and predicted `pose` [N, 6] by condition."""

    index: NDArray[np.int64]
    patient: NDArray[np.str_]
    size: NDArray[np.str_]
    action: Tensor
    pose1: Tensor
    pose2: Tensor
    here: Tensor
    there: Tensor
    maps: dict[str, Tensor]
    pose: dict[str, Tensor]


def pairs(
    model: CardiacDreamer,
    data: Transitions,
    indices: NDArray[np.int64],
    split: Split,
    each: int = 2,
) -> Pairs:
    """At most `each` pairs of every patient among the transitions `indices`, and their maps.

    Motions are ranked by translation over its mean plus rotation over its mean and named by thirds,
    small, medium and large. A wrong action is of the same third: it differs in direction, hardly in
    size.
    """
    owner = accuracy.patients(data, indices, indices, split)
    drawn = _draw(data, indices, owner, each)
    index, patient = indices[drawn], owner[drawn]
    action, moved = data.action[index], _away(data.action[index])
    rank = sum(value / value.mean() for value in moved.values()).argsort().argsort().numpy()
    size = np.array(SIZES)[rank * len(SIZES) // len(index)]
    other, rng = np.arange(len(index)), np.random.default_rng(0)
    for name in SIZES:
        among = rng.permutation(np.flatnonzero(size == name))
        other[among] = np.roll(among, 1)
    here, there = (encode(model, data.images(data.rows[index, side])).cpu() for side in (0, 1))
    maps, pose, still = {}, {}, torch.zeros_like(action)
    maps["zero action"], pose["ignore the motion"] = _imagine(model, here, still)
    pose["exact geometry"] = poses.compose(pose["ignore the motion"], action)
    pose["see frame 2"] = _imagine(model, there, still)[1]
    if model.world is None:
        maps = {}
    else:
        maps["imagined"], pose["imagined"] = _imagine(model, here, action)
        maps["wrong action"], pose["wrong action"] = _imagine(model, here, action[other])
    ends = data.pose1[index], data.pose2[index]
    return Pairs(index, patient, size, action, *ends, here, there, maps, pose)


def imagined_maps(found: Pairs, mean_map: Tensor | None = None) -> pd.DataFrame:
    """imagined_map_error, overall and by size of the motion, and what makes action dependence.

    Action dependence, (wrong - right) / (copy - right), is the ratio of the means of
    map_wrong_minus_right and map_copy_minus_right: 0 where the model ignores the action, 1 where a
    wrong motion costs all that imagination gains over a copy; it means nothing where a copy is
    nearer. motion_mm, motion_deg: mean sizes of the motions. `mean_map` [C, h, w]: of training
    frames.
    """
    maps = found.maps | {"copy": found.here}
    if mean_map is not None:
        maps["mean map"] = mean_map
    error = {name: _distance(value, found.there) for name, value in maps.items()}
    error = {name: value / _variance(found.there) for name, value in error.items()}
    tables = [_rows("imagined_map_error", error, found.patient)]
    if "imagined" in error:
        for name in ("wrong action", "copy"):
            more = {"": error[name] - error["imagined"]}
            tables.append(_rows(f"map_{name.split()[0]}_minus_right", more, found.patient))
    for unit, size in _away(found.action).items():
        tables.append(_rows(f"motion_{unit}", {"": size}, found.patient))
    return _by_size(found, tables)


def imagined_poses(found: Pairs) -> pd.DataFrame:
    """imagined_translation_mm and imagined_rotation_deg, overall and by size of the motion."""
    return _by_size(found, _pose_rows("imagined", found.pose, found.pose2, found.patient))


def rollout(
    model: CardiacDreamer,
    data: Transitions,
    indices: NDArray[np.int64],
    split: Split,
    steps: int = 5,
) -> pd.DataFrame:
    """1 to `steps` motions along recorded frames, each imagined map fed back for the next.

    One path per patient. Every other one is walked backwards, so that paths do not all lead to the
    target. `in one step` imagines the whole motion so far at once, which separates its length from
    the number of steps. Measures rollout_map_error, rollout_translation_mm, rollout_rotation_deg.
    Without rows, and with a warning, where no path is long enough.
    """
    order, rng, paths = np.sort(indices), np.random.default_rng(0), {}
    follows = data.frame_id[order[1:], 0] == data.frame_id[order[:-1], 1]
    for run in np.split(order, np.flatnonzero(~follows) + 1):
        patient = str(accuracy.patients(data, run[:1], indices, split)[0])
        if len(run) >= steps and patient not in paths:
            path = run[rng.integers(len(run) - steps + 1) :][:steps]
            rows = np.append(data.rows[path, 0], data.rows[path[-1], 1])
            pose = torch.cat((data.pose1[path], data.pose2[path[-1:]]))
            paths[patient] = (rows[::-1], pose.flip(0)) if len(paths) % 2 else (rows, pose)
    if not paths:
        log.warning("%s: no path of %d consecutive transitions to imagine", data.folder, steps)
        return _tidy([_rows("rollout_map_error", {"imagined": torch.zeros(0)}, [])])
    rows, pose = (
        np.stack([p[0] for p in paths.values()]),
        torch.stack([p[1] for p in paths.values()]),
    )
    seen = [encode(model, data.images(rows[:, k])).cpu() for k in range(steps + 1)]
    start = _imagine(model, seen[0], torch.zeros_like(pose[:, 0]))[1]
    features, tables = seen[0], []
    for k in range(1, steps + 1):
        so_far = poses.relative(pose[:, 0], pose[:, k])
        maps, reached = {"copy": seen[0]}, {"ignore the motion": start}
        reached["exact geometry"] = poses.compose(start, so_far)
        if model.world is not None:
            motion = poses.relative(pose[:, k - 1], pose[:, k])
            features, reached["imagined"] = _imagine(model, features, motion)
            maps["imagined"] = features
            if k > 1:
                maps["in one step"], reached["in one step"] = _imagine(model, seen[0], so_far)
        error = {name: _distance(m, seen[k]) / _variance(seen[k]) for name, m in maps.items()}
        found = [_rows("rollout_map_error", error, list(paths))]
        found += _pose_rows("rollout", reached, pose[:, k], list(paths))
        tables += [table.assign(condition=table["condition"] + f", step {k}") for table in found]
    return _tidy(tables)


def there_and_back(model: CardiacDreamer, found: Pairs) -> pd.DataFrame:
    """A motion and its inverse, imagined in a row, must lead back to the start.

    Distances to frame 1's map and single-frame prediction: of what is `moved` by the motion, then
    `returned` by its inverse, and of `zero action twice`, what two passes cost by themselves.
    Measures return_map_error (over the variance), return_translation_mm, return_rotation_deg.
    """
    first = np.unique(found.patient, return_index=True)[1]
    maps, pose = ({n: v[first] for n, v in part.items()} for part in (found.maps, found.pose))
    action, here = found.action[first], found.here[first]
    reached = {
        "moved": (maps["imagined"], pose["imagined"]),
        "returned": _imagine(model, maps["imagined"], poses.inverse(action)),
        "zero action twice": _imagine(model, maps["zero action"], torch.zeros_like(action)),
    }
    error = {n: _distance(m, here) / _variance(here) for n, (m, _) in reached.items()}
    ends, patient = {n: p for n, (_, p) in reached.items()}, found.patient[first]
    tables = _pose_rows("return", ends, pose["ignore the motion"], patient)
    return _tidy([_rows("return_map_error", error, patient), *tables])


def spread(found: Pairs) -> pd.DataFrame:
    """Whether maps have collapsed: map_variance, and map_rank, the effective rank of the channels'
    covariance (exp of the entropy of its eigenvalues, after Roy & Vetterli, EUSIPCO 2007), both
    about the mean map, over frames and cells."""
    tables = []
    for name, maps in {"see frame 2": found.there, **found.maps}.items():
        away = rearrange(maps - maps.mean(0), "n c h w -> (n h w) c")
        values = torch.linalg.eigvalsh((away.T @ away).double()).clamp_min(0)
        rank = torch.special.entr(values / values.sum()).sum().exp()
        tables.append(_rows("map_rank", {name: rank[None]}, [""]))
        tables.append(_rows("map_variance", {name: away.square().mean()[None]}, [""]))
    return _tidy(tables)


# What can be read from maps


def contents(
    found: Pairs, test: Known, of_map: Probe, of_pose: Probe, structures: Sequence[str]
) -> pd.DataFrame:
    """What is seen in frame 2 and where, read from imagined maps by probes of encoded maps.

    visible_ap, shadowed_ap: average precision of a structure's cells over a patient's pairs, mean
    over the structures that occur there, and by structure (patient "", mean over patients);
    shadow_ap: of shadowed cells; contact_error: mean absolute. `exact geometry` reads a pose, not a
    map: what the way alone would tell. Where imagined maps do not lie where encoded ones do
    (without the feature loss) a probe cannot read them. `test`: the second frames of `found`.
    """
    maps = {"copy": found.here, **found.maps, "see frame 2": found.there}
    readings = {"prior": of_map.prior} | {name: of_map(value) for name, value in maps.items()}
    readings["exact geometry"] = of_pose(found.pose["exact geometry"])
    patients, tables = np.unique(found.patient), []
    for condition, reading in readings.items():
        for name in ("visible", "shadowed", "shadow"):
            score = average_precisions(reading[name], test.truth[name], found.patient)
            tables.append(_rows(f"{name}_ap", {condition: score.nanmean(1)}, patients))
            if name != "shadow":
                each = zip(structures, score.nanmean(0)[:, None], strict=True)
                mean = {f"{condition}, {structure}": value for structure, value in each}
                tables.append(_rows(f"{name}_ap_by_structure", mean, [""]))
        error = (reading["contact"] - test.truth["contact"]).abs()[:, 0]
        tables.append(_rows("contact_error", {condition: error}, found.patient))
    return _tidy(tables)


def choice(
    model: CardiacDreamer,
    data: Transitions,
    found: Pairs,
    of_map: Probe | None = None,
) -> pd.DataFrame:
    """Which of eight motions leads nearest the target and, with a probe, to the best contact?

    From one frame of every patient, motions drawn from those of all pairs. Regret
    (choice_regret_mm, _deg, _contact): how much farther from the target, or how much less of the
    face on the skin, than the oracle's choice; choice_best_mm, ...: whether it was the oracle's.
    `random`: the expectation of a blind choice. `exact geometry` knows the skin of the phantom, the
    probe maps alone.
    """
    first = np.unique(found.patient, return_index=True)[1]
    draw = np.random.default_rng(0).integers(len(found.index), size=(len(first), CANDIDATES))
    motion = found.action[draw]  # [patients, candidates, 6]
    starts = (found.pose1, found.pose["ignore the motion"])
    true, geometry = (poses.compose(s[first, None].expand_as(motion), motion) for s in starts)
    cost, expected = _away(true), {"exact geometry": _away(geometry)}
    if of_map is not None:
        cost["contact"] = -contact(data, found.index[first], true)
        touching = contact(data, found.index[first], geometry)
        # Of motions with the same contact the deepest, which an error of the pose spoils least.
        expected["exact geometry"]["contact"] = -touching - 1e-3 * geometry[..., 2]
    if model.world is not None:
        here = found.here[first].repeat_interleave(CANDIDATES, 0)
        maps, pose = _imagine(model, here, motion.flatten(0, 1))
        expected["imagined"] = _away(pose)
        if of_map is not None:
            expected["imagined"]["contact"] = -of_map(maps)["contact"]
    tables = []
    for goal, paid in cost.items():
        regret = {"random": paid - paid.amin(1, keepdim=True)}
        for name, costs in expected.items():
            chosen = costs[goal].view_as(paid).argmin(1, keepdim=True)
            regret[name] = regret["random"].gather(1, chosen)
        best = {name: (value == 0).double().mean(1) for name, value in regret.items()}
        regret = {name: value.mean(1) for name, value in regret.items()}
        tables.append(_rows(f"choice_regret_{goal}", regret, found.patient[first]))
        tables.append(_rows(f"choice_best_{goal}", best, found.patient[first]))
    return _tidy(tables)


def measure(
    model: CardiacDreamer,
    train_data: Transitions,
    split: Split,
    test_data: Transitions | None = None,
    each: int = 2,
    frames: int = 600,
) -> pd.DataFrame:
    """All that a run imagines: every measure of this file but those of `space`.

    Args:
        model: of the run.
        train_data, split: what it was trained on; probes are fitted on about `frames` frames of the
            training part, their penalties chosen on a sixth as many of the validation part.
        test_data: unseen patients to test on, in place of the test part of `train_data`.
        each: pairs of every test patient.
    """
    data, indices = accuracy.tested(train_data, split, test_data)
    train, val = _fitted(model, train_data, split, frames)
    found = pairs(model, data, indices, split, each)
    test = known(model, data, found.index)
    tables = [imagined_maps(found, train.map.mean(0)), imagined_poses(found), spread(found)]
    tables.append(rollout(model, data, indices, split))
    if model.world is not None:
        tables.append(there_and_back(model, found))
    of_map = None
    if train.truth and test.truth:
        of_map = Probe((train.map, train.truth), (val.map, val.truth))
        kernel = gaussian(model.pose_std.cpu())
        of_pose = Probe((train.pose, train.truth), (val.pose, val.truth), kernel)
        tables.append(contents(found, test, of_map, of_pose, card(data)["structures"]))
    tables.append(choice(model, data, found, of_map))
    return pd.concat(tables, ignore_index=True)


def space(
    model: CardiacDreamer,
    train_data: Transitions,
    split: Split,
    test_data: Transitions | None = None,
    each: int = 2,
    frames: int = 600,
) -> pd.DataFrame:
    """What linear probes read from the map's tokens before the blocks and after each, zero action.

    layer_translation_mm, layer_rotation_deg: of the frame's pose; layer_visible_ap: of what is seen
    in each cell; beside the pixels, the backbone's map and the prior. A probe weighs all values of
    all tokens but has one weight per training frame, whatever the number and length of tokens. So
    both token types are read in a space of the same dimension, and how values are dealt to tokens
    does not matter. It shows what a linear readout could use, not what the model's heads use.
    Arguments as in `measure`.
    """
    data, indices = accuracy.tested(train_data, split, test_data)
    owner = accuracy.patients(data, indices, indices, split)
    drawn = _draw(data, indices, owner, each)
    patient, test = owner[drawn], known(model, data, indices[drawn])
    parts, readings = [], {}
    for part in (*_fitted(model, train_data, split, frames), test):
        wanted = {"pose": part.pose} | {k: v for k, v in part.truth.items() if k == "visible"}
        parts.append(({"pixels": part.image, "map": part.map} | _tokens(model, part.map), wanted))
    for name in list(parts[0][0]):
        probe = Probe(*((inputs.pop(name), wanted) for inputs, wanted in parts[:2]))
        readings[name] = probe(parts[2][0].pop(name))
    readings["prior"] = probe.prior
    pose = {name: reading["pose"].expand_as(test.pose) for name, reading in readings.items()}
    tables = _pose_rows("layer", pose, test.pose, patient)
    for name, reading in readings.items() if "visible" in probe.prior else ():
        score = average_precisions(reading["visible"], test.truth["visible"], patient)
        tables.append(_rows("layer_visible_ap", {name: score.nanmean(1)}, np.unique(patient)))
    return _tidy(tables)


# Helpers


def _draw(
    data: Transitions, indices: NDArray[np.int64], owner: NDArray[np.str_], each: int
) -> NDArray[np.int64]:
    """Places in `indices` of at most `each` transitions of every owner, of those whose motion does
    not leak the pose where such are marked."""
    free = np.flatnonzero(data.motion[indices] == "independent")
    shuffled = np.random.default_rng(0).permutation(free if len(free) else len(indices))
    turn = pd.Series(shuffled).groupby(owner[shuffled]).cumcount().to_numpy()
    return np.sort(shuffled[turn < each])


def _fitted(
    model: CardiacDreamer, data: Transitions, split: Split, frames: int
) -> tuple[Known, Known]:
    """Frames of the training part to fit probes on, of the validation part to choose penalties."""
    parts = []
    for part, count in ((split.train, frames), (split.val, frames // 6)):
        each = max(1, count // len(set(data.patient[part])))
        parts.append(known(model, data, part[_draw(data, part, data.patient[part], each)]))
    return tuple(parts)


@torch.no_grad()
def _imagine(model: CardiacDreamer, maps: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Imagined maps [N, C, h, w] and poses [N, 6]."""
    device, parts = model.pose_mean.device, []
    for features, motion in zip(maps.split(64), action.split(64), strict=True):
        dream = model.imagine(features.to(device), motion.to(device))
        parts.append((dream.next_features.cpu(), dream.pose.cpu()))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _tokens(model: CardiacDreamer, maps: Tensor) -> dict[str, Tensor]:
    """The map's tokens [N, values] before the blocks and after each, under the zero action."""
    if model.world is None:
        return {}
    kept, hooks = {}, []

    def keep(name: str, tokens: Tensor) -> None:  # half precision: they are large
        kept.setdefault(name, []).append(tokens[:, 1:].flatten(1).half().cpu())

    first = model.world.blocks[0]
    hooks.append(first.register_forward_pre_hook(lambda _, given: keep("tokens", given[0])))
    for number, block in enumerate(model.world.blocks, 1):
        name = f"tokens, block {number}"
        hooks.append(block.register_forward_hook(lambda *given, name=name: keep(name, given[2])))
    _imagine(model, maps, torch.zeros(len(maps), 6))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _away(pose: Tensor) -> dict[str, Tensor]:
    """How far [...] poses or motions [..., 6] lie from zero, in mm and in degrees."""
    error = poses.errors(pose, torch.zeros_like(pose))
    return {"mm": error.translation, "deg": error.rotation}


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().mean((1, 2, 3))


def _variance(maps: Tensor) -> Tensor:
    return maps.var(dim=(0, 2, 3)).mean()


def _rows(measure: str, values: Mapping[str, Tensor], patient: ArrayLike) -> pd.DataFrame:
    return pd.concat(
        pd.DataFrame({"measure": measure, "condition": name, "patient": patient, "value": value})
        for name, value in values.items()
    )


def _pose_rows(
    measure: str, pose: Mapping[str, Tensor], true: Tensor, patient: ArrayLike
) -> list[pd.DataFrame]:
    error = {name: poses.errors(value, true) for name, value in pose.items()}
    mm, deg = ({name: e[k] for name, e in error.items()} for k in (1, 2))
    named = {f"{measure}_translation_mm": mm, f"{measure}_rotation_deg": deg}
    return [_rows(name, values, patient) for name, values in named.items()]


def _by_size(found: Pairs, tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tidy rows of all pairs, then those of each size of motion, named in the condition."""
    table = pd.concat(tables)
    size = np.tile(found.size, len(table) // len(found.size))
    named = (table["condition"] + ", " + size + " motion").str.removeprefix(", ")
    return _tidy([table, table.assign(condition=named)])


def _tidy(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table, a patient's rows averaged; without what no frame of a patient could tell."""
    keys = ["measure", "condition", "patient"]
    return pd.concat(tables).dropna().groupby(keys, sort=False)["value"].mean().reset_index()
