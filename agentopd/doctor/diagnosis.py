"""What a check finds, and what the checks ask of a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from agentopd.config import RunConfig
from agentopd.config.teachers import TeacherConfig

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Diagnosis:
    """One line: ``fail`` means that the run cannot succeed, ``warn`` that part of it may not."""

    check: str
    level: Level
    detail: str


Check = Callable[[RunConfig], Iterable[Diagnosis]]


def local_teachers(config: RunConfig) -> dict[str, TeacherConfig]:
    """The teachers in this process, by name."""
    return {name: chosen for name, chosen in config.teachers.items() if isinstance(chosen, TeacherConfig)}
