"""What a check finds, and what the checks ask of a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from agentopd.capacity import BYTES, GIB, Shape, lora_parameters
from agentopd.config import RunConfig
from agentopd.config.teachers import TeacherConfig
from agentopd.models import load_shape, settle_dtype

Level = Literal["ok", "warn", "fail"]
TIGHT = 0.8
"""Share of what is free beyond which it is tight."""


@dataclass(frozen=True)
class Diagnosis:
    """One line: ``fail`` means that the run cannot succeed, ``warn`` that part of it may not."""

    check: str
    level: Level
    detail: str


class UnknownShapeError(Exception):
    """A model of another kind than the formulas of ``capacity`` are about: nothing is wrong with it."""


Check = Callable[[RunConfig], Iterable[Diagnosis]]


def local_teachers(config: RunConfig) -> dict[str, TeacherConfig]:
    """The teachers in this process, by name."""
    return {name: chosen for name, chosen in config.teachers.items() if isinstance(chosen, TeacherConfig)}


@dataclass(frozen=True)
class Student:
    """The student as arithmetic sees it."""

    shape: Shape
    dtype: str
    trained: int
    """Parameters that are trained: all, or those of adapters."""
    zero_stage: int
    """The one it runs at: a bfloat16 student with 0 runs as 1."""

    @classmethod
    def of(cls, config: RunConfig) -> Student:
        """From the config of its model; no weights are read."""
        shape, dtype, lora = (
            shape_of(config.model.student),
            settle_dtype(config.model.dtype),
            config.model.lora,
        )
        trained = shape.parameters if lora is None else lora_parameters(shape, lora.rank, lora.targets)
        return cls(shape, dtype, trained, max(int(dtype == "bfloat16"), config.learner.zero_stage))


def shape_of(model: str) -> Shape:
    """Of a model, from its config. Raises ``UnknownShapeError`` where that has other fields."""
    config = load_shape(model)
    try:
        return Shape.of(config)
    except AttributeError as exc:
        raise UnknownShapeError(f"not estimated: the config of model {model!r} has no {exc.name!r}") from None


def weight_bytes(model: str, dtype: str) -> int:
    """Of a model's weights as they are loaded; no weights are read."""
    return shape_of(model).parameters * BYTES[settle_dtype(dtype)]


def fit(needed: float, free: float) -> Level:
    """Whether so many bytes fit what is free; those that leave little of it are ``warn``."""
    return "fail" if needed > free else "warn" if needed > TIGHT * free else "ok"


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:,.1f}" if size >= GIB else f"{size / GIB:.2g}"
