"""Rollout engines: where the student's tokens are sampled."""

from agentopd.engines.hf import HFEngine
from agentopd.engines.vllm import VLLMEngine

__all__ = ["HFEngine", "VLLMEngine"]
