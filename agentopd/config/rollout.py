"""The config of rollouts: which engine samples, and how."""

from __future__ import annotations

from pydantic import Field, model_validator

from agentopd.config.base import Section
from agentopd.config.engines import EngineKind, ServersConfig, VLLMConfig


class RolloutConfig(Section):
    """How episodes are sampled."""

    engine: EngineKind = "hf"
    """``hf`` samples in this process, ``vllm`` in one beside it, ``vllm_servers`` in several behind HTTP."""
    vllm: VLLMConfig = VLLMConfig()
    """Of ``vllm`` and ``vllm_servers``."""
    servers: ServersConfig = ServersConfig()
    """Of ``vllm_servers`` alone."""
    group_size: int = Field(4, ge=1)
    """Episodes per prompt, whoever plays them. Gold is played once: copies of one trajectory weigh as much as one."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    batch_size: int = Field(256, ge=1)
    """Sequences decoded at once; of ``hf`` alone."""
    turn_cache_mb: int = Field(1024, ge=0)
    """Memory for keys and values kept between the turns of an episode; 0 prefills the whole prompt every
    turn. Of ``hf`` alone."""
    cut_turns: bool = False
    """A weight update cuts the turns under way, which go on from the new weights; otherwise it waits for their ends."""
    codec: str = "hermes_json"
    max_malformed: int = Field(3, ge=1)
    """Malformed tool calls that end an episode."""

    @model_validator(mode="after")
    def _keys_are_the_engines(self) -> RolloutConfig:
        by_vllm = ("vllm", "vllm_servers")
        of_engines = {"batch_size": ("hf",), "turn_cache_mb": ("hf",), "vllm": by_vllm, "servers": by_vllm[1:]}
        for key, engines in of_engines.items():
            if self.engine not in engines and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect on engine {self.engine!r}: leave it out, or use {engines[0]!r}")
        if self.engine in by_vllm and self.temperature > 2:
            raise ValueError(f"vLLM samples at temperatures up to 2, and temperature is {self.temperature:g}")
        if self.engine == "vllm_servers":
            self._servers_suffice()
        elif self.vllm.sync == "nccl":
            raise ValueError(f"vllm.sync 'nccl' is for engine 'vllm_servers', and engine is {self.engine!r}: use 'ipc'")
        return self

    def _servers_suffice(self) -> None:
        """There is a server, and nothing is asked of one that only those who start it can set."""
        servers, default = self.servers, VLLMConfig()
        if not servers.started and not servers.urls:
            raise ValueError("servers.replicas is 0 and there are no servers.urls: nothing would sample")
        for key in ("max_num_seqs", "kv_cache_gb", "enforce_eager") if not servers.started else ():
            if getattr(self.vllm, key) != getattr(default, key):
                raise ValueError(f"vllm.{key} has no effect on servers that were started elsewhere: leave it out")
        if self.vllm.sync == "ipc":
            raise ValueError(
                "vllm.sync 'ipc' shares the learner's GPU, and servers have their own: use 'disk' or 'nccl'"
            )
        if servers.gpus and not servers.started:
            raise ValueError("servers.gpus are for servers that are started here, and replicas is 0: leave them out")
