import math
import struct
import time
from collections import OrderedDict
from enum import IntEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopd_sandboxes import wire

ID = bytes(range(16))

keys = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    keys | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
    ),
    max_leaves=20,
)


def same(a: Any, b: Any) -> bool:
    """Equality that tells types, signed zeros and NaN apart."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a, b)) and all(map(same, a.values(), b.values()))
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    return bool(a == b)


@settings(deadline=None)
@given(values)
def test_what_is_encoded_is_decoded_with_its_types(value: Any) -> None:
    assert same(wire.decode(wire.encode(value)), value)


@settings(deadline=None)
@given(values, st.data())
def test_a_shortened_or_lengthened_value_is_refused(value: Any, data: st.DataObject) -> None:
    encoded = wire.encode(value)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    for bad in (encoded[:cut], encoded + b"n"):
        with pytest.raises(wire.WireError):
            wire.decode(bad)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused_or_is_exactly_an_encoding(noise: bytes) -> None:
    try:
        value = wire.decode(noise)
    except wire.WireError:
        return
    assert wire.decode(wire.encode(value)) == value or value != value or "nan" in repr(value)


class AlwaysEqual:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Sly(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class One(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "value",
    [AlwaysEqual(), Sly(3), One.ONE, OrderedDict(a=1), (i for i in ()), range(3), 1j, bytearray(b"a"), print, int],
    ids=lambda value: type(value).__name__,
)
def test_only_exact_built_in_types_travel(value: Any) -> None:
    for wrapped in (value, [value], {"a": value}):
        with pytest.raises(wire.WireTypeError):
            wire.encode(wrapped)


def test_size_depth_and_count_are_bounded() -> None:
    deep: list[Any] = []
    for _ in range(wire.MAX_DEPTH + 1):
        deep = [deep]
    loop: list[Any] = []
    loop.append(loop)
    for value in (deep, loop, "a" * (wire.MAX_BYTES + 1), [0] * (wire.MAX_NODES + 1), 1 << wire.MAX_INT_BITS):
        with pytest.raises(wire.WireSizeError):
            wire.encode(value)


def test_the_largest_integer_can_be_printed() -> None:
    value = (1 << wire.MAX_INT_BITS) - 1
    assert len(str(wire.decode(wire.encode(-value)))) > 4000


def test_a_claimed_length_is_not_believed() -> None:
    for tag in b"[(<*{sbi":
        with pytest.raises(wire.WireError):
            wire.decode(bytes([tag]) + b"\xff\xff\xff\xff")


def test_deep_bytes_are_refused_not_recursed_into() -> None:
    with pytest.raises(wire.WireSizeError):
        wire.decode((b"[" + struct.pack(">I", 1)) * 100_000 + b"n")


def test_two_equal_keys_and_unhashable_keys_are_refused() -> None:
    two = struct.pack(">I", 2)
    for bad in (b"<" + two + b"tt", b"{" + two + b"tntn", b"<" + two + b"t" + wire.encode([])):
        with pytest.raises(wire.WireError):
            wire.decode(bad)


def test_colliding_keys_cannot_stall_the_judge() -> None:
    modulus = (1 << 61) - 1  # the modulus of CPython's integer hash
    crowd = b"".join(wire.encode(i * modulus) for i in range(20_000))
    began = time.perf_counter()
    with pytest.raises(wire.WireError, match="one hash"):
        wire.decode(b"<" + struct.pack(">I", 20_000) + crowd)
    assert time.perf_counter() - began < 2


def test_not_a_number_travels() -> None:
    assert math.isnan(wire.decode(wire.encode(math.nan)))


def test_a_frame_is_accepted_once_whole_and_under_its_own_id() -> None:
    frame = wire.pack_frame(ID, wire.VALUE, b"body")
    assert wire.unpack_frame(frame, ID) == (wire.VALUE, b"body")
    for bad in (frame[:-1], frame + b"x", frame * 2, b"", b"noise" + frame):
        with pytest.raises(wire.WireError):
            wire.unpack_frame(bad, ID)
    with pytest.raises(wire.WireError, match="nobody asked"):
        wire.unpack_frame(frame, bytes(16))
