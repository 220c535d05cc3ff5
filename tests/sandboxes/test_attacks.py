"""The hostile-program catalogue, as far as it concerns a sandbox that evaluates calls and hands out values.

Every row names the ways in which the attack may end. Whatever it does, the judge gets a result and the next case runs.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from agentopd.contracts import Case, CaseResult, CaseStatus, Program, SandboxLimits
from agentopd_sandboxes import JailSandbox
from agentopd_sandboxes.jail import AHEAD

Run = Callable[..., CaseResult]
VALUE, EXCEPTION, TIMEOUT, RESOURCE, CRASH, NO_RESULT, PROTOCOL = CaseStatus
LIMITS = SandboxLimits(wall_s=15.0, memory_mb=128, processes=16, file_mb=2)
BRIEF = replace(LIMITS, wall_s=0.3)

EARLY_EXIT = {
    "sys.exit at import": ("import sys; sys.exit(0)", NO_RESULT),
    "os._exit at import": ("import os; os._exit(0)", NO_RESULT),
    "SystemExit in the function": ("def f(): raise SystemExit(0)", NO_RESULT),
    "exit code of a killed process": ("import os; os._exit(137)", NO_RESULT),
    "kill itself": ("import os, signal\ndef f(): os.kill(os.getpid(), signal.SIGKILL)", CRASH),
    "abort": ("import os\ndef f(): os.abort()", CRASH),
    "execv": ("import os\ndef f(): os.execv('/bin/true', ['true'])", EXCEPTION),
    "exec the interpreter": ("import os, sys\ndef f(): os.execv(sys.executable, ['x', '-c', 'pass'])", EXCEPTION),
    "recursion without limit": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()",
        TIMEOUT,
        CRASH,
        RESOURCE,
        EXCEPTION,
    ),
    "C stack": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): exec('['*10**6)", CRASH, RESOURCE, EXCEPTION),
    "segmentation fault": ("import ctypes\ndef f(): ctypes.string_at(1)", CRASH),
    "KeyboardInterrupt": ("def f(): raise KeyboardInterrupt", EXCEPTION),
    "an exception that lies": (
        "class E(BaseException):\n    def __str__(self): raise SystemExit(0)\ndef f(): raise E",
        EXCEPTION,
        NO_RESULT,
    ),
    "exit from a thread": (
        "import threading, os\ndef f():\n    t = threading.Thread(target=os._exit, args=(0,)); t.start(); t.join()",
        NO_RESULT,
    ),
    "syntax error": ("def f(: pass", EXCEPTION),
    "NUL in the source": ("x = 1\0", EXCEPTION),
}

LIES = {
    "AlwaysEqual": ("class A:\n    def __eq__(self, o): return True\ndef f(): return A()", PROTOCOL),
    "AlwaysEqual in a list": ("class A:\n    def __eq__(self, o): return True\ndef f(): return [A()]", PROTOCOL),
    "int subclass": ("class A(int):\n    def __eq__(self, o): return True\ndef f(): return A(1)", PROTOCOL),
    "str subclass as key": ("class A(str): pass\ndef f(): return {A('x'): 1}", PROTOCOL),
    "list subclass": ("class A(list): pass\ndef f(): return A()", PROTOCOL),
    "beats a tolerance": (
        "class A:\n    def __abs__(self): return 0\n    __sub__ = __abs__\ndef f(): return A()",
        PROTOCOL,
    ),
    "type that lies": ("class A:\n    __class__ = int\ndef f(): return A()", PROTOCOL),
    "endless generator": ("def g():\n    while 1: yield 1\ndef f(): return g()", PROTOCOL),
    "pickle bomb": ("class A:\n    def __reduce__(self): return eval, ('1/0',)\ndef f(): return A()", PROTOCOL),
    "lying repr": ("class A:\n    def __repr__(self): return '1'\ndef f(): return A()", PROTOCOL),
    "a value that is too large": ("def f(): return 'x' * (2 << 20)", RESOURCE),
    "deep nesting": ("def f():\n    x = []\n    for _ in range(10**5): x = [x]\n    return x", RESOURCE),
    "a list that holds itself": ("def f():\n    x = []; x.append(x)\n    return x", RESOURCE),
    "too many parts": ("def f(): return [0] * 10**6", RESOURCE),
    "unprintable integer": ("def f(): return 1 << 10**6", RESOURCE),
    "colliding keys": ("def f(): return {i * (2**61 - 1) for i in range(200)}", PROTOCOL),
}

FORGERIES = {
    "garbage on every descriptor": (
        "import os\ndef f():\n    for fd in range(256):\n        try: os.write(fd, b'PASS\\n')\n"
        "        except OSError: pass",
        PROTOCOL,
    ),
    "a frame with a guessed id": (
        "import os, struct\nos.write(3, struct.pack('>I16sc', 22, bytes(16), b'V') + b't'); os._exit(0)",
        PROTOCOL,
    ),
    "a frame of the wrong length": (
        "import os, struct\nos.write(3, struct.pack('>I16sc', 2**31, bytes(16), b'V')); os._exit(0)",
        PROTOCOL,
    ),
    "a report as large as it may be": ("import os\ndef f():\n    while 1: os.write(3, bytes(1 << 20))", PROTOCOL),
    "descriptor closed": ("import os\ndef f(): os.closerange(0, 256)", NO_RESULT),
    "report, then die": (
        "import os, atexit, threading, time\n"
        "def g():\n    while 1:\n        if os.fstat(3).st_size: os._exit(5)\n"
        "threading.Thread(target=g, daemon=True).start()\nos.write(3, b'x')\ntime.sleep(1)",
        PROTOCOL,
    ),
}

RESOURCES = {
    "fork bomb": ("import os\ndef f():\n    while 1: os.fork()", RESOURCE, TIMEOUT),
    "thread bomb": (
        "import threading, time\ndef f():\n    while 1: threading.Thread(target=time.sleep, args=(9,)).start()",
        RESOURCE,
        EXCEPTION,
    ),
    "memory bomb": ("def f(): return bytearray(10**11)", RESOURCE),
    "memory piece by piece": ("def f():\n    x = []\n    while 1: x.append(bytearray(1 << 20))", RESOURCE),
    "memory of many processes": (
        "import os, time\ndef f():\n    for _ in range(8):\n        if not os.fork(): break\n"
        "    x = bytearray(60 << 20)\n    time.sleep(14)",
        RESOURCE,
    ),
    "anonymous shared memory": ("import mmap\ndef f(): return mmap.mmap(-1, 1 << 30)", RESOURCE),
    "memfd": ("import os\ndef f(): return os.memfd_create('x')", EXCEPTION),
    "one huge file": (
        "def f():\n    with open('/tmp/x', 'wb') as x:\n        while 1: x.write(bytes(1 << 20))",
        RESOURCE,
    ),
    "a sparse file": (
        "import os\ndef f(): os.truncate(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 1 << 40)",
        RESOURCE,
    ),
    "many files": (
        "def f():\n    for i in range(99):\n        with open(f'/dev/shm/{i}', 'wb') as x: x.write(bytes(1 << 20))",
        RESOURCE,
    ),
    "inodes": ("def f():\n    for i in range(10**5): open(f'/work/{i}', 'w').close()", RESOURCE),
    "descriptors": ("import os\ndef f():\n    while 1: os.open('/dev/null', 0)", RESOURCE),
    "output flood": ("def f():\n    while 1: print('x' * 10**5)", RESOURCE),
    "output flood of a child": (
        "import os\ndef f():\n    if not os.fork():\n        while 1: os.write(1, b'x' * 10**5)\n    return 1",
        VALUE,
    ),
    "endless loop": ("def f():\n    while 1: pass", TIMEOUT),
    "loop in C": ("def f(): return sum(range(10**15))", TIMEOUT),
    "power": ("def f(): return pow(10, 10**9)", TIMEOUT, RESOURCE),
    "regular expression": ("import re\ndef f(): return re.match('(a+)+$', 'a' * 64 + 'b')", TIMEOUT),
    "sleep": ("import time\ndef f(): time.sleep(10**6)", TIMEOUT),
    "deaf to signals": (
        "import signal\nfor s in set(range(1, 65)) - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\ndef f():\n    while 1: pass",
        TIMEOUT,
    ),
    "stops itself": ("import os, signal\ndef f(): os.kill(os.getpid(), signal.SIGSTOP)", VALUE),
    "raising the limits": (
        "import resource\ndef f():\n    for r in range(10):\n        try: resource.setrlimit(r, (-1, -1))\n"
        "        except (OSError, ValueError): pass\n    return bytearray(1 << 30)",
        RESOURCE,
    ),
}

ESCAPES = {
    "TCP": ("import socket\ndef f(): socket.socket().connect(('127.0.0.1', 22))", EXCEPTION),
    "UDP": ("import socket\ndef f(): socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", EXCEPTION),
    "netlink": ("import socket\ndef f(): socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", EXCEPTION),
    "vsock": ("import socket\ndef f(): socket.socket(40, socket.SOCK_STREAM)", EXCEPTION),
    "names": ("import socket\ndef f(): socket.create_connection(('example.org', 80))", EXCEPTION),
    "docker socket": (
        "import socket\ndef f(): socket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')",
        EXCEPTION,
    ),
    "password file": ("def f(): return open('/etc/passwd').read()", EXCEPTION),
    "environments": ("import glob\ndef f(): return open('/proc/1/environ').read()", EXCEPTION),
    "sysctl": ("def f(): open('/proc/sys/kernel/core_pattern', 'w')", EXCEPTION),
    "write to the library": ("import os\ndef f(): open(os.__file__, 'w')", EXCEPTION),
    "write to the root": ("def f(): open('/x', 'w')", EXCEPTION),
    "climb out": ("def f(): return open('../' * 20 + 'etc/passwd').read()", EXCEPTION),
    "link out": ("import os\ndef f():\n    os.symlink('/etc/passwd', 'x')\n    return open('x').read()", EXCEPTION),
    "device": ("import os, stat\ndef f(): os.mknod('/tmp/d', 0o600 | stat.S_IFBLK, os.makedev(254, 0))", EXCEPTION),
    "chroot": ("import os\ndef f(): os.chroot('/tmp')", EXCEPTION),
    "become root": ("import os\ndef f(): os.setuid(0)", EXCEPTION),
    "host name": ("import socket\ndef f(): socket.sethostname('x')", EXCEPTION),
    "subprocess": ("import subprocess\ndef f(): subprocess.run(['ls'])", EXCEPTION),
    "shell": ("import os\ndef f(): return os.system('true')", VALUE),
}

CATALOGUE = {**EARLY_EXIT, **LIES, **FORGERIES, **RESOURCES, **ESCAPES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue(run: Run, name: str) -> None:
    source, *accepted = CATALOGUE[name]
    limits = BRIEF if accepted[0] is TIMEOUT else LIMITS
    result = run(source, limits=limits)
    assert result.status in accepted, result
    assert result.wall_ms < (limits.wall_s + 1) * 1000
    if result.status is not VALUE:
        assert result.value is None and result.detail
    assert run("", "6 * 7").value == 42


def test_a_shell_does_not_run(run: Run) -> None:
    assert run("import os", "os.system('true')").value != 0


def test_killing_the_neighbours_changes_nothing(run: Run) -> None:
    result = run(
        "import os\nfor p in (os.getppid(), 2, -1, 0):\n    try: os.kill(p, 9 if p else 0)\n    except OSError: pass",
        "1",
    )
    assert result.value == 1
    assert run("", "2").value == 2


def test_atexit_comes_too_late_to_change_the_report(run: Run) -> None:
    assert run("import atexit, os\natexit.register(os._exit, 0)", "1").value == 1


SCAN = """
import ctypes, gc, os
FLIP = bytes(b ^ 1 for b in range(256))
def pages():
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_void_p
    read, write = os.pipe()
    def page(address):  # a bad address is an error here, not a crash
        return libc.write(write, ctypes.c_void_p(address), 4096) == 4096 and os.read(read, 4096)
    for arena in {id(thing) >> 20 << 20 for thing in gc.get_objects()}:
        yield from filter(None, map(page, range(arena, arena + (1 << 20), 4096)))
    top = libc.sbrk(ctypes.c_long(0)) - 4096
    while found := page(top):
        yield found
        top -= 4096
