"""Whether teachers and the judge answer, and whether what they say can be trusted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from agentopd.config import RunConfig
from agentopd.config.teachers import ChatTeacherConfig, EndpointConfig, ServedTeacherConfig, TeacherConfig
from agentopd.contracts import FloatArray, Teacher
from agentopd.doctor.diagnosis import Diagnosis, UnknownShapeError, gib, local_teachers, weight_bytes
from agentopd.errors import NoAnswerError, TeacherError
from agentopd.models import available_bytes, load_model, load_tokenizer
from agentopd.teachers.chat import ChatEndpoint, Question, any_text
from agentopd.teachers.local import LocalTeacher
from agentopd.teachers.served import ServedTeacher
from agentopd.teaching import served_needs
from agentopd.types import Episode, StopReason, Turn

_COPIES, _SPREAD = 8, 0.1
"""Times a sequence is scored at once; what rounding in bfloat16 may make of a token's log-prob, in nats."""
_PROMPT, _LENGTH, _CHANGED = 8, 64, 24
"""Of the sequence that is scored: tokens of its prompt, all of its tokens, and the one that is exchanged."""
_VARIANTS, _CLEAR = 4, 4.0
"""Tokens put in its place; how many times the noise elsewhere a log-prob has to move where it must."""
_PATIENCE_S = 10.0


def served_teachers(config: RunConfig) -> Iterable[Diagnosis]:
    """Teachers on other machines are there, know the student's tokens, agree with themselves, and are not shifted."""
    tokenizer = load_tokenizer(config.model.student)
    for name, chosen in config.teachers.items():
        if isinstance(chosen, ServedTeacherConfig):
            patient = chosen.model_copy(update={"outage_s": _PATIENCE_S})
            teacher = ServedTeacher(name, patient, served_needs(config, name, tokenizer))
            yield asyncio.run(_examined("served teacher", name, teacher, len(tokenizer)))


def scoring_teachers(config: RunConfig) -> Iterable[Diagnosis]:
    """Teachers in this process that score agree with themselves, and with a plain forward pass."""
    stages = list(config.objective.every_stage())
    if not any(blocks.needs_teacher or blocks.top_k for blocks in stages):
        return
    for name, chosen in local_teachers(config).items():
        if (needed := _weights(chosen)) > (there := available_bytes()):
            told = f"{name!r} is not asked: its weights take {gib(needed)} GiB, and {gib(there)} are free"
            yield Diagnosis("scoring teacher", "fail", told)
            continue
        model, ids = load_model(chosen.model, chosen.dtype), len(load_tokenizer(chosen.model))
        teacher = LocalTeacher(name, model, chosen.batch_tokens, ids)
        yield asyncio.run(_examined("scoring teacher", name, teacher, ids, partial(plain_logprobs, model, ids)))
        del model, teacher
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next one is weighed against what is free


def _weights(chosen: TeacherConfig) -> int:
    """Bytes of a teacher's weights; 0 where they cannot be told."""
    try:
        return weight_bytes(chosen.model, chosen.dtype)
    except UnknownShapeError:
        return 0


async def _examined(
    check: str, name: str, teacher: Teacher, vocab_size: int, plain: Callable[[Episode], FloatArray] | None = None
) -> Diagnosis:
    """One line about a teacher's evidence; ``plain`` gives the log-probs (n,) that it ought to have."""
    spread, mixed = await self_disagreement(teacher, vocab_size), await batch_disagreement(teacher, vocab_size)
    told = (
        f"{name!r} scores one sequence {_COPIES} times at once within {spread:.2g} nat, among others within {mixed:.2g}"
    )
    wrong = [f"{_SPREAD:g} is the bound"] if max(spread, mixed) > _SPREAD else []
    shift = await misalignment(teacher, vocab_size)
    wrong += [shift] if shift else []
    if plain is not None:
        sequence = _sequence(vocab_size)
        (found,) = await teacher.score([sequence], 0)
        gap = _rms(found.teacher_logprobs - plain(sequence))
        told += f", and as a plain forward pass within {gap:.2g}"
        wrong += [f"{_SPREAD:g} is the bound"] if gap > _SPREAD and not wrong else []
    return Diagnosis(check, "fail" if wrong else "ok", "; ".join([told, *(wrong or ["each token in its place"])]))


def _sequence(vocab_size: int, length: int = _LENGTH, seed: int = 0) -> Episode:
    """An episode of random ids."""
    drawn = np.random.default_rng(seed).integers(0, vocab_size, length)
    return _of([int(x) for x in drawn])


