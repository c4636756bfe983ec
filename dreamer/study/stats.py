"""One interval, one paired comparison and one verdict vocabulary for every claim of the project.

**Model.** A result Y[seed, patient] (one value per cell; a patient's frames are averaged first) is
the sum of a mean, an effect of the training seed, an effect of the patient and what is left. Seeds
and patients are crossed random factors: other seeds and other patients would have been as good, and
every network is tested on every patient. From the mean squares of the two-way analysis of variance,
S seeds and P patients, the variance of the grand mean is

    V = (MS_seed + MS_patient - MS_residual) / (S P),

since both other mean squares contain the residual once (Searle, Casella & McCulloch, "Variance
Components", 1992, chapter 4). V is never taken smaller than the part of either factor alone.

**Interval.** estimate ± t(df) sqrt(V). With the seeds' share w = MS_seed / (S P V) of the variance,

    1 / df = w / (S - 1) + (1 - w) / (P - 1).

This is Satterthwaite's formula (Biometrics Bulletin 1946) with shares in place of their squares.
Both are exact where one factor dominates. Between the two, shares estimated from three seeds make
the squared form cover 92% where it promises 95%; this one covers 94 to 97%, and up to 99% where
the interaction of seed and patient dominates (simulated in tests/test_stats.py, which prints the
whole table when run as a program). With two seeds it can fall to 91%: use three or more. Strongly
skewed patients (gamma, shape 2) cost another 1 to 2% where there are only 24 of them.

**Comparison.** Where two sides share seeds and patients, their difference is one matrix, with the
interval above. Where the seeds do not correspond, each side adds its own variance of seeds, and
patients stay paired. A control without seeds is one value per patient, the same for every seed.
Measures of whole runs (area under a validation curve, seconds) have no patients: over="seeds".

**Decision.** At the 5% level. A difference ("less", "more") is tested two-sided; equivalence and
non-inferiority by one-sided tests against the margin, that is by the 90% interval (Schuirmann, J.
Pharmacokinet. Biopharm. 1987). A difference shown to lie inside the margin is `equivalent`, even
where its sign is certain: it is too small to matter. Several claims of one family are corrected
after Holm (Scand. J. Statist. 1979); intervals are not. Verdicts:

    confirmed      the claim is shown
    contradicted   its opposite is shown
    equivalent     the difference is shown to lie inside the margin
    inconclusive   nothing is shown; `seeds_needed` may decide
    untested       a single seed, a single patient, or not measured

**Power.** Beside every verdict stand `power`, the probability that this design shows a true
difference as large as the margin (for "not worse" and "equal": that it shows the claim where the
true difference is zero; without a margin, for the observed difference, which is optimistic);
`detectable`, the true difference that it shows with 80%; and `seeds_needed`, the seeds that decide
with 80% if the observed difference is the true one, with the estimated variances and the same
patients. It is infinite where 1,000 seeds would not do: then patients are lacking, or the
difference lies too near a limit. All by the noncentral t distribution, at 5%; in a family
`seeds_needed` is that of the strictest step of Holm.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

ALPHA, POWER, MOST_SEEDS = 0.05, 0.8, 1000
VERDICTS = ("confirmed", "contradicted", "equivalent", "inconclusive", "untested")
COLUMNS = (
    "family claim size tokens published estimate unit low high margin seeds patients power "
    "seeds_needed verdict source"
).split()
Claim = Literal["less", "more", "not worse", "equal"]
Over = Literal["both", "seeds"]


class Interval(NamedTuple):
    """A mean over seeds and patients with its confidence limits and their degrees of freedom."""

    estimate: float
    low: float
    high: float
    df: float
    seeds: int
    patients: int


@dataclass(frozen=True)
class Comparison:
    """A difference, second minus first, and its verdict; fields as the module describes them.

    `p` tests the claim; `p_other` tests the other possible finding: equivalence for "less" and
    "more", a difference beyond the margin for "not worse" and "equal".
    """

    claim: Claim
    estimate: float
    low: float
    high: float
    p: float
    p_other: float
    margin: float | None
    seeds: int
    patients: int
    power: float
    detectable: float
    seeds_needed: float
    verdict: str
    spread: "_Spread" = field(repr=False)

    def words(self, unit: str) -> str:
        """The difference and its interval for a figure's title: "0.31 mm less [-0.5, -0.1]"."""
        limits = f" [{self.low:+.2g}, {self.high:+.2g}]" if np.isfinite(self.low) else ""
        if self.low <= 0 <= self.high:
            return f"no difference shown{limits}"
        sign = "less" if self.estimate < 0 else "more"
        return " ".join([f"{abs(self.estimate):.2g}", *unit.split(), sign]) + limits


