"""What was kept: the matrix R[stage, skill], forgetting, transfer both ways, and the share of the teacher's gap closed.

Definitions follow Lopez-Paz & Ranzato (2017, GEM) for backward and forward transfer and Chaudhry et al. (2018) for
forgetting; all are differences of scores in [0, 1]. Intervals of a skill are paired bootstraps over the tasks that the
two stages share; those of a mean over skills combine the skills' own (``comparison.mean_of_independent``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agentopd.evaluation.comparison import mean_of_independent
from agentopd.evaluation.metrics import EvalResult, SkillScore
from agentopd.evaluation.statistics import Difference, Interval, bootstrap, paired_difference
from agentopd.types import Record, VersionedRecord

_ROUNDING = 1e-9  # two tasks of a hundred are two points, whatever the last bit of their mean
KeptVerdict = Literal["kept", "within", "broken"]


class GapClosed(Record):
    """``(after - base) / (teacher - base)``; ``ci95`` is None where the teacher's own lead is within noise."""

    value: float
    ci95: Interval | None


class SkillRetention(Record):
    """One skill over the stages. Every field is None where the scores it needs are missing."""

    change: Difference | None
    """Last stage minus the stage at which the skill was learned: its backward transfer."""
    forgetting: float | None
    """Best score of an earlier stage minus the last; at most the true loss plus the noise of picking a best."""
    forgetting_ci95: Interval | None
    gap_closed: GapClosed | None = None
    forward: Difference | None = None
    """Score just before the stage that taught the skill minus the first stage: its forward transfer."""
    verdict: KeptVerdict | None = None
    """Against the tolerated drop. ``broken``: the measured drop exceeds it. ``kept``: even the far end of the interval
    is within it. ``within``: the measured drop is, but more tasks could show otherwise."""


class RetentionMatrix(VersionedRecord):
    """R[i][j]: score (avg@k in [0, 1]) of skill j after stage i; None where it was not measured."""

    stages: tuple[str, ...]
    skills: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    ci95: tuple[tuple[Interval | None, ...], ...]
    by_skill: dict[str, SkillRetention]
    average: tuple[float | None, ...]
    """Mean over measured skills after each stage."""
    mean_forgetting: float | None
    backward_transfer: float | None
    """Mean over the skills learned before the last stage."""
    average_ci95: tuple[Interval | None, ...] = ()
    mean_forgetting_ci95: Interval | None = None
    backward_transfer_ci95: Interval | None = None
    forward_transfer: float | None = None
    """Mean over the skills taught after at least one other stage of training."""
    forward_transfer_ci95: Interval | None = None
    start_kl: tuple[tuple[float | None, ...], ...] = ()
    """KL(model, start) in nats per sampled token, by stage and skill, where it was measured."""
    start_kl_ci95: tuple[tuple[Interval | None, ...], ...] = ()
    tolerated_drop: float | None = None
    """What the suite declared, if it did."""

    @property
    def broken(self) -> tuple[str, ...]:
        """The skills that lost more than was tolerated."""
        return tuple(skill for skill in self.skills if self.by_skill[skill].verdict == "broken")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of everything above."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Tolerance:
    """The largest loss that is tolerated, and of which skills (none named: all)."""

    tolerated_drop: float
    skills: Collection[str] = ()

    def verdict(self, skill: str, change: Difference | None) -> KeptVerdict | None:
        """What a change since the skill was learned means; None where it is not covered or not measured."""
        if change is None or (self.skills and skill not in self.skills):
            return None
        if -change.mean > self.tolerated_drop + _ROUNDING:
            return "broken"
        return "kept" if -change.ci95[0] <= self.tolerated_drop + _ROUNDING else "within"


