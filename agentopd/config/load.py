"""TOML in, typed config out: presets merged, ``--set`` applied, every complaint one line with a place and a hint."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from agentopd.config.base import OFF, Section
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.presets import PRESETS
from agentopd.config.run import RunConfig, SuiteConfig
from agentopd.errors import ConfigError
from agentopd.registry import suites

DEFAULT_PRESET = "verifier_calibrated"

T = TypeVar("T", bound=Section)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file, apply dotted ``key=value`` overrides, merge the preset and validate.

    ``suite`` may be a table or the path of a suite file, relative to the config file. Raises ``ConfigError``.
    """
    raw = _raw(Path(path), overrides)
    raw["objective"] = merged_objective(raw.get("objective", {}))
    return _validate(RunConfig, raw, str(path))


def load_section(model: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read any other config file that may name a suite. Raises ``ConfigError``."""
    return _validate(model, _raw(Path(path), overrides), str(path))


def load_suite(name: str | Path) -> SuiteConfig:
    """A suite file, or a suite registered under ``agentopd.suites``. Raises ``ConfigError``."""
    return _validate(SuiteConfig, _suite_table(Path(name)), str(name))


def resolve_objective(preset: str) -> ObjectiveConfig:
    """A preset with every block filled in. Raises ``ConfigError`` for an unknown one."""
    return _validate(ObjectiveConfig, merged_objective({"preset": preset}), f"preset {preset!r}")


def dump_toml(config: Section) -> str:
    """A resolved config as TOML that ``load_run_config`` reads back to an equal config."""
    return tomli_w.dumps(_dumpable(config.model_dump(mode="json")))


def _raw(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    raw = _read_toml(path, "config")
    # Another suite is picked before anything inside it is overridden.
    picks_suite = [text for text in overrides if text.partition("=")[0].strip() == "suite"]
    for override in picks_suite:
        _apply(raw, override)
    if isinstance(raw.get("suite"), str):
        raw["suite"] = _suite_table(_beside(path, raw["suite"]))
    _take_in_stage_suites(raw, path)
    # Block settings of the file were chosen beside the file's preset: picking another one starts from its own.
    picks_preset = [text for text in overrides if text.partition("=")[0].strip() == "objective.preset"]
    for override in picks_preset:
        raw["objective"] = {}
        _apply(raw, override)
    for override in overrides:
        if override not in picks_suite and override not in picks_preset:
            _apply(raw, override)
    return raw


def _take_in_stage_suites(raw: dict[str, Any], path: Path) -> None:
    """A stage that names a suite brings its skills into the run's, as new ones."""
    stages = raw.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if not isinstance(stage, dict) or "suite" not in stage:
            continue
        given = stage.pop("suite")
        brought = _suite_table(_beside(path, given)) if isinstance(given, str) else given
        found = brought.get("skills", []) if isinstance(brought, dict) else None
        if not isinstance(found, list) or not all(isinstance(skill, dict) for skill in found):
            raise ConfigError(f"{path}: stages.suite: {given!r} is no suite: name a suite file, or write [[skills]]")
        suite = raw.setdefault("suite", {"name": "continual", "skills": []})
        known = {skill.get("name") for skill in suite.setdefault("skills", [])}
        skills = [{**skill, "role": "new"} for skill in found]
        suite["skills"] += [skill for skill in skills if skill.get("name") not in known]
        stage["skills"] = [skill.get("name") for skill in skills]


def _suite_table(path: Path) -> dict[str, Any]:
    """A suite as raw TOML. A registered one is a path to a TOML file, or a table."""
    if not path.exists() and str(path) in suites.entries():
        registered = suites.get(str(path))
        return dict(registered) if isinstance(registered, dict) else _read_toml(Path(registered), "suite")
    return _read_toml(path, "suite")


def _dumpable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dumpable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_dumpable(item) for item in value]
    return OFF if value is None else value


def _beside(config_path: Path, name: str) -> Path:
    near = config_path.parent / name
    return near if near.exists() else Path(name)


