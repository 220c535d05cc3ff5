"""Tests over seeds, corrections and combined intervals: against SciPy, published examples, and their promise."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.evaluation.comparison import benjamini_hochberg, holm, mean_of_independent, paired_seeds
from agentopd.evaluation.statistics import (
    mean_interval,
    paired_difference,
    sign_flip_p_value,
    student_t_cdf,
    student_t_quantile,
    wilson,
)

p_lists = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def by_seed(values):
    return dict(enumerate(values))


@pytest.fixture(scope="module")
def scipy_stats():
    return pytest.importorskip("scipy.stats", reason="SciPy is the oracle here: pip install scipy")


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9))
def test_paired_seeds_is_scipys_paired_t(scipy_stats, pairs):
    before, after = np.array(pairs).T
    if np.ptp(after - before) < 1e-6:
        return
    ours = paired_seeds(by_seed(before), by_seed(after))
    theirs = scipy_stats.ttest_rel(after, before)
    assert ours is not None and ours.ci95 is not None
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=1e-9)
    assert ours.ci95 == pytest.approx(tuple(theirs.confidence_interval(0.95)), abs=1e-9)


def test_student_t_and_wilson_are_scipys(scipy_stats):
    for df in (1, 2, 5, 20, 101):
        assert student_t_quantile(0.975, df) == pytest.approx(scipy_stats.t.ppf(0.975, df), abs=1e-9)
        assert student_t_cdf(1.3, df) == pytest.approx(scipy_stats.t.cdf(1.3, df), abs=1e-12)
    for count, n in ((0, 7), (3, 11), (50, 100)):
        interval = scipy_stats.binomtest(count, n).proportion_ci(method="wilson")
        assert wilson(count, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_sign_flip_is_scipys_permutation_test(scipy_stats):
    deltas = np.array([0.5, 0.25, -0.1, 0.7, 0.0, 0.3, 0.2])
    theirs = scipy_stats.permutation_test((deltas,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p_value(deltas, seed=0) == pytest.approx(theirs.pvalue)


def test_the_bootstrap_is_near_scipys_bca(scipy_stats):
    values = np.random.default_rng(3).beta(4, 2, size=80)
    theirs = scipy_stats.bootstrap((values,), np.mean, random_state=np.random.default_rng(0)).confidence_interval
    assert mean_interval(list(values), seed=0) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_one_seed_is_no_comparison_and_equal_differences_are_no_certainty():
    assert paired_seeds({0: 0.1}, {0: 0.9}) is None
    assert paired_seeds({0: 0.1, 1: 0.2}, {2: 0.9, 3: 0.8}) is None
    equal = paired_seeds(by_seed([0.0, 0.25, 0.5]), by_seed([0.5, 0.75, 1.0]))
    assert equal is not None and equal.ci95 is None and equal.p_value == 2 / 8


@given(p_lists)
def test_benjamini_hochberg_is_scipys(scipy_stats, p_values):
    assert benjamini_hochberg(p_values) == pytest.approx(scipy_stats.false_discovery_control(p_values), abs=1e-12)


def test_corrections_match_known_values():
    # Holm 1979 by hand: 4 * .01, max(.04, 3 * .02), max(.06, 2 * .03), max(.06, .04)
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    # Benjamini & Hochberg 1995, section 4: of these fifteen, four are rejected at 0.05; Holm rejects three
    published = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719]
    published += [0.6528, 0.7590, 1.0]
    assert sum(p <= 0.05 for p in benjamini_hochberg(published)) == 4
    assert sum(p <= 0.05 for p in holm(published)) == 3


@given(p_lists)
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    """Holm's adjusted p is the largest Bonferroni p over the sets of hypotheses that contain it."""
    if len(p_values) > 6:
        p_values = p_values[:6]
    indices = range(len(p_values))
    subsets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(indices, size)]
    local = {s: min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets}
    expected = [max(p for s, p in local.items() if index in s) for index in indices]
    assert holm(p_values) == pytest.approx(expected)


@given(p_lists)
def test_corrections_only_raise_and_keep_order(p_values):
    for adjusted in (holm(p_values), benjamini_hochberg(p_values)):
        assert all(new >= old - 1e-12 for new, old in zip(adjusted, p_values, strict=True))
        assert [adjusted[i] for i in np.argsort(p_values)] == sorted(adjusted)
    assert all(h >= b - 1e-12 for h, b in zip(holm(p_values), benjamini_hochberg(p_values), strict=True))


@pytest.mark.slow
def test_paired_bootstrap_covers_95_percent():
    """A model that wins one task in six and loses one in twenty: the true change is 0.1167."""
    rng = np.random.default_rng(5)
    tasks, reps, hits = 80, 800, 0
    truth = 1 / 6 - 1 / 20
    names = [f"t{i}" for i in range(tasks)]
    for rep in range(reps):
        before = (rng.random(tasks) < 0.5).astype(float)
        draw = rng.random(tasks)
        delta = np.where(draw < 1 / 6, 1.0, np.where(draw > 1 - 1 / 20, -1.0, 0.0))
        found = paired_difference(
            dict(zip(names, before, strict=True)), dict(zip(names, before + delta, strict=True)), rep
        )
        assert found is not None
        hits += found.ci95[0] <= truth <= found.ci95[1]
    assert 0.93 <= hits / reps <= 0.97


def test_paired_seeds_covers_95_percent():
    rng = np.random.default_rng(2)
    base, gain = rng.normal(0.5, 0.1, (2000, 5)), rng.normal(0.1, 0.05, (2000, 5))
    found = [paired_seeds(by_seed(b), by_seed(b + g)) for b, g in zip(base, gain, strict=True)]
    hits = sum(one is not None and one.ci95 is not None and one.ci95[0] <= 0.1 <= one.ci95[1] for one in found)
    assert 0.93 <= hits / len(found) <= 0.97


def test_a_mean_over_skills_covers_95_percent():
    rng = np.random.default_rng(4)
    rates, n, reps = np.array([0.95, 0.4, 0.7]), 100, 3000
    hits = 0
    for counts in rng.binomial(n, rates, size=(reps, 3)):
        low, high = mean_of_independent([(count / n, wilson(int(count), n)) for count in counts])
        hits += low <= rates.mean() <= high
    assert 0.93 <= hits / reps <= 0.97


def test_one_part_keeps_its_interval_and_none_is_refused():
    assert mean_of_independent([(0.9, (0.7, 0.95))]) == pytest.approx((0.7, 0.95))
    with pytest.raises(ValueError, match="no parts"):
        mean_of_independent([])
