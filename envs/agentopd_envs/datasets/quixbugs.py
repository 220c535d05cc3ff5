"""QuixBugs: classic algorithms with a one-line bug each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from agentopd.types import JSON, Source, Split, Task
from agentopd_envs.cases import call_length
from agentopd_envs.datasets.lifting import lift
from agentopd_envs.datasets.programs import NUM_SHOWN, BrokenProgram
from agentopd_envs.datasets.reading import Row, select
from agentopd_verifiers.plain import encode_plain

FILE = "quixbugs_dev.jsonl"
SOURCE = Source(dataset="quixbugs", revision="4257f44b0ff1181dedaedee6a447e133219fcebf", licence="MIT")


class IoCase(BaseModel):
    """Positional arguments and the value they must give."""

    args: list[Any]
    expected: Any


class QuixTest(BaseModel):
    """``buggy_result`` is what the shipped program does: ``pass``, ``fail:<exception>`` or ``timeout``."""

    id: str
    code: str
    buggy_result: str


class QuixbugsRow(Row):
    """``io_cases``, where present, say the same as ``tests``, in the same order."""

    entry_point: str
    description: str
    buggy: str
    correct: str
    support_files: dict[str, str]
    style: Literal["io:eq", "io:list_eq", "io:tuples_eq", "io:approx", "graph"]
    io_cases: list[IoCase] | None
    tests: list[QuixTest]


def tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """All rows (see the package), shuffled by ``seed``, ``limit`` of them at most."""
    for row in select(FILE, QuixbugsRow, limit, seed):
        cases = _cases(row)
        broken = {test.id for test in row.tests if test.buggy_result != "pass"}
        shown = sorted((case for case in cases if case["id"].partition(".")[0] in broken), key=call_length)
        yield BrokenProgram(
            id=row.id,
            entry_point=row.entry_point,
            description=row.description,
            buggy=row.buggy,
            gold=row.correct,
            cases=cases,
            shown=shown[:NUM_SHOWN],
            source=SOURCE,
            files=row.support_files,
        ).task(split, seed)


def _cases(row: QuixbugsRow) -> list[JSON]:
    if row.io_cases is None:
        return [case for test in row.tests for case in _lifted(test, row.entry_point)]
    return [_io_case(row, test.id, case) for test, case in zip(row.tests, row.io_cases, strict=True)]


def _lifted(test: QuixTest, entry_point: str) -> list[JSON]:
    cases = lift(test.code, entry_point)
    if len(cases) == 1:
        return [{**cases[0], "id": test.id}]
    return [{**case, "id": f"{test.id}.{index}"} for index, case in enumerate(cases)]


def _io_case(row: QuixbugsRow, case_id: str, case: IoCase) -> JSON:
    call = f"{row.entry_point}(*args)"
    body: JSON = {
        "id": case_id,
        "expression": call,
        "args": [encode_plain(value) for value in case.args],
        "expected": encode_plain(case.expected),
        "compare": "eq",
    }
    match row.style:
        case "io:list_eq":
            body["expression"] = f"[*{call}]"
        case "io:tuples_eq":
            body["compare"] = "tuples_eq"
        case "io:approx":
            body |= {"compare": "approx", "tolerance": float(case.args[-1])}
    return body
