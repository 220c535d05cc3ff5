"""Who owns a sandbox, and until when: so that a later process can remove what a killed one left behind.

An owner is a process named by machine boot, pid and start time, so that neither a reboot nor a reused pid confuses
anybody. Deadlines are on the clock that no one can set, and only mean something within one boot.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from agentopd.errors import SandboxError

LIFETIME_S = 24 * 3600.0
"""A sandbox that is still there after this long was forgotten, even if its owner lives."""
LABEL = "agentopd.sandbox"
OWNER, DEADLINE = "agentopd.owner", "agentopd.deadline"
MAX_LIVE = 256
"""Most sandboxes that all processes together may have on one engine."""


def boot_id() -> str:
    """Changes with every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


@dataclass(frozen=True)
class Owner:
    """A process of one boot of one machine."""

    boot: str
    pid: int
    started: str

    @classmethod
    def me(cls) -> Owner:
        """The calling process."""
        pid = os.getpid()
        return cls(boot_id(), pid, start_time(pid) or "")

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The reverse of ``str``; None for anything else."""
        boot, _, rest = text.partition(":")
        pid, _, started = rest.partition(":")
        return cls(boot, int(pid), started) if boot and pid.isdigit() and started else None

    def __str__(self) -> str:
        return f"{self.boot}:{self.pid}:{self.started}"

    def lives(self) -> bool | None:
        """Whether it runs; None if it belongs to another machine or boot, of which nothing is known here."""
        return start_time(self.pid) == self.started if self.boot == boot_id() else None


def now_s() -> float:
    """Seconds since boot, sleep included; no setting of the clock changes it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def labels() -> dict[str, str]:
    """What a container carries: that it is a sandbox, whose, and until when."""
    return {LABEL: "1", OWNER: str(Owner.me()), DEADLINE: f"{now_s() + LIFETIME_S:.0f}"}


def is_stale(found: dict[str, str]) -> bool:
    """Whether a container with these labels can be removed: its owner is gone, or its deadline is."""
    owner = Owner.parse(found.get(OWNER, ""))
    if owner is None:
        return True
    lives = owner.lives()
    if lives is None:
        return False
    return not lives or now_s() > float(found.get(DEADLINE, "0"))


def check_room(live: int) -> None:
    """Refuse one more sandbox where there are too many."""
    if live >= MAX_LIVE:
        raise SandboxError(
            f"there are {live} sandboxes on this engine, of at most {MAX_LIVE}: run `agentopd sandbox prune`, "
            "or wait for other runs to end"
        )
