"""Tests of maps: does a map show what the model's prediction depends on?

Deletion and insertion (Petsiuk et al., BMVC 2018), infidelity and max-sensitivity (Yeh et al.,
NeurIPS 2019), randomised weights (Adebayo et al., NeurIPS 2018) with the smoothed and the
efficient variant (Hedström et al., "A Fresh Look at Sanity Checks for Saliency Maps", xAI 2024),
agreement between methods and between the measures themselves (after LATEC: Klein et al., NeurIPS
2024). Beside every score stand controls that know nothing of the model: random maps, the edges of
the frame, its centre.
"""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import entropy, rankdata, spearmanr
from torch import Tensor

from dreamer.attribution import (
    ATTENTION,
    METHODS,
    attention_grid,
    attribute,
    baseline_map,
    choose,
    encode,
    frames_at_once,
    pose_target,
)
from dreamer.model import CardiacDreamer, as_input
from dreamer.study.ground_truth import Sample

CONTROLS = ("random", "edges", "centre")
DRAWS = 5  # random maps, the null of every score
SLOW = ("Shapley", "ablation", "occlusion")  # one pass per cell, or more
QUICK = (*ATTENTION, *(m for m in METHODS if m not in SLOW))
STAGES = ("guidance", "transformer", "all")  # weights drawn anew, from the head downwards
BINS = 10  # of the histogram behind `complexity`
BETTER = {  # measure: 1 where more of it is better, -1 where less is
    "deletion": 1,
    "insertion": -1,
    "frame_deletion": 1,
    "frame_insertion": -1,
    "infidelity": -1,
    "max_sensitivity": -1,
    "randomisation_rank": -1,
    "randomisation_smooth_rank": -1,
    "randomisation_complexity_rise": 1,
    "counterfactual_rank": 1,
    "decisive": 1,
    "pointing": 1,
}


class View(NamedTuple):
    """A sample through a model: `features` [N, C, h, w], the `baseline` [1 or N, C, h, w] that
    hidden cells show, and maps of `training` frames [M, C, h, w], computed once."""

    model: CardiacDreamer
    sample: Sample
    features: Tensor
    baseline: Tensor
    training: Tensor

    def take(self, rows: slice | Sequence[int]) -> "View":
        """The view of fewer frames."""
        base = self.baseline if len(self.baseline) == 1 else self.baseline[rows]
        return self._replace(
            sample=self.sample.take(rows), features=self.features[rows], baseline=base
        )


def view(model: CardiacDreamer, sample: Sample, baseline: str = "mean") -> View:
    """The `View` of a sample; `baseline` is one of attribution.BASELINES."""
    base = baseline_map(model, baseline, sample.images, sample.training)
    return View(model, sample, encode(model, sample.images), base, encode(model, sample.training))


def control(name: str, images: Tensor, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Maps [N, h, w] that know nothing of the model: random, the frame's edges, the centre."""
    n, (h, w) = len(images), grid
    if choose(name, "control", CONTROLS) == "random":
        return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed))
    if name == "centre":
        y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        return torch.exp(-2 * (x**2 + y**2)).expand(n, h, w)
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    edges = F.conv2d(as_input(images), torch.stack((sobel, sobel.T))[:, None], padding=1)
    return F.adaptive_avg_pool2d(edges.norm(dim=1), grid)


def maps(seen: View, method: str, targets: Sequence[str], steps: int = 16, seed: int = 0) -> Tensor:
    """Grids [targets, N, h, w] of one of METHODS, ATTENTION or CONTROLS, on the CPU; attention and
    controls are the same for every target."""
    model, sample, features, base, training = seen
    if method in METHODS:
        base = training if method == "GradientShap" else base
        grid = attribute(
            model, features, targets, method, base, sample.images, steps=steps, seed=seed
        )
    elif method in ATTENTION:
        grid = attention_grid(model, features, method).expand(len(targets), -1, -1, -1)
    else:
        grid = control(method, sample.images, features.shape[2:], seed)
        grid = grid.expand(len(targets), -1, -1, -1)
    return grid.detach().cpu()


# Scores without anatomy


