"""Rows of any data set as tasks, by a map from an environment's fields to the data set's columns.

A TOML file says where the rows are and which columns hold what; a suite names it as the ``source`` of an environment
that has a ``row`` model and a ``from_row``. JSON lines are read here; every other format, and the Hugging Face hub,
through the ``datasets`` package (extra ``datasets``).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from agentopd.config.base import Section
from agentopd.config.load import load_section
from agentopd.errors import ConfigError, TaskError, UserError
from agentopd.types import JSON, Source, Split, Task
from agentopd_envs.splits import split_of

_REVISION = re.compile(r"[0-9a-f]{40}")
_HOLE = re.compile(r"\{([^{}]+)\}")
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".arrow": "arrow"}


class DataConfig(Section):
    """Where the rows of a data set are, and which of its columns an environment's fields are read from."""

    rows: str | None = None
    """A file beside this one (``.jsonl``, ``.parquet``, ``.csv``, ``.json``) or, on the hub, a split. Its rows are
    divided by their content: 80 % train, 10 % eval, 10 % retention."""
    splits: dict[Split, str] = Field(default_factory=dict)
    """Instead of ``rows``: the file, or the split on the hub, of each split."""
    hub: str | None = None
    """A data set of the Hugging Face hub."""
    name: str | None = None
    """Which configuration of a data set that has several."""
    revision: str | None = None
    """The commit of a data set of the hub, 40 hex digits: a name that moves would not be the same tasks tomorrow."""
    licence: str = ""
    columns: dict[str, str]
    """For each field of the environment a column (``answer``, ``info.answer``) or a text around some
    (``"{context} Question: {question}"``). ``id`` is optional: rows without one are named by their content."""

    @model_validator(mode="after")
    def _located(self) -> DataConfig:
        if (self.rows is None) == (not self.splits):
            raise ValueError("give either rows or splits")
        if self.hub is None and (self.name or self.revision):
            raise ValueError("name and revision belong to a data set of the hub: give hub, or leave them out")
        if self.hub is not None and not _REVISION.fullmatch(self.revision or ""):
            raise ValueError(f"revision is {self.revision!r}: give the commit of {self.hub!r}, 40 hex digits")
        return self

    def where(self, split: Split) -> str:
        """The file or hub split that holds a split."""
        if self.rows is not None:
            return self.rows
        if split not in self.splits:
            raise ConfigError(f"the data set has no {split} split: add it to splits ({', '.join(self.splits)})")
        return self.splits[split]


def tasks(env: Any, path: Path, split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """Tasks of an environment class from the data set that ``path`` describes, in an order shuffled by ``seed``.

    A row that repeats another's content is left out. Raises ``ConfigError`` for a description that is wrong,
    ``TaskError`` naming the first row that is.
    """
    config = load_section(DataConfig, path)
    _check_columns(env, config.columns, path)
    place = config.where(split)
    source = Source(dataset=path.stem, revision=config.revision or "", licence=config.licence)
    rows = _rows(config, path, place)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    seen: set[str] = set()
    for index in order:
        if limit is not None and len(seen) >= limit:
            return
        where = f"{place}, row {index + 1}"
        fields = _mapped(rows[index], config.columns, where)
        row_id, content = fields.pop("id", None), json.dumps(fields, sort_keys=True, default=str)
        row = _validated(env.row, fields, where)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        if digest in seen or (config.rows is not None and split_of(content) != split):
            continue
        seen.add(digest)
        task = env.from_row(row)
        name = str(digest if row_id is None else row_id)
        named = {"id": f"{path.stem}/{name}", "split": split, "seed": seed}
        yield task.model_copy(update={**named, "source": source.model_copy(update={"row": name})})


def _check_columns(env: Any, columns: Mapping[str, str], path: Path) -> None:
    if env.row is None:
        raise ConfigError(f"environment {env.name!r} reads no rows: give it a `row` model and a `from_row`")
    fields = env.row.model_fields
    if unknown := [name for name in columns if name not in fields and name != "id"]:
        raise ConfigError(f"{path}: environment {env.name!r} has no field {unknown[0]!r}; it has: {', '.join(fields)}")
    if missing := [name for name, field in fields.items() if field.is_required() and name not in columns]:
        raise ConfigError(f"{path}: columns names none for {missing[0]!r}, which environment {env.name!r} needs")


def _rows(config: DataConfig, path: Path, place: str) -> Sequence[JSON]:
    if config.hub is not None:
        return _from_hub(config, place)
    file = path.parent / place
    if not file.is_file():
        raise ConfigError(f"{str(path)!r} names {place!r}, and there is no such file beside it")
    if file.suffix == ".jsonl":
        return _json_lines(file, file.stat().st_mtime_ns)
    if file.suffix not in _FORMATS:
        raise ConfigError(f"{place!r}: rows are read from .jsonl, {', '.join(_FORMATS)}")
    loaded: Sequence[JSON] = _datasets().load_dataset(_FORMATS[file.suffix], data_files=str(file), split="train")
    return loaded


@lru_cache(maxsize=16)
def _json_lines(file: Path, changed_ns: int) -> Sequence[JSON]:
    """The lines of a file, kept for as long as it does not change."""
    rows = []
    with file.open(encoding="utf-8") as lines:  # not splitlines, which also ends a line inside a string, at U+2028
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as exc:
                raise TaskError(f"{file}, line {number} is not JSON: {exc}") from None
    return rows


def _from_hub(config: DataConfig, split: str) -> Sequence[JSON]:
    try:
        loaded: Sequence[JSON] = _datasets().load_dataset(
            config.hub, name=config.name, split=split, revision=config.revision
        )
    except UserError:
        raise
    except Exception as exc:
        raise ConfigError(f"data set {config.hub!r} at {config.revision}, split {split!r}: {exc}") from exc
    return loaded


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError("data sets other than .jsonl need: pip install 'agentopd[datasets]'") from None
    return datasets


def _mapped(row: JSON, columns: Mapping[str, str], where: str) -> JSON:
    """The fields of one row; a column that is missing is the row's fault, one that is null leaves its field out."""
    fields: JSON = {}
    for field, column in columns.items():
        holes = _HOLE.findall(column)
        if holes:
            fields[field] = _HOLE.sub(lambda hole: str(_value(row, hole[1], where)), column)
        elif (value := _value(row, column, where)) is not None:
            fields[field] = value
    return fields


def _value(row: JSON, column: str, where: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise TaskError(f"{where}: no column {column!r}; there is: {known}")
        value = value[key]
    return value


def _validated(model: type[BaseModel], fields: JSON, where: str) -> BaseModel:
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        first = exc.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise TaskError(f"{where}: {name}: {first['msg']}") from None