def _of(ids: Sequence[int]) -> Episode:
    return Episode(
        id="doctor",
        task_id="",
        task_hash="",
        env="",
        split="train",
        prompt_ids=tuple(ids[:_PROMPT]),
        turns=(Turn(token_ids=tuple(ids[_PROMPT:]), rollout_logprobs=(0.0,) * (len(ids) - _PROMPT)),),
        stop_reason=StopReason.COMPLETED,
    )


def _others(vocab_size: int) -> list[Episode]:
    return [_sequence(vocab_size, 16 + 8 * i, seed=1 + i) for i in range(_COPIES)]


def _rms(values: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(values.astype(np.float64)))))


async def self_disagreement(teacher: Teacher, vocab_size: int) -> float:
    """Largest difference in a token's log-prob when one sequence is scored several times at once, among others."""
    asked = [item for other in _others(vocab_size) for item in (_sequence(vocab_size), other)]
    answers = await asyncio.gather(*(teacher.score([item], 0) for item in asked))
    logprobs_CN = np.stack([found.teacher_logprobs for (found,) in answers[::2]])
    return float(np.ptp(logprobs_CN, axis=0).max())


async def batch_disagreement(teacher: Teacher, vocab_size: int) -> float:
    """How far log-probs of a sequence alone are from those in one batch with others: root mean square, in nats.

    A batch is computed in other shapes, so that single tokens may round otherwise.
    """
    (alone,) = await teacher.score([_sequence(vocab_size)], 0)
    others = _others(vocab_size)
    first, *_, last = await teacher.score([_sequence(vocab_size), *others, _sequence(vocab_size)], 0)
    return max(_rms(found.teacher_logprobs - alone.teacher_logprobs) for found in (first, last))


async def misalignment(teacher: Teacher, vocab_size: int) -> str:
    """What is wrong with where a teacher puts its log-probs; nothing said where every token is in its place.

    One token of a sequence is exchanged: what comes before must not move, and its own log-prob and the next token's
    must. Where the teacher shows a top-K, the tokens put in are the most likely ones, and their log-probs those shown.
    Without a top-K, a distribution that has already read the token it is about is not noticed.
    """
    base, place = _sequence(vocab_size), _CHANGED - _PROMPT
    ids = base.token_ids
    shown = _VARIANTS if teacher.max_top_k is None else min(_VARIANTS, teacher.max_top_k)
    (found,) = await teacher.score([base], shown)
    if not np.isfinite(found.teacher_logprobs).all():
        return "log-probs are not finite"
    top = [] if found.topk_ids is None else [int(x) for x in found.topk_ids[place]]
    anybody = ((ids[_CHANGED] + i) % vocab_size for i in range(1, 2 * _VARIANTS))
    put_in = [token for token in dict.fromkeys([*top, *anybody]) if token != ids[_CHANGED]][:_VARIANTS]
    variants = [_of([*ids[:_CHANGED], token, *ids[_CHANGED + 1 :]]) for token in put_in]
    answers_VN = np.stack([x.teacher_logprobs for x in await teacher.score(variants, 0)])
    moved_VN = np.abs(answers_VN - found.teacher_logprobs)
    before = max(_rms(moved_N) for moved_N in moved_VN[:, :place])
    if before > _SPREAD:
        return f"log-probs before an exchanged token move by {before:.2g}: evidence lies too early"
    for what, index in (("an exchanged token", place), ("the token after an exchanged one", place + 1)):
        if (moved := moved_VN[:, index].max()) <= _CLEAR * before or not moved:
            return f"the log-prob of {what} does not move: evidence lies too late"
    if found.topk_logprobs is not None:
        listed = dict(zip(top, found.topk_logprobs[place].tolist(), strict=True))
        pairs = zip(put_in, answers_VN[:, place].tolist(), strict=True)
        gap = max((abs(answer - listed[token]) for token, answer in pairs if token in listed), default=0.0)
        if gap > _SPREAD:
            return f"a token's log-prob is {gap:.2g} nat from its own in the top-K: they lie on different tokens"
    return ""


@torch.no_grad()
def plain_logprobs(model: Any, vocab_size: int, episode: Episode) -> FloatArray:
    """Log-probs (n,) of an episode's last n tokens from the model's own logits, one sequence, nothing packed."""
    ids = torch.tensor([episode.token_ids], device=model.device)
    logprobs_TV = model(input_ids=ids).logits[0, :-1, :vocab_size].float().log_softmax(-1)
    found: FloatArray = logprobs_TV.gather(1, ids[0, 1:, None])[-episode.num_sampled :, 0].cpu().numpy()
    return found


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
