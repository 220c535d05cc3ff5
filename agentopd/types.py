"""The records that cross boundaries: frozen, typed, one JSON object a line on disk.

Three log-probs never share a name:

- ``rollout_logprobs``: the engine's, when the token was sampled;
- ``old_logprobs``: the learner's, before the update;
- ``logprobs``: the learner's, current.

Records hold data and derive views; behaviour lives behind the protocols of ``agentopd.contracts``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

SCHEMA_VERSION = 1

Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "eval", "retention"]
JSON = dict[str, Any]


def encodable(text: str) -> str:
    """``text`` with a question mark for each lone surrogate: no tokenizer takes one, and no file."""
    return text.encode("utf-8", "replace").decode()


Text = Annotated[str, AfterValidator(encodable)]
"""A string that programs had a part in, so that it may hold anything."""


class Record(BaseModel):
    """Base of every record: immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VersionedRecord(Record):
    """A record that is written to disk on its own line."""

    schema_version: Literal[1] = 1


class ToolCall(Record):
    """One well-formed call, as the student wrote it; ``arguments`` are not yet validated."""

    name: str
    arguments: JSON = Field(default_factory=dict)


class MalformedCall(Record):
    """A tool call that could not be parsed. It is data: shown to the student, counted, never a crash."""

    raw: str
    reason: str


class ToolSchema(Record):
    """What a student is told of a tool. ``parameters`` is a JSON schema of an object."""

    name: str
    description: str = ""
    parameters: JSON = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Message(Record):
    """One chat message. ``tool_calls`` only on assistant messages, ``name`` only on tool messages."""

    role: Role
    content: Text = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None


class Limits(Record):
    """Where an episode stops. Tokens count what the student sampled, over the whole episode."""

    max_turns: int = Field(8, ge=1)
    max_tokens: int = Field(1024, ge=1)
    max_turn_tokens: int | None = Field(None, ge=1)
    max_tool_calls: int = Field(16, ge=0)
    wall_s: float = Field(300.0, gt=0)


class Privileged(Record):
    """What only a teacher may see."""

    hint: str = ""
    solution: str = ""
    trajectory: tuple[Message, ...] = ()


class Source(Record):
    """Where a task came from."""

    dataset: str
    revision: str = ""
    licence: str = ""
    row: str = ""
    """Its name in a data set, which has an end; empty for a task that was made."""


class Task(VersionedRecord):
    """One problem. ``public`` may reach the student, ``hidden`` only the verifier, ``privileged`` only a teacher."""

    id: str
    env: str
    split: Split = "train"
    prompt: tuple[Message, ...]
    tools: tuple[str, ...] | None = None
    public: JSON = Field(default_factory=dict)
    hidden: JSON = Field(default_factory=dict)
    privileged: Privileged = Privileged()
    limits: Limits = Limits()
    seed: int = 0
    source: Source = Source(dataset="inline")

    def student_view(self) -> Task:
        """The task with everything the student must not see taken out: what an environment is given."""
        return self.model_copy(update={"hidden": {}, "privileged": Privileged()})

    @property
    def hash(self) -> str:
        """Content hash (hex, 16 digits): the identity of a task for certificates and caches."""
        body = self.model_dump(mode="json", exclude={"source", "schema_version"})
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


class StopReason(StrEnum):
    """Why an episode ended."""

    COMPLETED = "completed"
    """The environment or the student finished it."""
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    """The token budget ran out in the middle of a turn: the last turn has no end-of-turn token."""
    CONTEXT_OVERFLOW = "context_overflow"
    """The next turn would not fit the model's context."""
    PARSE_ERROR = "parse_error"
    """Too many malformed tool calls."""
    TOOL_BUDGET = "tool_budget"
    TIMEOUT = "timeout"
    ENV_ERROR = "env_error"
    """Environment code failed: the episode is masked, never scored."""

    @property
    def truncated(self) -> bool:
        """Whether a budget, not the student, ended the episode."""
        return self in _TRUNCATED


_TRUNCATED = frozenset(
    {
        StopReason.MAX_TURNS,
        StopReason.MAX_TOKENS,
        StopReason.CONTEXT_OVERFLOW,
        StopReason.TOOL_BUDGET,
        StopReason.TIMEOUT,
    }
)


