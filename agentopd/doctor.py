"""What a run needs, checked before it starts: one line for each check, worst first in the exit code.

To add a check: write a function from a config to diagnoses and put it into ``CHECKS``. A check raises nothing but
``AgentOPDError``; one raised is the diagnosis that the run cannot succeed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agentopd.build import load_skills
from agentopd.capacity import BF16, GIB, Shape, evidence_bytes, head_bytes, state_bytes
from agentopd.certify.certificate import how_to_validate, is_certified
from agentopd.config import RunConfig
from agentopd.config.teachers import ServedTeacherConfig, TeacherConfig
from agentopd.contracts import Teacher
from agentopd.errors import AgentOPDError
from agentopd.learner.head import chunk_size_of
from agentopd.models import (
    available_bytes,
    check_same_vocabulary,
    load_shape,
    load_tokenizer,
    settle_dtype,
    vocabulary_hash,
)
from agentopd.registry import tool_codecs
from agentopd.rendering import ChatRenderer
from agentopd.rendering.codecs import ToolCodec
from agentopd.teachers.served import ServedTeacher
from agentopd.types import Episode, StopReason, ToolCall, Turn

Level = Literal["ok", "warn", "fail"]
_COPIES, _SPREAD = 8, 0.1
"""Times a sequence is scored at once; what rounding in bfloat16 may make of a token's log-prob, in nats."""
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Diagnosis:
    """One line: ``fail`` means that the run cannot succeed, ``warn`` that part of it may not."""

    check: str
    level: Level
    detail: str


Check = Callable[[RunConfig], Iterable[Diagnosis]]


def diagnose(config: RunConfig) -> list[Diagnosis]:
    """Every check on a run's config."""
    found: list[Diagnosis] = []
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        try:
            found += check(config)
        except AgentOPDError as exc:
            found.append(Diagnosis(name, "fail", str(exc)))
    return found


def check_template(tokenizer: Any, codec: ToolCodec) -> list[Diagnosis]:
    """Whether turns of this tokenizer's chat template can be continued by appending, and calls survive its tokens.

    Raises ``ConfigError`` where no turn can be continued.
    """
    renderer = ChatRenderer(tokenizer, codec)
    end = tokenizer.convert_ids_to_tokens(renderer.end_of_turn_id)
    found = [Diagnosis("chat template", "ok", f"append-only; a turn ends in {end!r}")] if not renderer.refusals else []
    found += [Diagnosis("chat template", "warn", f"no {role} turns: {why}") for role, why in renderer.refusals.items()]
    call = ToolCall(name="write", arguments={"text": 'a "b" </tool_call> {\n\té', "count": 3})
    read = codec.parse(renderer.decode_turn(renderer.encode_turn(codec.render(call))))
    level: Level = "ok" if read == ((call,), ()) else "fail"
    return [
        *found,
        Diagnosis("tool calls", level, f"{codec.name} {'survives' if level == 'ok' else 'is lost in'} tokens"),
    ]


def chat_template(config: RunConfig) -> Iterable[Diagnosis]:
    """The student's template and codec."""
    return check_template(load_tokenizer(config.model.student), tool_codecs.get(config.rollout.codec)())


def vocabulary(config: RunConfig) -> Iterable[Diagnosis]:
    """Teachers have the student's tokens."""
    student = load_tokenizer(config.model.student)
    for name, teacher in config.teachers.items():
        if not isinstance(teacher, TeacherConfig):
            continue
        check_same_vocabulary(student, load_tokenizer(teacher.model), name)
        yield Diagnosis("vocabulary", "ok", f"teacher {name!r} has the student's {len(student)} tokens")


def served_teachers(config: RunConfig) -> Iterable[Diagnosis]:
    """Teachers on other machines are there, know the student's tokens, and agree with themselves."""
    tokenizer = load_tokenizer(config.model.student)
    for name, chosen in config.teachers.items():
        if isinstance(chosen, ServedTeacherConfig):
            patient = chosen.model_copy(update={"outage_s": _PATIENCE_S})
            teacher = ServedTeacher(name, patient, vocabulary_hash(tokenizer))
            spread = asyncio.run(self_disagreement(teacher, len(tokenizer)))
            told = f"{name!r} scores one sequence {_COPIES} times at once within {spread:.2g} nat"
            level: Level = "ok" if spread <= _SPREAD else "fail"
            yield Diagnosis("served teacher", level, told if level == "ok" else f"{told}; {_SPREAD:g} is the bound")


async def self_disagreement(teacher: Teacher, vocab_size: int) -> float:
    """Largest difference in a token's log-prob when one sequence is scored several times at once, among others."""
    rng = np.random.default_rng(0)

    def episode(length: int) -> Episode:
        ids = tuple(int(x) for x in rng.integers(0, vocab_size, length))
        turn = Turn(token_ids=ids[8:], rollout_logprobs=(0.0,) * (length - 8))
        return Episode(
            id="doctor",
            task_id="",
            task_hash="",
            env="",
            split="train",
            prompt_ids=ids[:8],
            turns=(turn,),
            stop_reason=StopReason.COMPLETED,
        )

    same, others = episode(64), [episode(16 + 8 * i) for i in range(_COPIES)]
    asked = [item for other in others for item in (same, other)]
    answers = await asyncio.gather(*(teacher.score([item], 0) for item in asked))
    logprobs_CN = np.stack([found.teacher_logprobs for (found,) in answers[::2]])
    return float(np.ptp(logprobs_CN, axis=0).max())


def certificates(config: RunConfig) -> Iterable[Diagnosis]:
    """Every skill's environment is certified."""
    for name, skill in load_skills(config.suite).items():
        certified = is_certified(skill)
        todo = f"not certified; run: agentopd envs validate {how_to_validate(skill)}"
        yield Diagnosis("certificate", "ok" if certified else "fail", f"{name}: {'certified' if certified else todo}")


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


CHECKS: tuple[Check, ...] = (chat_template, vocabulary, served_teachers, certificates, memory)