@torch.no_grad()
def play(seen: View, mask: Tensor, on: str = "map") -> Tensor:
    """Poses [..., N, 6] predicted with the cells of `mask` [..., N, h, w] as they are and the
    others hidden: by the baseline on the feature map, by a grey box on the frame."""
    model, n = seen.model, len(seen.features)
    if choose(on, "on", ("map", "frame")) == "map":
        given, nothing = seen.features, seen.baseline.expand_as(seen.features)
    else:
        given = as_input(seen.sample.images).to(seen.features)
        nothing = model.image_mean.expand_as(given)
    flat = mask.to(given).reshape(-1, 1, *mask.shape[-2:])
    size, poses = frames_at_once(model), []
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        row = torch.arange(start, start + len(part), device=part.device) % n
        if on == "frame":
            part = F.interpolate(part, given.shape[-2:], mode="nearest")
        mixed = torch.lerp(nothing[row], given[row], part)
        features = model.encode(mixed) if on == "frame" else mixed
        poses.append(model.imagine(features, mixed.new_zeros(len(part), 6)).pose.cpu())
    return torch.cat(poses).view(*mask.shape[:-2], 6)


def curves(
    seen: View,
    grid: Tensor,
    targets: Sequence[str],
    points: int = 0,
    ends: tuple[Tensor, Tensor] | None = None,
    on: str = "map",
) -> tuple[NDArray, NDArray, NDArray]:
    """Shares [K] of cells, deletion and insertion [targets, N, K] for a map [N, h, w].

    Deletion: |f(frame) - f(that share hidden)|; insertion: |f(frame) - f(only that share shown)|,
    in mm or deg; cells in the order of |map|, ties at random. `points`: numbers of cells to try,
    denser at the start; 0 tries every one. `ends`: poses for frame and baseline, if known. `on`:
    the feature map or the frame, see `play`. A faithful map has a high deletion curve and a low
    insertion curve.
    """
    n, (h, w) = len(grid), grid.shape[1:]
    counts = np.unique(np.geomspace(1, h * w, points or 4 * h * w).round().astype(int))
    shuffled = torch.randperm(h * w, generator=torch.Generator().manual_seed(0))
    magnitude = grid.detach().abs().cpu().flatten(1)[:, shuffled]
    order = shuffled[magnitude.argsort(dim=1, descending=True, stable=True)]
    place = order.argsort(dim=1).view(n, h, w)
    whole, empty = ends or whole_and_empty(seen, on)
    first = torch.stack([place < k for k in counts[:-1].tolist()])  # [K - 1, N, h, w]
    hidden, shown = play(seen, torch.stack((~first, first)), on)
    lines = []
    for poses in (torch.stack([whole, *hidden, empty]), torch.stack([empty, *shown, whole])):
        change = [(pose_target(poses, t) - pose_target(whole, t)).abs().T for t in targets]
        lines.append(torch.stack(change).numpy())
    return np.concatenate(([0], counts)) / (h * w), *lines


def whole_and_empty(seen: View, on: str = "map") -> tuple[Tensor, Tensor]:
    """The poses [N, 6] for the frames and for the baseline, or grey, alone."""
    ones = torch.ones(len(seen.features), *seen.features.shape[2:])
    return tuple(play(seen, torch.stack((ones, 0 * ones)), on))


