"""A hook of MkDocs: the references of config and commands, written from the code itself on every build."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

import tomli_w
import typer.main
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agentopd.cli import app
from agentopd.config import RunConfig
from agentopd.config.base import sections_in
from agentopd.config.comparison import ComparisonConfig
from agentopd.config.micro import MicroRecipe


def on_files(files: Files, config: Any) -> Files:
    """Add the two pages."""
    for name, text in {"config": config_reference(), "commands": command_reference()}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


# --- config ----------------------------------------------------------------------------------------------------------


def config_reference() -> str:
    """Every key of a run's file, of a comparison's and of a micro recipe's, by table."""
    parts = [
        "# Config reference",
        "Written from the models that read the files. An unknown key is an error that names the nearest valid one; "
        '`"none"` turns an optional key off. What the keys are for stands in [Train](../train.md).',
    ]
    for title, model in (("A run", RunConfig), ("A comparison", ComparisonConfig), ("A micro recipe", MicroRecipe)):
        parts += [f"## {title}", model.__doc__ or "", *_sections(model, "")]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _sections(model: type[BaseModel], path: str) -> Iterator[str]:
    """The model's own keys as a table, then each section below it; kinds of one block follow one another."""
    plain = {name: field for name, field in model.model_fields.items() if not list(sections_in(field.annotation))}
    if plain:
        rows = [
            f"| `{name}` | {_type(field)} | {_default(field)} | {_prose(field.description)} |"
            for name, field in plain.items()
        ]
        yield "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)
    for name, field in model.model_fields.items():
        below = f"{path}.{name}".lstrip(".")
        for inner in sections_in(field.annotation):
            kind = inner.model_fields.get("kind")
            several = len(list(sections_in(field.annotation))) > 1
            label = f" · {_type(kind)}" if kind and several else ""
            yield f"### {_heading(field, below)}{label}"
            if field.description or inner.__doc__:
                yield " ".join(_prose(text) for text in (field.description, inner.__doc__) if text)
            if below not in RECURSIVE:
                yield from _sections(inner, below)


RECURSIVE = ("objective.stages", "arms")
"""Sections that hold sections which are described elsewhere on the page."""


def _heading(field: FieldInfo, path: str) -> str:
    origin = typing.get_origin(field.annotation)
    return f"`[[{path}]]`" if origin is tuple else f"`[{path}.NAME]`" if origin is dict else f"`[{path}]`"


def _type(field: FieldInfo) -> str:
    return _cell(f"`{_named(field.annotation)}`")


def _named(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(repr(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(one) for one in inner)
    if origin is typing.Annotated:
        return _named(inner[0])
    if origin in (tuple, list):
        return f"list of {_named(inner[0])}"
    if origin is dict:
        return f"table of {_named(inner[1])}"
    return {type(None): "none", str: "text", int: "integer", float: "number", bool: "true or false"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "`none`"
    shown = list(value) if isinstance(value, tuple) else value
    return _cell(f"`{tomli_w.dumps({'x': shown}).strip().removeprefix('x = ')}`")


def _prose(text: str | None) -> str:
    return _cell(" ".join((text or "").replace("``", "`").split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# --- commands --------------------------------------------------------------------------------------------------------


def command_reference() -> str:
    """Every command with its arguments and options."""
    parts = ["# Command reference", "Exit codes: 0 done, 1 the run failed or a check did, 2 wrong input."]
    parts += _commands(typer.main.get_command(app), "agentopd")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _commands(command: Any, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for below, inner in command.commands.items():
            yield from _commands(inner, f"{name} {below}")
        return
    arguments = " ".join(_usage(p) for p in command.params if _is_argument(p))
    yield f"## {name}\n\n{_prose(command.help)}\n\n```text\n{name} {arguments}".rstrip() + "\n```"
    rows = [
        f"| {', '.join(f'`{o}`' for o in p.opts)} | {_prose(p.help)} |" for p in command.params if not _is_argument(p)
    ]
    if rows:
        yield "| option | meaning |\n|---|---|\n" + "\n".join(rows)


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _usage(parameter: Any) -> str:
    name = parameter.name.upper() + ("..." if parameter.nargs != 1 else "")
    return name if parameter.required else f"[{name}]"
