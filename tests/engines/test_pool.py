"""The pool of servers against real processes that die, hang and come back.

They sample by arithmetic (``token_server``), so that what an undisturbed server would have said is known.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentopd.config.engines import ServersConfig, VLLMConfig
from agentopd.contracts import Generation, GenerationRequest, SamplingParams
from agentopd.engines import VLLMServersEngine
from agentopd.engines.http import Address, Away, ask_json
from agentopd.engines.pool import Pool, Replica, Weights
from agentopd.engines.server_process import ServerProcess
from agentopd.engines.token_client import TokenClient
from agentopd.errors import ConfigError, EngineError
from agentopd.models import load_model
from tests.engines.token_server import DEADLY, ENDLESS, HANGING, SLOW, sampled

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.engines.token_server"
COUNT = 8


def request(*token_ids: int, seed: int = 0, session: str = "") -> GenerationRequest:
    return GenerationRequest(token_ids, SamplingParams(max_tokens=COUNT), seed, session)


def expected(weights: str, *token_ids: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(sampled(weights, list(token_ids), seed, COUNT))


async def unchecked(replica: Replica) -> None:
    pass


class Place:
    """Where servers of one test live."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[ServerProcess] = []

    def weights(self, content: str) -> Weights:
        path = self.folder / content
        path.mkdir(exist_ok=True)
        (path / "weights.txt").write_text(content)
        return Weights(path, f"version of {content}")

    def process(self, name: str) -> ServerProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.started.append(ServerProcess(MODULE, [], environment, self.folder / f"{name}.log"))
        return self.started[-1]

    def replicas(self, count: int) -> list[Replica]:
        return [Replica(f"server {i}", None, self.process(f"server-{i}")) for i in range(count)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for process in made.started:
        process.kill()


Scenario = Callable[[Pool], Awaitable[Any]]


def play(place: Place, replicas: list[Replica], scenario: Scenario, check: Any = unchecked, **keys: Any) -> Any:
    """Run ``scenario`` with a pool that has the weights "old"."""

    async def run() -> Any:
        config = ServersConfig(**{"turn_timeout_s": 60.0, "outage_s": 60.0, **keys})
        pool = Pool(replicas, config, 60.0, check)
        try:
            await pool.start(place.weights("old"), replicas)
            return await scenario(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def test_every_server_answers_and_all_get_new_weights(place):
    async def scenario(pool: Pool) -> None:
        asked = [request(SLOW, seed=i) for i in range(6)]
        before = await asyncio.gather(*map(pool.sample, asked))
        await pool.load(place.weights("new"), pool.replicas)
        after = await asyncio.gather(*map(pool.sample, asked))
        assert [x.token_ids for x in before] == [expected("old", SLOW, seed=i) for i in range(6)]
        assert [x.token_ids for x in after] == [expected("new", SLOW, seed=i) for i in range(6)]
        assert {x.versions for x in after} == {frozenset(["version of new"])}
        states = [await ask_json(r.reach().address, "GET", "/state", None, 5) for r in pool.replicas]
        assert [state["asked"] for state in states] == [6, 6]

    play(place, place.replicas(2), scenario)


@pytest.mark.parametrize(("routing", "asked"), [("session", [2, 4]), ("least_loaded", [4, 2])])
def test_the_turns_of_an_episode_stay_on_one_server(place, routing, asked):
    """Every other turn meets a first server that is busy."""

    async def scenario(pool: Pool) -> list[int]:
        for turn in range(4):
            busy = [asyncio.create_task(pool.sample(request(SLOW)))] if turn % 2 == 0 else []
            await asyncio.sleep(0)
            await pool.sample(request(7, seed=turn, session="episode"))
            await asyncio.gather(*busy)
        return [(await ask_json(r.reach().address, "GET", "/state", None, 5))["asked"] for r in pool.replicas]

    assert play(place, place.replicas(2), scenario, routing=routing) == asked


@pytest.mark.slow
def test_a_killed_server_comes_back_with_the_current_weights_and_nothing_is_lost(place):
    checked: list[str] = []

    async def check(replica: Replica) -> None:
        checked.append(replica.name)

    async def scenario(pool: Pool) -> None:
        await pool.load(place.weights("new"), pool.replicas)
        turns = [asyncio.create_task(pool.sample(request(SLOW, seed=i))) for i in range(6)]
        await asyncio.sleep(0.2)
        victim = pool.replicas[0]
        assert victim.turns == 3
        os.kill(victim.process.pid, signal.SIGKILL)
        made = await asyncio.gather(*turns)
        assert [x.token_ids for x in made] == [expected("new", SLOW, seed=i) for i in range(6)]
        async with asyncio.timeout(30):
            while victim.life < 2:
                await asyncio.sleep(0.05)
        again = await pool.sample_on(victim, request(5))
        assert again.token_ids == expected("new", 5) and again.versions == {"version of new"}
        assert sorted(checked) == ["server 0", "server 0", "server 1"]

    play(place, place.replicas(2), scenario, check)


@pytest.mark.slow
def test_a_server_is_started_again_from_weights_that_are_written(place, monkeypatch):
    """Those of the next sync, which are still being written, are brought to it later."""
    starts: list[str] = []
    start = ServerProcess.start

    def noted(process: ServerProcess, path: Path) -> Address:
        starts.append(path.name if path.exists() else f"no {path.name}")
        return start(process, path)

    monkeypatch.setattr(ServerProcess, "start", noted)

    async def scenario(pool: Pool) -> None:
        (server,) = pool.replicas
        slow, slower = (Weights(place.folder / name, f"version of {name}") for name in ("slow", "slower"))
        pool._weights = slow
        os.kill(server.process.pid, signal.SIGKILL)
        while server.is_up:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        place.weights("slow")
        pool._weights = slower
        while len(starts) < 2:
            await asyncio.sleep(0.01)
        place.weights("slower")
        made = await pool.sample(request(7))
        assert made.token_ids == expected("slower", 7) and server.life == 2

    play(place, place.replicas(1), scenario)
    assert starts == ["old", "slow"]


def test_who_was_started_again_since_it_was_claimed_is_not_taken_for_one_that_was_sent_the_weights(place):
    async def scenario(pool: Pool) -> None:
        new = place.weights("new")
        claimed = await pool.claim(new, pool.replicas)
        again = claimed[1]
        again.life += 1
        assert await pool.settle(new, claimed, {}) == claimed[:1]
        versions = [await replica.reach().version() for replica in claimed]
        assert versions[0] == new.version and versions[1].startswith(f"{new.version}, brought by")

    play(place, place.replicas(2), scenario)


@pytest.mark.slow
def test_a_server_that_dies_while_nobody_asks_is_brought_back(place):
    async def scenario(pool: Pool) -> None:
        os.kill(pool.replicas[0].process.pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            while pool.replicas[0].life < 2:
                await asyncio.sleep(0.05)
        assert (await pool.sample(request(5))).token_ids == expected("old", 5)

    play(place, place.replicas(1), scenario)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [True, False])
def test_a_hung_server_is_found_by_its_deadline(place, stopped):
    async def scenario(pool: Pool) -> None:
        (only,) = pool.replicas
        first = only.process.pid
        if stopped:
            os.kill(first, signal.SIGSTOP)
            assert (await pool.sample(request(5))).token_ids == expected("old", 5)
        else:
            with pytest.raises(EngineError, match=r"failed on 5 servers: no answer within 0.5 s"):
                await pool.sample(request(HANGING))
        assert only.life == (2 if stopped else 5 + only.is_up) and not psutil.pid_exists(first)

    play(place, place.replicas(1), scenario, turn_timeout_s=0.5)


@pytest.mark.slow
def test_a_request_that_kills_every_server_is_given_up_and_the_others_go_on(place):
    async def scenario(pool: Pool) -> None:
        asked = [request(DEADLY), *(request(SLOW, seed=i) for i in range(4))]
        deadly, *others = await asyncio.gather(*map(pool.sample, asked), return_exceptions=True)
        assert [x.token_ids for x in others] == [expected("old", SLOW, seed=i) for i in range(4)]
        assert isinstance(deadly, EngineError) and "a request of 1 tokens failed on 5 servers" in str(deadly)

    play(place, place.replicas(2), scenario)


@pytest.mark.slow
def test_a_server_that_cannot_start_is_named_with_its_last_words(place):
    weights = place.weights("old")
    (weights.path / "broken").touch()

    async def scenario(pool: Pool) -> None:
        raise AssertionError("it started")

    with pytest.raises(EngineError, match=r"server 0 does not start: .*exit code 1.*these weights cannot be loaded"):
        play(place, place.replicas(1), scenario)


@pytest.mark.slow
def test_without_servers_the_outage_ends_the_run(place):
    async def scenario(pool: Pool) -> None:
        (place.weights("old").path / "broken").touch()
        os.kill(pool.replicas[0].process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="no server is left; server 0: it ended with exit code 1"):
            await pool.sample(request(5))

    play(place, place.replicas(1), scenario)


def elsewhere(place: Place, weights: Weights) -> tuple[ServerProcess, Replica]:
    process = place.process("elsewhere")
    address = process.start(weights.path)
    return process, Replica(f"server {address}", TokenClient(address))


@pytest.mark.slow
def test_servers_started_elsewhere_are_given_the_weights_and_left_alone(place):
    process, replica = elsewhere(place, place.weights("whatever"))

    async def scenario(pool: Pool) -> None:
        assert (await pool.sample(request(5))).token_ids == expected("old", 5)

    play(place, [replica], scenario)
    assert process.exit_code is None


@pytest.mark.slow
def test_weights_that_somebody_else_loaded_are_noticed_and_replaced(place):
    _, replica = elsewhere(place, place.weights("whatever"))

    async def scenario(pool: Pool) -> None:
        theirs = place.weights("theirs")
        await replica.reach().load(theirs.path, theirs.version, 5)
        assert (await pool.sample(request(5))).token_ids == expected("old", 5)
        assert replica.life == 2

    play(place, [replica], scenario)


@pytest.mark.slow
@pytest.mark.parametrize("it_does", [True, False])
def test_a_server_whose_weights_another_rank_brings_is_waited_for_a_while(place, it_does):
    """Unless that rank does not: its name on the server may be all that is left of it."""
    _, replica = elsewhere(place, place.weights("whatever"))

    async def run() -> Any:
        weights, client = place.weights("old"), replica.reach()
        while True:
            with suppress(Away):
                await client.alive()
                break
        await client.name(f"{weights.version}, brought by another", 5)
        pool = Pool([replica], ServersConfig(outage_s=60), 60 if it_does else 1, unchecked)
        starting = asyncio.create_task(pool.start(weights, [replica]))
        while it_does and replica.fault != "another rank brings it the weights":
            await asyncio.sleep(0.01)
        if it_does:
            await client.load(weights.path, weights.version, 5)
        await starting
        assert (await pool.sample(request(5))).token_ids == expected("old", 5)
        await pool.close()
        return await ask_json(client.address, "GET", "/state", None, 5)

    assert asyncio.run(run())["loads"] == 1


@pytest.mark.slow
def test_nobody_brings_a_server_the_weights_that_a_sync_replaces(place):
    """Else they could arrive after the new ones, which another rank has brought."""
    _, replica = elsewhere(place, place.weights("whatever"))

    async def scenario(pool: Pool) -> Any:
        theirs, client = place.weights("theirs"), replica.reach()
        await pool.hold()
        await client.load(theirs.path, theirs.version, 5)
        pool.blame(replica, replica.life, "it has other weights")
        await asyncio.sleep(0.5)
        assert not replica.is_up
        await pool.load(place.weights("new"), [])
        assert (await pool.sample(request(5))).token_ids == expected("new", 5)
        return await ask_json(client.address, "GET", "/state", None, 5)

    assert play(place, [replica], scenario)["loads"] == 3


@pytest.mark.slow
def test_a_server_elsewhere_that_is_away_is_waited_for(place, caplog):
    process, replica = elsewhere(place, place.weights("whatever"))
    assert replica.client is not None
    port = replica.client.address.port

    async def scenario(pool: Pool) -> None:
        process.kill()
        turn = asyncio.create_task(pool.sample(request(5)))
        await asyncio.sleep(0.5)
        assert not turn.done()
        module = [sys.executable, "-m", MODULE, "--host", "127.0.0.1", "--port", str(port)]
        back = subprocess.Popen([*module, "--model", str(place.weights("whatever").path)], cwd=ROOT)
        try:
            assert (await turn).token_ids == expected("old", 5)
        finally:
            back.kill()
            back.wait()

    play(place, [replica], scenario)
    assert ["failed" in m or "is back" in m for m in caplog.messages] == [True, True]


@pytest.mark.slow
def test_a_cancelled_turn_is_aborted_in_the_server(place):
    async def scenario(pool: Pool) -> None:
        turn = asyncio.create_task(pool.sample(request(SLOW)))
        await asyncio.sleep(0.2)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert pool.replicas[0].turns == 0 and pool.replicas[0].is_up

    play(place, place.replicas(1), scenario)


def test_requests_that_are_cut_end_where_they_are_and_those_of_others_go_on(place):
    async def scenario(pool: Pool) -> None:
        mine = [asyncio.create_task(pool.sample(request(ENDLESS, seed=i))) for i in range(4)]
        (server,) = pool.replicas
        other = asyncio.create_task(server.reach().sample(request(SLOW), "another", 60))
        while (await ask_json(server.reach().address, "GET", "/state", None, 5))["asked"] < 5:
            await asyncio.sleep(0.01)
        await pool.cut()
        made = await asyncio.gather(*mine)
        assert [x.token_ids for x in made] == [expected("old", ENDLESS, seed=i)[: COUNT // 2] for i in range(4)]
        assert {x.finish_reason for x in made} == {"abort"}
        assert (await other).token_ids == expected("old", SLOW)
        assert server.is_up and not server.under_way
        await pool.cut()  # nothing is under way: nobody's requests end

    play(place, place.replicas(1), scenario)


@pytest.mark.slow
def test_a_request_that_ends_uncut_is_a_fault_of_the_server(place):
    async def scenario(pool: Pool) -> None:
        turn = asyncio.create_task(pool.sample(request(ENDLESS)))
        (server,) = pool.replicas
        while (await ask_json(server.reach().address, "GET", "/state", None, 5))["asked"] < 1:
            await asyncio.sleep(0.01)
        await server.reach().cut(server.under_way)  # not by the pool
        await asyncio.sleep(0.1)
        while not server.under_way:
            await asyncio.sleep(0.01)
        await pool.cut()
        assert (await turn).token_ids == expected("old", ENDLESS)[: COUNT // 2] and server.life == 2

    play(place, place.replicas(1), scenario)


@pytest.mark.slow
def test_an_update_cuts_turns_under_way_which_go_on_from_the_new_weights(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    vllm = VLLMConfig(canary_bound=1e3, timeout_s=60.0)
    model = load_model("micro/student", "float32")
    engine = VLLMServersEngine(model, vllm, ServersConfig(replicas=2), MODULE, cut_turns=True)
    asked = [request(ENDLESS, seed=i) for i in range(4)]

    async def scenario() -> list[Generation]:
        call = asyncio.create_task(engine.generate(asked))
        while sum(len(replica.under_way) for replica in engine.replicas) < len(asked):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.sync_weights, 1)
        return await call

    try:
        made = asyncio.run(asyncio.wait_for(scenario(), 60))
        assert [replica.life for replica in engine.replicas] == [1, 1]
    finally:
        engine.close()
    assert {(x.weight_version, x.updates, x.finish_reason) for x in made} == {(0, ((COUNT // 2, 1),), "length")}
    assert [len(set(x.token_ids)) > 1 and len(x.token_ids) == COUNT for x in made] == [True] * len(asked)


@pytest.mark.slow
def test_an_engine_that_fails_the_canary_is_given_up(place):
    async def check(replica: Replica) -> None:
        if replica.life:
            raise EngineError("it samples from other weights")

    async def scenario(pool: Pool) -> None:
        os.kill(pool.replicas[0].process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="no server is left; server 0: it samples from other weights"):
            await pool.sample(request(5))

    play(place, place.replicas(1), scenario, check)


@pytest.mark.slow
def test_servers_that_all_die_between_weights_and_canary_are_waited_for(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    vllm = VLLMConfig(canary_bound=1e3, timeout_s=60.0)  # what is said by arithmetic is not what the model would say
    made = VLLMServersEngine(load_model("micro/student", "float32"), vllm, ServersConfig(replicas=2), MODULE)
    load, loads = Pool.load, 0

    async def load_and_die(pool: Pool, weights: Weights, replicas: list[Replica]) -> None:
        nonlocal loads
        loads += 1
        await load(pool, weights, replicas)
        for replica in pool.replicas:
            os.kill(replica.process.pid, signal.SIGKILL)

    monkeypatch.setattr(Pool, "load", load_and_die)
    try:
        found = made.sync_weights(1)
        (one,) = asyncio.run(made.generate([request(7)]))
    finally:
        made.close()
    assert loads == 1 and found["sync/replicas"] >= 1 and max(replica.life for replica in made.replicas) == 2
    assert (one.weight_version, len(one.token_ids)) == (1, COUNT)


def test_a_process_with_children_leaves_none_behind(place):
    process = place.process("server")
    process.start(place.weights("old").path)
    leader = psutil.Process(process.pid)
    process.stop()
    assert process.pid is None and not leader.is_running()
    process.stop()


TRAINER = """
import json, sys, time
from pathlib import Path
from agentopd.engines.server_process import ServerProcess
process = ServerProcess({module!r}, [], {{"PYTHONPATH": {root!r}, "PATH": "/usr/bin"}}, Path({folder!r}) / "log")
process.start(Path({folder!r}))
print(process.pid, flush=True)
time.sleep(600)
"""
SPAWNS = """
import multiprocessing, time
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    child.start()
    print(child.pid, flush=True)
    child.join()
"""


@pytest.mark.slow
def test_servers_and_their_children_die_with_the_trainer_that_was_killed(tmp_path):
    """kill -9 runs no clean-up: the kernel ends the server, and then what the server spawned."""
    (tmp_path / "spawns.py").write_text(SPAWNS)
    code = TRAINER.format(module="spawns", root=f"{ROOT}:{tmp_path}", folder=str(tmp_path))
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert trainer.stdout is not None
    server = psutil.Process(int(trainer.stdout.readline()))
    while not (words := (tmp_path / "log").read_text().split()):
        time.sleep(0.05)
    child = psutil.Process(int(words[-1]))
    assert child.ppid() == server.pid
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    psutil.wait_procs([server, child], timeout=10)
    assert not _alive(server) and not _alive(child)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("url", ["far:1", "ftp://far:1", "http://", "http://far:port"])
def test_addresses_are_read_or_refused(url):
    with pytest.raises(ConfigError, match="write http://HOST:PORT"):
        Address.parse(url, "rollout.servers.urls")
    assert str(Address.parse("https://far", "key")) == "https://far:443"


def test_answers_in_pieces_are_put_together():
    async def scenario() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            body = json.dumps({"a": 1}).encode()
            pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:3], body[3:], b""))
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            assert await ask_json(Address("127.0.0.1", port), "GET", "/", None, 5) == {"a": 1}

    asyncio.run(scenario())