def f(flipped):
    scanned = [flipped in page.translate(FLIP) for page in pages()]
    return len(scanned) > 500, any(scanned)
"""


def test_nothing_of_an_earlier_run_is_in_memory(run: Run) -> None:
    """The zygote never sees a program, an argument or a value, so no later case can inherit one."""
    secret = "a-hidden-answer-0123456789"
    flipped = bytes(byte ^ 1 for byte in secret.encode())  # the scan looks for this image, so it cannot find itself
    for _ in range(2):
        assert run("def f(*args): return args", "f(*args)", args=(secret,)).value == (secret,)
    assert run(SCAN, "f(*args)", args=(flipped,)).value == (True, False)
    assert run(f"SECRET = {secret!r}{SCAN}", "f(*args)", args=(flipped,)).value == (True, True)


def test_an_orphan_does_not_outlive_its_case(run: Run) -> None:
    daemon = """
import os, time
def f():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                for place in ('/tmp/later', '/work/later'):
                    try: open(place, 'w').write('x')
                    except OSError: pass
        os._exit(0)
    return os.getpid()
"""
    assert run(daemon).status is VALUE
    assert run("import os, time\ntime.sleep(0.1)", "os.listdir('/tmp') + os.listdir('/work')").value == ["solution.py"]


def test_a_late_child_cannot_change_what_was_reported(run: Run) -> None:
    source = """
