"""Intervals for means over tasks and over seeds, and paired comparisons over tasks; all seeded, none needing SciPy.

The unit of resampling is always the task: attempts at one task are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from agentopd.types import Record

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
_NORMAL = NormalDist()
_CHUNK = 2_000_000  # indices drawn at once: bounds the memory of a bootstrap over many tasks
_FEW = 3
_EXACT_UP_TO = 12  # so many changed tasks have few enough sign patterns to try them all


class Difference(Record):
    """Mean of ``after - before`` over the tasks judged in both."""

    mean: float
    ci95: Interval
    n: int
    p_value: float
    """Two-sided sign-flip permutation test of no difference."""

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.ci95
        return low > 0 or high < 0


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927). Raises ``ValueError`` unless 0 <= successes <= n, n >= 1."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = _NORMAL.inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def student_t_cdf(t: float, df: int) -> float:
    """P(T <= t) for integer degrees of freedom, in closed form (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    term = cos if df % 2 else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    inside = 2 / math.pi * (theta + sin * total) if df % 2 else sin * total
    return 0.5 + inside / 2


def student_t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, by bisection; p in [0.5, 1). Normal beyond 1000 degrees of freedom."""
    if df > 1000:
        return _NORMAL.inv_cdf(p)
    low, high = 0.0, 1.0
    while student_t_cdf(high, df) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, df) < p else (low, middle)
    return high


def bootstrap(rows: Floats, statistic: Callable[[Floats], Floats], seed: int, level: float = 0.95) -> Interval:
    """Expanded-percentile bootstrap interval over the rows (tasks) of ``rows`` (n, columns).

    ``statistic`` maps means of resampled rows (resamples, columns) to values (resamples,). The percentiles are widened
    for small n so that a mean gets the coverage of a t interval (Hesterberg 2015, "What teachers should know about the
    bootstrap", section 3.3).
    """
    n = len(rows)
    if n < 2:
        raise ValueError(f"a bootstrap needs at least two tasks, got {n}")
    values = statistic(_resampled_means(rows, np.random.default_rng(seed)))
    tail = _NORMAL.cdf(-math.sqrt(n / (n - 1)) * student_t_quantile(0.5 + level / 2, n - 1))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(rows: Floats, rng: np.random.Generator) -> Floats:
    """Means (resamples, columns) of rows drawn with replacement.

    Rows of few distinct values (outcomes of few attempts) are drawn by their counts, which is the same distribution.
    """
    n = len(rows)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    if len(distinct) <= n // _FEW:
        means: Floats = rng.multinomial(n, counts / n, size=RESAMPLES) @ distinct / n
        return means
    size = max(1, _CHUNK // n)
    sizes = [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]
    return np.concatenate([rows[rng.integers(0, n, size=(part, n))].mean(axis=1) for part in sizes])


def mean_interval(values: Sequence[float], seed: int, level: float = 0.95) -> Interval:
    """Interval for the mean of per-task values in [0, 1].

    Wilson where every value is 0 or 1, and where all values are equal: a bootstrap would then claim certainty, and
    Wilson is conservative because a variable in [0, 1] with mean p has variance at most p(1 - p). Bootstrap otherwise.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        raise ValueError("no values: an interval needs at least one task")
    binary = bool(np.isin(array, (0.0, 1.0)).all())
    if binary or np.ptp(array) == 0:
        return wilson(float(array.sum()), len(array), level)
    return bootstrap(array[:, None], lambda means: means[:, 0], seed, level)


def paired_difference(before: Mapping[str, float], after: Mapping[str, float], seed: int = 0) -> Difference | None:
    """Paired comparison of per-task scores in [0, 1] on the tasks that both hold; None if they share no task.

    Two pseudo-tasks are added before resampling, as much better and as much worse as any task became (after Bonett &
    Price 2012, whose are +1 and -1): where few tasks changed, or all in one direction, the tasks alone claim more than
    n deserves. Where all differences are equal they are +1 and -1.
    """
    shared = sorted(before.keys() & after.keys())
    if not shared:
        return None
    deltas = np.array([after[task] - before[task] for task in shared], dtype=np.float64)
    most = float(np.abs(deltas).max()) if np.ptp(deltas) > 0 else 1.0
    widened = np.append(deltas, [most, -most])
    low, high = bootstrap(widened[:, None], lambda means: means[:, 0], seed)
    return Difference(
        mean=float(deltas.mean()),
        ci95=(max(-1.0, low), min(1.0, high)),
        n=len(shared),
        p_value=sign_flip_p_value(deltas, seed),
    )


def sign_flip_p_value(deltas: Floats, seed: int, flips: int = 4000) -> float:
    """Two-sided p-value of a sign-flip permutation test of a zero mean.

    Exact where at most twelve differences are not zero, otherwise ``(1 + hits) / (1 + flips)`` of random flips.
    """
    moved = deltas[deltas != 0]
    if len(moved) == 0:
        return 1.0
    if len(moved) <= _EXACT_UP_TO:
        bits = (np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1
        return float((np.abs((2 * bits - 1) @ moved) >= abs(float(moved.sum())) - 1e-12).mean())
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(flips, len(moved)), dtype=np.int8) * 2 - 1
    hits = int((np.abs(signs @ moved) >= abs(float(moved.sum())) - 1e-12).sum())
    return (1 + hits) / (1 + flips)


def seeds_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student-t interval of the mean over independent seeds; None below two seeds."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_t_quantile(0.5 + level / 2, n - 1) * spread / math.sqrt(n)
    return mean - half, mean + half
