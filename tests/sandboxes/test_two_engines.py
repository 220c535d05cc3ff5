"""Two Docker engines that share the verdicts, one of which is killed and started again."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agentopd.errors import SandboxError
from agentopd_sandboxes import docker
from agentopd_sandboxes.docker import DockerSandbox, Engine
from tests.sandboxes.test_faults import verdict

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("dockerd") is None, reason="starting an engine needs root"),
]
START_S = 60


class Second:
    """Another engine on this machine, with its own store and no network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = f"unix://{folder}/d.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        places = {"--data-root": "data", "--exec-root": "run", "--pidfile": "pid"}
        words = [word for flag, name in places.items() for word in (flag, str(self.folder / name))]
        alone = ["--bridge=none", "--iptables=false", "--ip-forward=false"]
        with (self.folder / "log").open("ab") as log:
            command = ["dockerd", "-H", self.host, *words, *alone]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"a second engine does not start: {(self.folder / 'log').read_text()[-300:]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        engine = Engine(self.host)
        try:
            engine.client()
        except SandboxError:
            return False
        engine.close()
        return True

    def kill(self) -> None:
        """At once, with everything it started in its session."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            (self.folder / "pid").unlink(missing_ok=True)


@pytest.fixture
def second(docker_client: Any) -> Iterator[Second]:
    folder = Path(tempfile.mkdtemp(prefix="dk-"))
    engine = Second(folder)
    engine.start()
    yield engine
    with suppress(SandboxError):
        DockerSandbox.prune([engine.host])
    engine.kill()
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in (place for place in reversed(mounts) if place.startswith(str(folder))):
        subprocess.run(["umount", "-l", place], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def test_engines_share_the_work_and_one_that_dies_costs_no_verdict(second, monkeypatch):
    monkeypatch.setattr(docker, "COOL_DOWN_S", 0.0)
    started: Counter[str] = Counter()
    start = Engine.start

    def counted(engine: Engine, *rest: Any) -> Any:
        container = start(engine, *rest)
        started[engine.host] += 1
        return container

    monkeypatch.setattr(Engine, "start", counted)
    first = os.environ.get("DOCKER_HOST") or ""

    async def round_of(sandbox: DockerSandbox, name: str) -> list[Any]:
        return await asyncio.gather(*(verdict(sandbox, f"{name} {i}") for i in range(6)))

    async def scenario() -> None:
        sandbox = DockerSandbox(workers=2, hosts=(first, second.host))
        try:
            await sandbox.start()
            assert [v.outcome for v in await round_of(sandbox, "shared")] == [1.0] * 6
            assert min(started[first], started[second.host]) >= 2
            running = asyncio.create_task(round_of(sandbox, "struck"))
            await asyncio.sleep(0.4)
            await asyncio.to_thread(second.kill)
            assert [v.outcome for v in await running] == [1.0] * 6
            before = started[second.host]
            assert [v.outcome for v in await round_of(sandbox, "alone")] == [1.0] * 6
            assert started[second.host] == before
            await asyncio.to_thread(second.start)
            assert [v.outcome for v in await round_of(sandbox, "back")] == [1.0] * 6
            assert started[second.host] > before
        finally:
            await sandbox.aclose()

    asyncio.run(scenario())
