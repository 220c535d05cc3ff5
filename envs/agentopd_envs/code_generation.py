"""Code generation: a function to write from its description, judged by cases that the student never sees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from itertools import takewhile
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from agentopd.contracts import AssistantTurn, StepResult
from agentopd.registry import register_environment
from agentopd.types import JSON, Message, Task
from agentopd_envs.authoring import SingleTurnEnvironment, TaskLoader
from agentopd_envs.datasets import completion

_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


class CodeRow(BaseModel):
    """What a data set must hold: ``test`` is plain asserts, or a function ``check(candidate)``.

    ``given`` is code that the question shows, to be completed; ``solution``, where there is one, a whole program.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    entry_point: str
    test: str
    solution: str = ""
    given: str = ""


@register_environment("code_generation")
class CodeGenerationEnvironment(SingleTurnEnvironment):
    """HumanEval, MBPP, and any data set of functions with asserts.

    Of an answer the last fenced block that defines the function counts. ``task.public`` holds ``entry_point`` and
    ``given``, whose imports an answer need not repeat.
    """

    name = "code_generation"
    verifier = "code"
    loaders: ClassVar[dict[str, TaskLoader]] = {"humaneval": completion.humaneval, "mbpp": completion.mbpp}
    sources = tuple(loaders)
    row = CodeRow

    @classmethod
    def from_row(cls, row: CodeRow) -> Task:
        """A task of a data set's row."""
        return completion.completion_task(row.prompt, row.entry_point, row.test, row.solution, row.given)

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """A function without a body."""
        return (_answer(f"def {task.public['entry_point']}(*args):\n    pass"),)

    @classmethod
    def wrong_turns(cls, task: Task) -> Iterable[tuple[Message, ...]]:
        """A claim of success, an early exit, a value that equals everything; the solution without its block."""
        name = task.public["entry_point"]
        equal = "class Equal:\n    __eq__ = lambda self, other: True\n    __hash__ = object.__hash__\n\n"
        yield (_answer(f"print('ALL TESTS PASSED')\n\n\ndef {name}(*args):\n    return True"),)
        yield (_answer(f"import os\n\n\ndef {name}(*args):\n    os._exit(0)"),)
        yield (_answer(f"{equal}\ndef {name}(*args):\n    return Equal()"),)
        yield (Message(role="assistant", content=task.privileged.solution),)

    def setup(self) -> None:
        """Nothing is written yet."""
        self._program: str | None = None

    async def step(self, action: AssistantTurn) -> StepResult:
        """Take the program out of the answer; the first turn is the last."""
        self._program = program_of(action.text, self.task.public["entry_point"], self.task.public["given"])
        return await super().step(action)

    def state(self) -> JSON:
        """The program, and whether there is one."""
        return {"program": self._program, "submitted": self._program is not None}


def program_of(text: str, entry_point: str, given: str = "") -> str | None:
    """The last fenced block that defines the function, with the imports of ``given``; None if there is none."""
    name = re.escape(entry_point)
    defines = re.compile(rf"^(?:(?:async )?def|class) {name}\b|^{name} *=", re.MULTILINE)
    blocks = [block for block in _BLOCK.findall(text) if defines.search(block)]
    if not blocks:
        return None
    imports = [node for node in ast.parse(given).body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = str(blocks[-1]).split("\n")
    head = _head(blocks[-1]) if imports else 0
    return "\n".join([*lines[:head], *map(ast.unparse, imports), *lines[head:]])


def _head(source: str) -> int:
    """How many lines only count as the first of a program: a docstring, and imports from ``__future__``."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0
    return max((node.end_lineno or 0 for node in takewhile(_stays_first, body)), default=0)


def _stays_first(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Constant(value=str())) | ast.ImportFrom(module="__future__"):
            return True
    return False


def _answer(code: str) -> Message:
    return Message(role="assistant", content=completion.fenced(code))
