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
