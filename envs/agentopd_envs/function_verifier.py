"""A verifier made of one function, for environments that carry their own ``score(task, episode)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from agentopd.contracts import Sandbox
from agentopd.errors import InfraError, boundary
from agentopd.registry import register_verifier
from agentopd.types import Episode, Task, Verdict, VerdictStatus
from agentopd_verifiers.judge import Finding, JudgingVerifier

Score = Callable[[Task, Episode], float | Verdict]


class FunctionVerifier(JudgingVerifier):
    """Turns a score into a verdict. A function that raises, or leaves [0, 1], is a fault and never a score."""

    score: ClassVar[Score]

    async def judge(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Finding:
        """Judge an episode by the environment's own function."""
        with boundary(InfraError, f"{self.name} on task {task.id!r}"):
            value = type(self).score(task, episode)
            if isinstance(value, Verdict):
                return _finding(value)
            outcome = float(value)
        if not 0.0 <= outcome <= 1.0:
            raise InfraError(f"{self.name} on task {task.id!r} returned {outcome}; a score lies in [0, 1]")
        return Finding(outcome, VerdictStatus.OK if outcome == 1.0 else VerdictStatus.WRONG)


def register_score(environment: Any) -> str:
    """Register a verifier for an environment class with a static or class method ``score``; returns its key.

    The key names module and class, so that environments of the same name in different files never meet.
    """
    members = {
        "name": f"{environment.__name__}.score",
        "version": environment.version,
        "score": staticmethod(environment.score),
        "__module__": environment.__module__,
        "__qualname__": f"{environment.__qualname__}.score",
    }
    key = f"{environment.__module__}.{environment.__qualname__}.score"
    register_verifier(key)(type(f"{environment.__name__}Verifier", (FunctionVerifier,), members))
    return key


def _finding(verdict: Verdict) -> Finding:
    return Finding(
        outcome=verdict.outcome,
        status=verdict.status,
        reward=verdict.reward,
        components=verdict.components,
        certificates=verdict.certificates,
        flags=verdict.flags,
        detail=verdict.detail,
        evidence=verdict.provenance,
    )
