"""The config of the optimiser."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agentopd.config.base import Section


class LearnerConfig(Section):
    """The optimiser. Compute is in the model's dtype, master weights and log-prob arithmetic in fp32."""

    lr: float = Field(5e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(5, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    grad_clip: float = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(8192, ge=128)
    """Padded tokens in one forward pass; sequences are bucketed by length."""
    epochs: int = Field(1, ge=1)
    """Optimiser passes over each batch."""
    mini_batches: int = Field(1, ge=1)
    """Optimiser steps that each pass is cut into; those after the first are slightly off-policy."""
    max_epoch_kl: float = Field(0.1, gt=0)
    """Stop further passes once mean |logprobs - old_logprobs| exceeds this."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What is split over ranks: optimiser state (1), gradients too (2), weights too (3). A bfloat16 student with 0 runs
    as 1: the same thing on one rank, and the stage that keeps fp32 gradients."""
    collective_timeout_s: float = Field(7200.0, gt=0)
    """How long the ranks of a launched job wait for one another before they take one to hang; longer than a rank may
    wait for a server or a teacher."""
