"""Two additions or subtractions in a row, as a sum or as a story; worked line by line, answer boxed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from agentopd.types import Limits, Message, Privileged, Source, Split, Task
from agentopd_envs.micro.words import ITEMS, PEOPLE
from agentopd_envs.splits import procedural

SYSTEM = "Solve step by step. End with \\boxed{answer}."
LIMITS = Limits(max_turns=1, max_tokens=60)
SOURCE = Source(dataset="micro_math", licence="Apache-2.0")

_VERBS = {"+": ("buys", "finds", "gets"), "-": ("eats", "sells", "loses")}


@dataclass(frozen=True)
class Problem:
    """``start`` and then each (sign, number) in turn, worded by ``question``."""

    start: int
    steps: tuple[tuple[str, int], ...]
    question: str

    @property
    def worked(self) -> tuple[list[str], int]:
        """One line per step, and the result."""
        lines, value = [], self.start
        for sign, number in self.steps:
            result = value + number if sign == "+" else value - number
            lines.append(f"{value}{sign}{number}={result}")
            value = result
        return lines, value


def tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """Tasks of one split; endless when ``limit`` is None. A story and a sum of the same numbers share a split."""
    for task_id, problem in procedural(_draw, lambda p: (p.start, p.steps), split, limit, seed, "micro_math"):
        yield _task(problem, task_id, split, seed)


def wrong_turns(task: Task) -> tuple[tuple[Message, ...], ...]:
    """Plausible wrong solutions: a slip in the last line, one step left out, an empty box under right work."""
    lines = task.privileged.solution.split("\n")
    slip = int(task.hidden["answer"]) + 1
    texts = (
        "\n".join([*lines[:-2], lines[-2].partition("=")[0] + f"={slip}", f"\\boxed{{{slip}}}"]),
        "\n".join([*lines[:-2], f"\\boxed{{{lines[-3].partition('=')[2]}}}"]),
        "\n".join([*lines[:-1], "\\boxed{}"]),
    )
    return tuple((Message(role="assistant", content=text),) for text in texts)


def _draw(rng: random.Random) -> Problem:
    start = value = rng.randint(1, 30)
    steps = []
    for _ in range(2):
        number = rng.randint(1, 9)
        sign = rng.choice("+-")
        if value < number:
            sign = "+"
        value += number if sign == "+" else -number
        steps.append((sign, number))
    name, item = rng.choice(PEOPLE), rng.choice(ITEMS)
    if rng.randint(0, 1):
        question = f"What is {start}" + "".join(f" {sign} {number}" for sign, number in steps) + "?"
    else:
        first, second = (f"{name} {rng.choice(_VERBS[sign])} {number}." for sign, number in steps)
        question = f"{name} has {start} {item}. {first} Then {second} How many {item}?"
    return Problem(start, tuple(steps), question)


def _task(problem: Problem, task_id: str, split: Split, seed: int) -> Task:
    lines, answer = problem.worked
    solution = "\n".join([*lines, f"\\boxed{{{answer}}}"])
    return Task(
        id=task_id,
        env="math",
        split=split,
        prompt=(Message(role="system", content=SYSTEM), Message(role="user", content=problem.question)),
        hidden={"answer": str(answer)},
        privileged=Privileged(
            hint=f"Start with {lines[0]}.",
            solution=solution,
            trajectory=(Message(role="assistant", content=solution),),
        ),
        limits=LIMITS,
        seed=seed,
        source=SOURCE,
    )
