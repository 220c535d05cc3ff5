"""The warden of the cells: makes one for every message of the judge, watches its case, and says how it ended.

Runs in the zygote, outside the namespaces of every cell, and handles only descriptors and limits: programs, arguments
and values pass through files that the case opens itself, so nothing of one run can be found in the memory of the next.
Imports only the standard library.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from agentopd_sandboxes import cell, linux, namespaces
from agentopd_sandboxes.bounds import Bounds
from agentopd_sandboxes.confine import Tools
from agentopd_sandboxes.scales import Scales
from agentopd_sandboxes.watch import Watch

FILES = 4
"""Descriptors that make a cell: the judge's socket, request, report, output."""


class Warden:
    """Serves the judge at the other end of ``control`` until it hangs up."""

    def __init__(self, control: socket.socket, tools: Tools) -> None:
        self.control = control
        self.tools = tools
        self.scales = Scales(tools.proc)
        self.made = 0
        self.cells: dict[int, _Cell] = {}
        self.begun, self.begin = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.poller = select.poll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.on(control.fileno(), select.POLLIN, self.make)
        self.on(self.begun, select.POLLIN, self.hear)

    def on(self, fd: int, events: int, handler: Callable[[], None]) -> None:
        """Have ``handler`` called when ``fd`` has one of the events, or is hung up."""
        self.poller.register(fd, events)
        self.handlers[fd] = handler

    def off(self, fd: int) -> None:
        """Close it and hear no more of it."""
        if self.handlers.pop(fd, None):
            self.poller.unregister(fd)
        os.close(fd)

    def serve(self) -> NoReturn:
        """Handle what comes, and look at the running cases in between."""
        while True:
            running = [found for found in self.cells.values() if found.watch is not None and not found.killed]
            left = min((found.watch.left_s() for found in running if found.watch), default=None)
            for fd, _ in self.poller.poll(None if left is None else left * 1000 + 1):
                if handler := self.handlers.get(fd):  # not one that went in this very round
                    handler()
            for found in running:
                if found.number in self.cells and found.watch is not None and (why := found.watch.look()):
                    found.kill(why)

    def make(self) -> None:
        """Make the cell that the judge asks for."""
        message, fds, _, _ = socket.recv_fds(self.control, 64, FILES)
        if not message:
            os._exit(0)  # and every cell with us
        self.made += 1
        judge = fds[0]
        try:
            pid = linux.clone(namespaces.CELL_FLAGS)
            if pid == 0:
                cell.be(self.tools, self.made, fds, self.begin, int(message))
            made = _Cell(self.made, pid, judge, os.pidfd_open(pid))
        except OSError as exc:
            with suppress(OSError):
                cell.refuse(judge, exc)
            os.close(judge)
        else:
            self.cells[made.number] = made
            self.on(made.ending, select.POLLIN, lambda: self.collect(made))
            self.on(judge, 0, lambda: self.abandon(made))
        for fd in fds[1:]:
            os.close(fd)

    def abandon(self, found: _Cell) -> None:
        """Kill a cell whose judge hung up: nobody waits for the answer."""
        self.poller.unregister(found.judge)
        del self.handlers[found.judge]
        found.kill("unwanted")

    def hear(self) -> None:
        """Start the clocks of the cases that say they begin. Only a cell without a program in it can say so."""
        with suppress(BlockingIOError):
            while said := os.read(self.begun, cell.BEGUN.size):
                number, started, bounds = cell.BEGUN.unpack(said)
                if found := self.cells.get(number):
                    found.watch = Watch(self.scales, found.pid, Bounds.unpack(bounds), started)

    def collect(self, found: _Cell) -> None:
        """Tell the judge how a cell ended. The kernel has cleared away all that was in it."""
        self.hear()
        _, status, usage = os.wait4(found.pid, 0)
        report: dict[str, Any] = {"killed": found.killed, "cpu_s": usage.ru_utime + usage.ru_stime}
        if not found.killed:
            report["status"] = status
        if found.watch is not None:
            report["wall_ms"] = found.watch.wall_ms()
        with suppress(OSError):
            os.write(found.judge, json.dumps(report).encode())
        del self.cells[found.number]
        self.off(found.ending)
        self.off(found.judge)


class _Cell:
    """A cell from outside."""

    def __init__(self, number: int, pid: int, judge: int, ending: int) -> None:
        self.number = number
        self.pid = pid
        self.judge = judge
        self.ending = ending
        self.watch: Watch | None = None
        self.killed = ""

    def kill(self, why: str) -> None:
        """Kill everything in it; ``collect`` follows when all of it is gone."""
        if not self.killed:
            self.killed = why
            os.kill(self.pid, signal.SIGKILL)
