"""What honest programs find inside, and the limits they live under."""

from collections.abc import Callable

import pytest

from agentopd.contracts import CaseResult, CaseStatus, SandboxLimits
from agentopd.errors import TaskError

Run = Callable[..., CaseResult]

HONEST = {
    "value": ("def f(): return {'a': (1, 2.5, None), 'b': {True}, b'c': frozenset('x')}", None),
    "main guard": ("import sys\ndef f(): return 1\nif __name__ == '__main__': sys.exit(1)", 1),
    "debug output": ("def f():\n    print('debug')\n    return 2", 2),
    "threads": (
        "import threading\nout = []\ndef f():\n"
        "    threads = [threading.Thread(target=out.append, args=(i,)) for i in range(4)]\n"
        "    [t.start() for t in threads]; [t.join() for t in threads]\n    return sorted(out)",
        [0, 1, 2, 3],
    ),
    "processes": (
        "import multiprocessing\ndef g(x): return x * x\n"
        "def f():\n    with multiprocessing.get_context('fork').Pool(2) as pool: return pool.map(g, [1, 2, 3])",
        [1, 4, 9],
    ),
    "recursion": ("def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(): return g(900)", 900),
    "temporary files": (
        "import tempfile\ndef f():\n    with tempfile.TemporaryFile() as file:\n"
        "        file.write(b'x'); file.seek(0)\n        return file.read()",
        b"x",
    ),
    "asyncio": ("import asyncio\nasync def g(): return 5\ndef f(): return asyncio.run(g())", 5),
    "dataclasses": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(): return P(3).x", 3),
    "a late import": (
        "import sqlite3, colorsys\ndef f(): return sqlite3.connect(':memory:').execute('select 7').fetchone()",
        (7,),
    ),
    "a parser": ("import xml.etree.ElementTree as e\ndef f(): return e.fromstring('<a><b/></a>')[0].tag", "b"),
    "suspicious words": ("text = 'os.system exit'  # sys.exit(0)\ndef f(): return text", "os.system exit"),
    "own source": ("import inspect\ndef f(): return inspect.getsource(f)\n", "def f(): return inspect.getsource(f)\n"),
    "annotations are the program's own": ("def g(x: int): pass\ndef f(): return g.__annotations__['x'] is int", True),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_work(run: Run, name: str) -> None:
    source, expected = HONEST[name]
    result = run(source)
    assert result.status is CaseStatus.VALUE, result
    if expected is not None:
        assert type(result.value) is type(expected) and result.value == expected


def test_args_setup_and_expression_share_the_programs_names(run: Run) -> None:
    result = run("def f(x, y): return x + y", " f(*args, ) + extra", setup="extra = [args[0][0]]", args=([1], [2]))
    assert result.value == [1, 2, 1]


def test_support_files_are_importable_and_kept_apart_from_the_standard_library(run: Run) -> None:
    files = {"helper.py": "X = 4", "pkg/__init__.py": "", "pkg/data.txt": "deep"}
    result = run("import helper\ndef f(): return helper.X, open('pkg/data.txt').read()", files=files)
    assert result.value == (4, "deep")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a\0b"])
def test_support_files_stay_in_their_directory(run: Run, name: str) -> None:
    with pytest.raises(TaskError, match="relative path"):
        run("", "1", files={name: "x"})


def test_arguments_must_be_plain_data(run: Run) -> None:
    with pytest.raises(TaskError, match="'object'"):
        run("", "1", args=(object(),))


def test_runs_are_reproducible(run: Run) -> None:
    source = "import random\ndef f(): return [random.random(), list({'b', 'a', 'c', 'd'}), hash('x')]"
    assert run(source).value == run(source).value


def test_output_is_kept_and_cut_with_a_marker(run: Run) -> None:
    result = run(
        "import sys\ndef f():\n    sys.stdout.buffer.write(b'ok \\xff\\x00\\n')\n    print('x' * 500)\n    return 1",
        limits=SandboxLimits(output_bytes=100),
    )
    assert result.value == 1
    assert result.stdout.startswith("ok \ufffd\x00\nxxx")
    assert result.stdout.endswith("[output cut at 100 bytes]")


def test_what_is_said_of_a_failure_is_text_that_can_be_written(run: Run) -> None:
    result = run("def f(): raise ValueError('half of ' + chr(0xd83d))")
    assert (result.status, result.detail) == (CaseStatus.EXCEPTION, "ValueError: half of ?")


def test_the_environment_holds_nothing_of_ours(run: Run) -> None:
    assert run("import os, sys", "(dict(os.environ), sys.argv)").value == (
        {"HOME": "/work", "TMPDIR": "/tmp", "LANG": "C.UTF-8"},
        ["/work/solution.py"],
    )


def test_nothing_is_left_for_the_next_case(run: Run) -> None:
    leave = """
import os, builtins, math
def f():
    for place in ('/tmp', '/work', '/dev/shm'):
        open(place + '/mark', 'w').write('x')
    builtins.mark = math.mark = os.environ['MARK'] = 'x'
    return True
"""
    look = """
import os, builtins, math
def f(): return [p for p in ('/tmp/mark', '/work/mark', '/dev/shm/mark') if os.path.exists(p)] + [
    hasattr(builtins, 'mark'), hasattr(math, 'mark'), 'MARK' in os.environ]
"""
    for _ in range(3):
        assert run(leave).value is True
        assert run(look).value == [False, False, False]


@pytest.mark.slow
def test_processor_time_is_limited_apart_from_the_clock(run: Run) -> None:
    result = run("def f():\n    while 1: pass", limits=SandboxLimits(wall_s=120, cpu_s=1))
    assert result.status is CaseStatus.TIMEOUT and "CPU" in result.detail
