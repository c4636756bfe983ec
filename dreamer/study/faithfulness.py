"""Whether a map of what a model looks at is to be believed.

Deletion and insertion (Petsiuk et al., BMVC 2018), infidelity and max-sensitivity (Yeh et al.,
NeurIPS 2019), randomised weights (Adebayo et al., NeurIPS 2018), rank agreement between methods,
seeds and variants, and, where the anatomy is known, the scores of `truth`. Beside every score stand
controls that know nothing of the model.
"""

import copy
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from captum.metrics import sensitivity_max
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from tqdm.auto import tqdm

from dreamer.attribution import (
    ATTENTION,
    BASELINES,
    LIMIT,
    METHODS,
    answer,
    attention,
    attention_grid,
    attribute,
    baseline_map,
    encode,
    known,
    parts_of,
    rows_at_once,
)
from dreamer.study.accuracy import bootstrap
from dreamer.model import CardiacDreamer
from dreamer.phantom import crew
from dreamer.study.ground_truth import Anatomy, Sample, against_truth

CONTROLS = ("random", "edges", "centre")
PASS = 0.3  # rank correlation with the trained map that may be left when nothing trained is
CLAIMS = {  # measure: what it would mean for patch tokens to be ahead
    "counterfactual": "better spatial understanding: maps tell which structures move the answer",
    "decisive": "better spatial understanding: the top cell holds the decisive structure",
    "mass": "better spatial understanding: relevance lies on the heart",
    "deletion": "better spatial understanding: the cells named carry the answer",
}
SLOW = ("shapley", "ablation", "occlusion")  # a pass for every cell, or many
STANDARD = (*(m for m in METHODS if m not in SLOW), *ATTENTION)
_DRAWING = threading.Lock()  # weights come from the generator that all threads share
MEASURES = {  # name: what more of it means
    "deletion": 1, "insertion": -1, "infidelity": -1,
    "counterfactual": 1, "decisive": 1, "pointing": 1, "mass": 1, "rank": 1,
}  # fmt: skip


def control(name: str, images: Tensor, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Maps [N, h, w] that know nothing of the model: random, the frame's edges, the centre."""
    n, (h, w) = len(images), grid
    if known(name, "control", CONTROLS) == "random":
        return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed))
    if name == "centre":
        y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        return torch.exp(-2 * (x**2 + y**2)).expand(n, h, w)
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    edges = F.conv2d(images.float(), torch.stack((sobel, sobel.T))[:, None], padding=1)
    return F.adaptive_avg_pool2d(edges.norm(dim=1), grid)


def ranks(maps: Tensor) -> NDArray:
    """Ranks of the magnitudes of maps [N, ...] as vectors [N, cells] of mean zero and length one;
    nan where a map is flat."""
    found = rankdata(maps.detach().abs().cpu().flatten(1).numpy(), axis=1)
    found = found - found.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return found / np.sqrt((found**2).sum(1, keepdims=True))


def rank_correlation(one: Tensor, other: Tensor) -> NDArray:
    """Spearman correlation [N] between the magnitudes of maps [N, ...]; nan where one is flat."""
    return (ranks(one) * ranks(other)).sum(1)


@torch.no_grad()
def posed(model: CardiacDreamer, features: Tensor, baseline: Tensor, mask: Tensor) -> Tensor:
    """Poses [N, 6] with the cells of `mask` [N, 1, h, w] from the frame, the others' baseline."""
    base, found = baseline.expand_as(features), []
    for p in parts_of(len(features), rows_at_once(model), None):
        seen = torch.lerp(base[p], features[p], mask[p])
        found.append(model.imagine(seen, seen.new_zeros(len(seen), 6)).pose)
    return torch.cat(found)


