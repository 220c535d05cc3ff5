"""The interpreter from which cases are forked: what it has imported, and what a program finds in it.

Imports only the standard library.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import signal
import sys

from agentopd_sandboxes import case

COMMON = "bisect collections functools heapq itertools json math operator re string typing"
_PRELOAD = f"""{COMMON}
_bz2 _ctypes _decimal _hashlib _lzma _sqlite3 _uuid pyexpat array calendar cmath collections.abc contextlib copy
dataclasses datetime decimal enum fractions hashlib inspect io numbers pprint queue random statistics struct tempfile
textwrap threading time traceback types unicodedata zlib
"""
"""Imported before any case forks, so that a case pays nothing for them. The underscored ones are extension modules with
system libraries behind them, which cannot be loaded later because the root has no system libraries."""


def preload(names: str = _PRELOAD) -> None:
    """Import what a case should not pay for."""
    for name in names.split():
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # an interpreter built without it; the program that wants it will say so


def tidy_interpreter(environ: dict[str, str]) -> None:
    """Leave the payload an interpreter that looks freshly started, and the same one every time."""
    for name in [name for name in sys.modules if name.split(".")[0] == __package__]:
        del sys.modules[name]
    sys.modules["__main__"].__dict__.clear()
    os.environ.clear()
    os.environ.update(environ)
    sys.argv[:] = [case.MAIN_FILE]
    sys.path.insert(0, case.WORK)
    random.seed(0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process of a pid namespace gets no signal without handler
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def freeze() -> None:
    """Settle the memory of the interpreter: a collection in a fork would write to all of it."""
    gc.collect()
    gc.freeze()
    gc.disable()
