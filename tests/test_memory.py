import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading, torch
from agentopd.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    for _ in range(5):
        [torch.ones(size * 250_000) for size in (1, 30, 5, 20, 10, 30, 2)]  # megabytes, freed together
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def body():
    faults()
    print(faults())
thread = threading.Thread(target=body)  # one that stays, as that of the backward pass
thread.start()
thread.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's allocator can be told")
def test_freed_tensors_are_not_faulted_in_again() -> None:
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # the thread that frees is then the one that allocates
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, check=True, env=one).stdout)
        for how in ("keep", "default")
    }
    assert faults["keep"] < 0.1 * faults["default"]
