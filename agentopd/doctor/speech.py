"""Words that student and teachers share: templates, ends of turns, vocabularies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from agentopd.config import RunConfig
from agentopd.doctor.diagnosis import Diagnosis, Level, local_teachers
from agentopd.errors import ConfigError
from agentopd.models import check_same_vocabulary, load_shape, load_tokenizer
from agentopd.registry import tool_codecs
from agentopd.rendering import ChatRenderer
from agentopd.rendering.codecs import ToolCodec
from agentopd.rendering.pieces import token_bytes
from agentopd.types import ToolCall


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


def teacher_template(config: RunConfig) -> Iterable[Diagnosis]:
    """Teachers end turns as the student does and know its chat template, or the objective aligns their own."""
    student, codec = load_tokenizer(config.model.student), tool_codecs.get(config.rollout.codec)()
    end = _end_of_turn(student, codec)
    stages = list(config.objective.every_stage())
    for name, chosen in local_teachers(config).items():
        theirs = load_tokenizer(chosen.model)
        if any(blocks.alignment.kind != "same" for blocks in stages):
            told = f"teacher {name!r} ends turns in {_end_of_turn(theirs, codec)!r}, aligned with the student's {end!r}"
            yield Diagnosis("teacher template", "ok", told)
            continue
        ends, unlike = _unlike(student, theirs, codec, chosen.end_of_turn)
        if not (ends or unlike):
            told = f"teacher {name!r} ends turns in {end!r} and has the student's chat template"
            yield Diagnosis("teacher template", "ok", told)
            continue
        if ends and all(blocks.masks.special_tokens for blocks in stages):
            ends.append("objective.masks.special_tokens leaves both out of the teacher term")
        elif ends:
            ends.append("set objective.masks.special_tokens = true, or it teaches the student not to end its turns")
        yield Diagnosis("teacher template", "warn", f"teacher {name!r} {'; '.join([*ends, *unlike])}")


def _end_of_turn(tokenizer: Any, codec: ToolCodec) -> str:
    return str(tokenizer.convert_ids_to_tokens(ChatRenderer(tokenizer, codec).end_of_turn_id))


def _unlike(student: Any, teacher: Any, codec: ToolCodec, said: str | None) -> tuple[list[str], list[str]]:
    """What tells a teacher with the student's tokens from it: in how turns end, and in the template's words.

    ``said`` is the end of turn that the config gives to the teacher.
    """
    ends, unlike, end = [], [], _end_of_turn(student, codec)
    try:
        theirs = said or _end_of_turn(teacher, codec)
    except ConfigError as exc:
        theirs = end
        unlike.append(f"has no chat template to be used, and reads the student's: {exc}")
    if theirs != end:
        ends.append(f"ends turns in {theirs!r}, the student in {end!r}")
    if teacher.eos_token != student.eos_token:
        ends.append(f"ends text in {teacher.eos_token!r}, the student's tokenizer in {student.eos_token!r}")
    if not unlike and teacher.chat_template != student.chat_template:
        unlike.append("has another chat template than the student's, in which it reads all the same")
    return ends, unlike


def vocabulary(config: RunConfig) -> Iterable[Diagnosis]:
    """Teachers have the student's tokens, or the objective aligns theirs with them; rows that pad are told."""
    student = load_tokenizer(config.model.student)
    ours = padded_rows(config.model.student, student)
    aligned = [x.alignment.kind for x in config.objective.every_stage() if x.alignment.kind != "same"]
    if not local_teachers(config):
        yield Diagnosis("vocabulary", "ok", f"the student has {len(student)} tokens{_told({'the student': ours})}")
    for name, chosen in local_teachers(config).items():
        theirs = load_tokenizer(chosen.model)
        rows = _told({"the student": ours, "the teacher": padded_rows(chosen.model, theirs)})
        if aligned:
            for tokenizer in (student, theirs):
                token_bytes(tokenizer)
            told = f"teacher {name!r} has {len(theirs)} tokens of its own, aligned with the student's by {aligned[0]}"
        else:
            check_same_vocabulary(student, theirs, name)
            told = f"teacher {name!r} has the student's {len(student)} tokens"
        yield Diagnosis("vocabulary", "ok", told + rows)


def padded_rows(model: str, tokenizer: Any) -> int:
    """Rows of a model's embedding beyond the ids of its tokenizer. Raises ``ConfigError`` where it has too few."""
    rows = int(load_shape(model).vocab_size)
    if rows < len(tokenizer):
        raise ConfigError(
            f"model {model!r} has {rows} embeddings but its tokenizer {len(tokenizer)} tokens; resize the embeddings "
            "or fix the tokenizer"
        )
    return rows - len(tokenizer)


def _told(padded: dict[str, int]) -> str:
    rows = [f"{num} of {whose}'s embedding" for whose, num in padded.items() if num]
    return f"; rows without a token: {', '.join(rows)}" if rows else ""
