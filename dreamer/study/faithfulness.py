"""Tests of maps: does a map show what the model's prediction depends on?

Deletion and insertion (Petsiuk et al., BMVC 2018), infidelity and max-sensitivity (Yeh et al.,
NeurIPS 2019), randomised weights (Adebayo et al., NeurIPS 2018), rank agreement between methods,
seeds and variants, and, on the phantom, the scores of `ground_truth`. Beside every score stand
controls that know nothing of the model: a random map, the edges of the frame, its centre.
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
from scipy.stats import rankdata
from torch import Tensor
from tqdm.auto import tqdm

from dreamer.attribution import (
    ATTENTION,
    METHODS,
    CellGame,
    Head,
    attention_grid,
    attribute,
    baseline_map,
    choose,
    encode,
    frames_at_once,
)
from dreamer.model import CardiacDreamer, as_input
from dreamer.study import stats
from dreamer.study.ground_truth import Anatomy, Sample, against_truth

CONTROLS = ("random", "edges", "centre")
SLOW = ("Shapley", "ablation", "occlusion")  # one pass per cell, or more
QUICK = (*(m for m in METHODS if m not in SLOW), *ATTENTION)
LEFT = 0.3  # rank correlation with the trained map that may remain under random weights
BETTER = {  # measure: whether more or less of it is better
    "deletion": "more",
    "insertion": "less",
    "infidelity": "less",
    "sensitivity": "less",
    "counterfactual": "more",
    "decisive": "more",
    "pointing": "more",
    "mass": "more",
    "rank": "more",
}


class View(NamedTuple):
    """A sample through a model: `features` [N, C, h, w] and the `baseline` [1 or N, C, h, w] that
    hidden cells show, computed once."""

    model: CardiacDreamer
    sample: Sample
    features: Tensor
    baseline: Tensor

    def take(self, rows: slice | Sequence[int]) -> "View":
        """The view of fewer frames."""
        base = self.baseline if len(self.baseline) == 1 else self.baseline[rows]
        return View(self.model, self.sample.take(rows), self.features[rows], base)


def view(model: CardiacDreamer, sample: Sample, baseline: str = "mean") -> View:
    """The `View` of a sample; `baseline` is one of attribution.BASELINES."""
    base = baseline_map(model, baseline, sample.images, sample.training)
    return View(model, sample, encode(model, sample.images), base)


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


def maps(
    seen: View,
    methods: Sequence[str],
    target: str,
    steps: int = 16,
    seed: int = 0,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """Grids [N, h, w] for one target, by method; attention and controls are the same for all."""
    model, sample, features, base = seen
    grids = {}
    for method in tqdm(methods, desc=progress, leave=False, disable=progress is None):
        if method in METHODS:
            grid = attribute(
                model, features, target, method, base, sample.images, steps=steps, seed=seed
            )
        elif method in ATTENTION:
            grid = attention_grid(model, features, method)
        else:
            grid = control(method, sample.images, features.shape[2:], seed)
        grids[method] = grid.cpu()
    return grids


# Scores without anatomy


@torch.no_grad()
def _play(seen: View, target: str, mask: Tensor) -> Tensor:
    """The prediction [N] with the cells of `mask` [N, 1, h, w] from the frame, others' baseline."""
    game, base = CellGame(Head(seen.model, target)), seen.baseline.expand_as(seen.features)
    size = frames_at_once(seen.model)
    parts = zip(mask.split(size), seen.features.split(size), base.split(size), strict=True)
    return torch.cat([game(*part) for part in parts]).cpu()


def curves(
    seen: View,
    grid: Tensor,
    target: str,
    points: int = 0,
    ends: tuple[Tensor, Tensor] | None = None,
) -> tuple[NDArray, NDArray, NDArray]:
    """Shares [K] of cells, deletion and insertion [N, K] for a map [N, h, w].

    Deletion: |f(frame) - f(that share hidden)|; insertion: |f(frame) - f(only that share shown)|,
    in mm or deg; cells in the order of |map|, ties at random. `points`: numbers of cells to try,
    denser at the start; 0 tries every one. `ends`: predictions for frame and baseline, if known. A
    faithful map has a high deletion curve and a low insertion curve.
    """
    n, (h, w) = len(grid), grid.shape[1:]
    counts = np.unique(np.geomspace(1, h * w, points or 4 * h * w).round().astype(int))
    shuffled = torch.randperm(h * w, generator=torch.Generator().manual_seed(0))
    magnitude = grid.detach().abs().cpu().flatten(1)[:, shuffled]
    order = shuffled[magnitude.argsort(dim=1, descending=True, stable=True)]
    place = order.argsort(dim=1).view(n, 1, h, w).to(seen.features.device)
    whole, empty = ends or whole_and_empty(seen, target)
    hidden = [_play(seen, target, (place >= k).float()) for k in counts[:-1]]
    shown = [_play(seen, target, (place < k).float()) for k in counts[:-1]]
    deletion = (torch.stack([whole, *hidden, empty], 1) - whole[:, None]).abs()
    insertion = (torch.stack([empty, *shown, whole], 1) - whole[:, None]).abs()
    return np.concatenate(([0], counts)) / (h * w), deletion.numpy(), insertion.numpy()


