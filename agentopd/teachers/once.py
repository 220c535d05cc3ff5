"""Questions that are worked on once, however often they are asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

Reply = tuple[int, bytes]
"""Status and body."""
OK = 200


class Once:
    """Lets a question that is asked again join the work on it, or take the answer that did not reach who asked first.

    A client that ran out of patience asks again: without this a slow teacher would be given the same work over and
    over. Thread-safe. At most ``most_kept`` answers wait for who asks again; faults do not.
    """

    def __init__(self, most_kept: int = 16) -> None:
        self._most_kept = most_kept
        self._lock = threading.Lock()
        self._answers: dict[bytes, Future[Reply]] = {}
        """Under way or not yet delivered, oldest first."""

    def ask(self, key: bytes, work: Callable[[], Reply]) -> Reply:
        """What ``work`` returns, from whoever asked first. What it raises passes, to all who wait for it."""
        with self._lock:
            answer = self._answers.get(key)
            mine = answer is None
            if answer is None:
                answer = self._answers[key] = Future()
        if mine:
            self._do(key, work, answer)
        return answer.result()

    def delivered(self, key: bytes) -> None:
        """Somebody has the answer: forget it."""
        with self._lock:
            answer = self._answers.get(key)
            if answer is not None and answer.done():
                del self._answers[key]

    def _do(self, key: bytes, work: Callable[[], Reply], answer: Future[Reply]) -> None:
        try:
            reply = work()
        except BaseException as exc:
            with self._lock:
                del self._answers[key]
            answer.set_exception(exc)
            return
        with self._lock:
            answer.set_result(reply)
            if reply[0] != OK:
                del self._answers[key]
            done = [known for known, other in self._answers.items() if other.done()]
            for known in done[: max(0, len(done) - self._most_kept)]:
                del self._answers[known]