def hide_at_random(seen: View, samples: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random sets of hidden cells [samples, h, w], up to half of them, and the poses
    [samples, N, 6] that are predicted then."""
    n, (h, w) = len(seen.features), seen.features.shape[2:]
    draw = torch.Generator().manual_seed(seed)
    share = torch.rand(samples, 1, 1, generator=draw) / 2
    hidden = torch.rand(samples, h, w, generator=draw) < share
    return hidden, play(seen, (~hidden)[:, None].expand(-1, n, -1, -1))


def infidelity(grid: Tensor, hidden: Tensor, change: Tensor) -> Tensor:
    """Share [N] of the prediction's change under random hiding of cells that a map [N, h, w] fails
    to predict: 0 predicts all of it, 1 nothing, whatever the map's scale.

    `hidden` [samples, h, w] cells, `change` [samples, N] of the prediction. This is Captum's
    `infidelity` with normalize=True over the mean squared change; the masks are shared by all maps.
    """
    predicted = torch.einsum("shw,nhw->sn", hidden.to(grid), grid)
    change = change.to(grid)
    scale = (predicted * change).sum(0) / (predicted**2).sum(0).clamp_min(1e-20)
    missed = (scale * predicted - change).square().mean(0)
    return missed / change.square().mean(0).clamp_min(1e-20)


def complexity(grid: Tensor) -> NDArray:
    """Entropy [N] in nats of the histogram of a map's signed values [N, h, w], BINS bins over its
    own range: 0 for a flat map, log(BINS) where values are spread evenly (Hedström et al. 2024)."""
    counts = [np.histogram(values, BINS)[0] for values in grid.flatten(1).double().numpy()]
    return entropy(counts, axis=1)


def ranks(grid: Tensor) -> NDArray:
    """Ranks of the magnitudes of maps [N, ...] as vectors [N, cells] of mean zero and length one;
    NaN where a map is flat."""
    found = rankdata(grid.detach().abs().cpu().flatten(1).numpy(), axis=1)
    found = found - found.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return found / np.sqrt((found**2).sum(1, keepdims=True))


def rank_correlation(one: Tensor, other: Tensor) -> NDArray:
    """Spearman correlation [N] between the magnitudes of maps [N, ...]; NaN where one is flat."""
    return (ranks(one) * ranks(other)).sum(1)


def randomised(model: CardiacDreamer, seed: int = 0) -> Iterator[tuple[str, CardiacDreamer]]:
    """(stage, model) with weights drawn anew from the guidance head down, each of STAGES on top of
    those before; the given model is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10**6 + seed)  # not the draw that a run with this seed started from
        fresh = CardiacDreamer(model.config.model_copy(update={"weights": "none"}))
    net = copy.deepcopy(model)
    for stage, prefix in zip(STAGES, (r"(head|pooling)\.", r"world\.", r"backbone\."), strict=True):
        state = {k: v for k, v in fresh.state_dict().items() if re.match(prefix, k)}
        net.load_state_dict(state, strict=False)
        yield stage, net.eval()


# Tables: measure, condition, patient, value


def rows(measure: str, condition: str, patient: NDArray, values) -> pd.DataFrame:
    """One row per frame of `values` [N]."""
    value = np.asarray(values, dtype=float)
    return pd.DataFrame(
        {"measure": measure, "condition": condition, "patient": patient, "value": value}
    )