def whole_and_empty(seen: View, target: str) -> tuple[Tensor, Tensor]:
    """The predictions [N] for the frames and for the baseline alone."""
    ones = torch.ones_like(seen.features[:, :1])
    return _play(seen, target, ones), _play(seen, target, torch.zeros_like(ones))


@torch.no_grad()
def squared_error(
    seen: View, attribution: Tensor, target: str, normalize: bool, samples: int = 8, seed: int = 0
) -> Tensor:
    """Captum's `infidelity` [N] of a map [N, h, w] over random masks of cells, the same for all."""
    from captum.metrics import infidelity as captum_infidelity

    game, features = CellGame(Head(seen.model, target)), seen.features
    draw = torch.Generator().manual_seed(seed)

    def hide(mask: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.rand(len(mask), 1, 1, 1, generator=draw) / 2
        hidden = (torch.rand(mask.shape, generator=draw) < share).to(mask)
        return hidden, mask - hidden

    return captum_infidelity(
        game,
        hide,
        torch.ones_like(features[:, :1]),
        attribution[:, None].to(features),
        additional_forward_args=(features, seen.baseline.expand_as(features)),
        n_perturb_samples=samples,
        max_examples_per_batch=max(len(features), frames_at_once(seen.model)),
        normalize=normalize,
    ).cpu()


def infidelity(seen: View, grid: Tensor, target: str, change: Tensor | None = None) -> Tensor:
    """Share [N] of the prediction's change under random hiding of cells that a map [N, h, w] fails
    to predict: 0 predicts all of it, 1 nothing. `change`: the mean squared change, if known."""
    if change is None:
        change = mean_squared_change(seen, target)
    return squared_error(seen, grid, target, True) / change.clamp_min(1e-20)


def mean_squared_change(seen: View, target: str) -> Tensor:
    """Mean squared change [N] of the prediction under the masks of `infidelity`."""
    zero = seen.features.new_zeros(len(seen.features), *seen.features.shape[2:])
    return squared_error(seen, zero, target, False)


def sensitivity(
    seen: View, method: str, target: str, radius: float = 0.1, samples: int = 4, seed: int = 0
) -> Tensor:
    """Largest relative change [N] of a map under small noise on the feature map: Captum's
    `sensitivity_max`; `radius` in standard deviations of the maps."""
    from captum.metrics import sensitivity_max

    def explain(features: Tensor | tuple[Tensor]) -> tuple[Tensor]:
        x = features[0] if isinstance(features, tuple) else features
        repeat = len(x) // len(seen.baseline) if len(seen.baseline) > 1 else 1
        base = seen.baseline.repeat_interleave(repeat, 0)
        noisy = View(seen.model, seen.sample, x, base)
        return (maps(noisy, [method], target, steps=8, seed=seed)[method].flatten(1),)

    draw = torch.Generator().manual_seed(seed)

    def add_noise(features: Tensor | tuple[Tensor], reach: float) -> tuple[Tensor]:
        x = features[0] if isinstance(features, tuple) else features
        return (x + torch.empty(x.shape).uniform_(-reach, reach, generator=draw).to(x),)

    return sensitivity_max(
        explain,
        seen.features,
        add_noise,
        perturb_radius=radius * float(seen.features.std()),
        n_perturb_samples=samples,
    )


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
    """(stage, model) with weights drawn anew from the guidance head down to the backbone's first
    stage, each stage on top of those before; the given model is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10**6 + seed)  # not the draw that a run with this seed started from
        fresh = CardiacDreamer(model.config.model_copy(update={"weights": "none"}))
    net = copy.deepcopy(model)
    stages = [("guidance", r"(head|pooling)\.")]
    if model.world is not None:
        blocks = range(len(model.world.blocks), 0, -1)
        stages += [("map heads", r"world\.tokens\.(\w+\.)?heads\.")]
        stages += [(f"block {i}", rf"world\.blocks\.{i - 1}\.") for i in blocks]
        stages += [("embedding", r"world\.")]
    count = range(len(model.backbone.stages), 0, -1)
    stages += [(f"backbone {i}", rf"backbone\.stages\.{i - 1}\.") for i in count]
    for name, prefix in stages:
        state = {k: v for k, v in fresh.state_dict().items() if re.match(prefix, k)}
        net.load_state_dict(state, strict=False)
        yield name, net.eval()


# Tables


def rows(patient: NDArray, values, **names: str | float) -> pd.DataFrame:
    """One row per frame: patient, frame, `names`, value, for `values` [N]."""
    values = np.asarray(values, dtype=float)
    table = pd.DataFrame({"patient": patient, "frame": np.arange(len(values))})
    return table.assign(**names, value=values)


def score(
    seen: View,
    grids: Mapping[str, Tensor],
    target: str,
    anatomy: Anatomy | None = None,
    moved: Tensor | None = None,
    points: int = 4,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of all maps (patient, frame, method, measure, value), and their curves (with kind and
    share in place of measure).

    deletion and insertion are areas under curves that are relative to the mean distance between
    the predictions for frames and baseline. The measures of `against_truth` need `anatomy` and
    `moved` [N, structures].
    """
    patient, scores, lines = seen.sample.patient, [], []
    ends, change = whole_and_empty(seen, target), mean_squared_change(seen, target)
    for method, grid in grids.items():
        share, hidden, shown = curves(seen, grid, target, points, ends)
        scale = hidden[:, -1].mean()
        for kind, line in (("deletion", hidden / scale), ("insertion", shown / scale)):
            area = np.trapezoid(line, share, axis=1)
            scores.append(rows(patient, area, method=method, measure=kind))
            lines += [
                rows(patient, line[:, k], method=method, kind=kind, share=share[k])
                for k in range(len(share))
            ]
        missed = infidelity(seen, grid, target, change)
        scores.append(rows(patient, missed, method=method, measure="infidelity"))
        if anatomy is not None:
            for measure, value in against_truth(grid, anatomy, moved).items():
                scores.append(rows(patient, value, method=method, measure=measure))
    return pd.concat(scores, ignore_index=True).dropna(subset="value"), pd.concat(lines)


def randomisation(
    seen: View, methods: Sequence[str], target: str, seed: int = 0, progress: str | None = None
) -> pd.DataFrame:
    """Rank agreement with the trained map under `randomised` weights, one row per frame: patient,
    frame, method, stage, depth (1 is the guidance head), value."""
    trained, found = maps(seen, methods, target), []
    stages = tqdm(
        randomised(seen.model, seed), desc=progress, leave=False, disable=progress is None
    )
    for depth, (stage, net) in enumerate(stages, 1):
        other = view(net, seen.sample) if "backbone" in stage else seen._replace(model=net)
        for method, grid in maps(other, methods, target).items():
            value = rank_correlation(trained[method], grid)
            names = {"method": method, "stage": stage, "depth": depth}
            found.append(rows(seen.sample.patient, value, **names))
    return pd.concat(found, ignore_index=True)


def agreement(
    grids: Mapping[str, Mapping[str, Tensor]], variants: Mapping[str, str], patient: NDArray
) -> pd.DataFrame:
    """Rank agreement of maps: kind, variant, method, other, patient, frame, value.

    kind methods: two methods of one run; seeds: one method, two runs of a variant; variants: one
    method, a run of each. `grids`: run -> method -> map; `variants`: run -> its token type.
    """
    found = []

    def add(kind: str, variant: str, method: str, other: str, value: NDArray) -> None:
        names = {"kind": kind, "variant": variant, "method": method, "other": other}
        found.append(rows(patient, value, **names))

    ranked = {run: {m: ranks(g) for m, g in each.items()} for run, each in grids.items()}
    for run, each in ranked.items():
        for one, two in itertools.combinations(each, 2):
            add("methods", variants[run], one, two, (each[one] * each[two]).sum(1))
    for run, other in itertools.combinations(ranked, 2):
        same = variants[run] == variants[other]
        kind, variant = ("seeds", variants[run]) if same else ("variants", "both")
        for method in ranked[run]:
            if method not in CONTROLS:
                value = (ranked[run][method] * ranked[other][method]).sum(1)
                add(kind, variant, method, method, value)
    return pd.concat(found, ignore_index=True).dropna(subset="value")


def summarise(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Means of `value` by the columns `by` with 95% intervals over seeds and patients: adds
    estimate, low, high, seeds, patients. Patients that a seed lacks are left out."""
    found = []
    for key, part in table.groupby(list(by), sort=False):
        part = part if "seed" in part else part.assign(seed=0)
        cells = part.pivot_table("value", "seed", "patient", "mean").dropna(axis=1)
        found.append((*key, *stats.interval(cells)._asdict().values()))
    columns = [*by, *stats.Interval._fields]
    return pd.DataFrame(found, columns=columns).drop(columns="df")


def cells(table: pd.DataFrame, **where: str) -> pd.DataFrame:
    """The matrix [seeds, patients] of mean values of the rows with these values in other columns;
    patients that a seed lacks are left out."""
    for column, value in where.items():
        table = table[table[column] == value]
    return table.pivot_table("value", "seed", "patient", "mean").dropna(axis=1)
