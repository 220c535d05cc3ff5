"""A stock table of three items and one thing to change in it: read a count, write the new one.

The request alone does not determine the answer, the table does; so the wording of a request recurs between splits, the
sum that solves it (kind, count, number) never does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from agentopd.types import Limits, Message, Privileged, Source, Split, Task
from agentopd_envs.authoring import tool_turn
from agentopd_envs.micro.words import ITEMS
from agentopd_envs.splits import procedural

SYSTEM = "Keep the stock right using the tools."
LIMITS = Limits(max_turns=6, max_tokens=160, max_turn_tokens=64)
SOURCE = Source(dataset="micro_store", licence="Apache-2.0")


@dataclass(frozen=True)
class Problem:
    """Read ``source``, write ``count`` to ``target``. ``core`` is (kind, count read, the other number).

    ``working`` is the sum written down before the second call, as in the arithmetic skill; a copy needs none.
    """

    stock: dict[str, int]
    request: str
    source: str
    target: str
    count: int
    core: tuple[str, int, int]
    working: str = ""


def tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """Tasks of one split; endless when ``limit`` is None. The same sum over other items shares a split."""
    for task_id, problem in procedural(_draw, lambda p: p.core, split, limit, seed, "micro_store"):
        yield _task(problem, task_id, split, seed)


def wrong_turns(task: Task) -> tuple[tuple[Message, ...], ...]:
    """Plausible wrong solutions: only reading, a count off by one, the wrong item, one item too many."""
    read, write, closing = task.privileged.trajectory
    item, count = write.tool_calls[0].arguments["item"], write.tool_calls[0].arguments["count"]
    other, held = next((name, held) for name, held in task.public["db"].items() if name != item)
    return (
        (read, closing),
        (read, tool_turn("write", item=item, count=count + 1), closing),
        (read, tool_turn("write", item=other, count=count), closing),
        (read, write, tool_turn("write", item=other, count=held + 1), closing),
    )


def _draw(rng: random.Random) -> Problem:
    while (problem := _draw_any(rng)).count == problem.stock[problem.target]:
        pass  # Copying between equal counts: there would be nothing to do.
    return problem


def _draw_any(rng: random.Random) -> Problem:
    items = rng.sample(ITEMS, 3)
    stock = {item: rng.randint(1, 30) for item in items}
    kind = rng.choice(("add", "sell", "copy"))
    target = rng.choice(items)
    if kind == "copy":
        source = rng.choice([item for item in items if item != target])
        request = f"Set {target} to the count of {source}."
        return Problem(stock, request, source, target, stock[source], (kind, stock[source], stock[target]))
    if kind == "sell":
        stock[target] = max(stock[target], 10)
    number = rng.randint(1, 9)
    if kind == "add":
        request = rng.choice((f"Add {number} {target}.", f"We got {number} more {target}."))
        count, sign = stock[target] + number, "+"
    else:
        request = rng.choice((f"Sell {number} {target}.", f"{number} {target} went bad."))
        count, sign = stock[target] - number, "-"
    working = f"{stock[target]}{sign}{number}={count}"
    return Problem(stock, request, target, target, count, (kind, stock[target], number), working)


def _task(problem: Problem, task_id: str, split: Split, seed: int) -> Task:
    read = tool_turn("read", item=problem.source)
    write = tool_turn("write", item=problem.target, count=problem.count)
    write = write.model_copy(update={"content": problem.working})
    return Task(
        id=task_id,
        env="tool_use",
        split=split,
        prompt=(Message(role="system", content=SYSTEM), Message(role="user", content=problem.request)),
        public={"db": problem.stock},
        hidden={"initial": problem.stock, "goal": {**problem.stock, problem.target: problem.count}},
        privileged=Privileged(
            hint=f"Read {problem.source}; {problem.target} must end at {problem.count}.",
            solution=f"{problem.target} = {problem.count}",
            trajectory=(read, write, Message(role="assistant", content="Done.")),
        ),
        limits=LIMITS,
        seed=seed,
        source=SOURCE,
    )
