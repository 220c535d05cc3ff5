"""The verifier's advantage, one number per episode: relative to its prompt's group (GRPO), or absolute.

A rubric's advantage (ROPD, arXiv 2605.07396) is the group-relative one of another reward, without the std.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import fmean, stdev

STD_EPS = 1e-6
CONSTANT = 1e-8
"""A group whose rewards differ by less than this is constant: its advantages are exactly 0, not rounding residue."""


def group_advantages(
    rewards: Sequence[float | None], groups: Sequence[Hashable], normalise_std: bool = True
) -> list[float]:
    """``(R - mean) / (std + 1e-6)`` with the unbiased std, one number per episode.

    Episodes whose reward is unknown (None) enter neither mean nor std and get 0; so do constant groups and groups
    with one known reward.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        if rewards[index] is not None:
            members[group].append(index)
    advantages = [0.0] * len(rewards)
    for indices in members.values():
        known = [float(reward) for i in indices if (reward := rewards[i]) is not None]
        if max(known) - min(known) < CONSTANT:
            continue
        mean, scale = fmean(known), stdev(known) + STD_EPS if normalise_std else 1.0
        for index, reward in zip(indices, known, strict=True):
            advantages[index] = (reward - mean) / scale
    return advantages


def absolute_advantages(outcomes: Sequence[float | None]) -> list[float]:
    """``2 s - 1`` of each episode's outcome, 0 where it is unknown: for prompts with a single episode."""
    return [0.0 if outcome is None else 2 * outcome - 1 for outcome in outcomes]


def rubric_score(weights: Sequence[float], met: Sequence[float]) -> float:
    """``sum w v / sum w`` in [0, 1] of a rubric with criteria of weight ``w`` met to degree ``v`` (ROPD)."""
    total = sum(weights)
    if total <= 0:
        raise ValueError(f"a rubric needs a positive total weight: {list(weights)}")
    return sum(w * v for w, v in zip(weights, met, strict=True)) / total
