"""The ``@tool`` decorator: a method's type hints and docstring become the schema the student sees.

Arguments are checked against the hints before the method runs, in pydantic's lax mode: ``"3"`` passes for an ``int``,
``"three"`` does not, and an argument that the tool does not have is an error. What does not validate is a
``ToolError``: a message for the student.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticSerializationError

from agentopd.errors import ToolError
from agentopd.types import JSON, ToolSchema

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__agentopd_tool__"
_LITERAL_KEYS = ("default", "const", "enum", "examples")


@dataclass(frozen=True)
class ToolOptions:
    """What ``@tool`` says beside the schema. ``timeout_s`` and ``budget`` None: only the episode's limits hold."""

    mutates: bool = False
    timeout_s: float | None = None
    budget: int | None = None


@overload
def tool(function: F) -> F: ...
@overload
def tool(*, mutates: bool = False, timeout_s: float | None = None, budget: int | None = None) -> Callable[[F], F]: ...
def tool(
    function: F | None = None, *, mutates: bool = False, timeout_s: float | None = None, budget: int | None = None
) -> F | Callable[[F], F]:
    """Offer a method to the student under its own name.

    Every parameter needs a type hint (``Annotated[int, Field(ge=0)]`` works); the docstring's first part becomes the
    description, its ``Args:`` section describes the parameters. The method, plain or async, returns a string, None
    (shown as ``ok``) or anything JSON can hold, and raises ``ToolError`` to tell the student what went wrong.
    ``mutates`` says that a call changes the world; it is recorded with every call. ``timeout_s`` bounds one call of an
    async method: past it the call is cancelled and the student is told. ``budget`` bounds the calls of one episode.
    """

    def mark(method: F) -> F:
        if timeout_s is not None and not inspect.iscoroutinefunction(method):
            raise TypeError(f"tool {method.__qualname__}: only an async method can be stopped after timeout_s")
        if (budget is not None and budget < 1) or (timeout_s is not None and timeout_s <= 0):
            raise TypeError(f"tool {method.__qualname__}: budget and timeout_s are above 0")
        setattr(method, _MARK, ToolOptions(mutates, timeout_s, budget))
        return method

    return mark if function is None else mark(function)


@dataclass(frozen=True)
class Tool:
    """One tool of an environment class: what the student is told, and how a call is checked."""

    schema: ToolSchema
    arguments: type[BaseModel]
    options: ToolOptions

    def parse(self, raw: JSON) -> JSON:
        """The validated keyword arguments of a call; raises ``ToolError`` naming each offending argument."""
        values = self._values(raw)
        return {str(info.alias): getattr(values, name) for name, info in self.arguments.model_fields.items()}

    def record(self, raw: JSON) -> JSON | None:
        """The validated arguments as JSON, defaults included; None where they do not validate or are no JSON."""
        with suppress(ToolError, PydanticSerializationError):
            return self._values(raw).model_dump(mode="json", by_alias=True, warnings=False)
        return None

    def _values(self, raw: JSON) -> BaseModel:
        try:
            return self.arguments.model_validate(raw)
        except ValidationError as exc:
            raise ToolError("; ".join(_describe(error) for error in exc.errors())) from None


def tools_of(cls: type) -> dict[str, Tool]:
    """The marked methods of a class by name, base classes first, in order of definition."""
    found: dict[str, Tool] = {}
    for base in reversed(cls.__mro__):
        for name, method in vars(base).items():
            if hasattr(method, _MARK):
                found[name] = build_tool(name, method)
            elif name in found:
                del found[name]
    return found


def build_tool(name: str, method: Callable[..., Any]) -> Tool:
    """The tool of a method marked ``@tool``, whose first parameter is left out. Raises ``TypeError`` without hints."""
    description, notes = _parse_docstring(inspect.getdoc(method) or "")
    hints = get_type_hints(method, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"tool {method.__qualname__}: parameter {parameter.name!r} needs a name and a type hint")
        default = ... if parameter.default is parameter.empty else parameter.default
        # The alias keeps parameters called ``json`` or ``copy`` from shadowing pydantic's own attributes.
        info = Field(default, alias=parameter.name, description=notes.get(parameter.name))
        fields[f"{parameter.name}_"] = (Annotated[hints[parameter.name], info], default)
    arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    schema = _tidy(arguments.model_json_schema())
    # Every tool refuses unknown arguments; saying so in each schema only costs prompt tokens.
    schema.pop("additionalProperties", None)
    return Tool(
        schema=ToolSchema(name=name, description=description, parameters={"properties": {}, **schema}),
        arguments=arguments,
        options=getattr(method, _MARK),
    )


def _parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Description, and what a Google-style ``Args:`` section says of each parameter."""
    description, _, section = text.partition("Args:")
    notes: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if entry := re.match(r"\s*(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line):
            name = entry[1]
            notes[name] = entry[2].strip()
        elif name and line.strip():
            notes[name] += " " + line.strip()
    return " ".join(description.split()), notes


def _tidy(schema: Any) -> Any:
    """Drop pydantic's generated titles; a *property* called ``title`` is a mapping and stays."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    return {key: value if key in _LITERAL_KEYS else _tidy(value) for key, value in kept.items()}


def _describe(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']}" if where else str(error["msg"])
