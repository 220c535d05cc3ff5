"""Small repositories with one bug: a package of two modules, its tests, and hidden tests that judge.

A problem is a template, one of its bugs, and names and numbers drawn at random. What is wrong shows in another module
than the one that is wrong, so the student has to follow a call.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agentopd.types import Limits, Message, Privileged, Source, Split, Task
from agentopd_envs.authoring import tool_turn
from agentopd_envs.splits import procedural

SYSTEM = "Find the bug in this repository and fix it with a small edit. Run the tests, then submit."
LIMITS = Limits(max_turns=16, max_tokens=2048, max_tool_calls=24)
SOURCE = Source(dataset="micro_repositories", licence="Apache-2.0")


@dataclass(frozen=True)
class Template:
    """``core`` holds the bug, ``front`` uses it.

    Each of ``bugs`` is (right, wrong) text of ``core``, and an expression in terms of ``front`` with the value that it
    must have: the test that is shown. ``checks`` are the hidden ones. ``P``, ``N`` and ``M`` stand for the package and
    two numbers.
    """

    what: str
    core: str
    front: str
    bugs: tuple[tuple[str, str, str, str], ...]
    checks: tuple[tuple[str, str], ...]


_TEMPLATES = (
    Template(
        "the stock report",
        '''"""Counts by name."""


class Stock:
    def __init__(self):
        self.counts = {}

    def add(self, name, count):
        self.counts[name] = self.counts.get(name, 0) + count

    def take(self, name, count):
        if self.counts.get(name, 0) < count:
            raise ValueError(name)
        self.counts[name] -= count

    def low(self, limit):
        return sorted(name for name, count in self.counts.items() if count <= limit)
''',
        '''"""What there is, and what has to be bought."""

from P.core import Stock


def after(moves):
    stock = Stock()
    for name, count in moves:
        if count > 0:
            stock.add(name, count)
        else:
            stock.take(name, -count)
    return stock.counts


def to_buy(moves, limit=N):
    stock = Stock()
    stock.counts = after(moves)
    return stock.low(limit)
''',
        (
            ("self.counts.get(name, 0) + count", "count", "after([('oak', 2), ('oak', N)])", "{'oak': 2 + N}"),
            ("< count:", "<= count:", "after([('oak', N), ('oak', -N)])", "{'oak': 0}"),
            ("count <= limit", "count < limit", "to_buy([('oak', N)])", "['oak']"),
            ("[name] -= count", "[name] = count", "after([('oak', N), ('oak', -5)])", "{'oak': N - 5}"),
        ),
        (
            ("after([('a', 3), ('a', M), ('b', 1)])", "{'a': 3 + M, 'b': 1}"),
            ("after([('a', M), ('a', -M)])", "{'a': 0}"),
            ("to_buy([('z', N), ('c', N), ('k', N + 1)])", "['c', 'z']"),
            ("after([('a', 9), ('a', -2)])", "{'a': 7}"),
        ),
    ),
    Template(
        "the page summary",
        '''"""Words and lines."""


def words(text):
    return [word.strip(".,;:!?").lower() for word in text.split()]


def counts(text):
    found = {}
    for word in words(text):
        found[word] = found.get(word, 0) + 1
    return found


def wrap(text, width):
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line] if line else lines
''',
        '''"""A summary of a page of text."""

from P.core import counts, wrap


def common(text, most=2):
    found = counts(text)
    return sorted(found, key=lambda word: (-found[word], word))[:most]


def page(text, width=N):
    return "\\n".join(wrap(text, width))
''',
        (
            ("found.get(word, 0) + 1", "1", "common('oak elm oak', 1)", "['oak']"),
            (".lower() for", " for", "common('Oak elm oak', 1)", "['oak']"),
            ("+ 1 + len(word) > width", "+ len(word) > width", "page('oak elm', 6)", "'oak' + chr(10) + 'elm'"),
            ("[*lines, line] if line else lines", "lines", "page('oak')", "'oak'"),
        ),
        (
            ("common('Up up, down; up! left down')", "['up', 'down']"),
            ("page('x' * (N - 1) + ' y z')", "'x' * (N - 1) + chr(10) + 'y z'"),
            ("page('one ' * 3, 7)", "'one one' + chr(10) + 'one'"),
            ("page('')", "''"),
        ),
    ),
    Template(
        "the timetable",
        '''"""Spans of minutes, [start, end)."""


def overlap(a, b):
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


def merge(spans):
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def gaps(spans, start, end):
    free, at = [], start
    for left, right in merge(spans):
        if left > at:
            free.append((at, left))
        at = max(at, right)
    return [*free, (at, end)] if at < end else free
''',
        '''"""When there is time for a meeting."""

from P.core import gaps, overlap


def first_free(busy, length, day=(0, 600)):
    for start, end in gaps(busy, *day):
        if end - start >= length:
            return start
    return None


def clashes(plan, busy):
    return sum(overlap(plan, span) > 0 for span in busy)
''',
        (
            ("max(merged[-1][1], end)", "end", "first_free([(0, 90), (9, N)], 60)", "90"),
            ("- max(a[0], b[0])", "- a[0]", "clashes((N, N + 9), [(N + 20, N + 30)])", "0"),
            ("at = max(at, right)", "at = right + 1", "first_free([(0, N)], 600 - N)", "N"),
            ("if at < end else free", "if not free else free", "first_free([(5, N)], 300)", "N"),
        ),
        (
            ("first_free([(0, 100), (150, 500)], 60)", "500"),
            ("first_free([(0, 60 + M)], M)", "60 + M"),
            ("first_free([(0, 500), (20, 30)], 90)", "500"),
            ("clashes((100, 110), [(105, 106), (120, 130), (0, 100)])", "1"),
            ("first_free([(0, 100), (150, 590)], 40)", "100"),
            ("first_free([(10, 590)], 11)", "None"),
        ),
    ),
)  # fmt: skip
_PACKAGES = ("depot", "harbor", "ledger", "meadow", "orchard", "quarry", "tannery", "wharf")


@dataclass(frozen=True)
class Problem:
    """A template and its bug by index, the package's name, and the two numbers."""

    template: int
    bug: int
    package: str
    numbers: tuple[int, int]