def retention_matrix(
    results: Sequence[EvalResult],
    stages: Sequence[str] | None = None,
    learned_at: Mapping[str, int] | None = None,
    teacher: EvalResult | None = None,
    seed: int = 0,
    tolerance: Tolerance | None = None,
    begun_at: Mapping[str, int] | None = None,
) -> RetentionMatrix:
    """Build the matrix from evaluations in stage order.

    ``learned_at[skill]`` is the index of the stage that taught it (default 0: the starting model could already do it);
    skills learned at the last stage cannot have been forgotten yet and take no part in the means of what was kept.
    ``begun_at[skill]`` is the last stage without any training on it (default: the one before), which forward transfer
    is read from. ``teacher`` adds the share of the gap closed between the first stage and the teacher, ``tolerance`` a
    verdict on every skill that it covers and that was learned before the last stage. Raises ``ValueError`` on empty
    input, names that do not fit, or an index outside the stages.
    """
    last = len(results) - 1
    learned = dict(learned_at or {})
    names = tuple(stages) if stages is not None else tuple(_stage_name(result) for result in results)
    if not results or len(names) != len(results):
        raise ValueError(f"{len(results)} evaluations but {len(names)} stage names; need one each, and at least one")
    if any(not 0 <= index <= last for index in learned.values()):
        raise ValueError(f"learned_at {learned} names a stage outside 0..{last}")
    skills = tuple(dict.fromkeys(name for result in results for name in result.tasks))
    columns = {skill: [result.tasks.get(skill) for result in results] for skill in skills}
    begun = {skill: max(0, index - 1) for skill, index in learned.items()} | dict(begun_at or {})
    by_skill = {
        skill: _skill_retention(columns[skill], learned.get(skill, 0), begun.get(skill, 0), seed) for skill in skills
    }
    if teacher is not None:
        for skill, kept in by_skill.items():
            gap = gap_closed(columns[skill][0], columns[skill][-1], teacher.tasks.get(skill), seed)
            by_skill[skill] = kept.model_copy(update={"gap_closed": gap})
    for skill, kept in by_skill.items():
        verdict = tolerance.verdict(skill, kept.change) if tolerance else None
        by_skill[skill] = kept.model_copy(update={"verdict": verdict})
    old = [by_skill[skill] for skill in skills if learned.get(skill, 0) < last]
    forgetting, forgetting_ci95 = _combined([(kept.forgetting, kept.forgetting_ci95) for kept in old])
    backward, backward_ci95 = _combined([_parts(kept.change) for kept in old])
    forward, forward_ci95 = _combined([_parts(by_skill[skill].forward) for skill in skills])
    average = [_combined([(_avg(score), _ci95(score)) for score in result.tasks.values()]) for result in results]
    return RetentionMatrix(
        stages=names,
        skills=skills,
        values=tuple(tuple(_avg(columns[skill][i]) for skill in skills) for i in range(len(results))),
        ci95=tuple(tuple(_ci95(columns[skill][i]) for skill in skills) for i in range(len(results))),
        by_skill=by_skill,
        average=tuple(mean for mean, _ in average),
        average_ci95=tuple(interval for _, interval in average),
        mean_forgetting=forgetting,
        mean_forgetting_ci95=forgetting_ci95,
        backward_transfer=backward,
        backward_transfer_ci95=backward_ci95,
        forward_transfer=forward,
        forward_transfer_ci95=forward_ci95,
        start_kl=tuple(tuple(_kl(columns[skill][i])[0] for skill in skills) for i in range(len(results))),
        start_kl_ci95=tuple(tuple(_kl(columns[skill][i])[1] for skill in skills) for i in range(len(results))),
        tolerated_drop=tolerance.tolerated_drop if tolerance else None,
    )


def gap_closed(
    base: SkillScore | None, after: SkillScore | None, teacher: SkillScore | None, seed: int = 0
) -> GapClosed | None:
    """Share of the gap between base and teacher that was closed, over the tasks all three share.

    None where a score is missing or the teacher does not lead; the interval is None where its lead may be chance.
    """
    if base is None or after is None or teacher is None:
        return None
    means = [base.task_means, after.task_means, teacher.task_means]
    shared = sorted(means[0].keys() & means[1].keys() & means[2].keys())
    if not shared:
        return None
    rows = np.array([[mean[task] for mean in means] for task in shared], dtype=np.float64)
    start, end, goal = rows.mean(axis=0)
    if goal <= start:
        return None
    lead = paired_difference(means[0], means[2], seed)
    interval = None
    if lead is not None and lead.significant and len(shared) > 1:
        interval = bootstrap(rows, lambda m: (m[:, 1] - m[:, 0]) / np.maximum(m[:, 2] - m[:, 0], 1e-9), seed)
    return GapClosed(value=float((end - start) / (goal - start)), ci95=interval)


def _skill_retention(column: Sequence[SkillScore | None], learned: int, begun: int, seed: int) -> SkillRetention:
    start, end = column[learned], column[-1]
    change = None
    if start is not None and end is not None and learned < len(column) - 1:
        change = paired_difference(start.task_means, end.task_means, seed)
    forward = None
    before = column[begun]
    if begun > 0 and column[0] is not None and before is not None:
        forward = paired_difference(column[0].task_means, before.task_means, seed)
    earlier = [score for score in column[learned:-1] if score is not None and score.avg_at_k is not None]
    if not earlier or end is None or end.avg_at_k is None:
        return SkillRetention(change=change, forgetting=None, forgetting_ci95=None, forward=forward)
    best = max(earlier, key=lambda score: score.avg_at_k or 0.0)
    loss = paired_difference(end.task_means, best.task_means, seed)
    return SkillRetention(
        change=change,
        forgetting=(best.avg_at_k or 0.0) - end.avg_at_k,
        forgetting_ci95=loss.ci95 if loss else None,
        forward=forward,
    )


def _stage_name(result: EvalResult) -> str:
    return result.model if result.step is None else f"step {result.step}"


def _avg(score: SkillScore | None) -> float | None:
    return score.avg_at_k if score else None


def _ci95(score: SkillScore | None) -> Interval | None:
    return score.ci95 if score else None


def _kl(score: SkillScore | None) -> tuple[float | None, Interval | None]:
    return (score.start_kl, score.start_kl_ci95) if score else (None, None)


def _parts(difference: Difference | None) -> tuple[float | None, Interval | None]:
    return (difference.mean, difference.ci95) if difference else (None, None)


def _combined(parts: Sequence[tuple[float | None, Interval | None]]) -> tuple[float | None, Interval | None]:
    """Mean over the skills that were measured, with the interval of that mean where each has one."""
    known = [(value, interval) for value, interval in parts if value is not None]
    if not known:
        return None, None
    mean = sum(value for value, _ in known) / len(known)
    sure = [(value, interval) for value, interval in known if interval is not None]
    return mean, mean_of_independent(sure) if len(sure) == len(known) else None
