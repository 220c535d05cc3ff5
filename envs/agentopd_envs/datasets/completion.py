"""HumanEval and MBPP: one function to write, from its docstring or from a sentence and an example."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

from agentopd.types import JSON, Limits, Message, Privileged, Source, Split, Task
from agentopd_envs.datasets.lifting import lift
from agentopd_envs.datasets.reading import Row, select

HUMANEVAL = "humaneval_dev.jsonl"
MBPP = "mbpp_dev.jsonl"
HUMANEVAL_SOURCE = Source(dataset="humaneval", revision="6d43fb980f9fee3c892a914eda09951f772ad10d", licence="MIT")
MBPP_SOURCE = Source(
    dataset="mbpp", revision="26d6d00bb1fd0fa37f39c99d5290da67891d1c5e", licence="CC-BY-4.0 and Apache-2.0"
)
SYSTEM = "Write the Python that is asked for. Answer with one fenced code block that holds all of it."
LIMITS = Limits(max_turns=1, max_tokens=1024)


class CompletionRow(Row):
    """``canonical_solution`` continues ``prompt`` in HumanEval and stands alone in MBPP; ``test`` judges."""

    entry_point: str
    prompt: str
    canonical_solution: str
    test: str


def humaneval(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """All rows (see the package), shuffled by ``seed``, ``limit`` of them at most."""
    for row in select(HUMANEVAL, CompletionRow, limit, seed):
        question = f"Complete this function:\n\n{fenced(row.prompt)}"
        task = completion_task(question, row.entry_point, row.test, row.prompt + row.canonical_solution, row.prompt)
        yield _named(task, row, HUMANEVAL_SOURCE, split, seed)


def mbpp(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """All rows (see the package), shuffled by ``seed``, ``limit`` of them at most."""
    for row in select(MBPP, CompletionRow, limit, seed):
        task = completion_task(row.prompt, row.entry_point, row.test, row.canonical_solution)
        yield _named(task, row, MBPP_SOURCE, split, seed)


def completion_task(question: str, entry_point: str, test: str, solution: str, given: str = "") -> Task:
    """A code-generation task without id and split. ``given``: the code that the question shows, to be completed."""
    hidden: JSON = {"cases": lift(test, entry_point)}
    if solution:
        hidden["gold"] = solution
    return Task(
        id="",
        env="code_generation",
        prompt=(Message(role="system", content=SYSTEM), Message(role="user", content=question.strip())),
        public={"entry_point": entry_point, "given": given},
        hidden=hidden,
        privileged=Privileged(
            hint=first_statement(solution, entry_point),
            solution=solution,
            trajectory=(Message(role="assistant", content=fenced(solution)),) if solution else (),
        ),
        limits=LIMITS,
    )


def first_statement(program: str, name: str) -> str:
    """How the body of a function begins, in words; "" where the program does not define it at its top level."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # An odd escape in a benchmark's string is no business of the user's.
            tree = ast.parse(program)
    except SyntaxError:
        return ""
    body = next((node.body for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), [])
    after = body[1:] if len(body) > 1 and ast.get_docstring(ast.Module(body[:1], [])) is not None else body
    line = (ast.get_source_segment(program, after[0]) or "").partition("\n")[0] if after else ""
    return f"Its body can begin with `{line}`." if line else ""


def fenced(code: str) -> str:
    """Code as a Markdown block."""
    return f"```python\n{code.strip()}\n```"


def _named(task: Task, row: CompletionRow, source: Source, split: Split, seed: int) -> Task:
    named = {"id": row.id, "split": split, "seed": seed, "source": source.model_copy(update={"row": row.id})}
    return task.model_copy(update=named)
