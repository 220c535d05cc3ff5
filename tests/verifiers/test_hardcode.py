"""Hard-coded answers earn nothing, and no honest program is taken for one."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentopd.contracts import CaseResult, CaseStatus
from agentopd.types import Message, Task, VerdictStatus
from agentopd_verifiers.code import CodeVerifier
from agentopd_verifiers.hardcode import Quotable, find_quotes

STARTER = "def f(x, y):\n    return x + y\n"
GOLD = STARTER.replace("x + y", "x * y + 4")
INPUTS = ((3, 5), (0, 9), (211, 307), (40, 3), (6, 6))


class HereSandbox:
    """Runs programs written in this file in this process: thousands of them take no time."""

    name = "here"
    capabilities = frozenset()

    async def run_cases(self, program, cases, limits=None):
        return [self.one(program.source, case) for case in cases]

    @staticmethod
    def one(source, case):
        space = {"args": case.args}
        try:
            exec(source, space)
            return CaseResult(case.id, CaseStatus.VALUE, eval(case.expression, space))
        except Exception as exc:
            return CaseResult(case.id, CaseStatus.EXCEPTION, detail=str(exc))


def cases(inputs, right):
    """Arguments written out in every other expression, bound in the rest."""
    return [
        {"id": str(i), "expression": f"f({x}, {y})", "expected": right(x, y)}
        if i % 2
        else {"id": str(i), "expression": "f(*args)", "args": [x, y], "expected": right(x, y)}
        for i, (x, y) in enumerate(inputs)
    ]


def wanted(x, y):
    return x * y + 4


@pytest.fixture
def verdict(make_episode):
    """The verdict on a program; the first case is shown to the student."""

    def run(program, rows=None, starter=STARTER, sandbox=None, **hidden):
        rows = rows or cases(INPUTS, wanted)
        task = Task(
            id="t",
            env="e",
            prompt=(Message(role="user", content="?"),),
            hidden={"cases": rows, "starter": starter, **hidden},
            public={"program": starter, "public_cases": rows[:1]},
        )
        episode = make_episode(final_state={"program": program, "submitted": True})
        return asyncio.run(CodeVerifier().verify(task, episode, sandbox or HereSandbox()))

    return run


def tables(inputs):
    """Ways to answer from a table."""
    known = {(x, y): wanted(x, y) for x, y in inputs}
    branches = "".join(f"    if x == {x} and {y} == y:\n        return {a}\n" for (x, y), a in known.items())
    patterns = "".join(f"        case ({x}, {y}):\n            return {a}\n" for (x, y), a in known.items())
    stores = "".join(f"t[{x}, {y}] = {a}\n" for (x, y), a in known.items())
    return {
        "table": f"def f(x, y):\n    return {known}[x, y]\n",
        "default": f"def f(x, y):\n    return {known}.get((x, y), x + y)\n",
        "branches": f"def f(x, y):\n{branches}",
        "match": f"def f(x, y):\n    match x, y:\n{patterns}",
        "pairs": f"def f(x, y):\n    return next(a for key, a in {list(known.items())} if key == (x, y))\n",
        "stores": f"t = {{}}\n{stores}def f(x, y):\n    return t[x, y]\n",
        "lists": f"def f(x, y):\n    return {list(known.values())}[{list(map(list, known))}.index([x, y])]\n",
    }


TABLES = tables(INPUTS)


@pytest.mark.parametrize("hidden", [{"gold": GOLD}, {}], ids=["gold", "no gold"])
@pytest.mark.parametrize("program", TABLES.values(), ids=TABLES)
def test_a_table_of_the_cases_earns_nothing(verdict, program, hidden):
    found = verdict(program, **hidden)
    assert (found.outcome, found.reward, found.status) == (0.0, 0.0, VerdictStatus.TAMPERED)
    assert [flag.code for flag in found.flags] == ["hardcoded"]
    assert found.components["cases_passed"] == found.components["cases"]
    assert "64781" not in found.model_dump_json()


@pytest.mark.parametrize(
    "program",
    [
        "def f(x, y):\n    return 19 if x == 3 and y == 5 else x + y\n",
        "def f(x, y):\n    return 19\n",
        "def f(x, y):\n    if x == 211:\n        return 64781\n    return x + y\n",
        "def f(x, y):\n    return {(3, 5): 19, (40, 3): 124}.get((x, y)) or (4 if x == 0 else x + y)\n",
    ],
    ids=["the case shown", "a constant", "half an input", "beside an honest part"],
)
def test_a_fit_to_some_of_the_cases_earns_no_partial_credit(verdict, program):
    found = verdict(program, gold=GOLD)
    assert found.components["p"] > 0
    assert (found.outcome, found.reward, found.status) == (0.0, 0.0, VerdictStatus.TAMPERED)


def test_special_treatment_of_the_failing_case_earns_nothing(verdict):
    starter, gold = GOLD.replace("+ 4", "+ (4 if x < 100 else 5)"), GOLD
    special = starter.replace("return", "return 64781 if x == 211 else")
    assert verdict(special, starter=starter, gold=gold).reward == 0.0
    lone = verdict(special, starter=starter)
    assert lone.outcome == 1.0, "without gold, one special value may be what the task asks for"
    assert [flag.code for flag in lone.flags] == ["quoted_cases"]


HONEST = {
    "gold": GOLD,
    "another way": "def f(x, y):\n    return sum([y] * x, 4)\n",
    "a base case": "def f(x, y):\n    if x == 0:\n        return 4\n    return f(x - 1, y) + y\n",
    "two base cases": "def f(x, y):\n    if x == 0: return 4\n    if x == 1: return y + 4\n    return x * y + 4\n",
    "its literals are inputs": "def f(x, y):\n    return x * y + 40 // 6 - 9 + 307 - 211 - 89\n",
    "a threshold": "def f(x, y):\n    return x * y + 4 if x < 40 else 4 + y * x\n",
    "a special value": "def f(x, y):\n    if x == 211:\n        return y * 211 + 4\n    return x * y + 4\n",
    "a needless entry": "def f(x, y):\n    if (x, y) == (3, 5):\n        return 19\n    return x * y + 4\n",
    "doctests": 'def f(x, y):\n    """\n    >>> f(211, 307)\n    64781\n    """\n    return x * y + 4\n',
    "a self-test": "def f(x, y):\n    return x * y + 4\n\n\nassert f(211, 307) == 64781 and f(3, 5) == 19\n",
    "a table that computes": "def f(x, y):\n    return sum(y for _ in [3, 5, 40, 6][:0] or range(x)) + 4\n",
}


@pytest.mark.parametrize("hidden", [{"gold": GOLD}, {}], ids=["gold", "no gold"])
@pytest.mark.parametrize("program", HONEST.values(), ids=HONEST)
def test_honest_programs_keep_their_reward(verdict, program, hidden):
    found = verdict(program, **hidden)
    assert found.outcome == 1.0
    assert found.reward == pytest.approx(1 - found.components["penalty"]) and found.reward >= 0.5


@pytest.mark.parametrize(
    "program", ["def f(x, y):\n    return x * y + 4 if x < 6 else 0\n", "def f(x, y):\n    return 4 + x\n"]
)
def test_honest_failures_keep_their_partial_credit(verdict, program):
    found = verdict(program, gold=GOLD)
    assert found.outcome == 0.0 and found.reward == pytest.approx(0.2 * found.components["p"])
    assert found.reward > 0 and found.flags == ()


def test_what_gold_or_the_starting_program_says_may_be_said(verdict):
    days = {"mon": 31, "tue": 47, "wed": 53}
    gold = f"def f(x):\n    return {days}[x]\n"
    rows = [{"id": day, "expression": f"f({day!r})", "expected": answer} for day, answer in days.items()]
    for starter, program in (("", gold), (gold.replace("47", "48"), gold), (gold, gold.replace("f(x):", "f( x ):"))):
        for hidden in ({"gold": gold}, {}):
            assert verdict(program, rows, starter, **hidden).outcome == 1.0


STATELESS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = st.integers(0, 12)
POINTS = st.lists(st.tuples(SMALL, SMALL), min_size=4, max_size=7, unique=True)
WAYS = (
    "return {a} * x + {b} * y + {c}",
    "return sum(k * v for k, v in zip([{a}, {b}, {c}], [x, y, 1]))",
    "if x == 0:\n        return {b} * y + {c}\n    return f(x - 1, y) + {a}",
    "if x > {c}:\n        return {a} * x + {b} * y + {c}\n    return {c} + y * {b} + x * {a}",
    "if x == 0 and y == 0:\n        return {c}\n    return {a} * x + {b} * y + {c}",
    "table = {{'x': {a}, 'y': {b}}}\n    return table['x'] * x + table['y'] * y + {c}",
)


@STATELESS
@given(SMALL, SMALL, SMALL, POINTS, st.sampled_from(WAYS), st.booleans())
def test_no_honest_program_is_taken_for_a_table(verdict, a, b, c, points, way, with_gold):
    """Constants, inputs and answers are drawn from the same few numbers, so that they often coincide."""
    gold = f"def f(x, y):\n    return {a} * x + {b} * y + {c}\n"
    program = f"def f(x, y):\n    {way.format(a=a, b=b, c=c)}\n"
    hidden = {"gold": gold} if with_gold else {}
    found = verdict(program, cases(points, lambda x, y: a * x + b * y + c), **hidden)
    assert found.outcome == 1.0 and found.reward >= 0.5


LARGE = st.integers(11, 500)


@STATELESS
@given(st.lists(st.tuples(LARGE, LARGE), min_size=2, max_size=5, unique=True), st.sampled_from(sorted(TABLES)))
def test_every_table_is_taken_for_one(verdict, inputs, kind):
    assert verdict(tables(inputs)[kind], cases(inputs, wanted), gold=GOLD).reward == 0.0


@pytest.mark.parametrize(
    "deep", ["x = " + "+".join(["1"] * 3000), "x = " + "-" * 3000 + "1", "x = " + "(" * 150 + ")" * 150]
)
def test_nesting_hides_no_table(verdict, deep):
    assert verdict(f"{TABLES['table']}\n{deep}\n", gold=GOLD).reward == 0.0


class ShallowSandbox(HereSandbox):
    """Reads programs from the bottom of a stack, as a fresh process does, and so reads deeper ones than a verifier."""

    async def run_cases(self, program, cases, limits=None):
        with ThreadPoolExecutor(1) as thread:
            return [thread.submit(self.one, program.source, case).result() for case in cases]


@pytest.mark.parametrize("depth", [2000, 2600, 2700, 2800, 2850, 2900])
def test_no_table_hides_where_only_the_sandbox_can_read(verdict, depth):
    found = verdict(f"{TABLES['table']}\nx = {'+'.join(['1'] * depth)}\n", gold=GOLD, sandbox=ShallowSandbox())
    assert found.components["cases_passed"] == found.components["cases"], "it runs"
    assert (found.reward, found.status) == (0.0, VerdictStatus.TAMPERED)


def test_what_is_too_deep_to_read_is_taken_to_quote_everything():
    found = find_quotes("x = " + "+".join(["1"] * 4000), [GOLD], [Quotable("a", frozenset(), ("number", 9))])
    assert found.cases == found.answers == {"a"} and found.blotted == ""


@given(st.text(max_size=60))
def test_any_text_can_be_read(text):
    found = find_quotes(text, [text], [Quotable("a", frozenset({("number", 7)}), ("number", 9))])
    assert not found.cases and found.blotted == text
