"""The main module of a server that must not outlive whoever started it, kill -9 included.

Run by its path, so that nothing of AgentOPD is imported into the server; its first argument names the module to run.
vLLM's processes are spawned, and a spawned process imports its parent's main module: so each of them, too, dies with
the process above it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
PARENT = "AGENTOPD_STARTED_BY"
"""Names the variable with the process id of whoever starts the next process."""


def _die_with_the_parent() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # A parent that died before that sends no signal.
    if os.getppid() != int(os.environ[PARENT]):
        sys.exit("whoever started this process is gone")
    os.environ[PARENT] = str(os.getpid())


if __name__ in ("__main__", "__mp_main__"):
    _die_with_the_parent()

if __name__ == "__main__":
    import runpy
    import warnings

    warnings.simplefilter("ignore", DeprecationWarning)  # of vLLM's own modules
    runpy.run_module(sys.argv.pop(1), run_name="__main__")
