"""State differences, the frame condition, and calls."""

from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.errors import InfraError
from agentopd.rendering import HermesJSON
from agentopd.types import MalformedCall, Message, VerdictStatus
from agentopd_envs import tool_turn
from agentopd_envs.tool_use import ToolUseEnvironment
from agentopd_verifiers.state import StateVerifier, state_diff

INITIAL = {"stock": {"pears": 3, "figs": 5}, "orders": {"1": {"note": "Hi", "tags": ["a", "b"], "price": 1.0}}}
GOAL = {"stock": {"pears": 4, "figs": 5}, "orders": {"1": {"note": "Hi", "tags": ["a", "b"], "price": 1.0}}}
WRITE = ("write", {"item": "pears", "count": 4}, True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)
DB = st.dictionaries(st.sampled_from("xyz"), JSON, max_size=3)


@pytest.fixture
def verdict(make_task, make_episode, judge):
    def run(db, calls=(WRITE,), initial=INITIAL, goal=GOAL, text="Done.", malformed=(), **hidden):
        task = make_task({"initial": initial, "goal": goal, **hidden})
        return judge(
            StateVerifier(), task, make_episode(text, calls=calls, malformed=malformed, final_state={"db": db})
        )

    return run


def changed(**fields):
    return {**GOAL, "orders": {"1": {**GOAL["orders"]["1"], **fields}}}


def test_the_goal_state_passes(verdict):
    found = verdict(GOAL)
    assert found.passed
    assert found.components["goals_met"] == 1.0


def test_doing_nothing_and_claiming_success_fails(verdict):
    found = verdict(INITIAL, calls=(), text="<tool_response>ok</tool_response> I wrote 4 pears.")
    assert (found.outcome, found.status) == (0.0, VerdictStatus.NO_ANSWER)
    assert found.detail == "not reached: stock.pears"
    broken = MalformedCall(raw="{", reason="not JSON")
    assert verdict(INITIAL, calls=(), malformed=(broken,)).status is VerdictStatus.FORMAT


def test_the_frame_condition(verdict):
    found = verdict({**GOAL, "stock": {"pears": 4, "figs": 6}})
    assert (found.outcome, found.status) == (0.0, VerdictStatus.WRONG)
    assert found.components["broken"] == 1.0
    assert "stock.figs" in found.detail
    assert not verdict({**GOAL, "extra": {}}).passed
    assert not verdict({"stock": GOAL["stock"]}).passed
    empty, absent, full = {"orders": {"1": {}}}, {"orders": {}}, {"orders": {"1": {"note": "Hi"}}}
    assert not verdict(absent, initial=full, goal=empty).passed
    assert not verdict(empty, initial=full, goal=absent).passed
    assert verdict(empty, initial=full, goal=empty).passed and verdict(absent, initial=full, goal=absent).passed
    assert verdict(full, initial=absent, goal=empty, comparators={"orders.1.note": "ignore"}).passed
    assert not verdict({**GOAL, "stock": {"pears": True, "figs": 5}}).passed


def test_a_task_that_asks_for_nothing_cannot_be_judged(verdict):
    assert verdict(INITIAL, goal=INITIAL).status is VerdictStatus.TASK_ERROR
    assert verdict(INITIAL, goal=changed(note="hi"), comparators={"orders.*.note": "ignore"}).outcome == 0.0
    assert verdict(INITIAL, initial=GOAL, goal=changed(note="x"), comparators={"orders": "ignore"}).outcome is None


@pytest.mark.parametrize(
    ("comparator", "field", "value", "right"),
    [
        ("exact", "note", "hi", False),
        ("casefold", "note", " hI ", True),
        ("casefold", "note", "ho", False),
        ("numeric", "price", 1, True),
        ("numeric", "price", 1.0 + 1e-12, True),
        ("numeric", "price", 1.1, False),
        ("numeric", "price", True, False),
        ("set", "tags", ["b", "a", "a"], True),
        ("set", "tags", ["b"], False),
        ("ignore", "note", "anything", True),
    ],
)
def test_comparators_per_field(verdict, comparator, field, value, right):
    found = verdict(changed(**{field: value}), comparators={f"orders.*.{field}": comparator})
    assert found.passed is right


def test_required_and_forbidden_calls(verdict):
    read = ("read", {"item": "pears"}, True)
    required = [{"name": "read", "arguments": {"item": "pears"}}]
    assert verdict(GOAL, (read, WRITE), required_calls=required).passed
    assert verdict(GOAL, (WRITE,), required_calls=required).detail == "call not made: read"
    assert not verdict(GOAL, (("read", {"item": "pears"}, False), WRITE), required_calls=required).passed
    assert verdict(INITIAL, (read,), goal=INITIAL, required_calls=required).passed
    found = verdict(GOAL, (WRITE,), forbidden_calls=[{"name": "write"}])
    assert (found.outcome, [flag.code for flag in found.flags]) == (0.0, ["forbidden_call"])
    assert verdict(GOAL, (WRITE,), forbidden_calls=[{"name": "write", "arguments": {"item": "figs"}}]).passed


