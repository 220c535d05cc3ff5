"""Several models on one suite, as the stages of a retention matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from agentopd.build import Judge, build_policy, build_sandbox, load_skills
from agentopd.config.run import EvalConfig, RolloutConfig, SandboxConfig, SuiteConfig
from agentopd.console import progress
from agentopd.errors import ConfigError, UserError
from agentopd.evaluate import evaluate_model, heldout_tasks, start_kl, summarise
from agentopd.evaluation.metrics import EvalResult
from agentopd.evaluation.retention import RetentionMatrix, Tolerance, retention_matrix
from agentopd.models import check_same_vocabulary
from agentopd.teachers.local import LocalTeacher


def stages_of(models: Sequence[str], suite: SuiteConfig) -> list[str]:
    """The models in order, the suite's baseline first where it declares one. Raises ``UserError`` below two."""
    baseline = suite.retention.baseline if suite.retention else None
    stages = list(models) if baseline is None or baseline in models[:1] else [baseline, *models]
    if len(stages) < 2:
        raise UserError("retention compares at least two models: name the start first, as in --models START TRAINED")
    return stages


async def measure(
    models: Sequence[str], suite: SuiteConfig, limit: int | None, config: EvalConfig, console: Console
) -> list[EvalResult]:
    """Evaluate every model on the same held-out tasks under the same seeds; the first is the start of the KL."""
    skills = load_skills(suite)
    tasks = heldout_tasks(skills.values(), limit, config.seed)
    judge = Judge(skills.values(), build_sandbox(SandboxConfig(), skills.values()))
    results: list[EvalResult] = []
    start = None
    try:
        await judge.start((name, found[0]) for name, found in tasks.items())
        with progress(console, "evaluating", len(models) * sum(map(len, tasks.values())) * config.k) as advance:
            for model in models:
                policy = build_policy(model, "auto", RolloutConfig())
                start = start or policy
                judged = await evaluate_model(policy, skills, tasks, judge, config, advance)
                kl = None
                if config.measures_kl and _same_vocabulary(start.tokenizer, policy.tokenizer, model, console):
                    kl = await start_kl(judged, LocalTeacher("start", start.model))
                results.append(summarise(judged, model, config.k, seed=config.seed, kl=kl))
                await policy.engine.aclose()
    finally:
        await judge.sandbox.aclose()
    return results


def learned_at(given: Mapping[str, int], models: Sequence[str], suite: SuiteConfig) -> dict[str, int]:
    """Skill to the stage of ``stages_of`` that taught it; ``given`` counts ``models``, without the suite's baseline.

    New skills count as learned at the last one. Raises ``UserError`` for a skill or a model that is not there.
    """
    stages = stages_of(models, suite)
    for skill, index in given.items():
        if skill not in {entry.name for entry in suite.skills} or not 0 <= index < len(models):
            raise UserError(f"--learned {skill}={index}: name a skill of the suite and a model, 0 to {len(models) - 1}")
    at = {skill.name: len(stages) - 1 for skill in suite.skills if skill.role == "new"}
    return at | {skill: index + len(stages) - len(models) for skill, index in given.items()}


def matrix_of(results: Sequence[EvalResult], suite: SuiteConfig, learned: Mapping[str, int]) -> RetentionMatrix:
    """The matrix of models in order, under the suite's tolerance; ``learned`` is that of ``learned_at``."""
    declared = suite.retention
    tolerance = Tolerance(declared.tolerated_drop, declared.tasks) if declared else None
    return retention_matrix(results, [result.model for result in results], learned, tolerance=tolerance)


def _same_vocabulary(start: object, other: object, model: str, console: Console) -> bool:
    try:
        check_same_vocabulary(start, other, model)
    except ConfigError:
        console.print(f"{model} has another vocabulary than the first model: no KL between them", markup=False)
        return False
    return True
