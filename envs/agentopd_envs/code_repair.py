"""Code repair: a program that is wrong, tools to edit it and run the cases shown, and one hand-in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import Field

from agentopd.contracts import Program
from agentopd.errors import EnvironmentFault, ToolError
from agentopd.registry import register_environment
from agentopd.types import JSON, Message, Task, ToolSchema
from agentopd_envs.authoring import TaskLoader, ToolEnvironment, tool_turn
from agentopd_envs.cases import report, to_case
from agentopd_envs.datasets import humanevalfix, quixbugs
from agentopd_envs.micro import repair as micro
from agentopd_envs.tools import tool
from agentopd_verifiers.judge import PatchError


@register_environment("code_repair")
class CodeRepairEnvironment(ToolEnvironment):
    """Small programs with one wrong expression (``micro``), QuixBugs, HumanEvalFix.

    ``task.public`` holds ``program``, support ``files``, ``entry_point``, the ``public_cases`` shown, and
    ``accepts_program``: whether ``submit`` takes a whole new program or only what the edits made.
    """

    name = "code_repair"
    verifier = "code"
    loaders: ClassVar[dict[str, TaskLoader]] = {
        "micro": micro.tasks,
        "micro_wordy": micro.wordy_tasks,
        "quixbugs": quixbugs.tasks,
        "humanevalfix": humanevalfix.tasks,
    }
    sources = tuple(loaders)

    @classmethod
    def tool_schemas(cls, task: Task) -> tuple[ToolSchema, ...]:
        """All tools; ``submit`` without its argument where only edits count."""
        schemas = super().tool_schemas(task)
        if task.public.get("accepts_program", True):
            return schemas
        bare = {"parameters": {"type": "object", "properties": {}}}
        return tuple(schema.model_copy(update=bare) if schema.name == "submit" else schema for schema in schemas)

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """Hand in the buggy program unchanged."""
        return (tool_turn("submit"),)

    @classmethod
    def wrong_turns(cls, task: Task) -> Iterable[tuple[Message, ...]]:
        """A wrong constant, an edit that does not apply, a fit to the one case shown (``micro``)."""
        return micro.wrong_turns(task) if task.source.dataset == micro.SOURCE.dataset else ()

    @classmethod
    def difficulty(cls, task: Task) -> float:
        """Which part of the expression is wrong (``micro``), or how much of the program has to be read and changed."""
        if task.source.dataset == micro.SOURCE.dataset:
            return micro.difficulty(task)
        return super().difficulty(task)

    def setup(self) -> None:
        """The buggy program is where the student starts."""
        self._program: str = self.task.public["program"]
        self._submitted = False

    @tool(mutates=True)
    def edit(self, old: Annotated[str, Field(min_length=1)], new: str) -> str:
        """Replace one piece of the program. Args:
        old: text that occurs exactly once in the program
        new: text to put in its place
        """
        found = self._program.count(old)
        if found != 1:
            reason = "old text not found" if not found else f"old text found {found} times, must be unique"
            self.record("edit_failed", old=old, new=new, reason=reason)
            raise ToolError(reason)
        self._program = self._program.replace(old, new)
        return "ok"

    @tool
    async def run_tests(self) -> str:
        """Run the cases you were shown on the current program."""
        if self.ctx.sandbox is None:
            raise EnvironmentFault("code_repair: run_tests needs a sandbox, and the episode was given none")
        cases = self.task.public["public_cases"]
        program = Program(self._program, self.task.public["files"])
        results = await self.ctx.sandbox.run_cases(program, [to_case(case) for case in cases])
        return "\n".join(report(case, result) for case, result in zip(cases, results, strict=True))

    @tool(mutates=True)
    def submit(self, code: str | None = None) -> str:
        """Hand in the program and finish. Args:
        code: what to change first: a whole program, whole functions, search/replace blocks or a unified diff
        """
        if code is not None:
            if not self.task.public.get("accepts_program", True):
                raise ToolError("submit takes no code here; use edit")
            self._program = self._patched(code)
        self._submitted = True
        self.finish()
        return "submitted"

    def _patched(self, code: str) -> str:
        from agentopd_verifiers.patches import apply_patch  # its parser takes long to import

        try:
            return apply_patch(self._program, code)
        except PatchError as exc:
            raise ToolError(f"{exc}; nothing was handed in") from None

    def state(self) -> JSON:
        """The current program, and whether it was handed in."""
        return {"program": self._program, "submitted": self._submitted}
