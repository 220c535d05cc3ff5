"""How much replay each old skill gets.

``forgetting`` follows docs/algorithms.md (on-policy replay): skill j is drawn with weight
``max(floor, base_j - current_j) + floor``, where base and current are its scores when it was learned and at the latest
retention evaluation. A skill that was lost is replayed more; one that was kept is never dropped.

``budgeted`` is a controller of each skill's own share: doubled while the skill is below its tolerance, relaxed while it
has half of it to spare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentopd.config.retention import ReplayConfig

_RAISE, _RELAX = 2.0, 0.7
"""Losing a skill costs more than replaying it a little too long: up fast, down slowly."""


@dataclass
class ReplayScores:
    """Scores of the old skills when they became old and at the latest retention evaluation."""

    base: dict[str, float] = field(default_factory=dict)
    current: dict[str, float] = field(default_factory=dict)

    def update(self, scores: Mapping[str, float]) -> None:
        """Take in an evaluation; the first one a skill appears in is its base."""
        for skill, score in scores.items():
            self.base.setdefault(skill, score)
            self.current[skill] = score

    def loss(self, skill: str) -> float:
        """How far a skill is below its base; 0 for one without a score. Rounded: 0.92 - 0.90 is no more than 0.02."""
        return round(self.base.get(skill, 0.0) - self.current.get(skill, self.base.get(skill, 0.0)), 9)


def replay_weights(skills: Sequence[str], config: ReplayConfig, scores: ReplayScores) -> dict[str, float]:
    """Part of the replay share of each old skill; sums to 1. Skills without a score count as kept."""
    if not skills:
        return {}
    raw = dict.fromkeys(skills, 1.0)
    if config.policy == "forgetting":
        raw = {name: max(config.floor, scores.loss(name)) + config.floor for name in skills}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def budgeted_shares(
    shares: Mapping[str, float], config: ReplayConfig, scores: ReplayScores, tolerated_drop: float
) -> dict[str, float]:
    """The shares of the next stretch, from those of the last one and what it did to each skill.

    Every share stays at least ``min_share``, their sum at most ``max_share``.
    """
    moved = {}
    for name, share in shares.items():
        loss = scores.loss(name)
        factor = _RAISE if loss > tolerated_drop else _RELAX if loss <= tolerated_drop / 2 else 1.0
        moved[name] = max(config.min_share, share * factor)
    total = sum(moved.values())
    return {name: share * min(1.0, config.max_share / total) for name, share in moved.items()}
