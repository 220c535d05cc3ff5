"""The config of rollout engines other than the one in the learner's own process."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from agentopd.config.base import Section

EngineKind = Literal["hf", "vllm", "vllm_servers"]


class VLLMConfig(Section):
    """vLLM, in a process beside the learner or behind HTTP."""

    max_context: int | None = Field(None, ge=16)
    """Tokens of an episode, prompt included; None is the most that the model takes."""
    max_num_seqs: int = Field(256, ge=1)
    """Sequences decoded at once."""
    kv_cache_gb: float = Field(1.0, gt=0)
    """Memory for keys and values. On a GPU shared with the learner it is freed while the learner works."""
    enforce_eager: bool | None = None
    """Run without compiled graphs; None does so on a CPU, where compiling takes longer than it saves."""
    sync: Literal["auto", "disk", "ipc", "nccl"] = "auto"
    """How new weights reach vLLM: through files, through shared GPU memory (for an engine on the learner's GPU, and
    there ``auto``), or from the learner's GPU to those of servers by NCCL."""
    canary_bound: float | None = Field(None, gt=0)
    """Stop the run where vLLM's and the learner's log-probs of fixed prompts differ by more than this on average after
    a weight sync; None is 0.05 in bfloat16 and 1e-4 in float32."""
    timeout_s: float = Field(600.0, gt=0)
    """Deadline of starting up, and of each call of a weight sync."""


class ServersConfig(Section):
    """vLLM servers that take token ids over HTTP. All ranks of a launched job share ``urls``; each starts its own
    ``replicas``.
    """

    replicas: int | None = Field(None, ge=0)
    """Servers that are started on this machine, for each rank; None is one, or none where ``urls`` are given."""
    urls: tuple[str, ...] = ()
    """Servers started elsewhere, ``http://HOST:PORT``, each named once; every rank samples from all of them."""
    gpus: tuple[int, ...] = ()
    """One GPU for each server that is started, over all ranks; empty: they see what the learner sees."""
    folder: str | None = None
    """Where weights are left for the servers to read, under the same path on every machine; None is a temporary folder
    of this one. Ranks on several machines that share ``urls`` need it."""
    routing: Literal["session", "least_loaded"] = "session"
    """``session`` keeps the turns of an episode on one server, whose prefix cache then has the turns before."""
    turn_timeout_s: float = Field(600.0, gt=0)
    """Deadline of one turn. A server that is past it is taken to hang."""
    outage_s: float = Field(1800.0, ge=0)
    """How long the run waits while no server can be reached or brought back."""

    @field_validator("urls")
    @classmethod
    def _named_once(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        # A server that is named twice would get twice the turns.
        seen: set[str] = set()
        for url in urls:
            parts = urlsplit(url)
            if (place := parts._replace(netloc=parts.netloc.lower()).geturl().rstrip("/")) in seen:
                raise ValueError(f"{url!r} is named twice: name each server once, the ranks share them")
            seen.add(place)
        return urls

    @property
    def started(self) -> int:
        """Servers that are started here."""
        return self.replicas if self.replicas is not None else int(not self.urls)
