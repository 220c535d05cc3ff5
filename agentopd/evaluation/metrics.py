"""From verdicts to scores: avg@k, pass@k, and how sure we are of them.

An attempt that could not be judged is never a score: it is left out of every mean and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agentopd.evaluation.statistics import Interval, bootstrap, mean_interval
from agentopd.types import Record, Verdict, VersionedRecord


class TaskScore(Record):
    """The judged attempts at one task, in order; the material of paired comparisons."""

    task_id: str
    outcomes: tuple[float, ...]
    rewards: tuple[float, ...]
    start_kl: float | None = None
    """Nats per sampled token that the model has moved from its start, over this task's attempts."""

    @property
    def mean(self) -> float:
        """Mean outcome over the judged attempts."""
        return sum(self.outcomes) / len(self.outcomes)


class SkillScore(Record):
    """One skill's result. The scores are None where no attempt could be judged."""

    avg_at_k: float | None
    """Mean over tasks of the mean outcome of their judged attempts."""
    pass_at_k: float | None
    """Unbiased chance that at least one of k attempts fully succeeds; only tasks with k judged attempts count."""
    k: int
    n: int
    """Tasks with at least one judged attempt."""
    ci95: Interval | None
    """95 % interval of ``avg_at_k``, over tasks."""
    infra_errors: int
    """Attempts without a verdict (infrastructure or task faults, ambiguous judgements)."""
    mean_reward: float | None
    start_kl: float | None = None
    """KL(model, start) in nats per sampled token: mean over tasks of the log-ratio of what was sampled."""
    start_kl_ci95: Interval | None = None
    per_task: tuple[TaskScore, ...] = ()

    @property
    def task_means(self) -> dict[str, float]:
        """Mean outcome by task id."""
        return {task.task_id: task.mean for task in self.per_task}

    def change_error(self, before: SkillScore) -> float:
        """Standard error of the change of ``avg_at_k`` since ``before``, over the tasks of both; 0 below two tasks."""
        known, now = before.task_means, self.task_means
        changes = np.array([mean - known[task] for task, mean in now.items() if task in known])
        return float(changes.std(ddof=1) / math.sqrt(len(changes))) if len(changes) > 1 else 0.0


class EvalResult(VersionedRecord):
    """One evaluation of one model over a suite. ``step`` is the optimiser step it was taken at, where there is one."""

    tasks: dict[str, SkillScore]
    model: str
    step: int | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """What the command line prints: ``{"tasks": {NAME: {avg_at_k, pass_at_k, n, ci95, infra_errors}}}``."""
        keys = {"avg_at_k", "pass_at_k", "n", "ci95", "infra_errors"}
        return {"tasks": {name: score.model_dump(mode="json", include=keys) for name, score in self.tasks.items()}}


def pass_at_k(n: int, c: int, k: int) -> float:
    """``1 - C(n-c, k) / C(n, k)`` for c successes in n attempts (Chen et al. 2021). Raises ``ValueError`` for n < k."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def score_skill(
    verdicts: Mapping[str, Sequence[Verdict]], k: int, seed: int = 0, start_kl: Mapping[str, float] | None = None
) -> SkillScore:
    """Score one skill from verdicts by task id, k attempts each; ``seed`` drives the bootstrap only.

    ``start_kl`` holds the KL to the start by task id, in nats per sampled token.
    """
    known = start_kl or {}
    judged = (_judged(task_id, given, known.get(task_id)) for task_id, given in verdicts.items())
    tasks = tuple(task for task in judged if task.outcomes)
    moved = [task.start_kl for task in tasks if task.start_kl is not None]
    attempts = sum(len(given) for given in verdicts.values())
    unjudged = attempts - sum(len(task.outcomes) for task in tasks)
    means = [task.mean for task in tasks]
    full = [task.outcomes for task in tasks if len(task.outcomes) >= k]
    passes = [pass_at_k(len(outcomes), outcomes.count(1.0), k) for outcomes in full]
    rewards = [sum(task.rewards) / len(task.rewards) for task in tasks]
    return SkillScore(
        avg_at_k=_mean(means),
        pass_at_k=_mean(passes),
        k=k,
        n=len(tasks),
        ci95=mean_interval(means, seed) if means else None,
        infra_errors=unjudged,
        mean_reward=_mean(rewards),
        start_kl=_mean(moved),
        start_kl_ci95=bootstrap(np.array(moved)[:, None], lambda m: m[:, 0], seed) if len(moved) > 1 else None,
        per_task=tasks,
    )


def _judged(task_id: str, verdicts: Sequence[Verdict], start_kl: float | None) -> TaskScore:
    judged = [(v.outcome, v.reward) for v in verdicts if v.outcome is not None and v.reward is not None]
    outcomes, rewards = tuple(outcome for outcome, _ in judged), tuple(reward for _, reward in judged)
    return TaskScore(task_id=task_id, outcomes=outcomes, rewards=rewards, start_kl=start_kl)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
