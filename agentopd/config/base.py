"""The strict base of every config section: an unknown key is an error that names the nearest valid one.

TOML has no null, so the word ``"none"`` turns an optional setting off.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

OFF = "none"
"""How a config file spells None."""


class Section(BaseModel):
    """A frozen group of settings. Class defaults are the vetted values; a docstring under a field explains it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        valid = list(cls.model_fields)
        for key in data:
            if key not in valid:
                close = get_close_matches(str(key), valid, n=1)
                kind = f" for kind {data['kind']!r}" if "kind" in data and "kind" in valid else ""
                hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(valid)}"
                raise PydanticCustomError("unknown_key", "{text}", {"text": f"unknown key {key!r}{kind}; {hint}"})
        return {key: None if value == OFF and cls._optional(key) else value for key, value in data.items()}

    @classmethod
    def _optional(cls, key: str) -> bool:
        return NoneType in get_args(cls.model_fields[key].annotation)


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections a field may hold: through unions, tuples, dictionaries and ``Annotated``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, tuple, dict, Annotated):
        for inner in get_args(annotation):
            yield from sections_in(inner)