def test_certificates_come_from_the_event_log(verdict):
    calls = (("read", {"item": "pears"}, True), ("read", {"item": "kiwis"}, False), WRITE)
    found = verdict(GOAL, calls, required_calls=[{"name": "write"}])
    assert [(item.turn, item.sign, item.kind) for item in found.certificates] == [
        (1, -1, "failed_call"),
        (2, 1, "required_call"),
    ]


STOCK = {"pears": 3, "figs": 5}


@pytest.fixture
def played(make_task, act, judge, certified):
    """Play turns in the real environment; the verdict and what it certifies."""

    def run(*turns, initial=STOCK, goal=MappingProxyType({"pears": 4, "figs": 5}), **hidden):
        task = make_task({"initial": initial, "goal": dict(goal), **hidden}, {"db": STOCK})
        episode = act(ToolUseEnvironment, task, [*turns, Message(role="assistant", content="Done.")])
        verdict = judge(StateVerifier(), task, episode)
        return verdict, certified(verdict, episode)

    return run


def write(item, count):
    return tool_turn("write", item=item, count=count)


@pytest.mark.parametrize("count", [4, "4", 4.0])
def test_a_call_is_known_by_what_its_tool_was_given(played, count):
    wanted = [{"name": "write", "arguments": {"count": 4}}]
    assert played(write("pears", count), required_calls=wanted)[0].passed
    crossed, _ = played(write("pears", count), forbidden_calls=wanted)
    assert (crossed.outcome, [flag.code for flag in crossed.flags]) == (0.0, ["forbidden_call"])


def text(message):
    return HermesJSON().render(message.tool_calls[0])


def test_calls_are_certified_by_what_they_did_to_the_database(played):
    turns = (
        tool_turn("read", item="pears"),
        write("pears", 9),
        write("figs", 6),
        write("figs", 5),
        write("pears", "many"),
        write("pears", 4),
        write("pears", 4),
    )
    verdict, found = played(*turns)
    assert verdict.passed
    assert found == [
        (2, -1, "away_from_goal", text(turns[2])),
        (3, 1, "towards_goal", text(turns[3])),
        (4, -1, "failed_call", text(turns[4])),
        (5, 1, "towards_goal", text(turns[5])),
    ]


def test_each_of_several_calls_in_a_turn_has_its_own_tokens(played):
    good, bad = write("pears", 4), write("figs", 0)
    both = Message(role="assistant", content="Now:", tool_calls=(*good.tool_calls, *bad.tool_calls))
    verdict, found = played(both)
    assert verdict.outcome == 0.0
    assert found == [(0, 1, "towards_goal", text(good)), (0, -1, "away_from_goal", text(bad))]


def test_a_call_that_helps_and_harms_is_not_certified(make_task, make_episode, judge):
    initial, goal = {"a": 1, "b": 1}, {"a": 2, "b": 1}
    log = [{"path": ["db", "a"], "value": 2}, {"path": ["db", "b"], "value": 7}]
    episode = make_episode("x", calls=[("both", {}, True)], final_state={"db": {"a": 2, "b": 7}})
    event = episode.events[0].model_copy(update={"data": {**episode.events[0].data, "changes": log}})
    task = make_task({"initial": initial, "goal": goal})
    assert judge(StateVerifier(), task, episode.model_copy(update={"events": (event,)})).certificates == ()


def test_a_log_that_does_not_add_up_certifies_no_progress(played):
    other = {"pears": 3, "figs": 4}
    _, found = played(write("pears", 4), write("pears", -1), initial=other)
    assert [kind for _, _, kind, _ in found] == ["failed_call"]


def test_malformed_calls_are_bad_steps(played):
    broken = Message(role="assistant", content="<tool_call>\n{oops}\n</tool_call>")
    verdict, found = played(broken, write("pears", 4))
    assert verdict.passed
    assert found[0] == (0, -1, "malformed_call", broken.content)
    assert [kind for _, _, kind, _ in found] == ["malformed_call", "towards_goal"]


def test_a_missing_snapshot_is_an_infrastructure_fault(make_task, make_episode, judge):
    with pytest.raises(InfraError, match="no final database"):
        judge(StateVerifier(), make_task({"initial": INITIAL, "goal": GOAL}), make_episode("x"))


@pytest.mark.parametrize("hidden", [{"comparators": {"a": "fuzzy"}}, {"required_calls": ["write"]}, {"goal": [1]}])
def test_malformed_tasks(verdict, hidden):
    assert verdict(GOAL, **hidden).status is VerdictStatus.TASK_ERROR


@given(DB, DB, DB)
def test_a_state_passes_exactly_when_it_is_the_goal(initial, goal, final):
    found = state_diff(initial, goal, final)
    assert (not found.unmet and not found.broken) == same(goal, final)
    assert bool(found.goals) == (not same(initial, goal))


def same(a, b):
    """Equality with booleans apart from numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
