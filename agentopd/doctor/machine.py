"""What a run takes of this machine's memory, part by part, by the formulas of ``capacity``."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from agentopd.build import load_skills
from agentopd.capacity import (
    BF16,
    BYTES,
    GIB,
    activation_bytes,
    head_bytes,
    held_evidence_bytes,
    kv_bytes,
    state_bytes,
)
from agentopd.config import RunConfig
from agentopd.doctor.diagnosis import Diagnosis, Student, fit, gib, local_teachers, weight_bytes
from agentopd.evaluate import heldout_tasks
from agentopd.learner.head import chunk_size_of
from agentopd.models import available_bytes, load_shape
from agentopd.teaching import RETENTION_TEACHER, routes

_ALL_OF_AN_EPISODE = 2
"""Tokens of an episode for each that may be sampled: its prompt and what tools say take as many again."""


def memory(config: RunConfig) -> Iterable[Diagnosis]:
    """What the parts of a run hold on this machine or on one accelerator, against what is free there."""
    student, on_gpu = Student.of(config), torch.cuda.is_available()
    sampled = _sampled_tokens(config)
    learner, working = _learner(config, student)
    parts = {
        "learner": learner,
        "teachers": sum(_held(config).values()),
        "sampler": _sampler(config, student, sampled, on_gpu),
        "activations and output head": working,
        "evidence of a step": 0 if on_gpu else _evidence(config, student, sampled),
    }
    # Ranks on a CPU share its memory; each has an accelerator of its own otherwise.
    shared = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, there = shared * sum(parts.values()), available_bytes()
    if on_gpu and config.rollout.engine == "vllm":  # sleeps while the learner works
        needed -= min(parts["sampler"], parts["activations and output head"])
    level = fit(needed, there)
    close = {"ok": "", "warn": " (tight)", "fail": ", which cannot fit"}[level]
    listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    ranks = f" for each of {shared} ranks" if shared > 1 else ""
    yield Diagnosis("memory", level, f"{gib(needed)} GiB ({listed}{ranks}) of {gib(there)} free{close}")


def _learner(config: RunConfig, student: Student) -> tuple[float, float]:
    """What one rank of the learner holds all the time, and what a micro-batch adds."""
    shape, size, ranks = student.shape, BYTES[student.dtype], int(os.environ.get("WORLD_SIZE", "1"))
    held = state_bytes(student.trained, ranks, student.zero_stage, student.dtype)
    tokens, whole = config.learner.micro_batch_tokens, config.model.lora is None
    if not whole:
        held += size * shape.parameters / (ranks if student.zero_stage == 3 else 1)
    working = activation_bytes(shape, tokens, size, config.learner.activation_checkpointing)
    return held, working + head_bytes(shape, min(tokens, chunk_size_of(shape.vocabulary)), size, whole)


def _held(config: RunConfig) -> dict[str, int]:
    """Weights of the models beside the student that are held here: teachers, their bases, the frozen start."""
    stages = list(config.objective.every_stage())
    asked = set(routes(config, stages).values())
    chosen = {name: teacher for name, teacher in local_teachers(config).items() if name in asked}
    held = {name: weight_bytes(teacher.model, teacher.dtype) for name, teacher in chosen.items()}
    referring = [blocks.reference.policy for blocks in stages if blocks.needs_reference]
    if "teacher_base" in referring:
        bases = {name: teacher for name, teacher in chosen.items() if teacher.base is not None}
        held |= {f"{name}/base": weight_bytes(teacher.base or "", teacher.dtype) for name, teacher in bases.items()}
    if config.eval.measures_kl or RETENTION_TEACHER in asked or any(policy != "teacher_base" for policy in referring):
        held["start"] = weight_bytes(config.model.student, config.model.dtype)
    return held


def _sampler(config: RunConfig, student: Student, sampled: int, on_gpu: bool) -> float:
    """Copies of the student that sample here, with their keys and values."""
    rollout, shape, size = config.rollout, student.shape, BYTES[student.dtype]
    if config.ray is not None and config.ray.rollout_workers:
        here = config.ray.address is None and not on_gpu
        return config.ray.rollout_workers * shape.parameters * size if here else 0
    if rollout.engine == "hf":
        rows = min(rollout.batch_size, -(-_episodes(config) // int(os.environ.get("WORLD_SIZE", "1"))))
        tokens = _ALL_OF_AN_EPISODE * sampled
        most = getattr(load_shape(config.model.student), "max_position_embeddings", None) or tokens
        live = kv_bytes(shape, rows, min(most, tokens)) * size / BF16
        return live + min(live, rollout.turn_cache_mb * 2**20)
    engines = rollout.servers.started if rollout.engine == "vllm_servers" else 1
    if on_gpu and rollout.engine == "vllm_servers" and rollout.servers.gpus:
        return 0
    return engines * (rollout.vllm.kv_cache_gb * GIB + shape.parameters * size)


def _evidence(config: RunConfig, student: Student, sampled: int) -> float:
    stages = list(config.objective.every_stage())
    if not any(blocks.needs_teacher or blocks.top_k for blocks in stages):
        return 0
    width = student.shape.width if any(blocks.needs_full_vocabulary for blocks in stages) else 0
    tokens = _episodes(config) * sampled // int(os.environ.get("WORLD_SIZE", "1"))
    return held_evidence_bytes(tokens, max(blocks.top_k for blocks in stages), width)


def _episodes(config: RunConfig) -> int:
    return config.train.prompts_per_step * config.rollout.group_size


def _sampled_tokens(config: RunConfig) -> int:
    """The most tokens that an episode may sample, by one task of each skill."""
    tasks = heldout_tasks(load_skills(config.suite).values(), 1, config.eval.seed)
    return max(found[0].limits.max_tokens for found in tasks.values())
