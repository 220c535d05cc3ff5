"""The config of whoever teaches or judges: a model in this process, on another machine, or behind a chat endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from agentopd.config.base import Section
from agentopd.config.objective import Access

Dtype = Literal["auto", "bfloat16", "float32"]
"""``auto``: bfloat16 on accelerators and on CPUs that compute in it, float32 on other CPUs, where bfloat16 is slow."""


class TeacherConfig(Section):
    """One teacher."""

    kind: Literal["hf"] = "hf"
    model: str
    dtype: Dtype = "auto"
    batch_tokens: int = Field(16384, ge=256)
    context: Literal["student", "hint", "solution", "trajectory"] = "student"
    """What its prompt holds: what the student saw, or also the task's privileged hint, solution or gold trajectory."""
    misread_share: float = Field(0.0, ge=0, le=1)
    """For robustness studies: the share of tasks, chosen by their hashes, on which it is shown another task of the
    skill instead, so that it is confident and wrong."""
    end_of_turn: str | None = None
    """For robustness studies: the token that ends its turns, where that is another than the student's."""
    base: str | None = None
    """This teacher's model before its own training: what ``reference.policy = "teacher_base"`` reads."""

    @property
    def access(self) -> Access:
        """The most it can give."""
        return "full"


class ServedTeacherConfig(Section):
    """A teacher on another machine, behind ``agentopd serve``."""

    kind: Literal["served"] = "served"
    base_url: str
    """``http://HOST:PORT``."""
    timeout_s: float = Field(120.0, gt=0)
    """Of one try."""
    outage_s: float = Field(1800.0, ge=0)
    """How long the run waits for a teacher that is away or busy."""
    concurrency: int = Field(8, ge=1)
    """Questions asked at once."""
    batch_tokens: int = Field(16384, ge=256)
    """Tokens of the episodes in one question."""

    @property
    def access(self) -> Access:
        """The most it can give."""
        return "topk"


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible chat endpoint."""

    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; None sends none."""
    timeout_s: float = Field(60.0, gt=0)
    max_retries: int = Field(4, ge=0)
    """Further tries after a time-out, a lost connection, 429 or 5xx, with growing pauses."""
    concurrency: int = Field(16, ge=1)
    max_tokens: int = Field(2048, ge=1)


class ChatTeacherConfig(EndpointConfig):
    """A teacher that answers in text and shows no log-probs."""

    kind: Literal["chat"] = "chat"
    temperature: float = Field(1.0, ge=0)

    @property
    def access(self) -> Access:
        """The most it can give."""
        return "text"


class JudgeConfig(EndpointConfig):
    """The model that writes rubrics and grades by them, blind."""

    rubric_temperature: float = Field(0.7, ge=0)
    temperature: float = Field(0.0, ge=0)
    min_criteria: int = Field(4, ge=1)
    max_criteria: int = Field(12, ge=1)


def _teacher_kind(value: Any) -> Any:
    return value.get("kind", "hf") if isinstance(value, dict) else getattr(value, "kind", "hf")


AnyTeacherConfig = Annotated[
    Annotated[ChatTeacherConfig, Tag("chat")]
    | Annotated[ServedTeacherConfig, Tag("served")]
    | Annotated[TeacherConfig, Tag("hf")],
    Discriminator(_teacher_kind),
]
