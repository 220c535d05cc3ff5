"""The five Protocols that everything concrete plugs into, and the small records they exchange.

Engine and Teacher talk in token ids; Environment in messages; Verifier in finished episodes; Sandbox in programs and
cases. Nothing here imports a concrete implementation, or torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from agentopd.types import (
    Episode,
    Event,
    MalformedCall,
    Message,
    Split,
    StopReason,
    Task,
    ToolCall,
    ToolSchema,
    Verdict,
)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


# --- environments ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AssistantTurn:
    """What the student did in one turn, as messages; tokens stay with the rollout layer."""

    text: str
    """Decoded text without the end-of-turn token, tool calls included verbatim."""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: tuple[MalformedCall, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What the environment answers: tool (or user) messages, or the end of the episode."""

    messages: tuple[Message, ...] = ()
    done: bool = False
    events: tuple[Event, ...] = ()
    stop_reason: StopReason | None = None
    """Why it ended; None with ``done`` means completed."""


@dataclass
class EpisodeContext:
    """Per-episode resources. ``rng`` is the only source of randomness an environment may use."""

    seed: int
    rng: random.Random
    sandbox: Sandbox | None = None


@runtime_checkable
class Environment(Protocol):
    """One instance serves one episode and is thrown away."""

    name: ClassVar[str]
    version: ClassVar[str]

    @classmethod
    def tool_schemas(cls, task: Task) -> tuple[ToolSchema, ...]:
        """The tools the student is offered on this task."""
        ...

    @classmethod
    def load_tasks(cls, split: Split, source: str, limit: int | None, seed: int) -> Iterable[Task]:
        """Tasks of one split from a named source (``micro`` or a dataset); deterministic under ``seed``."""
        ...

    async def reset(self, task: Task, ctx: EpisodeContext) -> tuple[Message, ...]:
        """Start on the *student view* of a task; returns the opening messages (usually ``task.prompt``)."""
        ...

    async def step(self, action: AssistantTurn) -> StepResult:
        """Answer one assistant turn. ``ToolError`` is shown to the student; other exceptions mask the episode."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-able snapshot for the verifier."""
        ...

    async def close(self) -> None:
        """Release resources; idempotent."""
        ...


# --- verifiers -------------------------------------------------------------------------------------------------------


@runtime_checkable
class Verifier(Protocol):
    """Judges finished episodes. It is handed a sandbox; it never chooses one."""

    name: ClassVar[str]
    version: ClassVar[str]
    needs_sandbox: ClassVar[bool]

    async def verify(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Verdict:
        """Return a verdict. The payload's fault is a verdict; a machinery fault raises ``InfraError``."""
        ...


# --- sandboxes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SandboxLimits:
    """Resource limits of one case. ``wall_s`` is enforced from outside the sandbox."""

    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_mb: int = 512
    processes: int = 32
    output_bytes: int = 64 * 1024
    file_mb: int = 16


class CaseStatus(StrEnum):
    """How one case ended. Every member is the payload's own doing; machinery faults raise ``SandboxError``."""

    VALUE = "value"
    EXCEPTION = "exception"
    TIMEOUT = "timeout"
    RESOURCE = "resource"
    CRASH = "crash"
    NO_RESULT = "no_result"
    """The process ended without reporting a value (an early exit)."""
    PROTOCOL = "protocol"
    """It reported something that is not a well-formed result."""


@dataclass(frozen=True)
class Case:
    """One call to make in a fresh process. ``expression`` is evaluated after the program (and ``setup``) ran."""

    id: str
    expression: str
    setup: str = ""
    args: tuple[Any, ...] = ()
    """Bound to the name ``args`` before ``setup`` runs; plain data only."""


@dataclass(frozen=True)
class CaseResult:
    """The decoded value (plain data of exact built-in types) or how the case failed."""

    id: str
    status: CaseStatus
    value: Any = None
    detail: str = ""
    stdout: str = ""
    wall_ms: float = 0.0


@dataclass(frozen=True)
class Program:
    """The code under test: the main source, and read-only support files beside it."""

    source: str
    files: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Sandbox(Protocol):
    """Runs untrusted Python. Values come out as data; expectations never go in."""

    name: ClassVar[str]

    @property
    def capabilities(self) -> frozenset[str]:
        """What isolation is in force: ``pid``, ``net``, ``mount``, ``seccomp``, ``landlock``, …"""
        ...

    async def start(self) -> None:
        """Prepare workers; raises ``SandboxError`` naming what to install or change. Idempotent."""
        ...

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None = None
    ) -> list[CaseResult]:
        """Run every case in its own fresh, isolated process; results in the order of ``cases``."""
        ...

    async def aclose(self) -> None:
        """Kill everything; idempotent."""
        ...


