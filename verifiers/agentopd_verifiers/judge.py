"""What every verifier does the same way: provenance, and who is to blame for a verdict that cannot be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from agentopd.contracts import Sandbox
from agentopd.errors import AgentOPDError, TaskError
from agentopd.types import Episode, Flag, StepCertificate, StopReason, Task, Verdict, VerdictStatus


class PatchError(AgentOPDError):
    """A patch that does not apply: the student's doing, told in words."""


@dataclass(frozen=True)
class Finding:
    """What a verifier concluded: ``outcome`` in [0, 1], or None with a status that cannot carry one.

    ``reward`` defaults to the outcome.
    """

    outcome: float | None
    status: VerdictStatus
    reward: float | None = None
    components: dict[str, float] | None = None
    certificates: Sequence[StepCertificate] = ()
    flags: Sequence[Flag] = ()
    detail: str = ""
    evidence: dict[str, str] | None = None
    """Goes into the verdict's provenance, beside the verifier, task and sandbox."""


class JudgingVerifier:
    """Base of the verifiers: a subclass implements ``judge`` and raises ``TaskError`` for a bug in the task's data.

    ``InfraError`` passes through: a machinery fault is never turned into a verdict here.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    needs_sandbox: ClassVar[bool] = False

    async def judge(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Finding:
        """Conclude on a finished episode."""
        raise NotImplementedError

    async def verify(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Verdict:
        """The ``Verifier`` protocol: a finding with its provenance."""
        if episode.stop_reason is StopReason.ENV_ERROR:
            finding = Finding(None, VerdictStatus.INFRA_ERROR, detail=episode.error or "the environment failed")
        else:
            try:
                finding = await self.judge(task, episode, sandbox)
            except TaskError as exc:
                finding = Finding(None, VerdictStatus.TASK_ERROR, detail=f"task {task.id}: {exc}")
        return Verdict(
            outcome=finding.outcome,
            status=finding.status,
            reward=finding.outcome if finding.reward is None else finding.reward,
            components=finding.components or {},
            certificates=tuple(finding.certificates),
            flags=tuple(finding.flags),
            detail=finding.detail,
            provenance=self._provenance(task, sandbox) | (finding.evidence or {}),
        )

    def _provenance(self, task: Task, sandbox: Sandbox | None) -> dict[str, str]:
        found = {"verifier": f"{self.name}@{self.version}", "task_hash": task.hash}
        if self.needs_sandbox and sandbox is not None:
            found |= {"sandbox": sandbox.name, "capabilities": ",".join(sorted(sandbox.capabilities))}
        return found


def hidden_field(task: Task, key: str, kind: type | tuple[type, ...]) -> Any:
    """``task.hidden[key]``, checked.

    Raises:
        TaskError: if it is missing or of another type.

    """
    if key not in task.hidden:
        raise TaskError(f"hidden.{key} is missing")
    value = task.hidden[key]
    if not isinstance(value, kind):
        raise TaskError(f"hidden.{key} is a {type(value).__name__}")
    return value