def tasks(split: Split, limit: int | None, seed: int) -> Iterator[Task]:
    """Tasks of one split; endless when ``limit`` is None. The same bug with the same numbers shares a split."""
    for task_id, problem in procedural(_draw, _core, split, limit, seed, "micro_repositories"):
        yield _task(problem, task_id, split, seed)


def wrong_turns(task: Task) -> tuple[tuple[Message, ...], ...]:
    """A fit to the one test that is shown."""
    shown = task.public["files"][task.public["tests"][0].partition("::")[0]]
    name, value = re.findall(r"assert (\w+)\(.*\) == (.*)", shown)[0]
    front = task.public["editable"][1]
    last = task.public["files"][front].splitlines()[-1]
    fit = f"{last}\n\n\ndef {name}(*args):\n    return {value}"
    return ((tool_turn("edit", path=front, old=last, new=fit), tool_turn("submit")),)


def _core(problem: Problem) -> object:
    return problem.template, problem.bug, problem.numbers


def _draw(rng: random.Random) -> Problem:
    template = rng.randrange(len(_TEMPLATES))
    bug = rng.randrange(len(_TEMPLATES[template].bugs))
    return Problem(template, bug, rng.choice(_PACKAGES), (rng.randint(20, 60), rng.randint(2, 19)))


def _task(problem: Problem, task_id: str, split: Split, seed: int) -> Task:
    template = _TEMPLATES[problem.template]
    right, wrong, *shown = template.bugs[problem.bug]
    path, tests = f"{problem.package}/core.py", f"tests/test_{problem.package}.py"
    files = {
        f"{problem.package}/__init__.py": "",
        path: template.core.replace(right, wrong),
        f"{problem.package}/front.py": _filled(template.front, problem),
        tests: _tests(problem, [(shown[0], shown[1])]),
    }
    old, new = _changed_line(files[path], template.core)
    hidden = f"tests/test_{problem.package}_more.py"
    names = [f"{hidden}::test_{index}" for index in range(len(template.checks))]
    question = f"Something is wrong with {template.what} of `{problem.package}`."
    return Task(
        id=task_id,
        env="repo_repair",
        split=split,
        prompt=(Message(role="system", content=SYSTEM), Message(role="user", content=question)),
        public={
            "files": files,
            "editable": [path, f"{problem.package}/front.py"],
            "tests": [f"{tests}::test_0"],
        },
        hidden={"files": {hidden: _tests(problem, template.checks)}, "tests": names, "gold": {path: template.core}},
        privileged=Privileged(
            hint=f"Look at `{wrong}` in {path}.",
            solution=f"{path}: replace `{wrong}` by `{right}`.",
            trajectory=(tool_turn("edit", path=path, old=old, new=new), tool_turn("submit")),
        ),
        limits=LIMITS,
        seed=seed,
        source=SOURCE,
    )


def _tests(problem: Problem, checks: Sequence[tuple[str, str]]) -> str:
    body = [
        f"def test_{index}():\n    assert {expression} == {value}\n" for index, (expression, value) in enumerate(checks)
    ]
    return _filled(f"from P.front import *\n\n\n{chr(10).join(body)}", problem)


def _filled(text: str, problem: Problem) -> str:
    first, second = problem.numbers
    words = {"P": problem.package, "N": str(first), "M": str(second)}
    for mark, value in words.items():
        text = re.sub(rf"\b{mark}\b", value, text)
    return text


def _changed_line(before: str, after: str) -> tuple[str, str]:
    """The one line that differs, in both texts."""
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    return next((old, new) for old, new in pairs if old != new)
