"""An event loop in a thread of its own, for clients that outlive the loops of those who call them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_GRACE_S = 5.0
"""Tasks that are cancelled at the end have this long to clean up."""
_HURRY_S = 0.2
"""Pause between calls of ``hurry``: what was about to begin is met by the next."""


class BackgroundLoop:
    """Runs coroutines for callers with another event loop, or with none. ``close`` it when done."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work`` from another loop; cancelling the caller cancels it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def wait(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Block until ``work`` is done. Raises ``TimeoutError`` past the deadline."""

        async def bounded() -> T:
            async with asyncio.timeout(timeout_s):
                return await work

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._loop.is_closed()

    def close(self) -> None:
        """Stop the loop and its thread; idempotent."""
        if not self.closed:
            asyncio.run_coroutine_threadsafe(_cancel_the_rest(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class Gate:
    """Lets work through while it is open; closing it waits for the work inside. Of one event loop."""

    def __init__(self) -> None:
        self._inside = 0
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()

    async def __aenter__(self) -> None:
        await self._open.wait()
        self._inside += 1
        self._empty.clear()

    async def __aexit__(self, *exc: object) -> None:
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    async def close(self, hurry: Callable[[], Awaitable[object]] | None = None) -> None:
        """Let nothing more through, and wait for what is inside; ``hurry`` is called until nothing is."""
        self._open.clear()
        while hurry is not None and self._inside:
            await hurry()
            with suppress(TimeoutError):
                async with asyncio.timeout(_HURRY_S):
                    await self._empty.wait()
        await self._empty.wait()

    async def open(self) -> None:
        """Let work through again."""
        self._open.set()


async def _cancel_the_rest() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=_GRACE_S)
