import math

import pytest

from agentopd.errors import TaskError
from agentopd_verifiers.compare import matches


class AlwaysEqual:
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1

    def __float__(self):
        return 1.0

    def __sub__(self, other):
        return 0

    __rsub__ = __sub__

    def __abs__(self):
        return 0


class LyingInt(int):
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1


@pytest.mark.parametrize("compare", ["eq", "strict", "approx", "list_eq", "tuples_eq", "set"])
@pytest.mark.parametrize("value", [AlwaysEqual(), LyingInt(7), [AlwaysEqual()], [LyingInt(1)], {LyingInt(1): 1}])
def test_foreign_equality_is_never_asked(compare, value):
    for expected in (1, [1], {1: 1}):
        assert not matches(expected, value, compare)


@pytest.mark.parametrize(
    ("expected", "value", "equal"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        ([0], [False], False),
        ({1: "a"}, {True: "a"}, False),
        ({1}, {True}, False),
        ({1}, frozenset({1.0}), True),
        ([1, 2], (1, 2), False),
        (float("nan"), float("nan"), True),
        ([math.nan], [math.nan], True),
        (0.0, -0.0, True),
        (math.inf, 1e308, False),
        (10**400, 10**400, True),
        ("1", 1, False),
        (None, None, True),
        ({"a": [1, (2,)]}, {"a": [1, (2,)]}, True),
    ],
)
def test_eq_is_python_equality_with_booleans_apart(expected, value, equal):
    assert matches(expected, value) is equal


def test_strict_needs_the_same_types():
    assert not matches(1, 1.0, "strict")
    assert not matches([1], [1.0], "strict")
    assert not matches({1}, frozenset({1}), "strict")
    assert matches((1, 2.0), (1, 2.0), "strict")


def test_approx():
    assert matches(1.5, 1.4, "approx", 0.11)
    assert not matches(1.5, 1.3, "approx", 0.11)
    assert matches([1.0, {"a": 2.0}], [1.0 + 1e-9, {"a": 2}], "approx")
    assert not matches([1.0], [1.0, 2.0], "approx")
    assert not matches(1.0, True, "approx", 1.0)
    assert not matches(math.inf, 1e300, "approx", 1e6)
    assert not matches(0.0, 10**400, "approx")
    assert matches(math.nan, math.nan, "approx")


def test_containers():
    assert matches([1, 2], (1, 2), "list_eq")
    assert matches(["a", "b"], "ab", "list_eq")
    assert not matches([1, 2], {1, 2}, "list_eq")
    assert matches([[1, 2]], [(1, 2)], "tuples_eq")
    assert matches([1, 2, 2], (2, 1), "set")
    assert not matches([1], [True], "set")
    assert not matches([1], 5, "set")


def test_endless_nesting_is_a_mismatch():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert not matches([1], deep)


def test_bad_task_data():
    with pytest.raises(TaskError, match="equals"):
        matches(1, 1, "equals")
    with pytest.raises(TaskError, match="tolerance"):
        matches(1, 1, "approx", -1)