def _read_toml(path: Path, what: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no {what} file at {str(path)!r}") from None
    except IsADirectoryError:
        raise ConfigError(f"{str(path)!r} is a directory, not a {what} file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    """``a.b=value``: the value is TOML, or a bare string where it does not parse as TOML."""
    dotted, sep, text = override.partition("=")
    if not sep or not dotted.strip():
        raise ConfigError(f"--set {override!r}: write it as key.subkey=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = [part.strip() for part in dotted.split(".")]
    table: Any = raw
    for part in parents:
        table = _descend(table, part, override)
    if isinstance(table, list):
        raise ConfigError(f"--set {override!r}: name the entry first, as in suite.skills.NAME.key=value")
    table[last] = value


def _descend(table: Any, part: str, override: str) -> Any:
    """One step into a table; entries of an array of tables are addressed by their ``name``."""
    if isinstance(table, list):
        named = [entry for entry in table if isinstance(entry, dict) and entry.get("name") == part]
        if not named:
            names = ", ".join(str(entry.get("name")) for entry in table if isinstance(entry, dict))
            raise ConfigError(f"--set {override!r}: no entry is named {part!r} (there are: {names})")
        return named[0]
    child = table.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {override!r}: {part!r} is a value ({child!r}), not a table")
    return child


def merged_objective(given: Any) -> dict[str, Any]:
    """An objective table as a file gives it, with its preset's blocks filled in. Raises ``ConfigError``."""
    if not isinstance(given, dict):
        raise ConfigError(f"objective: expected a table, got {given!r}")
    preset = given.get("preset", DEFAULT_PRESET)
    if preset not in PRESETS:
        close = get_close_matches(str(preset), PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"objective.preset: unknown preset {preset!r}; {hint}(presets: {', '.join(PRESETS)})")
    merged: dict[str, Any] = {**deepcopy(PRESETS[preset]), "preset": preset}
    for block, settings in given.items():
        if isinstance(settings, str) and isinstance(merged.get(block), dict):
            settings = {"kind": settings}
        base = merged.get(block)
        if isinstance(settings, dict) and isinstance(base, dict) and _same_kind(base, settings):
            settings = {**base, **settings}
        merged[block] = settings
    return merged


def _same_kind(base: dict[str, Any], given: dict[str, Any]) -> bool:
    """A preset's settings carry over to a block unless the user picked another kind of it."""
    return "kind" not in given or given["kind"] == base.get("kind")


def _place(raw: Any, loc: Sequence[str | int]) -> Iterator[str]:
    """Where an error is, in the file's own words: pydantic also names the kind it chose, which is no key."""
    node = raw
    for index, part in enumerate(loc):
        known = isinstance(node, dict) and part in node
        if isinstance(node, dict) and not known and index + 1 < len(loc):
            continue
        yield str(part)
        node = node[part] if known or (isinstance(node, list | tuple) and isinstance(part, int)) else None


def _validate(model: type[T], raw: dict[str, Any], where: str) -> T:
    try:
        return model.model_validate(raw)
    except ValidationError as exc:
        first = exc.errors()[0]
        place = ".".join(_place(raw, first["loc"]))
        message = _words(first, place)
        more = f" (and {exc.error_count() - 1} more)" if exc.error_count() > 1 else ""
        raise ConfigError(f"{where}: {place + ': ' if place else ''}{message}{more}") from None


def _words(error: ErrorDetails, place: str) -> str:
    """What is wrong and what to write instead, with the value given where the message does not hold it."""
    given, context = error.get("input"), error.get("ctx", {})
    if error["type"] == "tuple_type" and isinstance(given, dict):
        return f"one table where a list of tables belongs: write [[{place}]]"
    if error["type"] == "union_tag_invalid":
        kinds = [kind.strip(" '") for kind in context["expected_tags"].split(",")]
        close = get_close_matches(str(context["tag"]), kinds, n=1)
        return f"unknown kind {context['tag']!r}; " + (
            f"did you mean {close[0]!r}?" if close else f"valid kinds: {', '.join(kinds)}"
        )
    shown = "" if isinstance(given, dict | Section) or error["type"] == "value_error" else f" (got {given!r})"
    return error["msg"].removeprefix("Value error, ") + shown
