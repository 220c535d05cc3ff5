import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.errors import TaskError
from agentopd_verifiers.compare import matches
from agentopd_verifiers.plain import decode_plain, encode_plain

HASHABLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
PLAIN = st.recursive(
    HASHABLE | st.sets(HASHABLE, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(HASHABLE | st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_round_trip_through_json_is_exact(value):
    found = decode_plain(json.loads(json.dumps(encode_plain(value))))
    assert repr_sorted(found) == repr_sorted(value)
    assert type(found) is type(value)


def repr_sorted(value):
    """``repr`` with sets in one order: it tells types, -0.0 and NaN apart, which ``==`` does not."""
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}{sorted(map(repr_sorted, value))}"
    if isinstance(value, dict):
        return f"{{{[(repr_sorted(key), repr_sorted(item)) for key, item in value.items()]}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}{[repr_sorted(item) for item in value]}"
    return repr(value)


@given(PLAIN)
def test_a_decoded_value_matches_itself_strictly(value):
    assert matches(value, decode_plain(encode_plain(value)), "strict")


@pytest.mark.parametrize("value", [None, True, 3, -0.5, "x", [1, [2.5, "a"]], {"a": [1], "b": {}}])
def test_plain_json_is_its_own_encoding(value):
    assert encode_plain(value) == value


def test_tags():
    assert encode_plain((1, [2])) == {"$tuple": [1, [2]]}
    assert encode_plain({"$x": 1}) == {"$dict": [["$x", 1]]}
    assert encode_plain({2, 1}) == {"$set": [1, 2]}
    assert math.isnan(decode_plain({"$float": "nan"}))


class Sneaky(int):
    pass


@pytest.mark.parametrize("value", [object(), Sneaky(3), [Sneaky(3)], 1j, bytearray(b"x")])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="plain data"):
        encode_plain(value)


@pytest.mark.parametrize(
    "encoded",
    [
        {"$tuple": [1], "x": 2},
        {"$unknown": 1},
        {"$tuple": 3},
        {"$float": "1.0"},
        {"$float": []},
        {"$bytes": "*"},
        {"$set": [[1]]},
        {"$set": [1, 1]},
        {"$dict": [[1]]},
        {"$dict": [[1, 2], [1, 3]]},
    ],
)
def test_malformed_tags_are_task_errors(encoded):
    with pytest.raises(TaskError, match="tagged value"):
        decode_plain(encoded)
