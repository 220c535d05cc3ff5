"""What the runs of a comparison came to, and which differences between arms are more than chance."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from agentopd.compare.plan import Plan, PlannedRun
from agentopd.compare.queue import check_made_as_planned, finished
from agentopd.compare.recorded import Key, recorded
from agentopd.compare.records import ArmResult, ArmTest, CurvePoint, Results, SeedResult
from agentopd.config.comparison import START_ARM
from agentopd.evaluation.comparison import SeedDifference, benjamini_hochberg, holm, paired_seeds
from agentopd.evaluation.metrics import EvalResult
from agentopd.report.collect import RunData, collect
from agentopd.tracking import Session, processor

MEASURES = ("new_skills", "retention")


def gather(plan: Plan) -> Results:
    """Every finished run, from its directory or from the record. Arms without one are left out; the untrained student
    comes first. Raises ``UserError`` for a directory that was not made as planned.
    """
    found = recorded(plan)
    for run in plan.runs:
        if finished(run):
            check_made_as_planned(plan, run)
            found |= _read(plan, run)
    chosen = {run.arm for run in plan.runs}
    return _results(plan, {key: item for key, item in found.items() if key[0] in chosen or key[0] == START_ARM})


def everything(plan: Plan) -> Results:
    """``gather``, and beside it what the record has of arms that were not asked for this time."""
    here = gather(plan)
    found = {(name, item.seed): item for name, arm in here.arms.items() for item in arm.seeds}
    return _results(plan, {**recorded(plan), **found})


def _results(plan: Plan, found: Mapping[Key, SeedResult]) -> Results:
    order = (START_ARM, *plan.comparison.arms)
    arms = {
        name: ArmResult(
            seeds=tuple(found[key] for key in sorted(found) if key[0] == name),
            preset=None if name == START_ARM else plan.preset_of(name),
        )
        for name in order
        if any(key[0] == name for key in found)
    }
    declared = next((run.config.suite.retention for run in plan.runs), None)
    return Results(
        name=plan.comparison.name,
        baseline=plan.comparison.tested_against,
        arms=arms,
        tests=arm_tests(arms, plan.comparison.tested_against),
        tolerated_drop=declared.tolerated_drop if declared else None,
        planned=len(plan.runs),
        finished=sum((run.arm, run.seed) in found for run in plan.runs),
        machine={"platform": platform.platform(), "processor": processor(), "cpus": os.cpu_count()},
        versions={"python": platform.python_version(), **Session.now(()).packages},
    )


def _read(plan: Plan, run: PlannedRun) -> dict[Key, SeedResult]:
    """A finished run, and the untrained student that it measured first."""
    data = collect(run.path)
    known = {"config": plan.fingerprint(run), "machine": f"{processor()}, {os.cpu_count()} CPUs"}
    found = {(run.arm, run.seed): seed_result(run.seed, data).model_copy(update=known)}
    if data.base is not None:
        untrained = SeedResult(seed=run.seed, **_scores(data, data.base.result), retention=0.0, forgetting=0.0)
        found[START_ARM, run.seed] = untrained
    return found


def seed_result(seed: int, run: RunData) -> SeedResult:
    """One finished run in figures."""
    matrix = run.retention()
    assert matrix is not None and run.latest is not None  # finished runs have a final evaluation
    total = _totals(run.rows)
    return SeedResult(
        seed=seed,
        **_scores(run, run.latest.result),
        retention=matrix.backward_transfer,
        forgetting=matrix.mean_forgetting,
        tokens=total("rollout/tokens"),
        replay_tokens=total("replay/tokens"),
        teacher_tokens=total("teacher/tokens"),
        patch_cost=_patch_cost(run.rows, list(run.roles)),
        cpu_seconds=total("time/cpu"),
        broken=matrix.broken,
        curve=tuple(CurvePoint(step=stage.result.step or 0, skills=_averages(stage.result)) for stage in run.stages),
    )


def arm_tests(arms: Mapping[str, ArmResult], baseline: str) -> tuple[ArmTest, ...]:
    """Every arm against the baseline on every measure where two seeds are shared, corrected together."""
    if baseline not in arms:
        return ()
    found: list[tuple[str, str, SeedDifference]] = []
    for name in arms:
        for measure in MEASURES if name not in (baseline, START_ARM) else ():
            difference = paired_seeds(arms[baseline].by_seed(measure), arms[name].by_seed(measure))
            if difference is not None:
                found.append((name, measure, difference))
    p_values = [difference.p_value for _, _, difference in found]
    corrected = zip(found, holm(p_values), benjamini_hochberg(p_values), strict=True)
    return tuple(
        ArmTest(arm=name, measure=measure, difference=difference, p_holm=p_holm, p_bh=p_bh)
        for (name, measure, difference), p_holm, p_bh in corrected
    )


def _scores(run: RunData, result: EvalResult) -> dict[str, Any]:
    skills = _averages(result)
    new = [skills[name] for name, role in run.roles.items() if role == "new" and name in skills]
    return {"skills": skills, "new_skills": sum(new) / len(new) if new else None}


def _averages(result: EvalResult) -> dict[str, float]:
    return {name: score.avg_at_k for name, score in result.tasks.items() if score.avg_at_k is not None}


def _totals(rows: Sequence[Mapping[str, Any]]) -> Callable[[str], float]:
    return lambda key: sum(float(row.get(key) or 0.0) for row in rows)


def _patch_cost(rows: Sequence[Mapping[str, Any]], skills: Sequence[str]) -> float | None:
    last = rows[-max(1, len(rows) // 10) :]
    values = [
        [float(row[key]) for row in last if row.get(key) is not None] for key in map("{}/diff_cost".format, skills)
    ]
    means = [mean(found) for found in values if found]
    return mean(means) if means else None
