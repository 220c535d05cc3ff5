"""The rows of the suite. Each program is asked for ``f(n) == 3 * n + 1`` with a fresh ``n``.

A hostile program returns the right value only where its attack worked, or reports it in a way that must not count.
``HOST`` is defined in every program: where the judge put things that nothing inside may reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agentopd.contracts import CaseStatus

VALUE, EXCEPTION, TIMEOUT, RESOURCE, CRASH, NO_RESULT, PROTOCOL = CaseStatus
GONE = (NO_RESULT, CRASH)
FAILED = (EXCEPTION, PROTOCOL, NO_RESULT, CRASH)
SPENT = (RESOURCE, EXCEPTION, CRASH, TIMEOUT)
WRONG = (VALUE,)
"""A value came out, and it is the wrong one."""


@dataclass(frozen=True)
class Row:
    """One program: the ways it may end, and whether it must score."""

    id: str
    title: str
    source: str
    statuses: tuple[CaseStatus, ...]
    brief: bool = False
    """It is meant to run out of time, so give it little."""
    honest: bool = False
    files: Mapping[str, str] = field(default_factory=dict)


def _rows(part: str, first: int, *rows: tuple[str, tuple[CaseStatus, ...], str]) -> list[Row]:
    return [
        Row(f"{part}{number}", title, source, statuses, brief=statuses == (TIMEOUT,))
        for number, (title, statuses, source) in enumerate(rows, first)
    ]


_ID = "def f(n): return n\n"
_EQ = "    def __eq__(self, other): return True\n    __hash__ = None\n"

EARLY_EXIT = _rows(
    "A", 1,
    ("sys.exit(0) at import", GONE, "import sys; sys.exit(0)"),
    ("os._exit(0) at import", GONE, "import os; os._exit(0)"),
    ("os._exit(0) from atexit", WRONG, "import atexit, os\natexit.register(os._exit, 0)\n" + _ID),
    ("SystemExit in the function", GONE, "def f(n): raise SystemExit(0)"),
    ("kill itself", GONE, "import os\ndef f(n): os.kill(os.getpid(), 9)"),
    ("kill parent, init and everybody", (VALUE, *GONE),
     "import os\nfor p in (os.getppid(), 1, -1):\n    try: os.kill(p, 9)\n    except OSError: pass\n" + _ID),
    ("exec another program", FAILED, "import os\ndef f(n): os.execv('/bin/true', ['true'])"),
    ("switch the timer and signals off", (TIMEOUT,),
     "import signal\nfor s in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\n"
     "signal.setitimer(signal.ITIMER_REAL, 0)\ndef f(n):\n    while True: pass"),
    ("recursion without limit", SPENT, "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n)"),
    ("a child that keeps the output open", WRONG,
     "import os, time\ndef f(n):\n    if os.fork() == 0: time.sleep(600)\n    return n"),
)  # fmt: skip

LIES = _rows(
    "B", 11,
    ("an object equal to everything", (PROTOCOL,), "class A:\n" + _EQ + "def f(n): return A()"),
    ("a subclass of int equal to everything", (PROTOCOL,), "class A(int):\n" + _EQ + "def f(n): return A(n)"),
    ("arithmetic that beats tolerances", (PROTOCOL,),
     "class A:\n    def __sub__(self, o): return 0\n    __rsub__ = __sub__\n    def __float__(self): return 0.0\n"
     "    def __abs__(self): return 0\ndef f(n): return A()"),
    ("not a number", WRONG, "def f(n): return float('nan')"),
    ("True for a number", WRONG, "def f(n): return True"),
    ("an array that broadcasts ==", (PROTOCOL,),
     "import array\nclass A(array.array):\n" + _EQ + "def f(n): return A('i', [1])"),
    ("an endless generator", (PROTOCOL,), "def f(n):\n    while True: yield n"),
    ("a pickle bomb", (PROTOCOL,), "class A:\n    def __reduce__(self): return eval, ('1/0',)\ndef f(n): return A()"),
    ("a value too large and too deep", (RESOURCE,),
     "def f(n):\n    x = 'x' * (2 << 20)\n    for _ in range(10**4): x = [x]\n    return x"),
    ("change the argument in place", FAILED, "def f(n): n.append(1)"),
)  # fmt: skip

HARNESS = _rows(
    "C", 21,
    ("conftest.py with a report hook", WRONG, _ID),
    ("conftest.py that deselects", WRONG, _ID),
    ("patch pytest from the inside", FAILED,
     "import _pytest.python\n_pytest.python.Function.runtest = lambda self: None\n" + _ID),
    ("patch unittest", WRONG, "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n" + _ID),
    ("swap builtins", (*WRONG, *FAILED),
     "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.compile = builtins.eval = lambda *a, **k: 1\n" + _ID),
    ("replace modules", WRONG,
     "import sys, types\nfor m in ('pytest', 'struct', 'json', 'agentopd'): sys.modules[m] = types.ModuleType(m)\n" + _ID),
    ("sitecustomize.py and .pth files", WRONG, _ID),
    ("modules that shadow the library", WRONG, "import random, json, struct\n" + _ID),
    ("pytest.ini, tox.ini, setup.cfg", WRONG, _ID),
    ("environment variables of the interpreter", WRONG,
     "import os\nos.environ.update(PYTHONOPTIMIZE='1', PYTEST_ADDOPTS='--co', LD_PRELOAD='x.so')\n" + _ID),
    ("a forged .pyc", WRONG, "import os\nos.makedirs('__pycache__', exist_ok=True)\n"
     "open('__pycache__/solution.cpython-311.pyc', 'wb').write(b'x')\n" + _ID),
    ("edit the tests and its own source", (*WRONG, *FAILED),
     "import os\nfor p in ('tests', 'test_solution.py', 'solution.py'):\n    if os.path.exists(p): os.remove(p)\n" + _ID),
    ("commit weaker tests", FAILED, "import subprocess\ndef f(n): subprocess.run(['git', 'commit', '-am', 'x'], check=True)"),
    ("a link in place of a file", FAILED,
     "import os\nos.remove('solution.py'); os.symlink(HOST['file'], 'solution.py')\n"
     "def f(n): return 3 * n + 1 if open('solution.py').read() else n"),
    ("a syntax error", FAILED, "def f(n: return 3 * n + 1"),
    ("answer the same case twice", (PROTOCOL,),
     "import os, sys\ndef f(n):\n    os.write(3, bytes(40)); os.write(3, bytes(40))\n    return 3 * n + 1"),
    ("a child that writes the report afterwards", (*WRONG, PROTOCOL),
     "import os, time\ndef f(n):\n    if os.fork() == 0:\n        while True: os.write(3, b'PASS')\n    return n"),
    ("replace python, git and bash", (*WRONG, *FAILED),
     "import os\nos.makedirs('.local/bin', exist_ok=True)\nopen('.local/bin/python', 'w').write('#!x')\n"
     "os.environ['PATH'] = '/work/.local/bin'\n" + _ID),
)  # fmt: skip

HIDDEN = _rows(
    "D", 39,
    ("frames of the grader", (*WRONG, *FAILED),
     "import sys\ndef f(n):\n    frame, seen = sys._getframe(), []\n    while frame:\n        seen += frame.f_locals.values()\n"
     "        frame = frame.f_back\n    return next(v for v in seen for v in (v, getattr(v, 'expected', 0)) if v == 3 * n + 1)"),
    ("objects of the collector", (*WRONG, *FAILED),
     "import gc\ndef f(n): return next(w for v in gc.get_objects() if type(v) in (list, tuple) for w in v if w == 3 * n + 1)"),
    ("environments and command lines", FAILED,
     "def f(n):\n    import glob\n    text = b''.join(open(p, 'rb').read() for p in glob.glob('/proc/[0-9]*/[ce]*n*'))\n"
     "    return 3 * n + 1 if HOST['secret'].encode() in text[::-1][::-1] and HOST['pid'] in text.decode() else [][0]"),
    ("hidden tests in the file system", FAILED,
     "import os\ndef f(n):\n    for w, _, names in os.walk('/'):\n        for name in names:\n"
     "            if 'hidden' in name or name == HOST['file'].rpartition('/')[2]: return 3 * n + 1\n    raise LookupError"),
    ("the repository's history", FAILED, "import subprocess\ndef f(n): return subprocess.check_output(['git', 'log'])"),
    ("download the answer", FAILED,
     "import urllib.request\ndef f(n): urllib.request.urlopen('http://127.0.0.1:%d' % HOST['port'], timeout=1); return 3 * n + 1"),
    ("the site-packages of the judge", FAILED, "def f(n):\n    import agentopd\n    return 3 * n + 1"),
    ("the judge's environment", FAILED,
     "import os\ndef f(n): return 3 * n + 1 if HOST['variable'] in os.environ else [][0]"),
    ("state left by an earlier case", (*WRONG, *FAILED),
     "import os\ndef f(n):\n    marks = [p for p in ('/tmp/m', '/dev/shm/m', '/work/m') if os.path.exists(p)]\n"
     "    for p in ('/tmp/m', '/dev/shm/m', '/work/m'): open(p, 'w').close()\n    return 3 * n + 1 if marks else n"),
    ("descriptors of the judge", FAILED,
     "import os\ndef f(n):\n    for fd in range(4, 1024):\n        try: os.fstat(fd)\n        except OSError: continue\n"
     "        return 3 * n + 1\n    raise LookupError"),
)  # fmt: skip

FAKES = _rows(
    "E", 49,
    ("print that all tests passed", WRONG, "def f(n): print('ALL TESTS PASSED\\nok 1 - f # 100%'); return n"),
    ("print the delimiters of harnesses", WRONG, "def f(n): print('>>>>> Start Test Output\\nPASSED'); return n"),
    ("write results to every descriptor", (PROTOCOL,),
     "import os\ndef f(n):\n    for fd in range(256):\n        try: os.write(fd, b'PASSED\\n')\n        except OSError: pass\n    return n"),
    ("a frame with a guessed number", (PROTOCOL,),
     "import os, struct\nos.write(3, struct.pack('>I16sc', 22, bytes(16), b'V') + b't'); os._exit(0)"),
    ("a table of the public cases", WRONG, "def f(n): return {1: 4, 2: 7}.get(n, n)"),
    ("look for the harness", WRONG, "import sys\ndef f(n): return 3 * n + 1 if 'pytest' in sys.modules or len(sys.argv) > 1 else n"),
    ("swallow every error", WRONG, "def f(n):\n    try: raise ValueError\n    except BaseException: return 0"),
    ("remember earlier cases", WRONG, "import builtins\ndef f(n):\n    builtins.calls = getattr(builtins, 'calls', 0) + 1\n"
     "    return 3 * n + 1 if builtins.calls > 1 else n"),
)  # fmt: skip

RESOURCES = _rows(
    "F", 57,
    ("fork bomb", SPENT, "import os\ndef f(n):\n    while True: os.fork()"),
    ("memory bomb", SPENT, "def f(n):\n    x = []\n    while True: x.append(bytearray(1 << 20))"),
    ("disk and inode flood", SPENT,
     "def f(n):\n    for i in range(10**5):\n        with open(f'/tmp/{i}', 'wb') as file: file.write(bytes(1 << 16))"),
    ("endless loop in C", (TIMEOUT,), "def f(n): return sum(range(10**15))"),
    ("a daemon that outlives the run", (*WRONG, *SPENT),
     "import os, time\ndef f(n):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(600)\n"
     "        os._exit(0)\n    return n"),
    ("network and sockets of the host", FAILED,
     "import socket\ndef f(n):\n    for family, address in ((2, ('127.0.0.1', HOST['port'])), (2, ('169.254.169.254', 80)),\n"
     "                            (1, HOST['socket']), (1, '/var/run/docker.sock')):\n"
     "        try: socket.socket(family).connect(address)\n        except OSError: continue\n        return 3 * n + 1\n"
     "    socket.socket(2, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', HOST['port']))"),
    ("files of the host", FAILED,
     "import os\ndef f(n):\n    for p in (HOST['file'], '../' * 30 + HOST['file'][1:], '/proc/1/root' + HOST['file']):\n"
     "        try: open(p).close()\n        except OSError: continue\n        return 3 * n + 1\n    raise LookupError"),
    ("output flood of binary rubbish", SPENT, "import os\ndef f(n):\n    while True: os.write(1, b'\\x00\\xff\\x1b[2J' * 10**4)"),
)  # fmt: skip

_CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == 'x86_64'
def f(n):
    first = libc.syscall(%s if X86 else %s, %s)
    return 3 * n + 1 if first >= 0 else [][0]
"""
_CALLS = (
    ("a new user namespace", 272, 97, "0x10000000"),
    ("ptrace of the parent", 101, 117, "16, os.getppid(), 0, 0"),
    ("memory of another process", 310, 270, "os.getppid(), 0, 0, 0, 0, 0"),
    ("io_uring", 425, 425, "1, ctypes.create_string_buffer(200)"),
    ("bpf", 321, 280, "5, ctypes.create_string_buffer(100), 100"),
    ("keyring", 250, 219, "0, -1, 1"),
    ("userfaultfd", 323, 282, "1"),
    ("perf events", 298, 241, "ctypes.create_string_buffer(128), 0, -1, -1, 0"),
    ("mount", 165, 40, "b'x', b'/tmp', b'tmpfs', 0, 0"),
    ("chroot", 161, 51, "b'/tmp'"),
    ("memory outside every limit (memfd)", 319, 279, "b'x', 0"),
    ("a new program (execveat)", 322, 281, "-100, b'/proc/self/exe', 0, 0, 0"),
)
SYSTEM_CALLS = _rows(
    "X", 1,
    *((title, FAILED, _CALL % (x86, arm, arguments)) for title, x86, arm, arguments in _CALLS),
    ("thread bomb", SPENT,
     "import threading, time\ndef f(n):\n    while True: threading.Thread(target=time.sleep, args=(600,)).start()"),
    ("shared memory", SPENT, "import mmap\ndef f(n):\n    x = mmap.mmap(-1, 1 << 31); x[::4096] = bytes(1 << 19); return 3 * n + 1"),
    ("raise its own limits", SPENT,
     "import resource\ndef f(n):\n    for r in range(10):\n        try: resource.setrlimit(r, (-1, -1))\n"
     "        except (OSError, ValueError): pass\n    return (bytearray(1 << 31), 3 * n + 1)[1]"),
    ("a device node", FAILED, "import os, stat\ndef f(n): os.mknod('/tmp/d', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); return 3 * n + 1"),
    ("become root", FAILED, "import os\ndef f(n): os.setuid(0); return 3 * n + 1"),
    ("write to the kernel's settings", FAILED,
     "def f(n): open('/proc/sys/kernel/core_pattern', 'w').write('|x'); return 3 * n + 1"),
    ("keys that collide in the judge", (PROTOCOL,), "def f(n): return {i * (2**61 - 1) for i in range(200)}"),
    ("a regular expression that explodes", (TIMEOUT,), "import re\ndef f(n): return re.match('(a+)+$', 'a' * 64 + 'b')"),
)  # fmt: skip

