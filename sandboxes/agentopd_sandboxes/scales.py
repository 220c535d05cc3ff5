"""What a case's processes weigh, and how long they waited for a processor: read from ``/proc`` by its number.

Imports only the standard library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

PAGE = os.sysconf("SC_PAGE_SIZE")
NANOSECONDS = 1e-9


class Scales:
    """Looks at the descendants of the calling process: those of the running case."""

    def __init__(self, proc: int) -> None:
        self.proc = proc
        self.me = os.readlink("self", dir_fd=proc)

    def weigh(self) -> int:
        """Private memory of all processes of the running case together, bytes."""
        return PAGE * sum(self._private_pages(pid) for pid in self._cases())

    def waited_s(self) -> float:
        """The longest that one thread of the running case was ready to run and did not, seconds."""
        return max((self._waited(pid) for pid in self._cases()), default=0.0)

    def sees_children(self) -> bool:
        """Whether the kernel tells which processes belong to a case."""
        return self._children(self.me) is not None

    def _cases(self) -> Iterator[str]:
        todo = list(self._children(self.me) or ())
        while todo:
            pid = todo.pop()
            yield pid
            todo += self._children(pid) or ()

    def _children(self, pid: str) -> list[str] | None:
        """Pids of all children of all threads of a process; None where the kernel hides them, or it ended."""
        try:
            return [child for task in self._tasks(pid) for child in self._read(f"{pid}/task/{task}/children").split()]
        except OSError:
            return None

    def _tasks(self, pid: str) -> list[str]:
        directory = os.open(f"{pid}/task", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc)
        try:
            return os.listdir(directory)
        finally:
            os.close(directory)

    def _private_pages(self, pid: str) -> int:
        try:
            _, resident, shared, *_ = self._read(f"{pid}/statm").split()
        except (OSError, ValueError):
            return 0  # it ended while we looked
        return int(resident) - int(shared)

    def _waited(self, pid: str) -> float:
        """Needs no more than a kernel with scheduler statistics; 0 without."""
        try:
            waits = [int(self._read(f"{pid}/task/{task}/schedstat").split()[1]) for task in self._tasks(pid)]
            return max(waits) * NANOSECONDS
        except (OSError, ValueError, IndexError):
            return 0.0

    def _read(self, path: str) -> str:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc)
        try:
            return os.read(fd, 1 << 16).decode()
        finally:
            os.close(fd)
