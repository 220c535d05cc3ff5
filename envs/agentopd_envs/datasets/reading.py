"""Rows of a JSONL file under ``$AGENTOPD_DATA``, checked against a model."""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from agentopd.errors import ConfigError, TaskError

VARIABLE = "AGENTOPD_DATA"


class Row(BaseModel):
    """Base of row models: the fields a loader reads; a file may hold more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str


R = TypeVar("R", bound=Row)


def select(file: str, model: type[R], limit: int | None, seed: int) -> list[R]:
    """The rows of a file in an order shuffled by ``seed``, ``limit`` of them at most.

    Raises ``ConfigError`` where the folder or file is missing, ``TaskError`` naming the line of a bad row.
    """
    rows = list(_read(locate(file), model))
    random.Random(seed).shuffle(rows)
    return rows[:limit]


def locate(file: str) -> Path:
    """A file of the folder; ``ConfigError`` says what to set."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise ConfigError(f"{VARIABLE} is not set: set it to the folder that holds {file}")
    path = Path(folder) / file
    if not path.is_file():
        raise ConfigError(f"{VARIABLE}={folder!r} has no {file}: set it to the folder that holds this file")
    return path


@cache
def _read(path: Path, model: type[R]) -> tuple[R, ...]:
    rows = []
    with path.open(encoding="utf-8") as lines:  # not splitlines, which also ends a line inside a string, at U+2028
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(model.model_validate_json(line))
            except ValidationError as exc:
                first = exc.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise TaskError(f"{path}, line {number}: {where}: {first['msg']}") from None
    return tuple(rows)
