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

from agentopd.build import Judge, build_sandbox, load_skills
from agentopd.capacity import BF16, GIB, Shape, evidence_bytes, head_bytes, state_bytes
from agentopd.certify.certificate import how_to_validate, is_certified
from agentopd.config import RunConfig
from agentopd.config.teachers import ChatTeacherConfig, EndpointConfig, ServedTeacherConfig, TeacherConfig
from agentopd.contracts import Teacher
from agentopd.engines.vllm_process import require_vllm
from agentopd.errors import AgentOPDError, NoAnswerError, TeacherError
from agentopd.evaluate import heldout_tasks
from agentopd.learner.head import chunk_size_of
from agentopd.mixture import load_embedder
from agentopd.models import (
    available_bytes,
    check_same_vocabulary,
    load_shape,
    load_tokenizer,
    settle_dtype,
)
from agentopd.registry import tool_codecs
from agentopd.rendering import ChatRenderer
from agentopd.rendering.codecs import ToolCodec
from agentopd.rendering.pieces import token_bytes
from agentopd.teachers.chat import ChatEndpoint, Question, any_text
from agentopd.teachers.served import ServedTeacher
from agentopd.teaching import served_needs
from agentopd.trackers import require_trackers
from agentopd.tracking import RunDirectory
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
    """Teachers have the student's tokens, or the objective aligns theirs with them."""
    student = load_tokenizer(config.model.student)
    aligned = [x.alignment.kind for x in config.objective.every_stage() if x.alignment.kind != "same"]
    for name, teacher in config.teachers.items():
        if not isinstance(teacher, TeacherConfig):
            continue
        if aligned:
            for tokenizer in (student, theirs := load_tokenizer(teacher.model)):
                token_bytes(tokenizer)
            told = f"teacher {name!r} has {len(theirs)} tokens of its own, aligned with the student's by {aligned[0]}"
            yield Diagnosis("vocabulary", "ok", told)
            continue
        check_same_vocabulary(student, load_tokenizer(teacher.model), name)
        yield Diagnosis("vocabulary", "ok", f"teacher {name!r} has the student's {len(student)} tokens")


def served_teachers(config: RunConfig) -> Iterable[Diagnosis]:
    """Teachers on other machines are there, give what the objective reads, and agree with themselves."""
    tokenizer = load_tokenizer(config.model.student)
    for name, chosen in config.teachers.items():
        if isinstance(chosen, ServedTeacherConfig):
            patient = chosen.model_copy(update={"outage_s": _PATIENCE_S})
            teacher = ServedTeacher(name, patient, served_needs(config, name, tokenizer))
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


def chat_endpoints(config: RunConfig) -> Iterable[Diagnosis]:
    """Teachers that only write text, and the judge, have their keys and answer."""
    asked: dict[str, EndpointConfig] = {
        f"teacher {name!r}": chosen for name, chosen in config.teachers.items() if isinstance(chosen, ChatTeacherConfig)
    }
    if config.judge is not None:
        asked["the judge"] = config.judge
    for who, chosen in asked.items():
        asyncio.run(_greet(chosen))
        yield Diagnosis("chat endpoint", "ok", f"{who} answers at {chosen.base_url}")


async def _greet(config: EndpointConfig) -> None:
    endpoint = ChatEndpoint(config.model_copy(update={"max_retries": min(1, config.max_retries)}))
    try:
        await endpoint.ask(Question((("user", "Answer with one word: yes."),), 0.0, 16), any_text)
    except TeacherError as exc:
        if isinstance(exc, NoAnswerError):
            raise
        # Cut off, or declined: it is there all the same.
    finally:
        await endpoint.aclose()


def sandbox(config: RunConfig) -> Iterable[Diagnosis]:
    """The sandbox starts, where a verifier needs one."""
    skills = load_skills(config.suite)
    built = build_sandbox(config.sandbox, skills.values(), config.ray)
    judge, tasks = Judge(skills.values(), built), heldout_tasks(skills.values(), 1, config.eval.seed)
    samples = [(name, found[0]) for name, found in tasks.items()]

    async def start() -> None:
        try:
            await judge.start(samples)
        finally:
            await built.aclose()

    asyncio.run(start())
    needed = any(judge.verifier(skill, task).needs_sandbox for skill, task in samples)
    yield Diagnosis("sandbox", "ok", f"{config.sandbox.backend} {'starts' if needed else 'is not needed'}")


def packages(config: RunConfig) -> Iterable[Diagnosis]:
    """What the config asks for beyond the standard installation is there."""
    rollout, workers = config.rollout, config.ray.rollout_workers if config.ray is not None else 0
    if not workers and (rollout.engine == "vllm" or (rollout.engine == "vllm_servers" and rollout.servers.started)):
        require_vllm()
        yield Diagnosis("packages", "ok", f"rollout.engine {rollout.engine!r} is installed")
    embedders = {"decontamination.embedding_model": config.decontamination.embedding_model}
    if config.replay.policy == "coreset":
        embedders["replay.coreset.model"] = config.replay.coreset.model
    for key, model in embedders.items():
        if model:
            load_embedder(model, key)
            yield Diagnosis("packages", "ok", f"{key} {model!r} loads")


def trackers(config: RunConfig) -> Iterable[Diagnosis]:
    """The packages of the trackers that are asked for are installed."""
    for name in require_trackers(config.tracking):
        yield Diagnosis("trackers", "ok", f"{name} is installed")


def run_directory(config: RunConfig) -> Iterable[Diagnosis]:
    """A new run can be made where the config says."""
    RunDirectory.check_free(config.run_dir)
    yield Diagnosis("run directory", "ok", f"{config.run_dir} is free")


CHECKS: tuple[Check, ...] = (
    *(chat_template, vocabulary, served_teachers, chat_endpoints, certificates),
    *(sandbox, packages, trackers, run_directory, memory),
)