@torch.no_grad()
def curves(
    model: CardiacDreamer,
    features: Tensor,
    grids: Mapping[tuple[str, str], Tensor],
    targets: Sequence[str],
    baseline: Tensor,
    points: int = 0,
    progress: str | None = None,
) -> tuple[NDArray, dict[tuple[str, str], Tensor]]:
    """Shares [K] of cells, and for each map and target [2, N, K] how far the answer lies from the
    whole frame's, mm or deg: deletion, that share hidden, and insertion, only that share shown.

    `grids` [N, h, w] by method and target, or "any"; greatest |value| first, ties fall at random.
    `points`: cell counts to try, denser at the start; 0 tries every one. A true map has a high
    deletion curve and a low insertion curve.
    """
    n, (h, w) = len(features), features.shape[2:]
    counts = np.unique(np.geomspace(1, h * w, points or 4 * h * w).round().astype(int))
    shuffled = torch.randperm(h * w, generator=torch.Generator().manual_seed(0))
    whole, empty = (
        posed(model, features, baseline, features.new_full((n, 1, h, w), shown))
        for shown in (1, 0)
    )  # fmt: skip
    found = {}
    for (method, own), grid in tqdm(
        grids.items(), desc=progress, leave=False, disable=progress is None
    ):
        magnitude = grid.detach().abs().cpu().flatten(1)[:, shuffled]
        order = shuffled[magnitude.argsort(dim=1, descending=True, stable=True)]
        place = order.argsort(dim=1).view(n, 1, h, w).to(features.device)
        hidden = [(place >= c, place < c) for c in counts[:-1]]
        lines = torch.stack([
            torch.stack([posed(model, features, baseline, mask.float()) for mask in pair])
            for pair in hidden
        ], dim=2)  # [2, N, K - 2, 6]  # fmt: skip
        ends = [torch.stack(pair)[:, :, None] for pair in ((whole, empty), (empty, whole))]
        lines = torch.cat((ends[0], lines, ends[1]), dim=2)
        for target in targets if own == "any" else [own]:
            away = answer(lines, target) - answer(whole, target)[:, None]
            found[method, target] = away.abs().cpu()
    return np.concatenate(([0], counts)) / (h * w), found


@torch.no_grad()
def infidelity(
    model: CardiacDreamer,
    features: Tensor,
    grids: Mapping[tuple[str, str], Tensor],
    targets: Sequence[str],
    baseline: Tensor,
    samples: int = 8,
    seed: int = 0,
) -> dict[tuple[str, str], Tensor]:
    """Share [N] of the answer's change under random hiding that each map fails to predict.

    Captum's `infidelity(normalize=True)` over masks of cells, the same masks for every map of
    `grids` (by method and target, or "any"), relative to the mean squared change: 0 predicts all of
    it, 1 none.
    """
    n, (h, w) = len(features), features.shape[2:]
    draw = torch.Generator().manual_seed(seed)
    hide = torch.rand(samples, n, 1, h, w, generator=draw)
    hide = (hide < torch.rand(samples, n, 1, 1, 1, generator=draw) / 2).float().to(features.device)
    whole = posed(model, features, baseline, torch.ones_like(hide[0]))
    partly = torch.stack([posed(model, features, baseline, 1 - m) for m in hide])
    scores = {}
    for target in targets:
        change = answer(whole, target) - answer(partly, target)  # [samples, N]
        for (method, own), grid in grids.items():
            if own in (target, "any"):
                told = (hide[:, :, 0] * grid.to(hide)).sum((2, 3))
                beta = (told * change).mean(0) / (told**2).mean(0).clamp_min(1e-20)
                missed = ((beta * told - change) ** 2).mean(0) / (change**2).mean(0)
                scores[method, target] = missed
    return scores


