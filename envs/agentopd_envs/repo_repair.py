"""Repair of a repository: several files, some of which may be edited, and tests of which some are shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from agentopd.errors import EnvironmentFault, ToolError
from agentopd.registry import register_environment
from agentopd.types import JSON, Limits, Message, Privileged, Source, Task
from agentopd_envs.authoring import TaskLoader, ToolEnvironment, tool_turn
from agentopd_envs.micro import repositories as micro
from agentopd_envs.tools import tool
from agentopd_sandboxes.suites import LIBRARIES, TestSuite, run_suite
from agentopd_verifiers.suite import LIMITS as TEST_LIMITS

LIMITS = Limits(max_turns=24, max_tokens=8192, max_tool_calls=32)
_LINES = 200
"""Lines of a file, and of a search, that one call shows."""

_EQUAL = """

class Equal:
    def __eq__(self, other):
        return True


for name, value in list(globals().items()):
    if type(value) is type(lambda: 0):
        globals()[name] = lambda *args, **options: Equal()
"""
"""Makes every function of a module return what is equal to anything."""


class RepositoryRow(BaseModel):
    """What a data set must hold. ``files`` and ``hidden_files`` are {path: text}, tests are named as pytest does.

    ``gold``, where there is one, is {path: text} of the editable files that it changes.
    """

    model_config = ConfigDict(frozen=True)

    problem: str
    files: dict[str, str]
    editable: list[str]
    tests: list[str]
    hidden_files: dict[str, str]
    hidden_tests: list[str]
    gold: dict[str, str] = Field(default_factory=dict)


@register_environment("repo_repair")
class RepoRepairEnvironment(ToolEnvironment):
    """Small generated repositories (``micro``), and any data set of repositories with tests for pytest.

    Only the files of ``task.public["editable"]`` can be changed; whatever else a student made of the repository would
    not be judged anyway. Hidden tests are not in the episode's files.
    """

    name = "repo_repair"
    verifier = "suite"
    libraries = LIBRARIES
    loaders: ClassVar[dict[str, TaskLoader]] = {"micro": micro.tasks}
    sources = tuple(loaders)
    row = RepositoryRow

    @classmethod
    def from_row(cls, row: RepositoryRow) -> Task:
        """A task of a data set's row."""
        return repository_task(row)

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """Hand in the repository unchanged."""
        return (tool_turn("submit"),)

    @classmethod
    def wrong_turns(cls, task: Task) -> Iterable[tuple[Message, ...]]:
        """An early exit, a patched runner, equal to all, never handed in; a fit to the test shown (``micro``)."""
        path = task.public["editable"][0]
        first = task.public["files"][path].splitlines()[0]
        for attack in (
            "import os; os._exit(0)",
            "import _pytest.python as p; p.Function.runtest = lambda self: None",
        ):
            yield tool_turn("edit", path=path, old=first, new=f"{attack}\n{first}"), tool_turn("submit")
        texts = {path: task.public["files"][path] for path in task.public["editable"] if path.endswith(".py")}
        rewrites = [tool_turn("edit", path=path, old=text, new=text + _EQUAL) for path, text in texts.items() if text]
        yield *rewrites, tool_turn("submit")
        yield (*task.privileged.trajectory[:-1], Message(role="assistant", content="Fixed."))
        yield from micro.wrong_turns(task) if task.source.dataset == micro.SOURCE.dataset else ()

    def setup(self) -> None:
        """The files as they are shipped."""
        self._files: dict[str, str] = dict(self.task.public["files"])
        self._editable = frozenset(self.task.public["editable"])
        self._submitted = False

    @tool
    def list_files(self) -> str:
        """List all files; those that can be edited are marked with *."""
        return "\n".join(f"{path} *" if path in self._editable else path for path in sorted(self._files))

    @tool
    def read_file(self, path: str, start: Annotated[int, Field(ge=1)] = 1) -> str:
        """Read a file, 200 lines at most. Args: path: the file; start: the first line."""
        lines = self._text(path).splitlines()
        shown = lines[start - 1 : start - 1 + _LINES]
        left = len(lines) - (start - 1 + len(shown))
        return "\n".join([*shown, *([f"[{left} more lines]"] if left > 0 else [])])

    @tool
    def search(self, text: Annotated[str, Field(min_length=1)]) -> str:
        """Find the lines of all files that hold a text. Args: text: what to look for, not a pattern."""
        found = [
            f"{path}:{number}: {line.strip()}"
            for path, content in sorted(self._files.items())
            for number, line in enumerate(content.splitlines(), start=1)
            if text in line
        ]
        more = [f"[{len(found) - _LINES} more lines]"] if len(found) > _LINES else []
        return "\n".join([*found[:_LINES], *more]) or "nothing found"

    @tool(mutates=True)
    def edit(self, path: str, old: Annotated[str, Field(min_length=1)], new: str) -> None:
        """Replace one piece of a file. Args: path: the file; old: text that occurs once in it; new: its replacement."""
        content = self._text(path)
        if path not in self._editable:
            raise ToolError(f"{path} cannot be edited; these can: {', '.join(sorted(self._editable))}")
        if (count := content.count(old)) != 1:
            raise ToolError(f"the old text is found {count} times in {path}; it has to be found once")
        self._files[path] = content.replace(old, new)

    @tool(budget=6)
    async def run_tests(self) -> str:
        """Run the tests that are part of the repository."""
        if self.ctx.sandbox is None:
            raise EnvironmentFault("repo_repair: run_tests needs a sandbox, and the episode was given none")
        suite = TestSuite(self.task.public["files"], self.task.public["tests"], self._editable)
        outcome = await run_suite(self.ctx.sandbox, suite, self._changed(), TEST_LIMITS)
        return "\n".join(f"{'pass' if held else 'FAIL'}: {name}" for name, held in outcome.passed.items())

    @tool(mutates=True)
    def submit(self) -> str:
        """Hand in the repository and finish."""
        self._submitted = True
        self.finish()
        return "submitted"

    def state(self) -> JSON:
        """The editable files that differ from the shipped ones, and whether they were handed in."""
        return {"files": self._changed(), "submitted": self._submitted}

    def _changed(self) -> dict[str, str]:
        shipped = self.task.public["files"]
        return {path: text for path, text in self._files.items() if text != shipped[path]}

    def _text(self, path: str) -> str:
        if path not in self._files:
            raise ToolError(f"no file {path!r}; there is: {', '.join(sorted(self._files))}")
        return self._files[path]


def repository_task(row: RepositoryRow) -> Task:
    """A repository as a task; its gold trajectory rewrites each changed file whole."""
    gold = [tool_turn("edit", path=path, old=row.files[path], new=text) for path, text in row.gold.items()]
    hidden: JSON = {"files": row.hidden_files, "tests": row.hidden_tests}
    return Task(
        id="",
        env="repo_repair",
        prompt=(
            Message(role="system", content=micro.SYSTEM),
            Message(role="user", content=row.problem),
        ),
        public={"files": row.files, "editable": row.editable, "tests": row.tests},
        hidden={**hidden, "gold": row.gold} if row.gold else hidden,
        privileged=Privileged(trajectory=(*gold, tool_turn("submit")) if gold else ()),
        limits=LIMITS,
        source=Source(dataset="repo_repair"),
    )
