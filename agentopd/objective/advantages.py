"""Group-relative advantage of the verifier's reward (GRPO), computed inside each prompt's group."""

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
