"""Whether teachers and the judge answer, and whether what they say can be trusted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np

from agentopd.config import RunConfig
from agentopd.config.teachers import ChatTeacherConfig, EndpointConfig, ServedTeacherConfig
from agentopd.contracts import Teacher
from agentopd.doctor.diagnosis import Diagnosis, Level
from agentopd.errors import NoAnswerError, TeacherError
from agentopd.models import load_tokenizer
from agentopd.teachers.chat import ChatEndpoint, Question, any_text
from agentopd.teachers.served import ServedTeacher
from agentopd.teaching import served_needs
from agentopd.types import Episode, StopReason, Turn

_COPIES, _SPREAD = 8, 0.1
"""Times a sequence is scored at once; what rounding in bfloat16 may make of a token's log-prob, in nats."""
_PATIENCE_S = 10.0


def served_teachers(config: RunConfig) -> Iterable[Diagnosis]:
    """Teachers on other machines are there, know the student's tokens, and agree with themselves."""
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
