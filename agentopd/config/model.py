"""The config of the student."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agentopd.config.base import Section
from agentopd.config.teachers import Dtype


class LoRAConfig(Section):
    """Low-rank adapters, through ``peft``; the student's own weights stay as they are."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    """An adapter's product is multiplied by alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get one, such as ``q_proj``; ``all-linear``: every one but the output head."""


class ModelConfig(Section):
    """The student."""

    student: str = "micro/student"
    """A directory, a Hugging Face id, or a checkpoint shipped with AgentOPD (``micro/student``)."""
    dtype: Dtype = "auto"
    lora: LoRAConfig | None = None
    """Train adapters instead of the weights; None trains the weights."""
