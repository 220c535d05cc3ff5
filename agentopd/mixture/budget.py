"""``budgeted``: of each old skill, the least share of the batch that keeps it.

Two witnesses say how a skill fares. Evaluations are exact but rare: the share goes down while the skill is within its
tolerance, and up where it is beyond it and not already on the mend, by less where that may be chance. The replayed
prompts are few, but every step has some: where half of their success is surely gone, the share goes to its largest at
once, for the longer a skill is lost the longer it takes to come back, and settles a little above what had not been
enough as soon as they succeed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentopd.config.retention import ReplayConfig
from agentopd.mixture.replay import ReplayScores

_RAISE, _NUDGE, _RELAX = 2.0, 1.4, 0.7
"""Losing a skill costs more than replaying it a little too long: up fast, down slowly. A nudge undoes a relaxation."""
_REFERENCE = 10
"""Replayed prompts that say how often the skill succeeds on its training tasks; these may be harder than held-out
ones."""
_NEWEST = 5
"""Replayed prompts that can say that a skill is back."""
_FADED = 0.5
"""Part of the usual success below which it is a matter of steps, not of evaluations."""
_CHANCE = 1 / 400
"""Largest probability of an alarm while the skill is within its tolerance, for one stretch of prompts."""

Tally = tuple[float, int]
"""Sum of mean outcomes in [0, 1], and of how many prompts."""


@dataclass
class Watch:
    """What is known of one replayed skill beyond its scores."""

    loss: float = 0.0
    """Its loss at the latest evaluation."""
    replayed: bool = False
    """Whether any of its prompts was drawn since."""
    first: Tally = (0.0, 0)
    """Its first replayed prompts: the reference."""
    steps: list[Tally] = field(default_factory=list)
    """Its replayed prompts since the share last moved, step by step."""
    settled: float | None = None
    """Its share once it is back; None while it has not faded."""

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Watch:
        """From the JSON values of ``dataclasses.asdict``."""
        first, steps = tuple(state["first"]), [tuple(tally) for tally in state["steps"]]
        return cls(state["loss"], state["replayed"], first, steps, state["settled"])

    def evaluated(self, loss: float) -> None:
        """Start a new stretch: an evaluation has said more than the prompts before it."""
        self.loss, self.replayed, self.steps = loss, False, []

    def observe(self, outcomes: Sequence[float]) -> None:
        """Take in the mean outcomes of one step's replayed prompts."""
        tally = (float(sum(outcomes)), len(outcomes))
        if self.first[1] < _REFERENCE:
            self.first = _plus(self.first, tally)
        elif outcomes:
            self.steps.append(tally)

    def gap(self, base: float | None, tolerated_drop: float) -> tuple[float, bool] | None:
        """How far the newest prompts are below the reference, and whether that is too far (True) or within tolerance.

        None where too few say anything. Every stretch of steps up to the newest is tested: with success at least ``p``
        (the reference, or ``base`` where that is lower, less the tolerance), a mean of ``x`` below it over n prompts
        has at most the probability ``exp(-n kl(x, p))`` (Hoeffding 1963, theorem 1). Within tolerance is a mean of the
        newest few no further below ``p`` than its standard error.
        """
        if self.first[1] < _REFERENCE:
            return None
        usual = min(1.0 if base is None else base, self.first[0] / self.first[1])
        kept = min(max(usual - tolerated_drop, 0.0), 0.99)
        seen, well = (0.0, 0), None
        for tally in reversed(self.steps):
            seen = _plus(seen, tally)
            mean = seen[0] / seen[1]
            if mean < min(kept, _FADED * usual) and seen[1] * _kl(mean, kept) > -math.log(_CHANCE):
                return usual - mean, True
            if well is None and seen[1] >= _NEWEST:
                well = mean if mean >= kept - math.sqrt(kept * (1 - kept) / seen[1]) else 0.0
        return (usual - well, False) if well else None


def evaluated_shares(
    shares: Mapping[str, float],
    config: ReplayConfig,
    scores: ReplayScores,
    watches: Mapping[str, Watch],
    tolerated_drop: float,
) -> dict[str, float]:
    """What each skill is to have in the next stretch, from what it had in the last one and what that did to it.

    ``watches`` know the evaluation before. What was not replayed has not been shown to do with less, and what has faded
    is for its prompts to bring back. Every share stays between ``min_share`` and ``max_share``; their sum may be more.
    """
    moved = {}
    for name, share in shares.items():
        loss, watch, factor = scores.loss(name), watches[name], 1.0
        if loss <= tolerated_drop and watch.settled is not None:
            share = watched_share(share, watch, False, config.max_share)
        elif loss <= tolerated_drop:
            factor = _RELAX if watch.replayed else 1.0
        elif loss >= watch.loss and watch.settled is None:
            factor = _RAISE if loss - scores.errors.get(name, 0.0) > tolerated_drop else _NUDGE
        moved[name] = min(max(config.min_share, share * factor), config.max_share)
    return moved


def watched_share(share: float, watch: Watch, too_far: bool, max_share: float) -> float:
    """The share from the next step on, after prompts that were ``too_far`` below the reference, or within tolerance.

    Notes in ``watch`` where the share is to settle.
    """
    if too_far:
        watch.settled = watch.settled or share * _NUDGE
        watch.steps.clear()
        return max_share
    settled, watch.settled = watch.settled, None
    return share if settled is None else min(share, settled)


def within_budget(shares: Mapping[str, float], config: ReplayConfig) -> dict[str, float]:
    """The shares; where they exceed ``max_share`` together, what each has beyond ``min_share`` is scaled down alike."""
    total = sum(shares.values())
    if total <= config.max_share:
        return dict(shares)
    least = min(config.min_share, config.max_share / len(shares))
    scale = (config.max_share - least * len(shares)) / (total - least * len(shares))
    return {name: least + (share - least) * scale for name, share in shares.items()}


def _plus(a: Tally, b: Tally) -> Tally:
    return a[0] + b[0], a[1] + b[1]


def _kl(x: float, p: float) -> float:
    """Between two Bernoulli means, in nats; ``p`` in (0, 1)."""
    success = x * math.log(x / p) if x > 0 else 0.0
    failure = (1 - x) * math.log((1 - x) / (1 - p)) if x < 1 else 0.0
    return success + failure
