"""What a case's processes weigh, and how long they waited for a processor: read from ``/proc`` by its number.

Imports only the standard library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

PAGE = os.sysconf("SC_PAGE_SIZE")
NANOSECONDS = 1e-9


class Scales:
    """Looks at children of the calling process, and at what descends from them.

    A child is named by its pid as the caller knows it, which may be another in ``proc``.
    """

    def __init__(self, proc: int) -> None:
        self.proc = proc
        self.me = os.readlink("self", dir_fd=proc)
        self._known: tuple[int, str | None] = (0, None)

    def weigh(self, child: int) -> int:
        """Memory of a child and all its descendants together, without that of files on a disk, bytes.

        Memory that several of them share counts for each that has touched it: their locks hide from this process too
        which of their pages are the same.
        """
        return sum(PAGE * self._private_pages(pid) + self._shared(pid) for pid in self._family(child))

    def waited_s(self, child: int) -> float:
        """The longest that one thread of them was ready to run and did not, seconds."""
        return max((self._waited(pid) for pid in self._family(child)), default=0.0)

    def sees_children(self) -> bool:
        """Whether the kernel tells which processes belong to a case."""
        return self._children(self.me) is not None

    def _family(self, child: int) -> Iterator[str]:
        known, name = self._known
        if known != child or name is None:
            name = self._name(child)
            self._known = (child, name)
        todo = [name] if name is not None else []
        while todo:
            pid = todo.pop()
            yield pid
            todo += self._children(pid) or ()

    def _name(self, child: int) -> str | None:
        """A child's pid in ``proc``: that of the one whose pid among the caller's is the given one."""
        level = self._pids(self.me)
        if not level:
            return str(child)  # a kernel that does not tell, and so has one namespace
        for pid in self._children(self.me) or ():
            pids = self._pids(pid)
            if len(pids) >= len(level) and pids[len(level) - 1] == str(child):
                return pid
        return None

    def _pids(self, pid: str) -> list[str]:
        """All pids of a process, from the namespace of ``proc`` inwards to its own."""
        try:
            _, _, after = self._read(f"{pid}/status").partition("\nNSpid:")
        except OSError:
            return []  # it ended while we looked
        return after.partition("\n")[0].split()

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

    def _shared(self, pid: str) -> int:
        """Anonymous shared memory and files in memory, as far as the process has touched them, bytes."""
        try:
            _, _, after = self._read(f"{pid}/status").partition("\nRssShmem:")
            return int(after.split(maxsplit=1)[0]) << 10
        except (OSError, IndexError):
            return 0  # it ended, or the kernel does not tell

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