def matrix(
    table: pd.DataFrame, value: str, seed: str = "seed", patient: str = "patient"
) -> pd.DataFrame:
    """Mean values [seeds, patients] of a tidy table: a patient's frames are averaged first.

    Raises ValueError where a seed lacks a patient or a value is not finite.
    """
    cells = table.pivot_table(value, seed, patient, "mean", dropna=False)
    if not np.isfinite(cells.to_numpy(float)).all():
        lacking = cells.index[cells.isna().any(axis=1)].tolist()
        raise ValueError(f"{value}: {seed} {lacking} have no finite value for some {patient}")
    return cells


def interval(values: ArrayLike, level: float = 0.95, over: Over = "both") -> Interval:
    """Mean and confidence interval of `values` [seeds, patients], both random factors.

    One-dimensional values belong to patients, or to seeds with over="seeds". With one seed the
    interval covers patients only; with one patient it is NaN.
    """
    side = _cells(values, over)
    spread = _spread([side], over)
    low, high = _limits(side.mean(), spread, level)
    return Interval(float(side.mean()), low, high, spread.df, *_counts(side, over))


def ratio(
    numerator: ArrayLike, denominator: ArrayLike, level: float = 0.95, over: Over = "both"
) -> Interval:
    """Ratio of two means over the same seeds and patients, for example to a baseline's error.

    Delta method on the logarithm: the interval is that of numerator / its mean - denominator / its
    mean. NaN where a mean is not positive, for example the error of an axis that never moves.
    """
    above, below = _sides(numerator, denominator, over, paired=True)
    if min(above.mean(), below.mean()) <= 0:
        return Interval(np.nan, np.nan, np.nan, np.nan, *_counts(above, over))
    estimate = float(above.mean() / below.mean())
    relative = interval(above / above.mean() - below / below.mean(), level, over)
    low, high = estimate * np.exp([relative.low, relative.high])
    return relative._replace(estimate=estimate, low=float(low), high=float(high))


