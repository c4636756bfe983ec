"""Whether a map of what a model looks at is to be believed.

Deletion and insertion (Petsiuk et al., BMVC 2018), infidelity and max-sensitivity (Yeh et al.,
NeurIPS 2019), randomised weights (Adebayo et al., NeurIPS 2018), rank agreement between methods,
seeds and variants, and, where the anatomy is known, the scores of `truth`. Beside every score stand
controls that know nothing of the model.
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
from captum.metrics import sensitivity_max
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from tqdm.auto import tqdm

from dreamer.attribution import (
    ATTENTION,
    BASELINES,
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
from dreamer.evaluation import bootstrap
from dreamer.model import CardiacDreamer
from dreamer.truth import Sample, Truth, against_truth, changes, occupancy

CONTROLS = ("random", "edges", "centre", "even")
PASS = 0.3  # rank correlation with the trained map that may be left when nothing trained is
CLAIMS = {  # measure: what it would mean for patch tokens to be ahead
    "counterfactual": "better spatial understanding: maps tell which structures move the answer",
    "decisive": "better spatial understanding: the top cell holds the decisive structure",
    "mass": "better spatial understanding: relevance lies on the heart",
    "deletion": "better spatial understanding: the cells named carry the answer",
}
SLOW = ("shapley", "ablation", "occlusion")  # a pass for every cell, or many
STANDARD = (*(m for m in METHODS if m not in SLOW), *ATTENTION)
MEASURES = {  # name: what more of it means
    "deletion": 1, "insertion": -1, "infidelity": -1,
    "counterfactual": 1, "decisive": 1, "pointing": 1, "mass": 1, "rank": 1,
}  # fmt: skip


def control(name: str, images: Tensor, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Maps [N, h, w] that know nothing of the model: random, the frame's edges, the centre, and an
    even one, which ranks structures by their size alone."""
    n, (h, w) = len(images), grid
    if known(name, "control", CONTROLS) == "random":
        return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed))
    if name == "even":
        return torch.ones(n, h, w)
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


class Curves(NamedTuple):
    """`share` [K] of cells; `deletion`, `insertion` [targets, N, K]: how far the answer lies from
    the whole frame's, mm or deg, with that share of the cells hidden, or shown."""

    share: NDArray
    deletion: Tensor
    insertion: Tensor


@torch.no_grad()
def curves(
    model: CardiacDreamer,
    features: Tensor,
    grid: Tensor,
    targets: Sequence[str],
    baseline: Tensor,
    points: int = 0,
) -> Curves:
    """`Curves` of cells hidden (from the frame) and shown (on the baseline), greatest |grid| first.

    `grid` [N, h, w]; ties fall at random. `points`: cell counts to try, denser at the start; 0
    tries every one. A true map has a high deletion curve and a low insertion curve.
    """
    n, cells = len(features), grid[0].numel()
    counts = np.unique(np.geomspace(1, cells, points or 4 * cells).round().astype(int))
    shuffled = torch.randperm(cells, generator=torch.Generator().manual_seed(0))
    magnitude = grid.detach().abs().cpu().flatten(1)[:, shuffled]
    order = shuffled[magnitude.argsort(dim=1, descending=True, stable=True)]
    place = order.argsort(dim=1).view(n, 1, *grid.shape[1:]).to(features.device)

    def ask(mask: Tensor) -> Tensor:
        pose = posed(model, features, baseline, mask)
        return torch.stack([answer(pose, t) for t in targets])  # [targets, N]

    whole, empty = (ask((place < c).float()) for c in (cells, 0))
    down = [whole] + [ask((place >= c).float()) for c in counts[:-1]] + [empty]
    up = [empty] + [ask((place < c).float()) for c in counts[:-1]] + [whole]
    away = [(torch.stack(line, -1) - whole[..., None]).abs().cpu() for line in (down, up)]
    return Curves(np.concatenate(([0], counts)) / cells, *away)


