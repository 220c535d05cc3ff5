"""Test code into cases: every form, what stays outside the sandbox, what is refused."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopd.errors import TaskError
from agentopd_envs.datasets.evaluate import NotConstant, evaluate
from agentopd_envs.datasets.lifting import lift
from agentopd_verifiers.plain import decode_plain


def single(test: str, entry_point: str = "f") -> dict:
    (case,) = lift(test, entry_point)
    return case


def test_equality_either_way_round():
    for test in ("assert f(1) == (2, [3])", "assert (2, [3]) == f(1), 'message'", "assert f(1) is (2, [3])"):
        case = single(test)
        assert (case["expression"], case["setup"], case["compare"]) == ("f(1)", "", "eq")
        assert decode_plain(case["expected"]) == (2, [3])


def test_tolerance():
    case = single("assert abs(f(1.33) - 0.33) < 1e-6")
    assert case == {
        "id": "test0",
        "expression": "f(1.33)",
        "setup": "",
        "expected": 0.33,
        "compare": "approx",
        "tolerance": 1e-6,
    }


@pytest.mark.parametrize(
    ("test", "expression", "expected"),
    [
        ("assert f(1)", "not not f(1)", True),
        ("assert not f(1)", "not not f(1)", False),
        ("assert f(1) > 3", "not not f(1) > 3", True),
        ("assert f(1) in [1, 2]", "not not f(1) in [1, 2]", True),
        ("assert all(f(x) for x in [1])", "not not all((f(x) for x in [1]))", True),
    ],
)
def test_truth(test, expression, expected):
    case = single(test)
    assert (case["expression"], case["expected"]) == (expression, expected)


def test_setup_is_kept_and_expected_values_are_not():
    test = """
'''A docstring.'''
from node import Node
a = Node(1)
a.next = a
expected = {("u", "v"): 3}
limit = 5
result = f(a)
assert True
assert result == expected
"""
    case = single(test)
    assert case["setup"] == "from node import Node\na = Node(1)\na.next = a\nresult = f(a)"
    assert decode_plain(case["expected"]) == {("u", "v"): 3}


def test_mutations_through_an_attribute_are_kept():
    case = single("n = Node()\nn.next = n\nfound = f(n)\nassert found")
    assert "n.next = n" in case["setup"]


def test_a_literal_that_the_program_is_given_stays():
    case = single("graph = {1: 2}\nresult = f(graph)\nassert result == [1]")
    assert case["setup"] == "graph = {1: 2}\nresult = f(graph)"


def test_loops_are_unrolled_with_the_variable_written_out():
    cases = lift("for x in range(2, 5):\n    assert f(x, x + 1) == str(x)", "f")
    assert [case["expression"] for case in cases] == ["f(2, 2 + 1)", "f(3, 3 + 1)", "f(4, 4 + 1)"]
    assert [case["expected"] for case in cases] == ["2", "3", "4"]
    assert [case["id"] for case in cases] == ["test0", "test1", "test2"]


def test_a_name_that_the_expression_binds_is_not_written_out():
    case = single("x = 1\nassert f([x for x in (1, 2)]) == 3")
    assert case["expression"] == "f([x for x in (1, 2)])"


def test_check_functions_bind_the_candidate():
    (case,) = lift("import math\ndef check(candidate):\n    assert candidate(2) == 4\ncheck(f)", "f")
    assert case["setup"] == "import math\ncandidate = f"
    (case,) = lift("def check(f):\n    assert f(2) == 4\ncheck(f)", "f")
    assert case["setup"] == ""


@pytest.mark.parametrize(
    "test",
    [
        "y = g(3)\nassert f(3) == y",
        "values = [1]\nvalues.append(2)\nassert f(1) == values",
        "a = [1]\nb = a\na.append(2)\nassert f(1) == b",
        "for x in g():\n    assert f(x) == 1",
        "while True:\n    assert f(1) == 1",
        "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False, f(1) == 2",
        "assert f(1) == = 2",
    ],
)
def test_what_cannot_be_lifted_is_refused(test):
    with pytest.raises(TaskError, match="test of 'f' cannot be lifted"):
        lift(test, "f")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@settings(max_examples=40)
@given(plain)
def test_literals_evaluate_to_themselves(value):
    assert evaluate(ast.parse(repr(value), mode="eval").body, {}) == value


@given(st.integers(-99, 99), st.integers(-99, 99), st.sampled_from("+-*"))
def test_arithmetic_is_python_s(a, b, operator):
    source = f"({a} {operator} {b}) * len(str({a}))"
    assert evaluate(ast.parse(source, mode="eval").body, {}) == eval(source)


@pytest.mark.parametrize(
    "source", ["open('x')", "().__class__", "'a' * 10**9", "[0] * 99999", "list(range(10**6))", "1 / 0", "f'{1}'", "x"]
)
def test_nothing_else_is_evaluated(source):
    with pytest.raises(NotConstant):
        evaluate(ast.parse(source, mode="eval").body, {})