def compare(
    first: ArrayLike,
    second: ArrayLike,
    margin: float | None = None,
    claim: Claim = "less",
    paired: bool = True,
    level: float = 0.95,
    over: Over = "both",
) -> Comparison:
    """Difference second - first of two results [seeds, patients], and the verdict on a claim.

    Args:
        first, second: arrays or tables of `matrix`. A control without seeds has one value per
            patient, or is a single number.
        margin: the largest difference, in the unit of the values, that is too small to matter.
        claim: about the second: "less" or "more" than the first, "not worse" (not more than the
            first by the margin; where more is better, exchange the sides), "equal".
        paired: row i of both sides is the same seed. Patients are always the same.
        level: of the interval; tests are at 5%.
        over: "seeds" for measures of whole runs, which have no patients.

    Raises ValueError where sides do not correspond, or a claim lacks its margin.
    """
    if claim not in ("less", "more", "not worse", "equal"):
        raise ValueError(f"claim: {claim!r}; use less, more, not worse or equal")
    if margin is None and claim in ("not worse", "equal"):
        raise ValueError(f"the claim {claim!r} needs a margin")
    margin = None if margin is None else float(margin)
    first, second = _sides(first, second, over, paired)
    sides = [second - first] if paired else [first, second]
    spread = _spread(sides, over)
    estimate = float(second.mean() - first.mean())
    low, high = _limits(estimate, spread, level)
    seeds, patients = np.minimum(_counts(first, over), _counts(second, over)).tolist()
    shared = dict(claim=claim, estimate=estimate, low=low, high=high, margin=margin)
    shared |= dict(seeds=seeds, patients=patients, spread=spread)
    if seeds < 2 or not np.isfinite(spread.df):
        unknown = dict.fromkeys(("p", "p_other", "power", "detectable", "seeds_needed"), np.nan)
        return Comparison(**shared, **unknown, verdict="untested")

    error, df = spread.error, spread.df
    findings = _tests(claim, estimate, margin)
    p, p_other = (_p(tests, error, df) for tests in findings)
    relevant = 0.0 if claim in ("not worse", "equal") else estimate if margin is None else margin
    return Comparison(
        **shared,
        p=p,
        p_other=p_other,
        power=_power(_tests(claim, relevant, margin)[0], error, df),
        detectable=error * brentq(lambda shift: _power([(shift, 2)], 1, df) - POWER, 0, 30),
        seeds_needed=_seeds_needed(findings, spread, seeds),
        verdict=_verdict(claim, estimate, p, p_other),
    )


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one family with p values corrected after Holm, and verdicts from these.

    Untested ones do not count.
    """
    tested = [c for c in comparisons if c.verdict != "untested"]
    p = _holm([c.p for c in tested])
    p_other = _holm([c.p_other for c in tested])
    adjusted = {}
    for c, a, b in zip(tested, p, p_other, strict=True):
        findings = _tests(c.claim, c.estimate, c.margin)
        adjusted[id(c)] = replace(
            c,
            p=a,
            p_other=b,
            seeds_needed=_seeds_needed(findings, c.spread, c.seeds, ALPHA / len(tested)),
            verdict=_verdict(c.claim, c.estimate, a, b),
        )
    return [adjusted.get(id(c), c) for c in comparisons]


def verdict_row(comparison: Comparison | None = None, **words: str) -> dict[str, object]:
    """One row of a verdict table (COLUMNS) from a comparison; None is a claim not measured.

    `words`: family, claim, size, tokens, published, unit, source. Raises ValueError for others.
    """
    if unknown := set(words) - set(COLUMNS):
        raise ValueError(f"verdict row: unknown columns {sorted(unknown)}")
    found = vars(comparison) if comparison else {"verdict": "untested"}
    row = {name: found.get(name) for name in COLUMNS} | {"claim": None} | words
    return {name: row[name] for name in COLUMNS}


class _Spread(NamedTuple):
    """Variance of an estimate: due to seeds, to patients, and the residual that each contains."""

    seeds: float
    patients: float
    residual: float
    seed_df: float
    patient_df: float

    @property
    def error(self) -> float:
        """The standard error."""
        both = self.seeds + self.patients - self.residual
        return float(np.sqrt(max(both, self.seeds, self.patients))) + 1e-150  # never divided by 0

    @property
    def df(self) -> float:
        """Degrees of freedom, by the shares of the variance."""
        share = self.seeds / self.error**2
        return float(1 / (share / self.seed_df + (1 - share) / self.patient_df))

    def with_seeds(self, now: int, seeds: int) -> "_Spread":
        """The spread expected with `seeds` seeds instead of `now`, and the same patients."""
        residual = self.residual * now / seeds
        return _Spread(
            max(self.seeds - self.residual, 0) * now / seeds + residual,
            max(self.patients - self.residual, 0) + residual,
            residual,
            self.seed_df * (seeds - 1) / (now - 1),
            self.patient_df,
        )


def _spread(sides: Sequence[NDArray], over: Over) -> _Spread:
    """The spread of the mean of one side, or of a difference of two that share patients alone."""
    count = sides[0].shape[1]
    by_seed, by_patient, residual, seed_df = 0.0, 0.0, 0.0, 1.0
    several = min(map(len, sides)) > 1
    if several:
        parts = np.array([side.mean(1).var(ddof=1) / len(side) for side in sides])
        freedom = np.array([len(side) - 1 for side in sides])
        by_seed = float(parts.sum())
        seed_df = by_seed**2 / (parts**2 / freedom).sum() if by_seed else freedom.min()
    if over == "both":
        means = sides[-1].mean(0) - (sides[0].mean(0) if len(sides) == 2 else 0)
        by_patient = float(means.var(ddof=1) / count) if count > 1 else np.nan
    elif not several:
        by_seed = np.nan
    if over == "both" and several and count > 1:
        for side in sides:
            left = side - side.mean(1, keepdims=True) - side.mean(0) + side.mean()
            residual += (left**2).sum() / ((len(side) - 1) * (count - 1)) / side.size
    return _Spread(by_seed, by_patient, float(residual), float(seed_df), max(count - 1, 1))


def _limits(estimate: float, spread: _Spread, level: float) -> tuple[float, float]:
    reach = stats.t.isf((1 - level) / 2, spread.df) * spread.error
    return float(estimate - reach), float(estimate + reach)


def _cells(values: ArrayLike, over: Over) -> NDArray[np.float64]:
    """Values as [seeds, patients]."""
    values = np.asarray(values, dtype=float)
    if values.ndim == 1:
        values = values[:, None] if over == "seeds" else values[None]
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"finite values [seeds, patients] are needed, got {values.shape}")
    return values


def _counts(values: NDArray, over: Over) -> tuple[int, int]:
    seeds, patients = values.shape
    return seeds, 0 if over == "seeds" and patients == 1 else patients


def _sides(first: ArrayLike, second: ArrayLike, over: Over, paired: bool) -> list[NDArray]:
    """Both sides as [seeds, patients], in the order of the first's labels; controls repeated."""
    if isinstance(first, pd.DataFrame) and isinstance(second, pd.DataFrame):
        second = _ordered(second.T, first.columns).T
        second = _ordered(second, first.index) if paired else second
    elif isinstance(first, pd.DataFrame) and isinstance(second, pd.Series):
        second = _ordered(second, first.columns)
    elif isinstance(first, pd.Series) and isinstance(second, pd.DataFrame):
        first = _ordered(first, second.columns)
    elif isinstance(first, pd.Series) and isinstance(second, pd.Series):
        second = _ordered(second, first.index) if paired or over == "both" else second
    sides = [np.asarray(side, dtype=float) for side in (first, second)]
    whole = max(sides, key=np.ndim)
    shape = _cells(whole, over).shape
    for k, side in enumerate(sides):
        side = _cells(side, over) if side.ndim else side
        sides[k] = side if sides[k].ndim == whole.ndim else np.broadcast_to(side, shape)
    if sides[0].shape[1] != sides[1].shape[1] or (paired and len(sides[0]) != len(sides[1])):
        raise ValueError(
            f"the sides have {sides[0].shape} and {sides[1].shape} [seeds, patients]; patients "
            "must be the same, and seeds too unless paired=False"
        )
    return sides


