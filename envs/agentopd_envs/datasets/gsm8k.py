"""GSM8K: grade-school word problems with worked answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from agentopd.types import Limits, Message, Privileged, Source, Split, Task
from agentopd_envs.datasets.reading import Row, select
from agentopd_envs.micro.math import SYSTEM

FILE = "gsm8k_dev.jsonl"
LIMITS = Limits(max_turns=1, max_tokens=512)
_CALCULATION = re.compile(r"<<(.*?)>>")
SOURCE = Source(dataset="gsm8k", revision="3101c7d5072418e28b9008a6636bde82a006892c", licence="MIT")


class Gsm8kRow(Row):
    """``answer`` is worked, with ``<<calculator>>`` marks and a last line ``#### n``; ``final`` is n."""

    question: str
    answer: str
    final: str


def tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """All rows (see the package), shuffled by ``seed``, ``limit`` of them at most."""
    for row in select(FILE, Gsm8kRow, limit, seed):
        yield _task(row, split, seed)


def _task(row: Gsm8kRow, split: Split, seed: int) -> Task:
    worked = _CALCULATION.sub("", row.answer.partition("####")[0]).strip()
    solution = f"{worked}\n\\boxed{{{row.final}}}"
    first = _CALCULATION.search(row.answer)
    return Task(
        id=row.id,
        env="math",
        split=split,
        prompt=(Message(role="system", content=SYSTEM), Message(role="user", content=row.question)),
        hidden={"answer": row.final},
        privileged=Privileged(
            hint=f"Start with {first[1]}." if first else worked.splitlines()[0],
            solution=solution,
            trajectory=(Message(role="assistant", content=solution),),
        ),
        limits=LIMITS,
        seed=seed,
        source=SOURCE.model_copy(update={"row": row.id}),
    )
