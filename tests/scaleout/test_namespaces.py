"""Learner and judge with nothing between them but a cable: two network namespaces and a pair of virtual interfaces."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from agentopd.build import Judge, build_sandbox
from agentopd.config.run import SandboxConfig
from agentopd.evaluate import evaluate_script, heldout_tasks
from agentopd.rendering import HermesJSON
from tests.scaleout.conftest import PATHS, STORE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]
HEAD, JUDGE, PORT = "10.213.7.1", "10.213.7.2", 6379


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def namespaces():
    """The names of two namespaces that see each other and nobody else; what ran in them is killed."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    names = [f"opd{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
    except OSError as exc:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"this machine makes no network namespaces: {exc}")
    for name, address in zip(names, (HEAD, JUDGE), strict=True):
        ip("link", "set", name, "netns", name)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
        ip("-n", name, "link", "set", name, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield names
    for name in names:
        for pid in ip("netns", "pids", name).split():
            os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", name)
    shutil.rmtree(folder(names[0]), ignore_errors=True)


def folder(name: str) -> Path:
    """Where Ray has its sockets, whose paths have to be short."""
    return Path(tempfile.gettempdir()) / name


def test_workers_in_network_namespaces_of_their_own(namespaces, skills, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'agentopd[ray]'")
    learner, judge = namespaces
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "120"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    temporary = folder(learner)
    ports = "--dashboard-agent-grpc-port 7001 --dashboard-agent-listen-port 7002 --runtime-env-agent-port 7003 "
    ports += "--metrics-export-port 7004"
    ray = f"{sys.executable} -m ray.scripts.scripts start --object-store-memory {STORE} {ports}"
    head = f"{ray} --head --node-ip-address {HEAD} --port {PORT} --num-cpus 0 --include-dashboard false"
    # Two machines have two disks: Ray keeps the address of the node it is on in a file.
    other_disk = f"mkdir -p {temporary} && mount -t tmpfs tmpfs {temporary}"
    room = """--num-cpus 1 --resources '{"judge": 1}'"""

    def run(where: str, command: str) -> str:
        log = tmp_path / "log"
        with log.open("w") as out:  # not a pipe, which what stays behind would keep open
            words = ["ip", "netns", "exec", where, "sh", "-c", command]
            done = subprocess.run(words, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=200)
        assert done.returncode == 0, log.read_text()
        return log.read_text()

    run(learner, f"{head} --temp-dir {temporary}")
    run(judge, f"{other_disk} && {ray} --address {HEAD}:{PORT} --node-ip-address {JUDGE} {room}")
    said = run(learner, f"{sys.executable} -m tests.scaleout.driver {HEAD}:{PORT}")
    found = json.loads(said.strip().splitlines()[-1])
    assert found["here"] != found["there"]
    assert found["verdict"] == in_process(skills)


def in_process(skills):
    """The verdict on the same task here."""
    repair = {"repair": skills["repair"]}
    judge = Judge(repair.values(), build_sandbox(SandboxConfig(backend="unsafe", workers=1), repair.values()))

    async def play():
        tasks = heldout_tasks(repair.values(), 1, 0)
        ((_, verdict),) = await evaluate_script("gold", repair, tasks, judge, HermesJSON())
        await judge.sandbox.aclose()
        return verdict.model_dump(mode="json")

    return asyncio.run(play())