def _ordered(side: pd.DataFrame | pd.Series, labels: pd.Index) -> pd.DataFrame | pd.Series:
    """`side` in the order of `labels`; ValueError where it has others."""
    if set(side.index) != set(labels):
        differ = sorted(set(side.index) ^ set(labels))
        raise ValueError(f"seeds or patients of one side alone: {differ}")
    return side.loc[labels]


Tests = list[tuple[float, int]]  # distance of the estimate from a limit, and 1 or 2 tails


def _tests(claim: Claim, estimate: float, margin: float | None) -> tuple[Tests, Tests]:
    """The one-sided tests that all must succeed for the claim, and for the other finding."""
    inside = [(margin - estimate, 1), (margin + estimate, 1)] if margin is not None else []
    if claim == "equal":
        return inside, [(abs(estimate) - margin, 2)]
    if claim == "not worse":
        return [(margin - estimate, 1)], [(estimate - margin, 1)]
    return [(abs(estimate), 2)], inside


def _p(tests: Tests, error: float, df: float) -> float:
    """The p value of several one-sided tests that all must succeed; NaN without any."""
    each = [tails * stats.t.sf(shift / error, df) for shift, tails in tests]
    return float(min(max(each), 1)) if each else np.nan


def _power(tests: Tests, error: float, df: float, alpha: float = ALPHA) -> float:
    """The least probability that all tests succeed where the estimate is the truth."""
    fails = 0.0 if tests else 1.0
    for shift, tails in tests:
        limit = stats.t.isf(alpha / tails, df)
        fails += stats.nct.cdf(limit, df, np.clip(shift / error, 0, 30))  # NaN for some below 0
    return float(max(1 - fails, 0))


def _seeds_needed(
    findings: Sequence[Tests], spread: _Spread, now: int, alpha: float = ALPHA
) -> float:
    """The fewest seeds with which one of the findings is shown with a probability of POWER."""

    def decided(seeds: int) -> bool:
        expected = spread.with_seeds(now, seeds)
        power = [_power(tests, expected.error, expected.df, alpha) for tests in findings]
        return max(power) >= POWER

    seeds = bisect_left(range(MOST_SEEDS + 1), True, lo=2, key=decided)
    return float(seeds) if seeds <= MOST_SEEDS else np.inf


def _verdict(claim: Claim, estimate: float, p: float, p_other: float) -> str:
    main, other = p < ALPHA, p_other < ALPHA
    if claim == "equal":
        return "equivalent" if main else "contradicted" if other else "inconclusive"
    if claim == "not worse":
        return "confirmed" if main else "contradicted" if other else "inconclusive"
    if other:
        return "equivalent"
    if not main:
        return "inconclusive"
    return "confirmed" if (estimate < 0) == (claim == "less") else "contradicted"


def _holm(p: Sequence[float]) -> list[float]:
    """p values, the smallest times their number, the next less one; NaN is not counted."""
    adjusted = np.array(p, dtype=float)
    order = adjusted.argsort()[: np.isfinite(adjusted).sum()]  # NaN sorts last
    steps = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(steps).clip(max=1)
    return adjusted.tolist()
