"""The log of what a step changed."""

import copy

from hypothesis import given
from hypothesis import strategies as st

from agentopd_verifiers.changes import changes, replay
from agentopd_verifiers.compare import matches

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["a", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_a_log_leads_from_one_state_to_the_other_and_spares_both(before, after):
    kept = copy.deepcopy((before, after))
    found = replay(before, changes(before, after))
    assert matches(after, found, "strict")
    assert (before, after) == kept


@given(JSON)
def test_no_change_no_entry(state):
    assert changes(state, copy.deepcopy(state)) == []


def test_entries_name_the_smallest_object_that_changed():
    before = {"db": {"pears": 3, "figs": 1, "tags": ["a"]}, "done": False}
    after = {"db": {"pears": 4, "tags": ["a", "b"]}, "done": 0, "new": {}}
    assert changes(before, after) == [
        {"path": ["db", "figs"], "removed": True},
        {"path": ["db", "pears"], "value": 4},
        {"path": ["db", "tags"], "value": ["a", "b"]},
        {"path": ["done"], "value": 0},
        {"path": ["new"], "value": {}},
    ]
