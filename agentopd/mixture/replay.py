"""How much of the replay share each old skill gets.

``forgetting`` follows docs/algorithms.md (on-policy replay): skill j is drawn with weight
``max(floor, base_j - current_j) + floor``, where base and current are its scores at the start and at the latest
retention evaluation. A skill that was lost is replayed more; one that was kept is never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentopd.config.run import ReplayConfig


@dataclass
class ReplayScores:
    """Scores of the old skills at the start of the run and at the latest retention evaluation."""

    base: dict[str, float] = field(default_factory=dict)
    current: dict[str, float] = field(default_factory=dict)

    def update(self, scores: Mapping[str, float]) -> None:
        """Take in an evaluation; the first one a skill appears in is its base."""
        for skill, score in scores.items():
            self.base.setdefault(skill, score)
            self.current[skill] = score


def replay_weights(skills: Sequence[str], config: ReplayConfig, scores: ReplayScores) -> dict[str, float]:
    """Share of the replay budget of each old skill; sums to 1. Skills without a score count as kept."""
    if not skills:
        return {}
    raw = dict.fromkeys(skills, 1.0)
    if config.policy == "forgetting":
        for name in skills:
            lost = scores.base.get(name, 0.0) - scores.current.get(name, scores.base.get(name, 0.0))
            raw[name] = max(config.floor, lost) + config.floor
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}
