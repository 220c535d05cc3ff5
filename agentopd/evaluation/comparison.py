"""Comparisons over seeds, corrections for many of them, and intervals of means over skills.

The unit of a comparison between two ways of training is the seed: tasks say how well one trained model is measured,
seeds say how far another training would land elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from agentopd.evaluation.statistics import Interval, sign_flip_p_value, student_t_cdf, student_t_quantile
from agentopd.types import Record


class SeedDifference(Record):
    """Mean of ``other - baseline`` over the seeds that both have, with a paired t test."""

    mean: float
    ci95: Interval | None
    """None where every seed differs by the same amount: a spread of zero is no evidence of certainty."""
    n: int
    p_value: float


def paired_seeds(baseline: Mapping[int, float], other: Mapping[int, float]) -> SeedDifference | None:
    """Paired t test over shared seeds; None below two of them.

    Where all differences are equal the t statistic does not exist, and the p-value is the exact sign-flip one.
    """
    shared = sorted(baseline.keys() & other.keys())
    n = len(shared)
    if n < 2:
        return None
    deltas = np.array([other[seed] - baseline[seed] for seed in shared], dtype=np.float64)
    mean, spread = float(deltas.mean()), float(deltas.std(ddof=1))
    if spread <= 1e-12 * max(1.0, abs(mean)):
        return SeedDifference(mean=mean, ci95=None, n=n, p_value=sign_flip_p_value(deltas, seed=0))
    error = spread / math.sqrt(n)
    half = student_t_quantile(0.975, n - 1) * error
    p_value = 2 * student_t_cdf(-abs(mean) / error, n - 1)
    return SeedDifference(mean=mean, ci95=(mean - half, mean + half), n=n, p_value=min(1.0, max(0.0, p_value)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that bound the chance of any false rejection (Holm 1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that bound the expected share of false rejections (Benjamini & Hochberg 1995)."""
    total = len(p_values)
    order = sorted(range(total), key=lambda index: p_values[index], reverse=True)
    adjusted = [0.0] * total
    running = 1.0
    for place, index in enumerate(order):
        running = min(running, p_values[index] * total / (total - place))
        adjusted[index] = running
    return adjusted


def mean_of_independent(parts: Sequence[tuple[float, Interval]]) -> Interval:
    """Interval of the mean of independent estimates from their own intervals (MOVER, Zou & Donner 2008).

    Each part is (estimate, interval). Skills share no tasks, so their estimates are independent, and the distances
    from estimate to bound add in quadrature; asymmetric and bounded intervals keep their shape.
    """
    if not parts:
        raise ValueError("no parts: the mean of nothing has no interval")
    n = len(parts)
    mean = sum(estimate for estimate, _ in parts) / n
    below = math.sqrt(sum((estimate - low) ** 2 for estimate, (low, _) in parts)) / n
    above = math.sqrt(sum((high - estimate) ** 2 for estimate, (_, high) in parts)) / n
    return mean - below, mean + above