@runtime_checkable
class GroupVerifier(Protocol):
    """A verifier whose reward also depends on the other episodes of a task's group."""

    def compare(self, task: Task, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts of one group with their rewards set against one another; outcomes stay as they are."""
        ...


# --- engines and teachers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. ``temperature`` 0 is greedy; log-probs are always those of the sampling distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """Continue ``token_ids`` under ``seed``. Equal requests on equal weights give equal samples."""

    token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    session: str = ""
    """Names the episode, so that an engine may keep what it computed for the turns before; empty: keep nothing."""
    drawn: int = 0
    """Tokens at the end of ``token_ids`` that ``seed`` has given already, where a weight update cut the turn."""


@dataclass(frozen=True)
class Generation:
    """Sampled ids (the stop id included) and their log-probs at the sampling temperature."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    """``stop`` or ``length``."""
    weight_version: int = 0
    """Of the weights that sampled its first token."""
    updates: tuple[tuple[int, int], ...] = ()
    """See ``Turn``."""


@runtime_checkable
class Engine(Protocol):
    """Samples from the current student."""

    max_context: int
    lockstep: bool
    """True: one call should hold the requests of all live episodes, so that batches (and so results) repeat exactly.
    False: the engine batches concurrent calls itself."""

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Sample one continuation per request, in order."""
        ...

    def updating(self) -> AbstractContextManager[object]:
        """Hold back sampling from weights that change inside: turns under way end first, others wait."""
        ...

    def sync_weights(self, version: int) -> dict[str, float]:
        """Make the learner's current weights the ones sampled from; returns what it measured on the way, by metric.

        Raises ``EngineError`` where the engine cannot be shown to have them.
        """
        ...

    def sleep(self) -> None:
        """Free what only sampling needs. The next call is ``sync_weights``."""
        ...

    async def aclose(self) -> None:
        """Release resources; idempotent."""
        ...


@dataclass(frozen=True)
class Evidence:
    """A teacher's view of one episode, on the N sampled tokens in order (``loss_mask == 1``).

    Shapes: ``teacher_logprobs`` (N,), ``topk_ids`` and ``topk_logprobs`` (N, K); all full-vocabulary log-probs at
    temperature 1. ``ref_logprobs`` (N,) are the reference policy's on the same ids.

    ``segments`` (N,) is there when the teacher has another tokenizer: the student's tokens of one segment share a
    number, -1 is outside all. A token's ``teacher_logprobs`` is then its whole segment's, and only a segment's first
    token has a top-K.
    """

    teacher: str
    teacher_logprobs: FloatArray
    topk_ids: IntArray | None = None
    topk_logprobs: FloatArray | None = None
    ref_logprobs: FloatArray | None = None
    candidate_ids: IntArray | None = None
    """The student's own most likely ids (N, K), where an objective asks what the teacher thinks of them."""
    candidate_logprobs: FloatArray | None = None
    """The teacher's log-probs of ``candidate_ids`` (N, K)."""
    hidden: FloatArray | None = None
    """A local teacher's last hidden states (N, H), where an objective compares whole distributions."""
    segments: IntArray | None = None
    rest_logprobs: FloatArray | None = None
    """With ``segments``, at a segment's first token: the teacher's joint log-prob of its own tokens there after the
    first (N,); 0 elsewhere."""


@runtime_checkable
class Teacher(Protocol):
    """Scores the very tokens the student wrote."""

    name: str
    max_top_k: int | None
    """Largest K it can return; None is unbounded, 0 is sampled tokens only."""

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        """Evidence for each episode, in order; raises ``TeacherError`` on a fault, never a made-up number.

        A log-prob that is not finite is handed on as it is: the episode is then not trained on.
        """
        ...

    async def aclose(self) -> None:
        """Release resources; idempotent."""
        ...


@runtime_checkable
class CandidateTeacher(Protocol):
    """A teacher that can also score ids it did not choose."""

    async def score_ids(self, episodes: Sequence[Episode], ids: Sequence[IntArray]) -> list[FloatArray]:
        """Full-vocabulary log-probs (N, K) at ``ids`` (N, K) of each episode, in order; raises ``TeacherError``."""
        ...


@dataclass(frozen=True)
class ScoredEpisode:
    """An episode with its verdict and the teacher's evidence (None where the teacher failed)."""

    episode: Episode
    verdict: Verdict
    evidence: Evidence | None = None
    replay: bool = False
    """Whether it was drawn from an older skill for replay."""
    anchor: bool = False
    """Whether it is a teacher's or a gold trajectory beside the student's own: it takes part in the anchor alone."""
