"""The study's statistics: by hand, against a published mixed model, and by simulation.

`python tests/test_stats.py` prints the coverage of the interval for the whole grid of designs.
"""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from dreamer.study import stats

# Inhibition zones (mm) of six samples of penicillin on each of 24 plates: Davies & Goldsmith,
# "Statistical Methods in Research and Production", 1972, section 6.6 (Penicillin in R's lme4).
PENICILLIN = (
    np.array(
        """
    27 23 26 23 23 21  27 23 26 23 23 21  25 21 25 24 24 20  26 23 25 23 23 20
    25 22 26 22 23 20  24 22 25 23 22 19  24 20 23 21 22 19  26 22 26 24 24 21
    24 21 24 22 22 20  24 21 24 23 22 19  26 23 26 24 24 21  25 22 26 24 24 20
    26 24 26 24 25 22  26 23 26 23 23 20  26 23 25 24 24 22  25 22 25 23 23 20
    25 21 24 23 23 20  25 22 24 23 23 19  24 21 23 21 21 19  26 23 26 24 24 21
    25 21 24 22 22 18  25 22 25 22 22 20  24 21 24 22 24 19  24 21 24 22 21 18
    """.split(),
        dtype=float,
    )
    .reshape(24, 6)
    .T
)


def draw(rng, seeds, patients, share, interaction, mean=0.0):
    """A made result: variance of the mean 1 from seeds (`share`) and patients, plus interaction."""
    by_seed = np.sqrt(share * seeds) * rng.normal(size=(seeds, 1))
    by_patient = np.sqrt((1 - share) * patients) * rng.normal(size=(1, patients))
    cells = (interaction * np.sqrt(patients) + 1e-6) * rng.normal(size=(seeds, patients))
    return mean + by_seed + by_patient + cells


