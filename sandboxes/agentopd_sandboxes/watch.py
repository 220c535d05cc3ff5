"""The clock and the scales beside one running case.

Imports only the standard library.
"""

from __future__ import annotations

import time

from agentopd_sandboxes.bounds import Bounds
from agentopd_sandboxes.scales import Scales

TICK_S = 0.05
"""How often memory is looked at, and so how coarse that limit is."""
PATIENCE = 3.0
"""The wall clock stands still while a case waits for a processor, until this many times its limit are over."""


class Watch:
    """Says when a case is over its limits; killing it is left to the caller."""

    def __init__(self, scales: Scales, pid: int, bounds: Bounds, started: float) -> None:
        self._scales = scales
        self._pid = pid
        self._wall_s = bounds.wall_s
        self._memory_bytes = bounds.memory_mb << 20
        self.started = started
        self._deadline = started + bounds.wall_s
        self._weighing = started + TICK_S

    def left_s(self) -> float:
        """How long nobody needs to look, seconds."""
        return max(0.0, min(self._deadline, self._weighing) - time.monotonic())

    def look(self) -> str:
        """``wall`` or ``memory`` if the case has to be killed, else empty."""
        now = time.monotonic()
        if now >= self._deadline and not self._extend():
            return "wall"
        if now >= self._weighing:
            if self._scales.weigh(self._pid) > self._memory_bytes:
                return "memory"
            self._weighing = time.monotonic() + TICK_S
        return ""

    def _extend(self) -> bool:
        """Move the deadline by the time the case spent waiting for a processor; False if there is no such time."""
        owed = min(self._scales.waited_s(self._pid), (PATIENCE - 1) * self._wall_s)
        self._deadline = self.started + self._wall_s + owed
        return self._deadline > time.monotonic()

    def wall_ms(self) -> float:
        """Since the case began, milliseconds."""
        return (time.monotonic() - self.started) * 1000
