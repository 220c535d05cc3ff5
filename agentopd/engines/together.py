"""The parts of all ranks in what one rank cannot do alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from agentopd.engines.broadcast import Endless
from agentopd.errors import EngineError
from agentopd.learner import runtime

T = TypeVar("T")


def together(work: Callable[[], T]) -> list[T]:
    """Do this rank's part and wait for the others'; what each returned, in rank order.

    What fails on one rank fails on all, so that none waits for one that is gone. ``Endless`` alone is raised at once:
    the others may stand in a collective that this rank has left, and would not hear of it.
    """
    made: T | None = None
    fault: Exception | None = None
    try:
        made = work()
    except Endless:
        raise
    except Exception as exc:
        fault = exc
    said = runtime.gather_objects((made, fault and f"{type(fault).__name__}: {fault}"))
    if fault is not None:
        raise fault
    for rank, (_, why) in enumerate(said):
        if why is not None:
            raise EngineError(f"rank {rank} failed: {why}")
    return [part for part, _ in said]
