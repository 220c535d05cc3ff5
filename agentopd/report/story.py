"""The first screen: what changed, in sentences and in one table, from evaluations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentopd.evaluation.metrics import SkillScore
from agentopd.evaluation.retention import RetentionMatrix
from agentopd.evaluation.statistics import Difference, paired_difference
from agentopd.report.charts import number
from agentopd.report.collect import RunData


@dataclass(frozen=True)
class Mark:
    """A score on a scale of 0 to 100, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SkillRow:
    """One row of the before/after table. Scores are percentages; None where not measured."""

    skill: str
    role: str
    tasks: int
    base: Mark | None
    after: Mark | None
    teacher: Mark | None
    change: Mark | None
    tone: str
    """``up`` or ``down`` beyond chance, ``flat`` otherwise."""
    gap_closed: str
    infra_errors: int


def skill_rows(run: RunData, matrix: RetentionMatrix | None) -> list[SkillRow]:
    """Base, after and paired change for every evaluated skill."""
    base = run.base.result.tasks if run.base else {}
    after = run.latest.result.tasks if run.latest else {}
    teacher = run.teacher.tasks if run.teacher else {}
    names = [skill for skill in run.skills if skill in base or skill in after]
    return [_row(name, run.roles.get(name, ""), base, after, teacher, matrix) for name in names]


def story(rows: list[SkillRow]) -> list[tuple[SkillRow, str]]:
    """One sentence a skill, new skills first; nothing is claimed beyond its interval."""
    told = [row for row in rows if row.change is not None and row.base is not None and row.after is not None]
    told.sort(key=lambda row: row.role == "old")
    return [(row, _sentence(row)) for row in told]


def tiles(run: RunData) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the run's totals at a glance; those that were logged."""
    steps = f"of {run.planned_steps} planned" if run.planned_steps else ""

    def count(key: str) -> str:
        total = _total(run.rows, key)
        return f"{total:,.0f}" if total < 100_000 else number(total)

    hours = sum(_total(run.rows, f"time/{phase}") for phase in ("rollout", "teacher", "verify", "learner")) / 3600
    unjudged = sum(_total(run.rows, f"{skill}/infra_errors") for skill in run.skills)
    found = [
        ("Steps", str(run.done_steps), steps),
        ("Episodes", count("rollout/episodes"), f"{unjudged:.0f} without a verdict"),
        ("Tokens sampled", count("rollout/tokens"), "by the student"),
        ("Tokens read", count("teacher/tokens"), "by teachers"),
        ("Time", f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min", "rollout, teacher and learner"),
    ]
    return [tile for tile in found if tile[1] not in ("0", "0.0 min")]


def _total(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(float(row[key]) for row in rows if isinstance(row.get(key), int | float))


def signed(value: float) -> str:
    """One decimal with its sign, and a true minus."""
    return f"{value:+.1f}".replace("-", "−")


def _sentence(row: SkillRow) -> str:
    assert row.base is not None and row.after is not None and row.change is not None
    verb = {
        "up": "rose from",
        "down": "fell from",
        "flat": "shows no measurable loss:" if row.role == "old" else "shows no measurable change:",
    }[row.tone]
    span = f"95 % interval {signed(row.change.low)} to {signed(row.change.high)}"
    move = f"{row.base.value:.1f} % to {row.after.value:.1f} % ({signed(row.change.value)} points, {span})"
    known = (
        f"The old skill {row.skill}" if row.role == "old" else f"The new skill {row.skill}" if row.role else row.skill
    )
    return f"{known} {verb} {move}."


def _row(
    name: str,
    role: str,
    base: Mapping[str, SkillScore],
    after: Mapping[str, SkillScore],
    teacher: Mapping[str, SkillScore],
    matrix: RetentionMatrix | None,
) -> SkillRow:
    old, new = base.get(name), after.get(name)
    change = paired_difference(old.task_means, new.task_means) if old and new else None
    kept = matrix.by_skill.get(name) if matrix else None
    gap = kept.gap_closed if kept and new else None
    return SkillRow(
        skill=name,
        role=role,
        tasks=max((score.n for score in (old, new) if score), default=0),
        base=_mark(old),
        after=_mark(new),
        teacher=_mark(teacher.get(name)),
        change=_change_mark(change),
        tone="flat" if change is None or not change.significant else "up" if change.mean > 0 else "down",
        gap_closed=f"{100 * gap.value:.0f} %" if gap else "–",
        infra_errors=sum(score.infra_errors for score in (old, new) if score),
    )


def _mark(score: SkillScore | None) -> Mark | None:
    if score is None or score.avg_at_k is None or score.ci95 is None:
        return None
    return Mark(100 * score.avg_at_k, 100 * score.ci95[0], 100 * score.ci95[1])


def _change_mark(change: Difference | None) -> Mark | None:
    return Mark(100 * change.mean, 100 * change.ci95[0], 100 * change.ci95[1]) if change else None
