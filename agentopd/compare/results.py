"""What the runs of a comparison came to, and which differences between arms are more than chance."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentopd.compare.plan import Plan, PlannedRun
from agentopd.compare.queue import finished
from agentopd.config.comparison import START_ARM
from agentopd.evaluation.comparison import SeedDifference, benjamini_hochberg, holm, paired_seeds
from agentopd.evaluation.metrics import EvalResult
from agentopd.report.collect import RunData, collect
from agentopd.tracking import Session
from agentopd.types import Record, VersionedRecord


class CurvePoint(Record):
    """Held-out scores at one evaluation."""

    step: int
    skills: dict[str, float]


class SeedResult(Record):
    """One run. Scores are success in [0, 1]; None where there is nothing to average."""

    seed: int
    skills: dict[str, float]
    """Final score of every skill."""
    new_skills: float | None
    """Mean final score of the new skills."""
    retention: float | None
    """Mean change of the skills known before the last stage, since each was learned; 0 is all kept."""
    forgetting: float | None
    """Mean over the same skills of best earlier score minus the last."""
    tokens: float = 0.0
    """Sampled by the student in training."""
    replay_tokens: float = 0.0
    """Of those, on replayed prompts."""
    teacher_tokens: float = 0.0
    """Read by teachers."""
    cpu_seconds: float = 0.0
    """Of training and the evaluations before its last step."""
    broken: tuple[str, ...] = ()
    """Skills that lost more than the suite tolerates."""
    curve: tuple[CurvePoint, ...] = ()


class ArmResult(Record):
    """All finished runs of one arm."""

    seeds: tuple[SeedResult, ...]
    preset: str | None = None

    def by_seed(self, measure: str) -> dict[int, float]:
        """A measure of ``SeedResult`` by seed, where there is one."""
        values = {result.seed: getattr(result, measure) for result in self.seeds}
        return {seed: value for seed, value in values.items() if value is not None}


class ArmTest(Record):
    """An arm against the baseline on one measure, paired over seeds; corrected over all tests of the comparison."""

    arm: str
    measure: str
    difference: SeedDifference
    p_holm: float
    p_bh: float


class Results(VersionedRecord):
    """A comparison as far as it got."""

    name: str
    baseline: str
    arms: dict[str, ArmResult]
    tests: tuple[ArmTest, ...]
    tolerated_drop: float | None
    planned: int
    finished: int
    machine: dict[str, Any]
    versions: dict[str, str]


MEASURES = ("new_skills", "retention")


def gather(plan: Plan) -> Results:
    """Read every finished run. Arms without one are left out; the untrained student comes first."""
    done = [run for run in plan.runs if finished(run)]
    data = {run.name: collect(run.path) for run in done}
    arms: dict[str, ArmResult] = {}
    if done:
        arms[START_ARM] = ArmResult(seeds=_start_rows(done, data))
    for name in dict.fromkeys(run.arm for run in done):
        mine = [run for run in done if run.arm == name]
        seeds = tuple(seed_result(run.seed, data[run.name]) for run in sorted(mine, key=lambda run: run.seed))
        arms[name] = ArmResult(seeds=seeds, preset=mine[0].config.objective.preset)
    declared = next((run.config.suite.retention for run in plan.runs), None)
    return Results(
        name=plan.comparison.name,
        baseline=plan.comparison.tested_against,
        arms=arms,
        tests=arm_tests(arms, plan.comparison.tested_against),
        tolerated_drop=declared.tolerated_drop if declared else None,
        planned=len(plan.runs),
        finished=len(done),
        machine={"platform": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
        versions={"python": platform.python_version(), **Session.now(()).packages},
    )


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


def _start_rows(done: Sequence[PlannedRun], data: Mapping[str, RunData]) -> tuple[SeedResult, ...]:
    """The untrained student, once per seed: every run begins by measuring it."""
    by_seed = {run.seed: data[run.name] for run in done}
    return tuple(
        SeedResult(seed=seed, **_scores(run, run.base.result), retention=0.0, forgetting=0.0)
        for seed, run in sorted(by_seed.items())
        if run.base is not None
    )


def _scores(run: RunData, result: EvalResult) -> dict[str, Any]:
    skills = _averages(result)
    new = [skills[name] for name, role in run.roles.items() if role == "new" and name in skills]
    return {"skills": skills, "new_skills": sum(new) / len(new) if new else None}


def _averages(result: EvalResult) -> dict[str, float]:
    return {name: score.avg_at_k for name, score in result.tasks.items() if score.avg_at_k is not None}


def _totals(rows: Sequence[Mapping[str, Any]]) -> Callable[[str], float]:
    return lambda key: sum(float(row.get(key) or 0.0) for row in rows)
