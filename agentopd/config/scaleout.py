"""The config of workers on other machines."""

from __future__ import annotations

from pydantic import Field, model_validator

from agentopd.config.base import Section


class RayConfig(Section):
    """Workers on a Ray cluster. They import AgentOPD, so it is installed on every machine."""

    address: str | None = None
    """Ray's head, as ``host:port``, or ``auto`` for the cluster this machine belongs to; None starts one of its own."""
    verification_workers: int = Field(0, ge=0)
    """Judges, each with a sandbox of its own for ``sandbox.workers`` cases at once; 0 judges in this process."""
    verification_resource: str | None = None
    """A custom resource of which each judge takes 1: machines that have it run programs, the others do not."""
    rollout_workers: int = Field(0, ge=0)
    """Copies of the student that sample, each a ``hf`` engine; 0 samples in this process. Each rank has as many."""
    rollout_resource: str | None = None
    """A custom resource of which each rollout worker takes 1."""
    cpus_per_worker: float = Field(1.0, ge=0)
    gpus_per_rollout_worker: float = Field(0.0, ge=0)
    canary_bound: float | None = Field(None, gt=0)
    """Stop the run where a rollout worker's and the learner's log-probs of fixed prompts differ by more than this on
    average; None is 0.05 in bfloat16 and 1e-4 in float32."""
    deadline_s: float = Field(600.0, gt=0)
    """Of one verdict, of one batch of turns, and of starting a worker. A worker that misses it is replaced."""
    health_s: float = Field(10.0, gt=0)
    """How often a worker that takes long is asked whether it lives, and how long it may take to say so."""
    attempts: int = Field(3, ge=1)
    """Workers that are tried, one after the other as they are lost, before a verdict or a turn is given up."""

    @model_validator(mode="after")
    def _workers_for_what_is_set(self) -> RayConfig:
        if not self.verification_workers + self.rollout_workers:
            raise ValueError("no worker is asked for: set verification_workers or rollout_workers, or leave [ray] out")
        if self.verification_resource and not self.verification_workers:
            raise ValueError("verification_resource has no effect without verification_workers: leave it out")
        of_rollouts = self.rollout_resource or self.gpus_per_rollout_worker or self.canary_bound
        if of_rollouts and not self.rollout_workers:
            raise ValueError(
                "rollout_resource, gpus_per_rollout_worker and canary_bound have no effect without rollout_workers"
            )
        return self
