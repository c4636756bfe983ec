"""Attention and attribution maps of one trained run, and what they are worth, as one tidy table.

`measure` is called right after a training; its rows are measure, condition, patient, value. Parts
of a condition are joined by " | ". Targets are the axes, `rotation` and `translation` (what remains
to the target plane, deg and mm). Maps of the imagination explain how far a motion changes the
imagined feature map.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dreamer import attribution, poses
from dreamer.attribution import ATTENTION, METHODS, TARGETS
from dreamer.data import Split, Transitions
from dreamer.model import CardiacDreamer
from dreamer.study import faithfulness, ground_truth
from dreamer.study.faithfulness import CONTROLS, DRAWS, QUICK, View, rows
from dreamer.study.ground_truth import GROUPS, HEART, Sample, Truth

# What is changed in the frames of the shortcut report, see `ground_truth.rerender`.
SHORTCUTS = {
    "no heart": {"without": HEART},
    "no ribs": {"without": "ribs"},
    "no chest wall": {"without": "chest_wall"},
    "no lung or liver": {"without": ("lung", "liver")},
    "heart alone": {"without": ("ribs", "chest_wall", "lung", "liver")},
    "ribs moved": {"vary": {"rib_shadow": 3.0}},
    "other time gain": {"vary": {"time_gain": 1}},
}


def measure(
    model: CardiacDreamer,
    data: Transitions,
    indices: NDArray[np.int64],
    split: Split,
    frames: int = 24,
    scored: int = 12,
    tested: int = 8,
    targets: Sequence[str] = ("rotation", "translation"),
    seed: int = 0,
    training: Tensor | None = None,
) -> pd.DataFrame:
    """Every measure of this module for one model: measure, condition, patient, value.

    Takes about 90 s of one core with 513 tokens, and 20 s with 50 (laptop preset).

    Args:
        model: in evaluation mode, on any device.
        indices: test transitions; their first frames are explained. `split.train` gives baselines.
        frames: behind relevance, average maps, maps of the imagination and the shortcut report,
            each of another patient where there are as many.
        scored, tested: the first of them, behind the scores of all methods, and behind tests with
            noise and random weights.
        targets: that methods are scored for, the main one first.
        seed: draws frames, random maps, noise and weights.
        training: uint8 [N, 1, S, S], frames behind the baselines where `data` are other patients
            than those of the training, and `split` has no training part.

    Measures (the condition in brackets; "method" includes controls):

    - deletion, insertion, infidelity, frame_deletion, frame_insertion [method | target];
      max_sensitivity, randomisation_* [method | target (| stage)], for quick methods and the main
      target: see `dreamer.study.faithfulness`.
    - incompleteness [method | target]: the convergence delta of methods that should sum to
      f(frame) - f(baseline), over its mean size.
    - map_agreement [one | other | target]; metric_agreement [one measure | other], whole run.
    - On a phantom: pointing, decisive, counterfactual_rank [method | target]; relevance [method |
      target | group of structures]; structure_relevance [ablation | target | structure];
      average_map [method | target | row | column], whole run, in the target plane;
      shortcut_translation_mm, shortcut_rotation_deg [change of the frame].
    - With a transformer: see `imagination` and `attention`.
    """
    sample = ground_truth.draw(data, indices, split, frames, seed)
    sample = sample if training is None else sample._replace(training=training)
    seen = faithfulness.view(model, sample)
    part = seen.take(slice(scored))
    attends = [] if model.world is None else list(ATTENTION)
    ablation = dict(zip(TARGETS, faithfulness.maps(seen, "ablation", TARGETS), strict=True))
    grids = {"ablation": torch.stack([ablation[target][:scored] for target in targets])}
    for method in (*attends, *METHODS, *CONTROLS):
        if method not in grids:
            grids[method] = faithfulness.maps(part, method, targets, seed=seed)
    for draw in range(1, DRAWS):
        grids[f"random {draw}"] = faithfulness.maps(part, "random", targets, seed=seed + draw)
    tables = [
        faithfulness.faithful(part, grids, targets)[0],
        incompleteness(part, grids, targets),
        faithfulness.map_agreement(grids, targets, part.sample.patient),
    ]
    quick = [m for m in (*QUICK, *CONTROLS) if m not in ATTENTION or m in attends]
    tables.append(faithfulness.robust(seen.take(slice(tested)), quick, targets[0], seed=seed))
    if model.world is not None:
        tables += [imagination(seen, seed), attention(seen)]
    if (known := ground_truth.truth(seen.sample)) is not None:
        tables += [
            anatomical(part, known.take(slice(scored)), grids, targets),
            relevance(seen, known, ablation, targets),
            shortcuts(model, seen.sample, known),
        ]
    table = pd.concat(tables, ignore_index=True)
    table["condition"] = table["condition"].str.replace(r"^random \d", "random", regex=True)
    scores = faithfulness.score_matrix(table, targets[0])
    table = pd.concat([table, faithfulness.metric_agreement(scores)], ignore_index=True)
    names = ["measure", "condition", "patient"]
    return table.dropna().groupby(names, sort=False)["value"].mean().reset_index()


@torch.no_grad()
def incompleteness(seen: View, grids: dict[str, Tensor], targets: Sequence[str]) -> pd.DataFrame:
    """Convergence deltas of integrated gradients, GradientShap and Shapley values."""
    head, found = attribution.Head(seen.model, targets), []
    for method in ("integrated gradients", "GradientShap", "Shapley"):
        base = head(seen.training if method == "GradientShap" else seen.baseline)
        reference = base.mean(0, keepdim=True) if method == "GradientShap" else base
        missed = attribution.incompleteness(head, seen.features, reference, grids[method])
        for target, value in zip(targets, missed.cpu(), strict=True):
            name = f"{method} | {target}"
            found.append(rows("incompleteness", name, seen.sample.patient, value))
    return pd.concat(found, ignore_index=True)


# With the phantom's truth


def anatomical(
    seen: View, known: Truth, grids: dict[str, Tensor], targets: Sequence[str]
) -> pd.DataFrame:
    """pointing, decisive, counterfactual_rank and relevance of maps, method -> [targets, N, h, w];
    relevance of ablation is that of `relevance`."""
    size, patient, found = seen.features.shape[2:], seen.sample.patient, []
    removed = ground_truth.remove(seen.sample, known)
    anatomy = ground_truth.anatomy(known, removed, size)
    moved = ground_truth.changes(seen.model, removed, known.structures, targets)
    shares = ground_truth.group_shares(known, size)
    for method, each in grids.items():
        for target, grid, effect in zip(targets, each, moved, strict=True):
            name = f"{method} | {target}"
            for measure, value in ground_truth.against_truth(grid, anatomy, effect).items():
                found.append(rows(measure, name, patient, value))
            if method != "ablation":
                value = ground_truth.relevance(grid, shares)
                found += by_part("relevance", name, patient, value, GROUPS)
    return pd.concat(found, ignore_index=True)


def by_part(
    measure: str, name: str, patient: NDArray, values: Tensor, parts: Sequence[str]
) -> list[pd.DataFrame]:
    """Rows of `values` [N, parts], the part last in the condition."""
    names = [f"{name} | {part}" if name else part for part in parts]
    return [rows(measure, n, patient, values[:, k]) for k, n in enumerate(names)]


def relevance(
    seen: View, known: Truth, grids: dict[str, Tensor], targets: Sequence[str]
) -> pd.DataFrame:
    """relevance of ablation maps, target -> [N, h, w], by group of structures; structure_relevance
    for `targets`; average_map of ablation and rollout."""
    size, patient, found = seen.features.shape[2:], seen.sample.patient, []
    shares = ground_truth.group_shares(known, size)
    filled = ground_truth.filled(known, size)
    for target, grid in grids.items():
        name = f"ablation | {target}"
        value = ground_truth.relevance(grid, shares)
        found += by_part("relevance", name, patient, value, GROUPS)
        if target in targets:
            value = ground_truth.relevance(grid, filled)
            found += by_part("structure_relevance", name, patient, value, known.structures)
    averaged = {f"ablation | {target}": grid for target, grid in grids.items()}
    if seen.model.world is not None:
        averaged["rollout | all"] = faithfulness.maps(seen, "rollout", targets)[0]
    bins = ground_truth.plane_bins(known.pose, known.labels > 0)
    for name, grid in averaged.items():
        mean, count = ground_truth.average_map(grid, bins)
        row, column = np.nonzero((count >= len(grid) / 8).numpy())
        for r, c in zip(row, column, strict=True):
            value = [float(mean[r, c])]
            found.append(rows("average_map", f"{name} | {r} | {c}", np.array([""]), value))
    return pd.concat(found, ignore_index=True)


def shortcuts(model: CardiacDreamer, sample: Sample, known: Truth) -> pd.DataFrame:
    """Pose errors for the same frames after each change of SHORTCUTS, for `whole` frames, and for
    the training part's `mean pose`: shortcut_translation_mm, shortcut_rotation_deg.

    What remains without the heart is read from ribs, chest wall and lung.
    """
    guesses = {"whole": ground_truth.predict(model, ground_truth.rerender(sample, known))}
    for name, change in SHORTCUTS.items():
        images = ground_truth.rerender(sample, known, **change)
        guesses[name] = ground_truth.predict(model, images)
    guesses["mean pose"] = model.pose_mean.cpu().expand_as(guesses["whole"])
    found = []
    for name, guess in guesses.items():
        error = poses.errors(guess, known.pose)
        found.append(rows("shortcut_translation_mm", name, sample.patient, error.translation))
        found.append(rows("shortcut_rotation_deg", name, sample.patient, error.rotation))
    return pd.concat(found, ignore_index=True)


# Maps of the imagination


class Change(nn.Module):
    """How far a motion changes the imagined map: |next(features, action) - next(features, 0)|
    [B, 1] for features [B, C, h, w] and actions [B, 6]."""

    def __init__(self, model: CardiacDreamer):
        super().__init__()
        self.model = model

    def where(self, features: Tensor, action: Tensor, still: Tensor | None = None) -> Tensor:
        """The change itself [B, C, h, w]; `still` is next(features, 0), if known."""
        if still is None:
            still = self.model.imagine(features, torch.zeros_like(action)).next_features
        return self.model.imagine(features, action).next_features - still

    def forward(self, features: Tensor, action: Tensor, still: Tensor | None = None) -> Tensor:
        return self.where(features, action, still).flatten(1).norm(dim=1)[:, None]


def imagined_change(
    model: CardiacDreamer, features: Tensor, action: Tensor, baseline: Tensor, steps: int = 8
) -> tuple[Tensor, Tensor]:
    """What in frame 1 decides how far the imagined map changes: integrated gradients [N, h, w] of
    the norm of that change, from `baseline` [1, C, h, w], and its attribution to the motion's six
    numbers [N, 6]."""
    from captum.attr import IntegratedGradients

    change = Change(model)
    by_frame = IntegratedGradients(change)
    by_action = IntegratedGradients(lambda action, x, still: change(x, action, still))
    size = max(1, attribution.frames_at_once(model) // (2 * steps))
    grids, numbers = [], []
    for x, a in zip(features.split(size), action.split(size), strict=True):
        with torch.no_grad():
            still = model.imagine(x, torch.zeros_like(a)).next_features
        found = by_frame.attribute(x, baseline, additional_forward_args=(a,), n_steps=steps)
        grids.append(found.sum(1).detach().cpu())
        given = (x, still)
        found = by_action.attribute(a, 0, additional_forward_args=given, n_steps=steps)
        numbers.append(found.detach().cpu())
    return torch.cat(grids), torch.cat(numbers)


@torch.no_grad()
def imagination(seen: View, seed: int = 0) -> pd.DataFrame:
    """Maps of the imagination.

    - imagined_change_rank: where does the imagined map change? Rank correlation over the cells
      with the true change between the maps of both frames [imagined | wrong action | frame 1 |
      random]; `frame 1` is the norm of its own map, `deciding cells` compares the cells that
      decide with the cells that change.
    - action_share [axis]: of the attribution of the change to the motion's six numbers.
    """
    model, sample, features, base, _ = seen
    patient, found = sample.patient, []
    change, action = Change(model), sample.action.to(features)
    size = attribution.frames_at_once(model)

    def changed(action: Tensor) -> Tensor:
        both = zip(features.split(size), action.split(size), strict=True)
        return torch.cat([change.where(x, a).norm(dim=1).cpu() for x, a in both])

    after = attribution.encode(model, sample.after)
    true, imagined = (after - features).norm(dim=1).cpu(), changed(action)
    compared = {
        "imagined": imagined,
        "wrong action": changed(action.roll(1, 0)),
        "frame 1": features.norm(dim=1).cpu(),
        "random": faithfulness.control("random", sample.images, true.shape[1:], seed),
    }
    for name, values in compared.items():
        rank = faithfulness.rank_correlation(values, true)
        found.append(rows("imagined_change_rank", name, patient, rank))
    with torch.enable_grad():
        grid, numbers = imagined_change(model, features, action, base[:1])
    rank = faithfulness.rank_correlation(grid, imagined)
    found.append(rows("imagined_change_rank", "deciding cells", patient, rank))
    share = numbers.abs() / numbers.abs().sum(1, keepdim=True).clamp_min(1e-12)
    found += by_part("action_share", "", patient, share, poses.AXES)
    return pd.concat(found, ignore_index=True)


# Attention


@torch.no_grad()
def attention(seen: View) -> pd.DataFrame:
    """How selective attention is, and what a motion does to it.

    - attention_spread [layer | head]: effective share of tokens, the exponential of the entropy of
      a token's attention over the number of tokens, mean over the map's tokens; 1 is even.
    - attention_to_action [still | motion]: the map tokens' weight on the action token, over an
      even weight; mean over layers, heads and tokens.
    - attention_shift [rollout | action attention]: total variation distance between the grids
      without and with the motion; [... of frames]: between the grids of two frames.
    """
    model, sample, features, *_ = seen
    action, tables = sample.action.to(features), []
    grids = {(kind, state): [] for kind in ATTENTION for state in ("still", "motion")}
    for x, a, patient in _parts(model, features, action, sample.patient):
        for state, motion in (("still", torch.zeros_like(a)), ("motion", a)):
            weights = attribution.attention(model, x, motion)  # [layers, B, heads, N, N]
            own = weights[..., 1:, :]  # rows of the map's tokens
            even = own[..., 0].mean((0, 2, 3)) * own.shape[-1]
            tables.append(rows("attention_to_action", state, patient, even.cpu()))
            for kind in ATTENTION:
                grids[kind, state].append(attribution.on_grid(weights, x, model, kind).cpu())
            if state == "still":
                entropy = -(own * own.clamp_min(1e-12).log()).sum(-1).mean(-1)
                spread = (entropy.exp() / own.shape[-1]).cpu()  # [layers, B, heads]
                tables += [
                    rows("attention_spread", f"{k + 1} | {h + 1}", patient, spread[k, :, h])
                    for k in range(spread.shape[0])
                    for h in range(spread.shape[2])
                ]
    for kind in ATTENTION:
        still, motion = (torch.cat(grids[kind, state]) for state in ("still", "motion"))
        still, motion = (g / g.sum((1, 2), keepdim=True) for g in (still, motion))
        for name, other in ((kind, motion), (f"{kind} of frames", still.roll(1, 0))):
            distance = (still - other).abs().sum((1, 2)) / 2
            tables.append(rows("attention_shift", name, sample.patient, distance))
    return pd.concat(tables, ignore_index=True)


def _parts(model: CardiacDreamer, features: Tensor, action: Tensor, patient: NDArray):
    """Few enough frames for all attention weights at once."""
    few = attribution.frames_at_once(model, recorded=True)
    for start in range(0, len(features), few):
        part = slice(start, start + few)
        yield features[part], action[part], patient[part]