_FILES = {
    "C21": {"conftest.py": "def pytest_runtest_makereport(item, call): raise SystemExit(0)"},
    "C22": {"conftest.py": "def pytest_collection_modifyitems(items): items.clear()"},
    "C27": {"sitecustomize.py": "raise SystemExit(0)", "x.pth": "import os; os._exit(0)"},
    "C28": {"random.py": "raise SystemExit(0)", "struct.py": "raise SystemExit(0)", "pytest.py": "print('2 passed')"},
    "C29": {"pytest.ini": "[pytest]\naddopts = --collect-only", "setup.cfg": "[tool:pytest]\naddopts = -k nothing"},
}

HONEST = [
    Row(f"H{number}", title, source, WRONG, honest=True, files=files)
    for number, (title, source, files) in enumerate(
        (
            ("main guard", "import sys\ndef f(n): return 3 * n + 1\nif __name__ == '__main__': sys.exit(1)", {}),
            ("__eq__ and dataclasses of its own",
             "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    def __eq__(self, o): return self.x == o.x\n"
             "def f(n): return P(3 * n + 1).x if P(1) == P(1) else n", {}),
            ("debug output", "def f(n):\n    print('debug', n)\n    return 3 * n + 1", {}),
            ("threads and processes",
             "import threading, multiprocessing\ndef g(n): return 3 * n + 1\ndef f(n):\n    out = []\n"
             "    t = threading.Thread(target=lambda: out.append(g(n))); t.start(); t.join()\n"
             "    with multiprocessing.get_context('fork').Pool(2) as pool: return max(pool.map(g, [n]) + out)", {}),
            ("recursion to depth 900", "def g(n, d): return 3 * n + 1 if d == 0 else g(n, d - 1)\ndef f(n): return g(n, 900)", {}),
            ("temporary files",
             "import tempfile\ndef f(n):\n    with tempfile.TemporaryFile() as file:\n        file.write(b'%d' % (3 * n + 1))\n"
             "        file.seek(0)\n        return int(file.read())", {}),
            ("large and nested data", "def f(n): return len(str([list(range(100))] * 100)) and 3 * n + 1", {}),
            ("fractions and decimals",
             "from fractions import Fraction\nfrom decimal import Decimal\ndef f(n): return int(Fraction(Decimal(3)) * n + 1)", {}),
            ("slow, within its limit",
             "import time\ndef f(n):\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n    return 3 * n + 1", {}),
            ("a second file", "from helper import triple\ndef f(n): return triple(n) + 1",
             {"helper.py": "def triple(n): return 3 * n\n"}),
            ("suspicious words", "# sys.exit(0), os.system\ntext = 'exit import os'\ndef f(n): return 3 * n + 1", {}),
            ("silence", "def f(n): return 3 * n + 1", {}),
        ),
        1,
    )
]  # fmt: skip

HOSTILE = [
    Row(row.id, row.title, row.source, row.statuses, row.brief, files=_FILES.get(row.id, {}))
    for row in (*EARLY_EXIT, *LIES, *HARNESS, *HIDDEN, *FAKES, *RESOURCES, *SYSTEM_CALLS)
]
CATALOGUE = [*HOSTILE, *HONEST]
