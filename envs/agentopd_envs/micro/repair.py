"""One-line functions that do not do what their docstring says: one wrong operator, constant or variable each.

The student is shown one failing case; six other inputs, on which the shipped program fails at least once, judge it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from agentopd.types import JSON, Limits, Message, Privileged, Source, Split, Task
from agentopd_envs.authoring import tool_turn
from agentopd_envs.splits import procedural

SYSTEM = "Fix the bug with one small edit, then submit."
LIMITS = Limits(max_turns=5, max_tokens=160, max_turn_tokens=64)
SOURCE = Source(dataset="micro_repair", licence="Apache-2.0")
NUM_HIDDEN = 6

_VARIABLES = (("a", "b"), ("x", "y"), ("m", "n"), ("p", "q"))
_FUNCTIONS = ("f", "g", "h", "calc", "score", "total", "value", "mix")
_WORDS = {"+": "plus", "-": "minus", "*": "times"}
_OPERATORS = "+-*"


@dataclass(frozen=True)
class Expression:
    """``v0 op0 v1 op1 k``; ``variables`` index the function's two parameters."""

    variables: tuple[int, int]
    operators: tuple[str, str]
    constant: int

    def text(self, names: tuple[str, str]) -> str:
        """Source code, with the parameters called ``names``."""
        (first, second), (op0, op1) = self.variables, self.operators
        return f"{names[first]} {op0} {names[second]} {op1} {self.constant}"

    def value(self, arguments: tuple[int, int]) -> int:
        """What Python makes of it: ``*`` binds tighter than ``+`` and ``-``."""
        first, second = (arguments[index] for index in self.variables)
        op0, op1 = self.operators
        if op1 == "*" and op0 != "*":
            return _apply(op0, first, second * self.constant)
        return _apply(op1, _apply(op0, first, second), self.constant)


@dataclass(frozen=True)
class Problem:
    """A wanted and a shipped expression, the names around them, and the inputs that tell them apart."""

    good: Expression
    bad: Expression
    names: tuple[str, str]
    function: str
    shown: tuple[int, int]
    inputs: tuple[tuple[int, int], ...]


def tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """Tasks of one split; endless when ``limit`` is None. The same bug under other names shares a split."""
    for task_id, problem in procedural(_draw, lambda p: (p.good, p.bad), split, limit, seed, "micro_repair"):
        yield _task(problem, task_id, split, seed)


def wordy_tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """The same tasks; three gold trajectories in four add two lines that nothing needs.

    A student taught by them writes both kinds of patch, which is what studies of a patch's price start from.
    """
    for index, task in enumerate(tasks(split, limit, seed)):
        yield _wordy(task) if index % 4 else task


def wrong_turns(task: Task) -> tuple[tuple[Message, ...], ...]:
    """Plausible wrong solutions: a wrong constant, an edit that does not apply, a fit to the one case shown."""
    bad, good = _expressions(task)
    head, _, constant = good.rpartition(" ")
    submit = tool_turn("submit")
    return (
        (tool_turn("edit", old=bad, new=f"{head} {int(constant) + 1}"), submit),
        (tool_turn("edit", old=f"{bad} + 0", new=good), submit),
        (tool_turn("edit", old=bad, new=str(task.public["public_cases"][0]["expected"])), submit),
    )


def _wordy(task: Task) -> Task:
    bad, good = _expressions(task)
    old, new = f"return {bad}", f"r = {good}\n    r = r + 0\n    return r"
    trajectory = tool_turn("edit", old=old, new=new), tool_turn("submit")
    solution = task.public["program"].replace(old, new)
    privileged = task.privileged.model_copy(update={"trajectory": trajectory, "solution": solution})
    return task.model_copy(update={"privileged": privileged})


def _expressions(task: Task) -> tuple[str, str]:
    """What the program returns, shipped and wanted."""
    programs: tuple[str, str] = task.public["program"], task.hidden["gold"]
    shipped, wanted = (program.rpartition("return ")[2].strip() for program in programs)
    return shipped, wanted