class Turn(Record):
    """One assistant turn: exactly the ids that were sampled, and what came back.

    ``token_ids`` and ``rollout_logprobs`` have one entry per sampled token; ``observation_ids`` is what the rollout
    layer appended after them (tool results and the next generation prompt), never trained on.

    ``token_ends`` and ``call_spans`` let a judge name the tokens of a piece of ``text``; both are empty where unknown.
    """

    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    observation_ids: tuple[int, ...] = ()
    text: str = ""
    token_ends: tuple[int, ...] = ()
    """Characters of ``text`` that are written once each token is read, one entry per token."""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: tuple[MalformedCall, ...] = ()
    call_spans: tuple[tuple[int, int], ...] = ()
    """Character ranges [start, end) of ``tool_calls``, then of ``malformed``."""
    results: tuple[Message, ...] = ()
    finish_reason: Literal["stop", "length"] = "stop"
    weight_version: int = 0
    """Of the weights that sampled its first token."""
    updates: tuple[tuple[int, int], ...] = ()
    """(token, version), where weights changed amid the turn: from this token on it was sampled from this version's."""

    @model_validator(mode="after")
    def _aligned(self) -> Turn:
        if len(self.token_ids) != len(self.rollout_logprobs):
            raise ValueError(f"{len(self.token_ids)} token_ids but {len(self.rollout_logprobs)} rollout_logprobs")
        if self.token_ends and len(self.token_ends) != len(self.token_ids):
            raise ValueError(f"{len(self.token_ids)} token_ids but {len(self.token_ends)} token_ends")
        calls = len(self.tool_calls) + len(self.malformed)
        if self.call_spans and len(self.call_spans) != calls:
            raise ValueError(f"{calls} calls but {len(self.call_spans)} call_spans")
        firsts = [0, *(first for first, _ in self.updates), len(self.token_ids)]
        if self.updates and any(a >= b for a, b in pairwise(firsts)):
            raise ValueError(f"updates {self.updates} do not divide {len(self.token_ids)} token_ids")
        return self

    @property
    def weight_spans(self) -> list[tuple[int, int]]:
        """(version, tokens) of each stretch that was sampled from the same weights, in order."""
        starts = [(0, self.weight_version), *self.updates]
        ends = [*(first for first, _ in self.updates), len(self.token_ids)]
        return [(version, end - first) for (first, version), end in zip(starts, ends, strict=True)]

    def token_span(self, start: int, end: int) -> tuple[int, int] | None:
        """Tokens [first, last) whose text begins inside characters [start, end); None if there are none, or unknown."""
        begins = (0, *self.token_ends[:-1]) if self.token_ends else ()
        inside = [index for index, begin in enumerate(begins) if start <= begin < end]
        return (inside[0], inside[-1] + 1) if inside else None


class Event(Record):
    """Something the environment did or saw, written by the environment, never by the model."""

    turn: int
    kind: str
    data: JSON = Field(default_factory=dict)


class Episode(VersionedRecord):
    """One finished trajectory. Token in, token out: nothing here is ever re-rendered.

    ``prompt_ids`` and the turns' ids are the only stored tokens; ``token_ids``, ``loss_mask`` and the aligned streams
    are views of them, so they cannot disagree.
    """

    id: str
    task_id: str
    task_hash: str
    env: str
    split: Split
    skill: str = ""
    """The name of the suite entry the task was drawn from; metrics are keyed by it."""
    group_id: str = ""
    """Episodes of the same prompt share it; advantages are computed inside it."""
    prompt_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    error: Text = ""
    events: tuple[Event, ...] = ()
    final_state: JSON = Field(default_factory=dict)
    """The environment's own snapshot at the end; verifiers judge this and ``events``, not the model's claims."""
    seed: int = 0
    temperature: float = 1.0
    timings: dict[str, float] = Field(default_factory=dict)

    @property
    def token_ids(self) -> list[int]:
        """Prompt, then each turn's sampled ids and observation ids, in order."""
        ids = list(self.prompt_ids)
        for turn in self.turns:
            ids += turn.token_ids
            ids += turn.observation_ids
        return ids

    @property
    def loss_mask(self) -> list[int]:
        """1 exactly on the tokens the student sampled."""
        return [int(turn >= 0) for turn in self.turn_ids]

    @property
    def rollout_logprobs(self) -> list[float]:
        """Aligned with ``token_ids``; 0.0 where nothing was sampled (see ``loss_mask``)."""
        values = [0.0] * len(self.prompt_ids)
        for turn in self.turns:
            values += turn.rollout_logprobs
            values += [0.0] * len(turn.observation_ids)
        return values

    @property
    def turn_ids(self) -> list[int]:
        """Index of the turn that sampled each token; -1 outside sampled tokens."""
        ids = [-1] * len(self.prompt_ids)
        for index, turn in enumerate(self.turns):
            ids += [index] * len(turn.token_ids)
            ids += [-1] * len(turn.observation_ids)
        return ids

    @property
    def num_sampled(self) -> int:
        """Number of tokens the student sampled."""
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def final_text(self) -> str:
        """The text of the last turn ('' if there was none)."""
        return self.turns[-1].text if self.turns else ""


