"""The limits of one case as they travel into a sandbox: fixed-size, so that nothing has to be parsed inside.

Imports only the standard library.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("=dd4Q")
SIZE = _LAYOUT.size
"""Bytes of packed bounds."""


class Bounds(NamedTuple):
    """``SandboxLimits`` for the inside."""

    wall_s: float
    cpu_s: float
    memory_mb: int
    processes: int
    output_bytes: int
    file_mb: int

    def pack(self) -> bytes:
        """As ``SIZE`` bytes."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Bounds:
        """The reverse of ``pack``."""
        return cls(*_LAYOUT.unpack(data))