def difficulty(task: Task) -> float:
    """What is wrong: 1 a constant, which the docstring gives, 2 an operator, which it gives as a word, 3 a variable."""
    bad, good = (expression.split() for expression in _expressions(task))
    places = [shipped == wanted for shipped, wanted in zip(bad, good, strict=True)]
    return {4: 1.0, 1: 2.0, 3: 2.0}.get(places.index(False), 3.0)


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def _draw(rng: random.Random) -> Problem:
    names = rng.choice(_VARIABLES)
    order = (1, 0) if rng.random() < 0.5 else (0, 1)
    good = Expression(order, (rng.choice(_OPERATORS), rng.choice(_OPERATORS)), rng.randint(2, 9))
    bad = _break(good, rng)
    function = rng.choice(_FUNCTIONS)
    shown = _telling(good, bad, rng)
    inputs = (_telling(good, bad, rng), *(_pair(rng) for _ in range(NUM_HIDDEN - 1)))
    return Problem(good, bad, names, function, shown, inputs)


def _break(good: Expression, rng: random.Random) -> Expression:
    (op0, op1), constant = good.operators, good.constant
    match rng.randrange(4):
        case 0:
            return Expression(good.variables, (rng.choice(_OPERATORS.replace(op0, "")), op1), constant)
        case 1:
            return Expression(good.variables, (op0, rng.choice(_OPERATORS.replace(op1, ""))), constant)
        case 2:
            others = [other for other in range(2, 10) if other != constant]
            return Expression(good.variables, (op0, op1), rng.choice(others))
        case _:
            twice = rng.choice(good.variables)
            return Expression((twice, twice), (op0, op1), constant)


def _pair(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1, 9), rng.randint(1, 9)


def _telling(good: Expression, bad: Expression, rng: random.Random) -> tuple[int, int]:
    """An input on which the two expressions differ."""
    while True:
        arguments = _pair(rng)
        if good.value(arguments) != bad.value(arguments):
            return arguments


def _task(problem: Problem, task_id: str, split: Split, seed: int) -> Task:
    good, bad = problem.good.text(problem.names), problem.bad.text(problem.names)
    first, second = (problem.names[index] for index in problem.good.variables)
    op0, op1 = (_WORDS[operator] for operator in problem.good.operators)
    head = f'def {problem.function}({", ".join(problem.names)}):\n    """{first} {op0} {second} {op1} '
    head += f'{problem.good.constant}"""\n    return '
    shown = _case(problem, "public", problem.shown)
    program, solution = f"{head}{bad}\n", f"{head}{good}\n"
    failure = f"{shown['expression']} gives {problem.bad.value(problem.shown)}, expected {shown['expected']}"
    return Task(
        id=task_id,
        env="code_repair",
        split=split,
        prompt=(Message(role="system", content=SYSTEM), Message(role="user", content=f"{program}\n{failure}")),
        public={
            "program": program,
            "files": {},
            "entry_point": problem.function,
            "public_cases": [shown],
            "accepts_program": False,
        },
        hidden={
            "cases": [_hidden_case(problem)],
            "gold": solution,
            "starter": program,
        },
        privileged=Privileged(
            hint=f"The docstring asks for {good}.",
            solution=solution,
            trajectory=(tool_turn("edit", old=bad, new=good), tool_turn("submit")),
        ),
        limits=LIMITS,
        seed=seed,
        source=SOURCE,
    )


def _hidden_case(problem: Problem) -> JSON:
    """All hidden inputs in one process: tiny pure functions gain nothing from one process each, and cost six."""
    return {
        "id": "hidden",
        "expression": f"[{problem.function}(left, right) for left, right in args]",
        "args": [list(pair) for pair in problem.inputs],
        "expected": [problem.good.value(pair) for pair in problem.inputs],
        "compare": "eq",
    }


def _case(problem: Problem, case_id: str, arguments: tuple[int, int]) -> JSON:
    expression = f"{problem.function}({arguments[0]}, {arguments[1]})"
    return {"id": case_id, "expression": expression, "expected": problem.good.value(arguments), "compare": "eq"}
