"""Recorded calls against accepted ones."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.rendering import HermesJSON
from agentopd.types import MalformedCall, Message, ToolCall, VerdictStatus
from agentopd_envs.tool_use import ToolUseEnvironment
from agentopd_verifiers.calls import CallsVerifier, call_matches, matching, value_matches

TRUTH = {"geo.distance": {"start": ["New York", "NYC"], "km": [True], "digits": ["", 2]}}


@pytest.fixture
def verdict(make_task, make_episode, judge):
    def run(truth, calls, text="", functions=(), malformed=()):
        task = make_task({"ground_truth": truth}, {"functions": list(functions)})
        episode = make_episode(text, calls=[(name, args, True) for name, args in calls], malformed=malformed)
        return judge(CallsVerifier(), task, episode)

    return run


@pytest.mark.parametrize(
    ("name", "arguments", "right"),
    [
        ("geo.distance", {"start": "New York", "km": True}, True),
        ("geo_distance", {"start": "new-york.", "km": True, "digits": 2}, True),
        ("geo.distance", {"start": "NYC", "km": 1}, False),
        ("geo.distance", {"start": "NYC", "km": "true"}, False),
        ("geo.distance", {"start": "NYC"}, False),
        ("geo.distance", {"start": "NYC", "km": True, "digits": 3}, False),
        ("geo.distance", {"start": "NYC", "km": True, "extra": 1}, False),
        ("geo.distances", {"start": "NYC", "km": True}, False),
        ("geo.distance", "NYC", False),
    ],
)
def test_one_call(name, arguments, right):
    ((wanted, accepted),) = TRUTH.items()
    assert call_matches((name, arguments), (wanted, accepted)) is right


@pytest.mark.parametrize(
    ("value", "accepted", "right"),
    [
        (5, [5.0], True),
        (5.0, [5], False),
        (5, ["5"], False),
        ([1, 2], [[1, 2]], True),
        ([2, 1], [[1, 2]], False),
        ([1.0, 2], [[1, 2]], True),
        (["New York"], [["new_york"]], True),
        ([[1, "A b"]], [[[1, "ab"]]], True),
        ({"a": 1}, [{"a": [1, 2], "b": ["", 3]}], True),
        ({"a": 1, "c": 1}, [{"a": [1]}], False),
        ({}, [{"a": [1]}], False),
        ([{"a": "X y"}], [[{"a": ["xy"]}]], True),
        (None, [None], True),
        ("'x'", ['"x"'], True),
    ],
)
def test_values(value, accepted, right):
    assert value_matches(value, accepted) is right


def test_a_declared_float_accepts_a_float_where_the_truth_is_an_integer(verdict):
    schema = {"name": "f", "parameters": {"type": "dict", "properties": {"x": {"type": "float"}}}}
    assert verdict([{"f": {"x": [5]}}], [("f", {"x": 5.0})], functions=[schema]).passed
    assert not verdict([{"f": {"x": [5]}}], [("f", {"x": 5.0})]).passed


def test_parallel_calls_in_any_order_and_none_extra(verdict):
    truth = [{"f": {"x": [1]}}, {"f": {"x": [2]}}, {"g": {}}]
    calls = [("g", {}), ("f", {"x": 2}), ("f", {"x": 1})]
    assert verdict(truth, calls).passed
    assert verdict(truth, calls[:2]).status is VerdictStatus.WRONG
    assert not verdict(truth, [*calls, ("g", {})]).passed
    assert not verdict(truth, [calls[0], calls[1], calls[1]]).passed


def test_a_greedy_match_would_fail_here(verdict):
    truth = [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]
    assert verdict(truth, [("f", {"x": 1}), ("f", {"x": 2})]).passed


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), max_size=4)))
def test_matching_is_maximum(agree):
    columns = range(len(agree[0]) if agree else 0)
    rows = range(len(agree))
    best = max(
        size
        for size in range(len(rows) + 1)
        if size == 0
        or any(
            all(agree[row][column] for row, column in zip(chosen, places, strict=True))
            for chosen in itertools.combinations(rows, size)
            for places in itertools.permutations(columns, size)
        )
    )
    assert matching(agree) == best


def test_irrelevance(verdict):
    assert verdict([], [], "None of these can help.").passed
    assert verdict([], [], "  ").status is VerdictStatus.NO_ANSWER
    assert verdict([], [("f", {})], "done").status is VerdictStatus.WRONG
    broken = MalformedCall(raw="{", reason="not JSON")
    assert verdict([], [], "hm", malformed=(broken,)).status is VerdictStatus.FORMAT


def test_no_call_where_one_is_wanted(verdict):
    assert verdict([TRUTH], [], "It is 5 km.").status is VerdictStatus.NO_ANSWER
    assert verdict([TRUTH], [], "geo.distance(start='NYC', km=True)").outcome == 0.0


def test_each_call_is_certified_on_its_own_tokens(make_task, act, judge, certified):
    functions = [{"name": name, "parameters": {"type": "object", "properties": {}}} for name in ("f", "g")]
    task = make_task({"ground_truth": [{"f": {"x": [1]}}, {"g": {}}]}, {"functions": functions})
    calls = [ToolCall(name="f", arguments={"x": 1}), ToolCall(name="f", arguments={"x": 2}), ToolCall(name="h")]
    calls.append(calls[0])
    episode = act(ToolUseEnvironment, task, [Message(role="assistant", content="So", tool_calls=tuple(calls))])
    verdict = judge(CallsVerifier(), task, episode)
    assert verdict.outcome == 0.0
    assert certified(verdict, episode) == [
        (0, sign, kind, HermesJSON().render(call))
        for call, sign, kind in zip(
            calls, (1, -1, -1), ("accepted_call", "unaccepted_call", "unaccepted_call"), strict=False
        )
    ]


@pytest.mark.parametrize("truth", ["x", ["x"], [{"f": {}, "g": {}}], [{"f": {"x": 1}}]])
def test_malformed_truth_is_the_tasks_fault(verdict, truth):
    assert verdict(truth, [("f", {})]).status is VerdictStatus.TASK_ERROR


@pytest.mark.data
def test_bfcl_rows_accept_their_first_choice_and_nothing_simpler(verdict, data_dir):
    for line in (data_dir / "bfcl_single_turn_dev.jsonl").read_text().splitlines():
        row = json.loads(line)
        truth = row["ground_truth"]
        calls = [
            (name, {key: options[0] for key, options in arguments.items() if options[0] != ""})
            for call in truth
            for name, arguments in call.items()
        ]
        text = "" if truth else "I cannot do that."
        assert verdict(truth, calls, text, row["functions"]).passed, row["id"]
        assert not verdict(truth, calls[1:], "", row["functions"]).passed, row["id"]
        assert not verdict(truth, [(name, {}) for name, _ in calls], "", row["functions"]).passed, row["id"]
