"""What a run takes of this machine: memory."""

from __future__ import annotations

import os
from collections.abc import Iterable

from agentopd.capacity import BF16, GIB, Shape, evidence_bytes, head_bytes, state_bytes
from agentopd.config import RunConfig
from agentopd.doctor.diagnosis import Diagnosis
from agentopd.learner.head import chunk_size_of
from agentopd.models import available_bytes, load_shape, settle_dtype


def memory(config: RunConfig) -> Iterable[Diagnosis]:
    """What training the student takes on one rank that shares nothing, against what this machine has."""
    shape, dtype = Shape.of(load_shape(config.model.student)), settle_dtype(config.model.dtype)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    parameters, stage = shape.parameters, config.learner.zero_stage
    state = state_bytes(parameters, ranks, stage, dtype) if config.model.lora is None else BF16 * parameters
    needed = (state + head_bytes(shape, chunk_size_of(shape.vocabulary))) / GIB
    there = available_bytes() / GIB
    top_k = max(blocks.top_k for blocks in config.objective.every_stage())
    yield Diagnosis(
        "memory",
        "ok" if needed <= there else "warn",
        f"{parameters:,} parameters: weights, gradients, optimiser and output head take {needed:.2f} GiB a rank, "
        f"activations come on top, and {there:.1f} GiB are there; keys and values {shape.kv_bytes_per_token:,} B a "
        f"token, a served teacher's answer {evidence_bytes(1, top_k)} B a token",
    )
