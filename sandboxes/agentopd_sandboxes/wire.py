"""Values and frames that cross the wall: typed, bounded, and never executable.

Used on both sides, so it imports only the standard library. The judge decodes what hostile code may have written, so
the decoder accepts exactly what the encoder can produce and nothing else: exact built-in types, bounded depth, count
and size, no trailing bytes, no two equal keys, and no crowd of keys that share one hash (which would make the judge's
own sets and dictionaries quadratic).

Layout of a value: one tag byte, then ``n`` ``t`` ``f`` (none, true, false) nothing; ``d`` an IEEE double; ``i`` ``s``
``b`` a 32-bit length and that many bytes (two's complement, UTF-8, raw); ``[`` ``(`` ``<`` ``*`` ``{`` (list, tuple,
set, frozenset, dict) a 32-bit count and that many values (keys and values in turn for a dict).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sized
from typing import Any, TypeVar

MAX_BYTES = 1 << 20
"""Largest encoded result, bytes."""
MAX_REQUEST_BYTES = 64 << 20
"""Largest encoded request (program, support files and arguments), bytes."""
MAX_DEPTH = 64
MAX_NODES = 100_000
"""Most parts (items, keys) of an encoded result."""
MAX_REQUEST_NODES = 2_000_000
MAX_INT_BITS = 14_280
"""The largest integers are just under the 4300 decimal digits that Python prints, so a judge may print any value."""
MAX_HASH_CROWD = 32
ID_BYTES = 16

_Sized = TypeVar("_Sized", bound=Sized)

_COUNT = struct.Struct(">I")
_DOUBLE = struct.Struct(">d")
_FRAME = struct.Struct(f">I{ID_BYTES}sc")


class WireError(ValueError):
    """Bytes that are not a well-formed value or frame."""


class WireTypeError(WireError):
    """A value of a type that does not travel."""


class WireSizeError(WireError):
    """A value that is too large, too deep or has too many parts."""


# --- encoding --------------------------------------------------------------------------------------------------------


def encode(value: Any, max_bytes: int = MAX_BYTES, max_nodes: int = MAX_NODES) -> bytes:
    """Encode plain data of exact built-in types; ``WireTypeError`` or ``WireSizeError`` says why not."""
    encoder = _Encoder(max_bytes, max_nodes)
    encoder.put(value, MAX_DEPTH)
    return bytes(encoder.out)


class _Encoder:
    def __init__(self, max_bytes: int, max_nodes: int) -> None:
        self.out = bytearray()
        self.max_bytes = max_bytes
        self.max_nodes = max_nodes
        self.nodes = 0

    def put(self, value: Any, depth: int) -> None:
        self.nodes += 1
        if depth < 0:
            raise WireSizeError(f"nested deeper than {MAX_DEPTH}")
        if self.nodes > self.max_nodes:
            raise WireSizeError(f"more than {self.max_nodes} parts")
        kind = type(value)
        if kind in _ATOMS:
            self.atom(kind, value)
        elif kind in _TAG_OF:
            self.counted(_TAG_OF[kind], len(value))
            for item in value:
                self.put(item, depth - 1)
        elif kind is dict:
            self.counted(b"{", len(value))
            for key, item in value.items():
                self.put(key, depth - 1)
                self.put(item, depth - 1)
        else:
            raise WireTypeError(f"a value of type {kind.__name__!r} is not plain data")
        if len(self.out) > self.max_bytes:
            raise WireSizeError(f"larger than {self.max_bytes} bytes")

    def atom(self, kind: type, value: Any) -> None:
        if value is None or kind is bool:
            self.out += b"n" if value is None else b"t" if value else b"f"
        elif kind is float:
            self.out += b"d" + _DOUBLE.pack(value)
        elif kind is int:
            if value.bit_length() > MAX_INT_BITS:
                raise WireSizeError(f"an integer of more than {MAX_INT_BITS} bits")
            self.sized(b"i", value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
        elif len(value) > self.max_bytes:
            raise WireSizeError(f"larger than {self.max_bytes} bytes")
        elif kind is str:
            self.sized(b"s", value.encode("utf-8", "surrogatepass"))
        else:
            self.sized(b"b", value)

    def counted(self, tag: bytes, count: int) -> None:
        self.out += tag + _COUNT.pack(min(count, 0xFFFFFFFF))

    def sized(self, tag: bytes, data: bytes) -> None:
        self.counted(tag, len(data))
        self.out += data


_ATOMS = frozenset((type(None), bool, int, float, str, bytes))
_TAG_OF: dict[type, bytes] = {list: b"[", tuple: b"(", set: b"<", frozenset: b"*"}
_TYPE_OF: dict[bytes, type[Any]] = {tag: kind for kind, tag in _TAG_OF.items()}


# --- decoding --------------------------------------------------------------------------------------------------------


def decode(data: bytes, max_nodes: int = MAX_NODES) -> Any:
    """Decode one value that fills ``data`` exactly; ``WireError`` on anything else."""
    decoder = _Decoder(data, max_nodes)
    value = decoder.take(MAX_DEPTH)
    if decoder.at != len(data):
        raise WireError("bytes after the value")
    return value


class _Decoder:
    def __init__(self, data: bytes, max_nodes: int) -> None:
        self.data = data
        self.max_nodes = max_nodes
        self.at = 0
        self.nodes = 0

    def read(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise WireError("cut short")
        part = self.data[self.at : end]
        self.at = end
        return part

    def count(self) -> int:
        (count,) = _COUNT.unpack(self.read(4))
        return int(count)

    def take(self, depth: int) -> Any:
        self.nodes += 1
        if depth < 0 or self.nodes > self.max_nodes:
            raise WireSizeError("too deep or too many parts")
        tag = self.read(1)
        if tag == b"{":
            return self.mapping(self.count(), depth - 1)
        if tag in _TYPE_OF:
            return self.container(_TYPE_OF[tag], self.count(), depth - 1)
        return self.atom(tag)

    def atom(self, tag: bytes) -> Any:
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag == b"d":
            return _DOUBLE.unpack(self.read(8))[0]
        if tag == b"i":
            return self.integer(self.read(self.count()))
        if tag == b"b":
            return self.read(self.count())
        if tag == b"s":
            try:
                return self.read(self.count()).decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as exc:
                raise WireError("a string that is not UTF-8") from exc
        raise WireError(f"unknown tag {tag!r}")

    def integer(self, raw: bytes) -> int:
        value = int.from_bytes(raw, "big", signed=True)
        if value.bit_length() > MAX_INT_BITS or len(raw) != value.bit_length() // 8 + 1:
            raise WireError("an integer that is too large or padded")
        return value

    def container(self, kind: type[Any], count: int, depth: int) -> Any:
        items = [self.take(depth) for _ in range(self.fits(count))]
        if kind in (list, tuple):
            return kind(items)
        _check_keys(items)
        return _distinct(kind(items), count)

    def mapping(self, count: int, depth: int) -> dict[Any, Any]:
        pairs = [(self.take(depth), self.take(depth)) for _ in range(self.fits(count))]
        _check_keys([key for key, _ in pairs])
        return _distinct(dict(pairs), count)

    def fits(self, count: int) -> int:
        if count > len(self.data) - self.at:
            raise WireError("cut short")
        return count


def _check_keys(keys: list[Any]) -> None:
    try:
        hashes = [hash(key) for key in keys]
    except TypeError as exc:
        raise WireError("an unhashable key") from exc
    if len(hashes) > MAX_HASH_CROWD and max(Counter(hashes).values()) > MAX_HASH_CROWD:
        raise WireError("too many keys with one hash")


def _distinct(container: _Sized, count: int) -> _Sized:
    if len(container) != count:
        raise WireError("two equal keys")
    return container


_CONSTANTS: dict[bytes, bool | None] = {b"n": None, b"t": True, b"f": False}


# --- frames ----------------------------------------------------------------------------------------------------------


VALUE, EXCEPTION, RESOURCE, BAD_TYPE = b"V", b"E", b"M", b"T"
"""Kinds of a frame: a value; or a description of what was raised, what ran out, or what cannot travel."""


def pack_frame(request_id: bytes, kind: bytes, body: bytes) -> bytes:
    """The one frame a case may report: total length, request id, kind (one byte), body."""
    return _FRAME.pack(_FRAME.size + len(body), request_id, kind) + body


def unpack_frame(data: bytes, request_id: bytes) -> tuple[bytes, bytes]:
    """The kind and body of the only frame in ``data``; ``WireError`` if there is more, less, or a foreign id."""
    if len(data) < _FRAME.size:
        raise WireError("a frame cut short")
    length, got_id, kind = _FRAME.unpack_from(data)
    if length != len(data):
        raise WireError(f"a frame of {length} bytes in a report of {len(data)}")
    if got_id != request_id:
        raise WireError("a frame nobody asked for")
    return kind, data[_FRAME.size :]


MAX_FRAME_BYTES = MAX_BYTES + _FRAME.size