def faithful(
    seen: View, grids: Mapping[str, Tensor], targets: Sequence[str], points: int = 4
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of maps, method -> [targets, N, h, w], and the curves behind the first two of them
    (columns kind, method, target, share, patient, value).

    - deletion, insertion: areas under curves that are relative to the mean distance between the
      predictions for frames and baseline; frame_deletion, frame_insertion: the same with boxes on
      the frame, for the first target.
    - infidelity, see there.
    """
    patient, found, lines = seen.sample.patient, [], []
    ends = {on: whole_and_empty(seen, on) for on in ("map", "frame")}
    hidden, poses = hide_at_random(seen)
    for method, each in grids.items():
        same = all(torch.equal(each[0], grid) for grid in each[1:])  # one map for every target
        for k, target in enumerate(targets):
            name = f"{method} | {target}"
            change = pose_target(ends["map"][0], target) - pose_target(poses, target)
            found.append(rows("infidelity", name, patient, infidelity(each[k], hidden, change)))
            if k == 0 or not same:
                share, *both = curves(seen, each[k], targets, points, ends["map"])
            played = {"deletion": both[0][k], "insertion": both[1][k]}
            if k == 0:
                _, *both_on_frame = curves(seen, each[k], [target], points, ends["frame"], "frame")
                played |= {
                    "frame_deletion": both_on_frame[0][0],
                    "frame_insertion": both_on_frame[1][0],
                }
            for kind, line in played.items():
                deleted = played["frame_deletion" if "frame" in kind else "deletion"]
                line = line / deleted[:, -1].mean()
                found.append(rows(kind, name, patient, np.trapezoid(line, share, axis=1)))
                names = {"kind": kind, "method": method, "target": target}
                table = pd.DataFrame(line, columns=share).assign(patient=patient, **names)
                lines.append(table.melt([*names, "patient"], var_name="share"))
    return pd.concat(found, ignore_index=True), pd.concat(lines, ignore_index=True)


def robust(
    seen: View,
    methods: Sequence[str],
    target: str,
    noise: int = 2,
    radius: float = 0.1,
    steps: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """How maps answer to noise and to random weights, condition "method | target".

    - max_sensitivity: the largest relative change of a map under `noise` draws of uniform noise on
      the feature map, up to `radius` standard deviations.
    - randomisation_rank: rank correlation with the trained map where weights of a stage (in the
      condition) are drawn anew; for the last of STAGES the stage is left out.
    - randomisation_smooth_rank: the same for maps averaged over the noise.
    - randomisation_complexity_rise: relative rise of `complexity` when all weights are random.
    """
    patient = seen.sample.patient

    def both(seen: View, method: str) -> tuple[Tensor, Tensor]:
        """The map [N, h, w] and the maps under noise [noise, N, h, w]."""
        generator = torch.Generator().manual_seed(seed)
        reach = radius * float(seen.features.std())
        noisy = []
        for _ in range(noise):
            shift = torch.rand(seen.features.shape, generator=generator).mul(2).sub(1)
            moved = seen._replace(features=seen.features + reach * shift.to(seen.features))
            noisy.append(maps(moved, method, [target], steps, seed)[0])
        return maps(seen, method, [target], steps, seed)[0], torch.stack(noisy)

    trained = {method: both(seen, method) for method in methods}
    found = []
    for method, (grid, noisy) in trained.items():
        gap = (noisy - grid).flatten(2).norm(dim=2) / grid.flatten(1).norm(dim=1).clamp_min(1e-12)
        found.append(rows("max_sensitivity", f"{method} | {target}", patient, gap.amax(0)))
    for stage, net in randomised(seen.model, seed):
        last = stage == STAGES[-1]
        other = view(net, seen.sample) if last else seen._replace(model=net)
        for method, (grid, noisy) in trained.items():
            name = f"{method} | {target}"
            if not last:
                drawn = maps(other, method, [target], steps, seed)[0]
                rank = rank_correlation(grid, drawn)
                found.append(rows("randomisation_rank", f"{name} | {stage}", patient, rank))
                continue
            drawn, soft = both(other, method)
            before = complexity(grid)
            rise = complexity(drawn) / np.where(before > 0, before, np.nan) - 1  # flat: undefined
            values = {
                "randomisation_rank": rank_correlation(grid, drawn),
                "randomisation_smooth_rank": rank_correlation(noisy.mean(0), soft.mean(0)),
                "randomisation_complexity_rise": rise,
            }
            found += [rows(measure, name, patient, value) for measure, value in values.items()]
    return pd.concat(found, ignore_index=True)


def map_agreement(
    grids: Mapping[str, Tensor], targets: Sequence[str], patient: NDArray
) -> pd.DataFrame:
    """Rank correlation of the magnitudes of two methods' maps [targets, N, h, w], condition
    "one | other | target"; random maps are left out."""
    found = []
    names = [name for name in grids if not name.startswith("random")]
    ranked = {name: list(map(ranks, grids[name])) for name in names}
    for one, other in itertools.combinations(names, 2):
        for target, a, b in zip(targets, ranked[one], ranked[other], strict=True):
            name = f"{one} | {other} | {target}"
            found.append(rows("map_agreement", name, patient, (a * b).sum(1)))
    return pd.concat(found, ignore_index=True)


def score_matrix(table: pd.DataFrame, target: str) -> pd.DataFrame:
    """Mean scores by method (rows) and measure of BETTER (columns) for one target, controls
    included, as they are."""
    part = table[table["measure"].isin(BETTER) & table["condition"].str.endswith(f" | {target}")]
    method = part["condition"].str.removesuffix(f" | {target}")
    wide = part.pivot_table("value", method.rename("method"), "measure")
    return wide[[measure for measure in BETTER if measure in wide]]


def score_ranks(wide: pd.DataFrame) -> pd.DataFrame:
    """Ranks of the rows of a `score_matrix` on each measure, 1 the best."""
    return (wide * pd.Series(BETTER).reindex(wide.columns)).rank(ascending=False)


def metric_agreement(wide: pd.DataFrame) -> pd.DataFrame:
    """Do two measures rank the methods alike? Spearman correlation of their rankings of all
    methods but the controls, condition "one | other"; NaN under four methods, or all alike."""
    ranked = score_ranks(wide.drop(index=list(CONTROLS), errors="ignore"))
    found = []
    for one, other in itertools.combinations(ranked, 2):
        both = ranked[[one, other]].dropna()
        tells = len(both) > 3 and both.nunique().min() > 1
        value = spearmanr(both[one], both[other]).statistic if tells else np.nan
        found.append(rows("metric_agreement", f"{one} | {other}", np.array([""]), [value]))
    return pd.concat(found, ignore_index=True)
