"""Rollout engines: where the student's tokens are sampled."""

from agentopd.engines.hf import HFEngine

__all__ = ["HFEngine"]