@torch.no_grad()
def infidelity(
    model: CardiacDreamer,
    features: Tensor,
    grids: Mapping[tuple[str, str], Tensor],
    targets: Sequence[str],
    baseline: Tensor,
    samples: int = 32,
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
        return (attribute(model, x, target, method, base, steps=16, seed=seed).grid.flatten(1),)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sensitivity_max(
            explain, features, perturb_radius=radius * float(features.std()),
            n_perturb_samples=samples,
        )  # fmt: skip


def randomised(model: CardiacDreamer, seed: int = 0) -> Iterator[tuple[str, CardiacDreamer]]:
    """(stage, model) with the weights drawn anew from the guidance head down to the backbone's
    first stage, each stage on top of those before; the given model is not touched."""
    with torch.random.fork_rng(devices=[]):
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


def explain(
    model: CardiacDreamer,
    sample: Sample,
    methods: Sequence[str],
    targets: Sequence[str],
    baseline: str = "mean",
    steps: int = 16,
    seed: int = 0,
    progress: str | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Grids [N, h, w] by (method, target), controls and attention among them under target "any"."""
    features = encode(model, sample.images)
    base = baseline_map(model, baseline, sample.images, sample.training)
    grids = {}
    for method, target in tqdm(
        [(m, t) for m in methods for t in (targets if m in METHODS else ("any",))],
        desc=progress, leave=False, disable=progress is None,
    ):  # fmt: skip
        if method in METHODS:
            found = attribute(
                model, features, target, method, base, images=sample.images, steps=steps, seed=seed
            ).grid
        elif method in ATTENTION:
            found = attention_grid(model, features, method)
        else:
            found = control(method, sample.images, features.shape[2:], seed)
        grids[method, target] = found.cpu()
    return grids


def score(
    model: CardiacDreamer,
    sample: Sample,
    grids: Mapping[tuple[str, str], Tensor],
    targets: Sequence[str],
    known_truth: Truth | None = None,
    baseline: str = "mean",
    points: int = 6,
    progress: str | None = None,
) -> pd.DataFrame:
    """Every check of every map, one row a frame: group, frame, method, target, measure, value.

    See MEASURES. Those of the phantom are left out without `known_truth`. Deletion and insertion
    are areas relative to the mean distance between the answers to the frames and to the baseline.
    """
    features = encode(model, sample.images)
    base = baseline_map(model, baseline, sample.images, sample.training)
    rows = []

    def add(method: str, target: str, measure: str, value) -> None:
        rows.append(pd.DataFrame({
            "group": sample.group, "frame": np.arange(len(features)), "method": method,
            "target": target, "measure": measure, "value": np.asarray(value, dtype=float),
        }))  # fmt: skip

    if known_truth is not None:
        filled = occupancy(known_truth, features.shape[2:])
        moved = changes(model, known_truth, targets)
    for (method, own), grid in tqdm(
        grids.items(), desc=progress, leave=False, disable=progress is None
    ):
        asked = list(targets) if own == "any" else [own]
        found = curves(model, features, grid, asked, base, points=points)
        for k, target in enumerate(asked):
            scale = float(found.insertion[k, :, 0].mean())
            for measure, line in (("deletion", found.deletion), ("insertion", found.insertion)):
                add(method, target, measure, np.trapezoid(line[k], found.share) / scale)
            if known_truth is not None:
                at = moved[list(targets).index(target)]
                for measure, value in against_truth(grid, filled, at, known_truth).items():
                    add(method, target, measure, value)
    missed = infidelity(model, features, grids, list(targets), base)
    for (method, target), value in missed.items():
        add(method, target, "infidelity", value.cpu())
    return pd.concat(rows, ignore_index=True).dropna(subset="value")


def randomisation(
    model: CardiacDreamer,
    sample: Sample,
    methods: Sequence[str],
    target: str,
    frames: int = 24,
    seed: int = 0,
    progress: str | None = None,
) -> pd.DataFrame:
    """Rank agreement with the trained map while `randomised` works downwards, one row a frame:
    group, frame, method, stage, depth (0 the trained model), value."""
    few = sample._replace(images=sample.images[:frames], group=sample.group[:frames])

    def grids(net: CardiacDreamer) -> dict[str, Tensor]:
        return {m: g for (m, _), g in explain(net, few, methods, [target], steps=16).items()}

    trained, rows = grids(model), []
    bar = tqdm(randomised(model, seed), desc=progress, leave=False, disable=progress is None)
    for depth, (stage, net) in enumerate(bar, 1):
        for method, grid in grids(net).items():
            rows.append(pd.DataFrame({
                "group": few.group, "frame": np.arange(len(grid)), "method": method,
                "stage": stage, "depth": depth, "value": rank_correlation(trained[method], grid),
            }))  # fmt: skip
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

    def add(kind: str, variant: str, method: str, other: str, target: str, value: NDArray) -> None:
        rows.append(pd.DataFrame({
            "kind": kind, "variant": variant, "method": method, "other": other, "target": target,
            "group": group, "frame": np.arange(len(group)), "value": value,
        }))  # fmt: skip

    ranked = {run: {k: ranks(g) for k, g in found.items()} for run, found in grids.items()}
    for run, found in ranked.items():
        for (one, a), (two, b) in itertools.combinations(found, 2):
            if one != two and (a == b or "any" in (a, b)):
                value = (found[one, a] * found[two, b]).sum(1)
                target = b if a == "any" else a
                add("methods", variants[run], one, two, target, value)
    for one, two in itertools.combinations(grids, 2):
        same = variants[one] == variants[two]
        for method, target in grids[one]:
            if method not in CONTROLS:
                value = (ranked[one][method, target] * ranked[two][method, target]).sum(1)
                which = variants[one] if same else "both"
                add("seeds" if same else "variants", which, method, method, target, value)
    return pd.concat(rows, ignore_index=True).dropna(subset="value")


def reading(model: CardiacDreamer, sample: Sample) -> pd.DataFrame:
    """How attention is spread, one row a frame, layer and head: group, frame, layer, head, measure,
    value. Measures: the share of the map's reading that goes to the action token, and how many of
    the tokens are read (the exponential of the entropy), as a share of all."""
    features, rows = encode(model, sample.images), []
    for p in parts_of(len(features), rows_at_once(model, recorded=True), None):
        weights = attention(model, features[p])[..., 1:, :]  # read by the map's own tokens
        entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1).mean(-1)
        values = {
            "share read from the action token": weights[..., 0].mean(-1),
            "share of the tokens that are read": entropy.exp() / weights.shape[-1],
        }
        for measure, value in values.items():
            layer, frame, head = np.indices(value.shape).reshape(3, -1)
            rows.append(pd.DataFrame({
                "group": sample.group[p][frame], "frame": frame + p.start, "layer": layer + 1,
                "head": head + 1, "measure": measure, "value": value.flatten().cpu().numpy(),
            }))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def trembling(
    model: CardiacDreamer,
    sample: Sample,
    methods: Sequence[str],
    target: str,
    baseline: str = "mean",
    frames: int = 24,
) -> pd.DataFrame:
    """Max-sensitivity of the methods on the first `frames`, as rows of `score`."""
    features = encode(model, sample.images[:frames])
    base = baseline_map(model, baseline, sample.images[:frames], sample.training)
    rows = []
    for method in methods:
        value = sensitivity(model, features, method, target, base).cpu().numpy()
        rows.append(pd.DataFrame({
            "group": sample.group[:frames], "frame": np.arange(len(value)), "method": method,
            "target": target, "measure": "sensitivity", "value": value,
        }))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def slow_scores(
    model: CardiacDreamer,
    sample: Sample,
    known_truth: Truth | None,
    quick: Sequence[str],
    targets: Sequence[str],
    baseline: str = "mean",
    seed: int = 0,
    progress: str | None = None,
) -> pd.DataFrame:
    """Rows of `score` for the SLOW methods, and the max-sensitivity of the `quick` ones."""
    grids = explain(model, sample, SLOW, targets, baseline, seed=seed, progress=progress)
    return pd.concat((
        score(model, sample, grids, targets, known_truth, baseline),
        trembling(model, sample, quick, targets[0], baseline, len(sample.images)),
    ))  # fmt: skip


def curve_table(
    model: CardiacDreamer,
    sample: Sample,
    grids: Mapping[tuple[str, str], Tensor],
    target: str,
    baseline: str = "mean",
    points: int = 12,
) -> pd.DataFrame:
    """Deletion and insertion curves of each map of `target`, relative to the mean distance between
    the answers to the frames and to the baseline: group, frame, method, kind, share, value."""
    features = encode(model, sample.images)
    base = baseline_map(model, baseline, sample.images, sample.training)
    rows = []
    for (method, own), grid in grids.items():
        if own in (target, "any"):
            found = curves(model, features, grid, [target], base, points=points)
            scale = float(found.insertion[0, :, 0].mean())
            for kind, lines in (("deletion", found.deletion[0]), ("insertion", found.insertion[0])):
                frame, point = np.indices(lines.shape).reshape(2, -1)
                rows.append(pd.DataFrame({
                    "group": sample.group[frame], "frame": frame, "method": method, "kind": kind,
                    "share": found.share[point], "value": lines.flatten().numpy() / scale,
                }))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def baselines(
    model: CardiacDreamer, sample: Sample, target: str, frames: int = 32, steps: int = 16
) -> pd.DataFrame:
    """How much the baseline decides: rank agreement of integrated gradients from each two of
    BASELINES, and the share of maps that did not converge: group, frame, pair, measure, value."""
    features = encode(model, sample.images[:frames])
    found = {}
    for name in BASELINES:
        base = baseline_map(model, name, sample.images[:frames], sample.training)
        found[name] = attribute(model, features, target, baseline=base, steps=steps)
    values = {
        (f"{one} and {two}", "agreement"): rank_correlation(found[one].grid, found[two].grid)
        for one, two in itertools.combinations(found, 2)
    } | {(name, "missed"): maps.error.cpu().numpy() for name, maps in found.items()}
    rows = [
        pd.DataFrame({"group": sample.group[:frames], "frame": np.arange(len(value)), "pair": pair,
                      "measure": measure, "value": value})
        for (pair, measure), value in values.items()
    ]  # fmt: skip
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
