"""What a run needs, checked before it starts: one line for each check, worst first in the exit code.

To add a check: write a function from a config to diagnoses and put it into ``CHECKS``. A check raises nothing but
``AgentOPDError``; one raised is the diagnosis that the run cannot succeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from agentopd.build import load_skills
from agentopd.certify.certificate import how_to_validate, is_certified
from agentopd.config import RunConfig
from agentopd.errors import AgentOPDError
from agentopd.models import check_same_vocabulary, load_tokenizer
from agentopd.registry import tool_codecs
from agentopd.rendering import ChatRenderer
from agentopd.rendering.codecs import ToolCodec
from agentopd.types import ToolCall

Level = Literal["ok", "warn", "fail"]


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
        check_same_vocabulary(student, load_tokenizer(teacher.model), name)
        yield Diagnosis("vocabulary", "ok", f"teacher {name!r} has the student's {len(student)} tokens")


def certificates(config: RunConfig) -> Iterable[Diagnosis]:
    """Every skill's environment is certified."""
    for name, skill in load_skills(config.suite).items():
        certified = is_certified(skill)
        todo = f"not certified; run: agentopd envs validate {how_to_validate(skill)}"
        yield Diagnosis("certificate", "ok" if certified else "fail", f"{name}: {'certified' if certified else todo}")


CHECKS: tuple[Check, ...] = (chat_template, vocabulary, certificates)
