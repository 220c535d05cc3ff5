"""What was kept: the matrix R[stage, skill], forgetting, backward transfer, and the share of the teacher's gap closed.

Definitions follow Lopez-Paz & Ranzato (2017, GEM) for backward transfer and Chaudhry et al. (2018) for forgetting; both
are differences of scores in [0, 1]. Intervals are paired over the tasks that the two stages share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agentopd.evaluation.metrics import EvalResult, SkillScore
from agentopd.evaluation.statistics import Difference, Interval, bootstrap, paired_difference
from agentopd.types import Record, VersionedRecord


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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of everything above."""
        return self.model_dump(mode="json")


def retention_matrix(
    results: Sequence[EvalResult],
    stages: Sequence[str] | None = None,
    learned_at: Mapping[str, int] | None = None,
    teacher: EvalResult | None = None,
    seed: int = 0,
) -> RetentionMatrix:
    """Build the matrix from evaluations in stage order.

    ``learned_at[skill]`` is the index of the stage that taught it (default 0: the starting model could already do it);
    skills learned at the last stage cannot have been forgotten yet and take no part in the two means. ``teacher`` adds
    the share of the gap closed between the first stage and the teacher. Raises ``ValueError`` on empty input, names
    that do not fit, or an index outside the stages.
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
    by_skill = {skill: _skill_retention(columns[skill], learned.get(skill, 0), seed) for skill in skills}
    if teacher is not None:
        for skill, kept in by_skill.items():
            gap = gap_closed(columns[skill][0], columns[skill][-1], teacher.tasks.get(skill), seed)
            by_skill[skill] = kept.model_copy(update={"gap_closed": gap})
    old = [by_skill[skill] for skill in skills if learned.get(skill, 0) < last]
    return RetentionMatrix(
        stages=names,
        skills=skills,
        values=tuple(tuple(_avg(columns[skill][i]) for skill in skills) for i in range(len(results))),
        ci95=tuple(tuple(_ci95(columns[skill][i]) for skill in skills) for i in range(len(results))),
        by_skill=by_skill,
        average=tuple(_mean([_avg(score) for score in result.tasks.values()]) for result in results),
        mean_forgetting=_mean([kept.forgetting for kept in old]),
        backward_transfer=_mean([kept.change.mean if kept.change else None for kept in old]),
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


def _skill_retention(column: Sequence[SkillScore | None], learned: int, seed: int) -> SkillRetention:
    start, end = column[learned], column[-1]
    change = None
    if start is not None and end is not None and learned < len(column) - 1:
        change = paired_difference(start.task_means, end.task_means, seed)
    earlier = [score for score in column[learned:-1] if score is not None and score.avg_at_k is not None]
    if not earlier or end is None or end.avg_at_k is None:
        return SkillRetention(change=change, forgetting=None, forgetting_ci95=None)
    best = max(earlier, key=lambda score: score.avg_at_k or 0.0)
    loss = paired_difference(end.task_means, best.task_means, seed)
    return SkillRetention(
        change=change,
        forgetting=(best.avg_at_k or 0.0) - end.avg_at_k,
        forgetting_ci95=loss.ci95 if loss else None,
    )


def _stage_name(result: EvalResult) -> str:
    return result.model if result.step is None else f"step {result.step}"


def _avg(score: SkillScore | None) -> float | None:
    return score.avg_at_k if score else None


def _ci95(score: SkillScore | None) -> Interval | None:
    return score.ci95 if score else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
