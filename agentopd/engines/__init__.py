"""Rollout engines: where the student's tokens are sampled."""

from agentopd.engines.hf import HFEngine
from agentopd.engines.vllm import VLLMEngine
from agentopd.engines.vllm_servers import VLLMServersEngine

__all__ = ["HFEngine", "VLLMEngine", "VLLMServersEngine"]