import os
def f():
    if os.fork() == 0:
        while True:
            if os.fstat(3).st_size:
                os.ftruncate(3, 0)
                os._exit(0)
    return 1
"""
    assert run(source).status in (VALUE, NO_RESULT, PROTOCOL)


def test_only_its_own_descriptors_are_open(run: Run) -> None:
    source = """
import os
def f():
    found = []
    for fd in range(1024):
        try: os.fstat(fd)
        except OSError: continue
        found.append(fd)
    return found
"""
    assert run(source).value == [0, 1, 2, 3]


def test_the_root_holds_the_library_and_nothing_else(run: Run) -> None:
    source = """
import os, sys
def f():
    prefixes = [p for p in sys.path if p.startswith('/')] + ['/box', '/dev', '/tmp', '/work', '/usr/share/zoneinfo']
    strays = []
    for where, folders, files in os.walk('/'):
        folders[:] = [f for f in folders if os.path.join(where, f) not in prefixes]
        strays += [os.path.join(where, name) for name in files]
    return strays
def packages(): return [p for p in sys.path if os.path.isdir(p + '/site-packages') and os.listdir(p + '/site-packages')]
"""
    assert run(source, "f(), packages()").value == ([], [])


def test_it_has_no_identity_capability_or_process_in_sight(run: Run) -> None:
    assert run("import os", "os.getuid(), os.getgid(), os.getpid(), os.getppid()").value == (65534, 65534, 1, 0)
    source = """
