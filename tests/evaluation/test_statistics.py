"""Intervals against published values, and against their promise: coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.evaluation.statistics import (
    bootstrap,
    mean_interval,
    paired_difference,
    seeds_interval,
    sign_flip_p_value,
    student_t_cdf,
    student_t_quantile,
    wilson,
)


def test_wilson_matches_known_values():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="wilson needs"):
        wilson(successes, n)


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (999, 1.9623)]
)
def test_student_t_matches_the_tables(df, quantile):
    assert student_t_quantile(0.975, df) == pytest.approx(quantile, abs=1e-4)
    assert student_t_cdf(-quantile, df) == pytest.approx(0.025, abs=1e-5)


def test_seeds_interval_is_students():
    # mean 2, sd 1, n 3: half-width 4.3027 / sqrt(3)
    assert seeds_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-3
    )
    assert seeds_interval([0.5]) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 9))
def test_mean_interval_holds_the_mean_and_repeats(values, seed):
    low, high = mean_interval(values, seed)
    mean = sum(values) / len(values)
    assert low - 1e-9 <= mean <= high + 1e-9
    assert mean_interval(values, seed) == (low, high)


def test_certainty_is_never_claimed_from_equal_values():
    low, high = mean_interval([0.5] * 10, seed=0)
    assert high - low > 0.3


@pytest.mark.parametrize("p", [0.1, 0.5, 0.85])
def test_wilson_covers_95_percent(p):
    n = 100
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    covered = sum(w for c, w in enumerate(weights) if wilson(c, n)[0] <= p <= wilson(c, n)[1])
    assert 0.93 <= covered <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [12, 50])
def test_bootstrap_covers_95_percent(tasks):
    rng = np.random.default_rng(1)
    truth, reps, hits = 0.6, 1000, 0
    for rep in range(reps):
        attempts = rng.random((tasks, 4)) < rng.beta(3, 2, size=(tasks, 1))  # tasks differ; mean 0.6
        low, high = bootstrap(attempts.mean(axis=1)[:, None], lambda m: m[:, 0], seed=rep)
        hits += low - 1e-9 <= truth <= high + 1e-9
    assert 0.93 <= hits / reps <= 0.97


def test_paired_difference_uses_only_shared_tasks():
    before = {f"t{i}": float(i % 2) for i in range(40)}
    after = {f"t{i}": 1.0 for i in range(10, 60)}
    difference = paired_difference(before, after)
    assert difference is not None
    assert difference.n == 30
    assert difference.mean == pytest.approx(0.5)
    assert difference.significant and difference.p_value < 0.001


def test_pairing_sees_what_unpaired_intervals_cannot():
    before = {f"t{i}": i / 100 for i in range(90)}
    after = {task: value + (0.05 if int(task[1:]) % 3 else 0.1) for task, value in before.items()}
    difference = paired_difference(before, after)
    assert difference is not None and difference.significant
    assert mean_interval(list(before.values()), 0)[1] > mean_interval(list(after.values()), 0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "attempts", "lost", "gained"),
    [(100, 1, 0.035, 0.0), (100, 1, 0.04, 0.01), (100, 1, 0.1, 0.05), (100, 2, 0.035, 0.0), (100, 4, 0.03, 0.01)],
)
def test_few_changes_cover_95_percent(tasks, attempts, lost, gained):
    """Attempts of a task that were solved before and no more, or only now."""
    rng, reps, hits = np.random.default_rng(0), 1500, 0
    before = dict.fromkeys(map(str, range(tasks)), 0.5)
    for rep in range(reps):
        change = (rng.binomial(attempts, gained, tasks) - rng.binomial(attempts, lost, tasks)) / attempts
        found = paired_difference(before, {str(task): 0.5 + change[task] for task in range(tasks)}, seed=rep)
        hits += found.ci95[0] - 1e-9 <= gained - lost <= found.ci95[1] + 1e-9
    assert 0.93 <= hits / reps <= 0.98


def test_no_change_is_not_certain_no_change():
    same = {f"t{i}": 1.0 for i in range(20)}
    difference = paired_difference(same, same)
    assert difference is not None
    low, high = difference.ci95
    assert low < -0.02 and high > 0.02 and difference.p_value == 1.0


def test_disjoint_tasks_cannot_be_compared():
    assert paired_difference({"a": 1.0}, {"b": 1.0}) is None


def test_sign_flip_is_exact_enough_on_a_small_case():
    # five positive differences: 2 of 32 sign patterns are as extreme
    assert sign_flip_p_value(np.ones(5), seed=1) == pytest.approx(2 / 32, abs=0.02)
