"""How much replay each old skill gets.

``forgetting`` follows docs/algorithms.md (on-policy replay): skill j is drawn with weight
``max(floor, base_j - current_j) + floor``, where base and current are its scores when it was learned and at the latest
retention evaluation. A skill that was lost is replayed more; one that was kept is never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentopd.config.retention import ReplayConfig


@dataclass
class ReplayScores:
    """Scores of the old skills when they became old and at the latest retention evaluation."""

    base: dict[str, float] = field(default_factory=dict)
    current: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """Standard errors of the losses."""

    def update(self, scores: Mapping[str, float], errors: Mapping[str, float] | None = None) -> None:
        """Take in an evaluation, and how sure its losses are; the first one a skill appears in is its base."""
        for skill, score in scores.items():
            self.base.setdefault(skill, score)
            self.current[skill], self.errors[skill] = score, (errors or {}).get(skill, 0.0)

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
