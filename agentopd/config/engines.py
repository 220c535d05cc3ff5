"""The config of rollout engines other than the one in the learner's own process."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agentopd.config.base import Section

EngineKind = Literal["hf", "vllm"]


class VLLMConfig(Section):
    """vLLM in a process beside the learner."""

    max_context: int | None = Field(None, ge=16)
    """Tokens of an episode, prompt included; None is the most that the model takes."""
    max_num_seqs: int = Field(256, ge=1)
    """Sequences decoded at once."""
    kv_cache_gb: float = Field(1.0, gt=0)
    """Memory for keys and values. On a GPU it is freed while the learner works."""
    enforce_eager: bool | None = None
    """Run without compiled graphs; None does so on a CPU, where compiling takes longer than it saves."""
    sync: Literal["auto", "disk", "ipc"] = "auto"
    """How new weights reach vLLM: through files, or through shared GPU memory; ``auto``: the latter on a GPU."""
    canary_bound: float | None = Field(None, gt=0)
    """Stop the run where vLLM's and the learner's log-probs of fixed prompts differ by more than this on average after
    a weight sync; None is 0.05 in bfloat16 and 1e-4 in float32."""
    timeout_s: float = Field(600.0, gt=0)
    """Deadline of starting up, and of one weight sync."""