def sensitivity(
    model: CardiacDreamer,
    features: Tensor,
    method: str,
    target: str,
    baseline: Tensor,
    radius: float = 0.1,
    samples: int = 4,
    seed: int = 0,
) -> Tensor:
    """Largest relative change [N] of a grid when the feature map trembles (Captum's
    `sensitivity_max`); `radius` in standard deviations of the maps."""

    def explain(inputs) -> tuple[Tensor]:
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        if method in ATTENTION:
            return (attention_grid(model, x, method).flatten(1),)
        base = baseline.repeat_interleave(len(x) // len(baseline), 0)
        found = attribute(model, x, target, method, base, steps=8, limit=0, seed=seed)
        return (found.grid.flatten(1),)

    draw = torch.Generator().manual_seed(seed)

    def tremble(inputs, perturb_radius: float) -> tuple[Tensor]:
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        noise = torch.empty(x.shape).uniform_(-perturb_radius, perturb_radius, generator=draw)
        return (x + noise.to(x),)

    return sensitivity_max(
        explain, features, tremble, perturb_radius=radius * float(features.std()),
        n_perturb_samples=samples,
    )  # fmt: skip


def randomised(model: CardiacDreamer, seed: int = 0) -> Iterator[tuple[str, CardiacDreamer]]:
    """(stage, model) with the weights drawn anew from the guidance head down to the backbone's
    first stage, each stage on top of those before; the given model is not touched."""
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(10**6 + seed)  # not the draw that a run with this seed began from
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


class View(NamedTuple):
    """What a model makes of a sample: `features` [N, C, h, w] and the `base` [1 or N, C, h, w] that
    hidden cells show, computed once."""

    model: CardiacDreamer
    sample: Sample
    features: Tensor
    base: Tensor

    def take(self, rows: slice | Sequence[int]) -> "View":
        """The view of fewer frames."""
        base = self.base if len(self.base) == 1 else self.base[rows]
        return View(self.model, self.sample.take(rows), self.features[rows], base)


def view(model: CardiacDreamer, sample: Sample, baseline: str = "mean") -> View:
    """The `View` of a sample; `baseline` is one of BASELINES."""
    base = baseline_map(model, baseline, sample.images, sample.training)
    return View(model, sample, encode(model, sample.images), base)


def each(function: Callable[[str], Any], runs: Iterable[str]) -> dict[str, Any]:
    """What `function` says of each run, on as many threads as torch may use, a core for each.

    Small operations gain little from a second core, whole runs gain all of it. What is called must
    not draw from torch's global generator."""
    runs, threads = list(runs), torch.get_num_threads()
    if len(runs) == 1 or threads == 1 or torch.cuda.is_available():
        return {run: function(run) for run in runs}
    with crew(min(threads, len(runs))) as pool:
        return dict(zip(runs, pool.map(function, runs), strict=True))


def _rows(group: NDArray, values, **names) -> pd.DataFrame:
    """One row a frame and entry of `values` [N, ...]: group, frame, `names`, value. A name is one
    word for all, or an array that fits `values`."""
    values = np.asarray(values, dtype=float)
    frame = np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
    columns = {"group": group[frame], "frame": frame, **names, "value": values}
    return pd.DataFrame({k: np.broadcast_to(v, values.shape).ravel() for k, v in columns.items()})


def explain(
    seen: View,
    methods: Sequence[str],
    targets: Sequence[str],
    steps: int = 8,
    limit: int = LIMIT,
    seed: int = 0,
    progress: str | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Grids [N, h, w] by (method, target), controls and attention among them under target "any"."""
    model, sample, features, base = seen
    grids = {}
    for method, target in tqdm(
        [(m, t) for m in methods for t in (targets if m in METHODS else ("any",))],
        desc=progress, leave=False, disable=progress is None,
    ):  # fmt: skip
        if method in METHODS:
            found = attribute(
                model, features, target, method, base, images=sample.images, steps=steps,
                limit=limit, seed=seed,
            ).grid  # fmt: skip
        elif method in ATTENTION:
            found = attention_grid(model, features, method)
        else:
            found = control(method, sample.images, features.shape[2:], seed)
        grids[method, target] = found.cpu()
    return grids


def score(
    seen: View,
    grids: Mapping[tuple[str, str], Tensor],
    targets: Sequence[str],
    known_anatomy: Anatomy | None = None,
    moved: Tensor | None = None,
    points: int = 4,
    progress: str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every check of every map, one row a frame: group, frame, method, target, measure, value; and
    the curves themselves: group, frame, method, target, kind, share, value.

    See MEASURES. Those of the phantom take `known_anatomy` and `moved` [targets, N, structures], as
    `truth.anatomy` and `truth.changes` give them, and are left out without. Distances are
    relative to the mean distance between the answers to the frames and to the baseline; deletion
    and insertion are areas.
    """
    model, sample, features, base = seen
    targets, rows, lines = list(targets), [], []
    share, found = curves(model, features, grids, targets, base, points, progress)
    for (method, target), away in found.items():
        names = {"method": method, "target": target}
        away = away / away[1, :, 0].mean()
        for kind, line in zip(("deletion", "insertion"), away.numpy(), strict=True):
            lines.append(_rows(sample.group, line, **names, kind=kind, share=share))
            rows.append(_rows(sample.group, np.trapezoid(line, share), **names, measure=kind))
        if known_anatomy is not None:
            grid = grids[method, target if (method, target) in grids else "any"]
            told = against_truth(grid, known_anatomy, moved[targets.index(target)])
            rows += [_rows(sample.group, v, **names, measure=k) for k, v in told.items()]
    for (method, target), value in infidelity(model, features, grids, targets, base).items():
        rows.append(_rows(sample.group, value.cpu(), method=method, target=target,
                          measure="infidelity"))  # fmt: skip
    return pd.concat(rows, ignore_index=True).dropna(subset="value"), pd.concat(lines)


def slow_scores(
    seen: View,
    quick: Sequence[str],
    targets: Sequence[str],
    known_anatomy: Anatomy | None = None,
    moved: Tensor | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> pd.DataFrame:
    """Rows of `score` for the SLOW methods, and the max-sensitivity of the `quick` ones."""
    grids = explain(seen, SLOW, targets, seed=seed, progress=progress)
    table, _ = score(seen, grids, targets, known_anatomy, moved)
    trembling = (
        _rows(
            seen.sample.group, sensitivity(seen.model, seen.features, m, t, seen.base).cpu(),
            method=m, target=t, measure="sensitivity",
        )
        for m in quick for t in targets
    )  # fmt: skip
    return pd.concat((table, *trembling))


def randomisation(
    seen: View, methods: Sequence[str], target: str, seed: int = 0, progress: str | None = None
) -> pd.DataFrame:
    """Rank agreement with the trained map while `randomised` works downwards, one row a frame:
    group, frame, method, stage, depth (0 the trained model), value."""
    trained, rows = explain(seen, methods, [target]), []
    bar = tqdm(randomised(seen.model, seed), desc=progress, leave=False, disable=progress is None)
    for depth, (stage, net) in enumerate(bar, 1):
        other = view(net, seen.sample) if "backbone" in stage else seen._replace(model=net)
        for (method, own), grid in explain(other, methods, [target], limit=0).items():
            value = rank_correlation(trained[method, own], grid)
            rows.append(_rows(seen.sample.group, value, method=method, stage=stage, depth=depth))
    return pd.concat(rows, ignore_index=True)


def agreement(
    grids: Mapping[str, Mapping[tuple[str, str], Tensor]],
    variants: Mapping[str, str],
    group: NDArray,
) -> pd.DataFrame:
    """Rank agreement of maps, one row a frame: kind, variant, method, other, target, group, value.

    kind methods: two methods of one run; seeds: one method, two runs of a variant; variants: one
    method, a run of each. `grids`: run -> what `explain` gives; `variants`: run -> its token type.
    """
    rows = []

    def add(kind: str, variant: str, one: tuple, two: tuple, value: NDArray) -> None:
        names = {"kind": kind, "variant": variant, "method": one[0], "other": two[0]}
        target = two[1] if one[1] == "any" else one[1]
        rows.append(_rows(group, value, **names, target=target))

    ranked = {run: {k: ranks(g) for k, g in found.items()} for run, found in grids.items()}
    for run, found in ranked.items():
        for one, two in itertools.combinations(found, 2):
            if one[0] != two[0] and (one[1] == two[1] or "any" in (one[1], two[1])):
                add("methods", variants[run], one, two, (found[one] * found[two]).sum(1))
    for run, other in itertools.combinations(grids, 2):
        same = variants[run] == variants[other]
        kind, variant = ("seeds", variants[run]) if same else ("variants", "both")
        for key in grids[run]:
            if key[0] not in CONTROLS:
                add(kind, variant, key, key, (ranked[run][key] * ranked[other][key]).sum(1))
    return pd.concat(rows, ignore_index=True).dropna(subset="value")


def reading(seen: View) -> pd.DataFrame:
    """How attention is spread, one row a frame, layer and head: group, frame, layer, head, measure,
    value. Measures: the share of the map's reading that goes to the action token, and how many of
    the tokens are read (the exponential of the entropy), as a share of all."""
    values = []
    for p in parts_of(len(seen.features), rows_at_once(seen.model, recorded=True), None):
        weights = attention(seen.model, seen.features[p])[..., 1:, :]  # read by the map's tokens
        entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1).mean(-1)
        values.append(torch.stack((weights[..., 0].mean(-1), entropy.exp() / weights.shape[-1])))
    values = torch.cat(values, dim=2).cpu().numpy()  # [measures, layers, N, heads]
    measures = ("share read from the action token", "share of the tokens that are read")
    layers, heads = values.shape[1], values.shape[3]
    return pd.concat(
        _rows(seen.sample.group, value.swapaxes(0, 1), layer=np.arange(layers)[:, None] + 1,
              head=np.arange(heads) + 1, measure=measure)
        for measure, value in zip(measures, values, strict=True)
    )  # fmt: skip


def baselines(seen: View, target: str, steps: int = 8) -> pd.DataFrame:
    """How much the baseline decides: rank agreement of integrated gradients from each two of
    BASELINES, and the share of f(x) - f(baseline) that each misses: group, frame, pair, measure,
    value."""
    model, sample, features, _ = seen
    found = {}
    for name in BASELINES:
        base = baseline_map(model, name, sample.images, sample.training)
        found[name] = attribute(model, features, target, baseline=base, steps=steps)
    rows = [
        _rows(sample.group, rank_correlation(found[a].grid, found[b].grid), pair=f"{a} and {b}",
              measure="agreement")
        for a, b in itertools.combinations(found, 2)
    ]  # fmt: skip
    rows += [
        _rows(sample.group, maps.error.cpu(), pair=name, measure="missed")
        for name, maps in found.items()
    ]
    return pd.concat(rows, ignore_index=True).dropna(subset="value")


def summarise(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Means of `value` by the columns `by`, with 95% intervals over groups (patients).

    Seeds and targets that are not in `by` are averaged within a frame first. Adds mean, low, high,
    frames, groups.
    """
    rows = []
    for key, part in table.groupby(list(by), sort=False):
        frames = part.groupby(["group", "frame"])["value"].mean().reset_index()
        mean, low, high = bootstrap(frames["value"], frames["group"])
        rows.append((*key, mean, low, high, len(frames), frames["group"].nunique()))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "frames", "groups"])


def verdicts(
    table: pd.DataFrame, config: str, method: str = "integrated_gradients"
) -> pd.DataFrame:
    """The claims, judged by this run's numbers: claim, published, measured, interval, verdict,
    config, n.

    `table`: rows of `score` with columns run and variant. Patch against channel: supported (or
    contradicted) where the 95% interval over patients leaves zero out and every patch run beats
    (loses to) every channel run, of at least three each; else not shown. Maps against controls: the
    same, with every run compared with its own control.
    """
    rows = []

    def add(claim: str, published: str, sides, runs: str, apart: Sequence[float]) -> None:
        gap, low, high, count, groups = paired(*sides)
        verdict = "not shown"
        if low > 0 and min(apart) > 0:
            verdict = "supported"
        elif high < 0 and max(apart) < 0:
            verdict = "contradicted"
        rows.append((
            claim, published, f"{sides[0].value.mean():.3f} against {sides[1].value.mean():.3f}",
            f"difference {gap:+.3f} [{low:+.3f}, {high:+.3f}]", verdict, config,
            f"{count} frames, {groups} patients, {runs} runs",
        ))  # fmt: skip

    for measure, claim in CLAIMS.items():
        part = table[(table.measure == measure) & (table.method == method)]
        sides = [part[part.variant == v] for v in ("patch", "channel")]
        if not any(side.empty for side in sides):
            runs = [side.groupby("run")["value"].mean() for side in sides]
            apart = [a - b for a, b in itertools.product(*runs)] if min(map(len, runs)) > 2 else [0]
            add(claim, "patch tokens: better spatial understanding", sides,
                f"{len(runs[0])} + {len(runs[1])}", apart)  # fmt: skip
    for measure, rival in itertools.product(("deletion", "counterfactual"), ("random", "centre")):
        for variant, part in table[table.measure == measure].groupby("variant"):
            sides = [part[part.method == m] for m in (method, rival)]
            gaps = np.subtract(*(side.groupby("run")["value"].mean() for side in sides))
            claim = f"{variant} tokens: maps beat the {rival} map ({measure})"
            add(claim, "", sides, str(len(gaps)), gaps.tolist())
    columns = ["claim", "published", "measured", "interval", "verdict", "config", "n"]
    return pd.DataFrame(rows, columns=columns)


def paired(one: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float, float, int, int]:
    """Mean difference one - other of `value` per frame with its 95% interval over groups, and the
    numbers of frames and groups; seeds and targets are averaged within a frame first."""
    means = [side.groupby(["group", "frame"])["value"].mean() for side in (one, other)]
    gap = (means[0] - means[1]).dropna()
    group = gap.index.get_level_values("group")
    return *bootstrap(gap.to_numpy(), group), len(gap), group.nunique()


def sanity(table: pd.DataFrame) -> pd.DataFrame:
    """Whether methods pass the check of randomised weights: variant, method, left (mean rank
    correlation after the last stage), interval, passes (left under PASS)."""
    last = table[table.depth == table.groupby("variant")["depth"].transform("max")]
    found = summarise(last, ["variant", "method"])
    found["passes"] = np.where(found["mean"] < PASS, "passes", "fails the check")
    return found.rename(columns={"mean": "left"})