class VerdictStatus(StrEnum):
    """What a verifier found. The last three leave ``outcome`` None."""

    OK = "ok"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    FORMAT = "format"
    TIMEOUT = "timeout"
    RESOURCE = "resource"
    CRASH = "crash"
    TAMPERED = "tampered"
    AMBIGUOUS = "ambiguous"
    INFRA_ERROR = "infra_error"
    TASK_ERROR = "task_error"


UNJUDGED = frozenset({VerdictStatus.AMBIGUOUS, VerdictStatus.INFRA_ERROR, VerdictStatus.TASK_ERROR})


class StepCertificate(Record):
    """The judge's own evidence on part of a turn: ``sign`` +1 good, -1 bad; [start, end) index the turn's ids.

    ``end`` None is the end of the turn. Where two certificates overlap, the later one holds.
    """

    turn: int = Field(ge=0)
    sign: Literal[-1, 1]
    kind: str
    start: int = Field(0, ge=0)
    end: int | None = Field(None, ge=1)
    detail: str = ""

    def problem(self, episode: Episode) -> str:
        """Why it covers no token of ``episode``, in words; '' if it does."""
        if self.turn >= len(episode.turns):
            return f"names turn {self.turn}, and the episode has {len(episode.turns)}"
        sampled = len(episode.turns[self.turn].token_ids)
        end = sampled if self.end is None else self.end
        # An episode without token ids (a script without a tokenizer) has whole turns only.
        whole = self.start == 0 and self.end is None
        if not whole and not self.start < end <= sampled:
            return f"covers tokens [{self.start}, {end}) of turn {self.turn}, which has {sampled}"
        return ""


class Flag(Record):
    """A suspicion worth a reader's eye (hard-coded answers, an edited test, …)."""

    code: str
    detail: str = ""


class Verdict(VersionedRecord):
    """The judge's finding on one episode.

    ``outcome`` in [0, 1] is success, or None when it could not be judged; ``reward`` is the outcome after gated
    penalties and is None exactly when ``outcome`` is.
    """

    outcome: float | None = Field(ge=0.0, le=1.0)
    status: VerdictStatus
    reward: FiniteFloat | None = None
    components: dict[str, FiniteFloat] = Field(default_factory=dict)
    certificates: tuple[StepCertificate, ...] = ()
    flags: tuple[Flag, ...] = ()
    detail: str = ""
    provenance: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Verdict:
        if (self.outcome is None) != (self.status in UNJUDGED):
            raise ValueError(f"status {self.status} cannot carry outcome {self.outcome}")
        if (self.outcome is None) != (self.reward is None):
            raise ValueError(f"reward {self.reward} does not fit outcome {self.outcome}")
        return self

    @classmethod
    def unjudged(cls, status: VerdictStatus, detail: str, **provenance: str) -> Verdict:
        """A verdict that could not be reached: no outcome, no reward, zero loss weight."""
        return cls(outcome=None, status=status, reward=None, detail=detail, provenance=provenance)

    @property
    def passed(self) -> bool:
        """Whether the episode fully succeeded."""
        return self.outcome == 1.0


def content_hash(items: Sequence[Record]) -> str:
    """Hex digest of a sequence of records, in order (used for data provenance)."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item.model_dump(mode="json"), sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()
