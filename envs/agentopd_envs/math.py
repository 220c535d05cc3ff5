"""Math problems: worked steps that end in a boxed answer, in one turn or with a calculator and Python at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from agentopd.contracts import Case, CaseStatus, Program
from agentopd.errors import EnvironmentFault, ToolError
from agentopd.registry import register_environment
from agentopd.types import JSON, Limits, Message, Privileged, Source, Split, Task
from agentopd_envs.authoring import BaseEnvironment, SingleTurnEnvironment, TaskLoader, ToolEnvironment, tool_turn
from agentopd_envs.datasets import gsm8k
from agentopd_envs.micro import math as micro
from agentopd_envs.tools import tool
from agentopd_verifiers.arithmetic import evaluate

LIMITS = Limits(max_turns=1, max_tokens=2048)
TOOL_LIMITS = Limits(max_turns=8, max_tokens=4096)
_SHOWN = 2000
"""Characters of a program's output that the student is shown."""
_STEP = re.compile(r"^([\d+\-*/(). ]*\d)=-?\d+$", re.MULTILINE)


class MathRow(BaseModel):
    """What a data set must hold: ``answer`` in LaTeX or plain; ``solution`` and ``hint`` are for teachers."""

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)

    problem: str
    answer: str
    solution: str = ""
    hint: str = ""


class _MathTasks(BaseEnvironment):
    """Where the problems come from, and what does not solve them."""

    verifier = "math"
    loaders: ClassVar[dict[str, TaskLoader]] = {"micro": micro.tasks, "gsm8k": gsm8k.tasks}
    sources = tuple(loaders)
    row = MathRow

    @classmethod
    def from_row(cls, row: MathRow) -> Task:
        """A task of a data set's row."""
        boxed = f"\\boxed{{{row.answer.strip().strip('$')}}}"
        solution = f"{row.solution.strip()}\n{boxed}".strip()
        return Task(
            id="",
            env=cls.name,
            prompt=(Message(role="system", content=micro.SYSTEM), Message(role="user", content=row.problem)),
            hidden={"answer": row.answer},
            privileged=Privileged(
                hint=row.hint, solution=solution, trajectory=(Message(role="assistant", content=solution),)
            ),
            limits=LIMITS,
            source=Source(dataset=cls.name),
        )

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """An empty box."""
        return (Message(role="assistant", content="\\boxed{}"),)

    @classmethod
    def wrong_turns(cls, task: Task) -> Iterable[tuple[Message, ...]]:
        """A slip, a step left out, an empty box (``micro``)."""
        return micro.wrong_turns(task) if task.source.dataset == micro.SOURCE.dataset else ()


@register_environment("math")
class MathEnvironment(_MathTasks, SingleTurnEnvironment):
    """Sums and word problems (``micro``), grade-school math (``gsm8k``), any data set with an answer in LaTeX."""

    name = "math"


@register_environment("math_tools")
class MathToolsEnvironment(_MathTasks, ToolEnvironment):
    """The same problems over several turns, with a calculator and Python in the sandbox; the last turn is judged."""

    name = "math_tools"

    @classmethod
    def load_tasks(cls, split: Split, source: str, limit: int | None, seed: int) -> Iterable[Task]:
        """The problems of ``math``, with room for calls."""
        for task in super().load_tasks(split, source, limit, seed):
            yield task.model_copy(update={"env": cls.name, "limits": TOOL_LIMITS})

    @classmethod
    def gold_turns(cls, task: Task) -> tuple[Message, ...]:
        """Every step of the worked solution that is plain arithmetic on the calculator, then the solution."""
        steps = _STEP.findall(task.privileged.solution)
        return (*(tool_turn("calculator", expression=step) for step in steps), *task.privileged.trajectory)

    @tool
    def calculator(self, expression: Annotated[str, Field(max_length=200)]) -> str:
        """Compute exactly. Args: expression: numbers, + - * / and parentheses."""
        value = evaluate(expression)
        if value is None:
            raise ToolError(f"cannot compute {expression!r}: use numbers, + - * / and parentheses")
        try:
            return _show(value)
        except (OverflowError, ValueError):
            raise ToolError("the result is too large") from None

    @tool(budget=8)
    async def python(self, code: Annotated[str, Field(max_length=20_000)]) -> str:
        """Run a Python program and see what it prints. Args: code: the program; standard library only."""
        if self.ctx.sandbox is None:
            raise EnvironmentFault("math_tools: python needs a sandbox, and the episode was given none")
        (result,) = await self.ctx.sandbox.run_cases(Program(code), [Case("run", "None")])
        cut = f"\n[cut at {_SHOWN} characters]" if len(result.stdout) > _SHOWN else ""
        said = result.stdout[:_SHOWN] + cut
        if result.status is not CaseStatus.VALUE:
            raise ToolError(f"{said}\n{result.detail or result.status.value}".strip())
        return said.strip() or "(nothing was printed)"

    def state(self) -> JSON:
        """Nothing: the answer is in the text."""
        return {}


def _show(value: Fraction) -> str:
    """An integer, a decimal that ends, or a fraction with its first digits.

    Raises:
        OverflowError, ValueError: if Python cannot write so large a number.

    """
    if value.denominator == 1:
        return str(value.numerator)
    if 10**12 % value.denominator == 0:
        return str(float(value))
    return f"{value.numerator}/{value.denominator} (about {float(value):.10g})"