def coverage(seeds, patients, share, interaction, draws=1000):
    """Share of 95% intervals that contain the true mean."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(draws):
        found = stats.interval(draw(rng, seeds, patients, share, interaction))
        hits += found.low <= 0 <= found.high
    return hits / draws


def test_interval_by_hand():
    found = stats.interval([[1, 3, 5], [3, 5, 13]])
    # Means of seeds 3, 7; of patients 2, 4, 9; grand mean 5; residuals ±1, ±1, ±2.
    seed, patient, residual = 3 * 8, 2 * 13, 2 * (1 + 1 + 4) / 2
    variance = (seed + patient - residual) / 6
    share = seed / 6 / variance
    df = 1 / (share / 1 + (1 - share) / 2)
    reach = scipy_stats.t.isf(0.025, df) * np.sqrt(variance)
    assert (found.estimate, found.seeds, found.patients) == (5, 2, 3)
    assert (found.df, found.low, found.high) == pytest.approx((df, 5 - reach, 5 + reach))


def test_interval_of_one_factor_is_the_t_interval():
    patients = np.array([1.0, 2, 4, 7])
    t = scipy_stats.ttest_1samp(patients, 0).confidence_interval()
    for values, over in ((patients, "both"), (patients, "seeds"), (patients[None], "both")):
        found = stats.interval(values, over=over)
        assert (found.low, found.high, found.df) == pytest.approx((t.low, t.high, 3))
    copies = stats.interval(np.tile(patients, (5, 1)))  # seeds that agree add nothing
    assert (copies.low, copies.high) == pytest.approx((t.low, t.high))
    assert np.isnan(stats.interval(np.ones((3, 1))).low)
    with pytest.raises(ValueError, match="finite values"):
        stats.interval([[1, np.nan]])


def test_published_mixed_model_of_crossed_factors():
    """lme4, REML: intercept 22.9722 (standard error 0.8086), variances 0.7169, 3.7309, 0.3024."""
    found = stats.interval(PENICILLIN)
    spread = stats._spread([PENICILLIN], "both")
    assert (found.estimate, spread.error) == pytest.approx((22.9722, 0.808573), abs=1e-4)
    parts = (spread.patients - spread.residual, spread.seeds - spread.residual, spread.residual)
    variances = np.array(parts) * (24, 6, 144)
    assert variances == pytest.approx((0.716908, 3.73092, 0.302415), abs=2e-4)


@pytest.mark.parametrize(
    ("seeds", "patients"), itertools.product((3, 5, 10), (24, 200)), ids=lambda n: str(n)
)
def test_coverage(seeds, patients):
    for share, interaction in itertools.product((0.0, 0.5, 0.8, 1.0), (0.0, 0.5)):
        # 94% less two standard errors of a simulation of 1,000 draws.
        assert coverage(seeds, patients, share, interaction) >= 0.925, (share, interaction)


@pytest.mark.parametrize("paired", [True, False])
def test_false_positives(paired):
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(500):
        base = draw(rng, 3, 24, 0, 0)
        first, second = (base + draw(rng, 3, 24, 0.6, 0.3) for _ in range(2))
        wrong += stats.compare(first, second, paired=paired).verdict != "inconclusive"
    assert wrong / 500 <= 0.06 + 0.02


def test_equivalence_is_claimed_on_the_margin_at_most_at_its_rate():
    rng = np.random.default_rng(2)
    words = [
        stats.compare(0.0, draw(rng, 5, 24, 0.5, 0.2, mean=3.5), 3.5, "equal").verdict
        for _ in range(500)
    ]
    assert 0.01 < words.count("equivalent") / 500 <= 0.07 and "contradicted" in words


def test_power_and_seeds_needed_are_what_simulation_finds():
    rng = np.random.default_rng(3)
    comparisons = [stats.compare(0.0, draw(rng, 6, 50, 0.7, 0.2, mean=3), 3.0) for _ in range(400)]
    shown = np.mean([c.p < 0.05 for c in comparisons])
    assert np.mean([c.power for c in comparisons]) == pytest.approx(shown, abs=0.08)
    # Seeds alone vary: the standard error falls with their root, as for a t test.
    found = stats.compare([0.0, 1, 2, 3, 4], [2.0, 2, 4, 3, 6], 0.5, "more", over="seeds")
    needed = int(found.seeds_needed)
    spread = np.std([2, 1, 2, 0, 2], ddof=1)
    for seeds, enough in ((needed, True), (needed - 1, False)):
        limit = scipy_stats.t.isf(0.025, seeds - 1)
        power = scipy_stats.nct.sf(limit, seeds - 1, found.estimate / (spread / seeds**0.5))
        assert (power >= 0.8) == enough
    few_patients = np.tile([[-1.0, 1.5, 0.2, -0.3]], (3, 1))
    assert stats.compare(0.0, few_patients, 0.1).seeds_needed == np.inf


@pytest.mark.parametrize(
    ("claim", "shift", "noise", "verdict"),
    [
        ("less", -1, 0.1, "confirmed"),
        ("less", 1, 0.1, "contradicted"),
        ("more", 1, 0.1, "confirmed"),
        ("more", -1, 0.1, "contradicted"),
        ("less", 0.1, 0.05, "equivalent"),  # certain in sign, too small to matter
        ("less", 0, 3, "inconclusive"),
        ("not worse", 0.1, 0.1, "confirmed"),
        ("not worse", -1, 0.1, "confirmed"),
        ("not worse", 1, 0.1, "contradicted"),
        ("not worse", 0, 3, "inconclusive"),
        ("equal", 0.1, 0.1, "equivalent"),
        ("equal", -1, 0.1, "contradicted"),
        ("equal", 0, 3, "inconclusive"),
    ],
)
def test_verdicts(claim, shift, noise, verdict):
    rng = np.random.default_rng(1)
    first = rng.normal(5, 1, (5, 30)) + rng.normal(0, 2, (1, 30))
    second = first + shift + noise * rng.normal(size=(5, 1)) + noise * rng.normal(size=(1, 30))
    found = stats.compare(first, second, 0.5, claim)
    assert found.verdict == verdict and verdict in stats.VERDICTS
    assert found.low < found.estimate < found.high


def test_a_difference_in_words():
    first = np.zeros((2, 3))
    second = first + np.array([[-1.0, -1.1, -0.9], [-1.2, -1.1, -1.0]])
    found = stats.compare(first, second)
    assert found.words("mm") == f"1.1 mm less [{found.low:+.2g}, {found.high:+.2g}]"
    assert stats.compare(second, first).words("").startswith("1.1 more [+")
    none = stats.compare(first, first + np.array([[1.0, -1.0, 0.0]]))
    assert none.words("deg").startswith("no difference shown [-")
    assert stats.compare([2.0], [1.5], over="seeds").words("mm") == "0.5 mm less"  # one seed


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(0)
    first = rng.normal(0, 3, (5, 1)) + rng.normal(0, 3, (1, 24))
    second = first + 1 + rng.normal(0, 0.2, (5, 24))
    paired, unpaired = (stats.compare(first, second, paired=p) for p in (True, False))
    assert paired.estimate == pytest.approx(unpaired.estimate)
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)
    # Without patients the unpaired comparison is Welch's.
    a, b = first[:, 0], second[:4, 0]
    welch = scipy_stats.ttest_ind(b, a, equal_var=False)
    found = stats.compare(a, b, paired=False, over="seeds")
    limits = welch.confidence_interval()
    assert (found.low, found.high) == pytest.approx((limits.low, limits.high))
    assert found.p == pytest.approx(welch.pvalue)


def test_tables_are_aligned_by_their_labels():
    tidy = pd.DataFrame(
        [(seed, patient, frame, seed + 2 * ord(patient) + frame)
         for seed in (0, 1) for patient in "abc" for frame in (0, 1)],
        columns=["seed", "patient", "frame", "error"],
    )  # fmt: skip
    table = stats.matrix(tidy, "error")
    assert table.loc[1, "b"] == 1 + 2 * ord("b") + 0.5 and table.shape == (2, 3)
    found = stats.compare(table, table.iloc[::-1, ::-1] + 1)
    assert found.estimate == pytest.approx(1) and found.verdict == "contradicted"
    assert stats.compare(table.loc[0, ::-1], table).estimate == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one side alone"):
        stats.compare(table, table[["a", "b"]])
    with pytest.raises(ValueError, match=r"one side alone: \[1\]"):
        stats.compare(table, table.loc[[0]])
    with pytest.raises(ValueError, match="no finite value"):
        stats.matrix(tidy[:-2], "error")
    with pytest.raises(ValueError, match="patients must be the same"):
        stats.compare(np.ones((2, 3)), np.ones((3, 3)))


def test_one_seed_is_untested():
    found = stats.compare([[1.0, 2, 3]], [[2.0, 3, 5]], 0.1)
    assert found.verdict == "untested" and np.isnan(found.seeds_needed)
    assert found.low < found.estimate < found.high  # over patients
    assert stats.compare(np.ones((3, 1)), np.zeros((3, 1))).verdict == "untested"
    assert stats.holm([found])[0].verdict == "untested"
    with pytest.raises(ValueError, match="needs a margin"):
        stats.compare([1.0], [2.0], claim="equal")


def test_holm_by_hand():
    adjusted = stats._holm([0.01, 0.04, np.nan, 0.03, 0.5])
    assert adjusted == pytest.approx([0.04, 0.09, np.nan, 0.09, 0.5], nan_ok=True)
    rng = np.random.default_rng(0)
    weak = [stats.compare(0.0, 1.0 + rng.normal(0, 1, (6, 1)), over="seeds") for _ in range(8)]
    family = stats.holm(weak)
    for before, after in zip(weak, family, strict=True):
        assert after.p >= before.p and after.seeds_needed >= before.seeds_needed
        if after.verdict == "inconclusive":
            assert after.seeds_needed > 6
    before, after = ([c.verdict for c in part].count("contradicted") for part in (weak, family))
    assert before > after


def test_ratio():
    rng = np.random.default_rng(0)
    patients = rng.gamma(5, size=(1, 40))
    hits = 0
    for _ in range(300):
        numerator = (
            0.5 * patients * np.exp(rng.normal(0, 0.1, (4, 1)) + rng.normal(0, 0.3, (4, 40)))
        )
        found = stats.ratio(numerator, patients[0])
        hits += found.low <= 0.5 * np.exp(0.005 + 0.045) <= found.high
    assert 0.92 <= hits / 300 <= 0.99 and 0 < found.low < found.estimate < found.high
    exact = stats.ratio(3 * patients, patients)
    assert exact[:3] == pytest.approx((3, 3, 3))
    assert np.isnan(stats.ratio(patients, 0 * patients).estimate)


def test_verdict_row():
    row = stats.verdict_row(stats.compare(0.0, np.ones((2, 3)), 0.1), family="x", unit="mm")
    assert list(row) == stats.COLUMNS and row["claim"] is None
    assert (row["estimate"], row["unit"], row["verdict"], row["seeds"]) == (
        1,
        "mm",
        "contradicted",
        2,
    )
    assert stats.verdict_row(claim="y")["verdict"] == "untested"
    with pytest.raises(ValueError, match="unknown columns"):
        stats.verdict_row(famly="x")


if __name__ == "__main__":
    shares, interactions = (0, 0.25, 0.5, 0.75, 1), (0, 0.5, 1, 2)
    print("share of the mean's variance due to seeds:", *shares)
    for design in itertools.product((2, 3, 5, 10), (24, 200), interactions):
        row = [coverage(*design[:2], share, design[2], draws=5000) for share in shares]
        print(
            "seeds {:2}, patients {:3}, interaction {:3}:".format(*design),
            *map("{:.1%}".format, row),
        )
