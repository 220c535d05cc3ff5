"""The locks that do not depend on a case's limits: put on once, before any program is there.

Imports only the standard library.
"""

from __future__ import annotations

import resource
from typing import NamedTuple

from agentopd_sandboxes import case, linux

OPEN_FILES = 64
STACK_BYTES = 8 << 20


class Tools(NamedTuple):
    """What a case's process is given by whoever makes it."""

    proc: int
    """Descriptor of the ``/proc`` in which the processes of a case can be seen."""
    ruleset: int | None
    """A Landlock ruleset."""
    filter: bytes
    """A system-call filter."""


def lower_limits() -> None:
    """Put on the limits that neither a case nor its maker needs to exceed."""
    for kind, most in (
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        case.lower(kind, most)
    linux.no_new_privileges()


def lock_down(tools: Tools) -> None:
    """Put on what every case of the caller inherits, after ``lower_limits``; Landlock is left to it."""
    linux.make_dumpable(False)
    case.lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    linux.drop_capabilities()
    linux.install_filter(tools.filter)