import ctypes
def f():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capget(header, data) == 0
    return list(data)
"""
    assert run(source).value == [0] * 6


@pytest.fixture
def abstract_socket() -> Iterator[str]:
    name = f"\0agentopd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        yield name


def test_abstract_sockets_of_the_host_are_out_of_reach(run: Run, abstract_socket: str) -> None:
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(abstract_socket)  # the name is good
    result = run(
        "import socket\ndef f(name): socket.socket(socket.AF_UNIX).connect(name)", "f(*args)", args=(abstract_socket,)
    )
    assert result.status is EXCEPTION and "refused" in result.detail


SYSCALLS = {
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
    "chroot": 161,
    "unshare": 272,
    "setns": 308,
    "ptrace": 101,
    "process_vm_readv": 310,
    "pidfd_getfd": 438,
    "bpf": 321,
    "io_uring_setup": 425,
    "userfaultfd": 323,
    "keyctl": 250,
    "add_key": 248,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "execve": 59,
    "execveat": 322,
    "memfd_create": 319,
    "shmget": 29,
    "open_tree": 428,
    "fsopen": 430,
    "clone into a user namespace": 56,
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
def test_dangerous_system_calls_are_refused(run: Run) -> None:
    source = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def f(numbers):
    refused = {}
    for name, number in numbers.items():
        first = 0x10000000 if number == 56 else 0
        result = libc.syscall(number, first, 0, 0, 0, 0, 0)
        refused[name] = result == -1 and errno.errorcode[ctypes.get_errno()]
    return refused
"""
    result = run(source, "f(*args)", args=(SYSCALLS,))
    assert result.value == dict.fromkeys(SYSCALLS, "EPERM")
    unknown = {"clone3": 435, "the newest": 470, "x32 getpid": (1 << 30) | 39}
    assert run(source, "f(*args)", args=(unknown,)).value == dict.fromkeys(unknown, "ENOSYS")


@pytest.mark.slow
def test_the_clock_runs_beside_the_payload_not_in_the_judge(jail_works: None) -> None:
    """A judge whose loop is stalled by other work neither shortens nor lengthens a case."""

    async def scenario() -> CaseResult:
        sandbox = JailSandbox(workers=1)
        try:
            await sandbox.start()
            case = Case("a", "time.sleep(60)")
            task = asyncio.create_task(sandbox.run_cases(Program("import time"), [case], BRIEF))
            while not any(worker.used is not None and worker.zygote.cells > AHEAD for worker in sandbox._all):
                await asyncio.sleep(0)
            time.sleep(2.0)
            return (await task)[0]
        finally:
            await sandbox.aclose()

    result = asyncio.run(scenario())
    assert result.status is TIMEOUT and result.wall_ms < 1900
