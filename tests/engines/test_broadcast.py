"""Weights that are sent to servers instead of left in a folder, and what happens where that fails.

The servers sample by arithmetic, and take the weights over sockets: what is in a folder, what was sent and what is
sampled from must be the same bytes.
"""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agentopd.config.engines import ServersConfig, VLLMConfig
from agentopd.config.rollout import RolloutConfig
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd.engines import VLLMServersEngine, broadcast
from agentopd.engines.broadcast import WeightStream
from agentopd.engines.http import Away, ask_json
from agentopd.engines.pool import Replica
from agentopd.engines.weight_folder import WeightFolder, Weights
from agentopd.errors import ConfigError, EngineError
from agentopd.weights import full_weights
from tests.engines.socket_trainer import SocketTrainer, faulty
from tests.engines.token_server import read, sampled
from tests.tiny import qwen3

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.engines.token_server"
COUNT = 8

Make = Callable[..., VLLMServersEngine]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    """An engine with two servers, whose canary does not mind what is said by arithmetic."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made: list[VLLMServersEngine] = []

    def start(replicas: int = 2, timeout_s: float = 30.0) -> VLLMServersEngine:
        vllm = VLLMConfig(canary_bound=1e3, timeout_s=timeout_s, sync="nccl")
        model = qwen3(400, max_position_embeddings=128, tie_word_embeddings=True)
        servers = ServersConfig(replicas=replicas, folder=str(tmp_path / "weights"))
        made.append(VLLMServersEngine(model, vllm, servers, MODULE, SocketTrainer))
        return made[-1]

    SocketTrainer.opened.clear()
    yield start
    for engine in made:
        engine.close()
    while SocketTrainer.members:
        SocketTrainer.members.pop().close()


def move(engine: VLLMServersEngine) -> None:
    with torch.no_grad():
        for weight in engine._model.parameters():
            weight.add_(0.01)


def state(replica: Replica) -> Any:
    return asyncio.run(ask_json(replica.reach().address, "GET", "/state", None, 5))


def port(replica: Replica) -> str:
    return str(replica.reach().address.port)


def in_the_folder(engine: VLLMServersEngine) -> str:
    engine._folder.settle()
    return read(sorted(engine._folder.path.glob("weights-*"))[-1])


def all_sample_the_same(engine: VLLMServersEngine) -> str:
    """Every server samples from what is in the folder now; returns it."""
    asked = [GenerationRequest((7,), SamplingParams(max_tokens=COUNT), seed) for seed in range(6)]
    made = asyncio.run(engine.generate(asked))
    weights = in_the_folder(engine)
    assert [x.token_ids for x in made] == [tuple(sampled(weights, [7], seed, COUNT)) for seed in range(6)]
    assert {x.weight_version for x in made} == {engine.weight_version}
    return weights


def wait_for(engine: VLLMServersEngine, life: int) -> None:
    deadline = time.monotonic() + 60
    while sum(replica.is_up for replica in engine.replicas) < 2 or max(x.life for x in engine.replicas) < life:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_servers_take_what_is_sent_and_the_folder_gets_the_same(make: Make) -> None:
    engine = make()
    seen = {all_sample_the_same(engine)}
    for version in (1, 2):
        move(engine)
        assert engine.sync_weights(version)["sync/sent"] == 2
        seen.add(all_sample_the_same(engine))
    assert len(seen) == 3 and SocketTrainer.opened == [5]
    assert [(x["loads"], x["sent"]) for x in map(state, engine.replicas)] == [(1, 2)] * 2
    stored = load_file(sorted(engine._folder.path.glob("weights-*"))[-1] / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], engine._model.get_input_embeddings().weight)


@pytest.mark.slow
def test_a_server_that_comes_back_reads_the_folder_and_is_sent_the_next(make: Make, caplog: Any) -> None:
    engine = make()
    move(engine)
    engine.sync_weights(1)
    os.kill(engine.replicas[0].process.pid, signal.SIGKILL)
    wait_for(engine, 2)
    all_sample_the_same(engine)
    move(engine)
    assert engine.sync_weights(2)["sync/sent"] == 2
    all_sample_the_same(engine)
    assert [x["sent"] for x in map(state, engine.replicas)] == [1, 2] and SocketTrainer.opened == [5, 5]


@pytest.mark.slow
def test_a_server_that_fails_on_an_update_reads_the_folder(make: Make, caplog: Any) -> None:
    engine = make()
    move(engine)
    with faulty(**{port(engine.replicas[1]): "refuses"}):
        assert engine.sync_weights(1)["sync/sent"] == 1
    assert any("through files: update_weights: 500" in said for said in caplog.messages)
    wait_for(engine, 2)
    all_sample_the_same(engine)
    move(engine)
    assert engine.sync_weights(2)["sync/sent"] == 2
    all_sample_the_same(engine)


@pytest.mark.slow
def test_a_server_that_dies_amid_a_transfer_stops_the_run_which_nothing_else_could_end(make: Make, monkeypatch) -> None:
    monkeypatch.setattr(broadcast, "_MERCY_S", 1.0)
    engine = make()
    with (
        faulty(**{port(engine.replicas[1]): "dies"}),
        pytest.raises(EngineError, match=r"does not end: lost in the middle of it: server 1 \(it ended\)"),
    ):
        engine.sync_weights(1)


@pytest.mark.slow
def test_a_transfer_has_a_deadline(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(1)
    assert engine._broadcast is not None
    engine._broadcast._timeout_s, farewells = 0.5, []
    monkeypatch.setattr(broadcast, "_SLACK_S", 0.1)
    monkeypatch.setattr(SocketTrainer, "send_weights", lambda self: time.sleep(600))
    monkeypatch.setattr(SocketTrainer, "shutdown", farewells.append)
    with pytest.raises(EngineError, match=r"does not end: rollout.vllm.timeout_s, 0.5 s, is over"):
        engine.sync_weights(1)
    engine.close()
    assert not farewells  # whoever stands in that collective would not hear them


@pytest.mark.slow
def test_a_server_that_hangs_is_left_behind_and_the_others_leave_its_group(make: Make, monkeypatch) -> None:
    monkeypatch.setattr(broadcast, "_FAREWELL_S", 1.0)
    engine = make(timeout_s=8.0)
    well, hung = engine.replicas
    os.kill(hung.process.pid, signal.SIGSTOP)
    move(engine)
    assert engine.sync_weights(1)["sync/sent"] == 1
    assert (state(well)["left"], state(well)["sent"], SocketTrainer.opened) == (1, 1, [5, 3])
    wait_for(engine, 2)
    all_sample_the_same(engine)


def test_weights_that_cannot_be_read_to_their_end_are_left_nowhere(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(1)

    def broken(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield next(full_weights(model))
        raise RuntimeError("a rank is gone")

    monkeypatch.setattr(broadcast, "full_weights", broken)
    with pytest.raises(EngineError, match=r"could not be read to their end: RuntimeError: a rank is gone"):
        engine.sync_weights(1)
    assert [path.name for path in engine._folder.path.glob("*weights*")] == ["weights-000000-1"]


def test_a_server_without_a_transfer_is_found_at_the_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_transfer", "1")
    monkeypatch.setattr(broadcast, "_MERCY_S", 0.5)
    with pytest.raises(
        EngineError, match=r"not configured.*--weight-transfer-config '{\"backend\": \"nccl\"}', or use"
    ):
        make(1)


def test_a_stream_yields_what_it_announces_and_keeps_copies(model: Any) -> None:
    stream = WeightStream(model, keeps=True)
    stream.rewind()
    read_first = [next(iter(stream)), *stream]
    assert [(name, weight.dtype, tuple(weight.shape)) for name, weight in read_first] == stream.shapes()
    assert read_first[-1][0] == "lm_head.weight" and read_first[-1][1] is not None
    kept = stream.take_kept()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    assert kept.keys() == dict(read_first).keys() and not stream.take_kept() and not list(stream)
    assert torch.equal(kept["lm_head.weight"] + 1, model.model.embed_tokens.weight)


def test_a_folder_appears_when_it_is_complete_and_its_fault_is_raised(model: Any, tmp_path: Path) -> None:
    folder = WeightFolder(model, str(tmp_path))
    weights = folder.next(1)
    with pytest.raises(Away, match=r"were not written to .*weights-000001-1 within 0.2 s"):
        asyncio.run(weights.at_hand(0.2))
    folder.write_behind(weights, {"a": torch.ones(2)})
    asyncio.run(weights.at_hand(10))
    assert sorted(file.name for file in weights.path.iterdir()) == ["config.json", "model.safetensors"]
    shutil.rmtree(folder.path)
    folder.write_behind(folder.next(2), {"a": torch.ones(2)})
    with pytest.raises(EngineError, match="writing the weights for servers that come back failed"):
        folder.settle()
    folder.settle()
    assert isinstance(weights, Weights)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"engine": "vllm", "vllm": {"sync": "nccl"}}, "'nccl' is for engine 'vllm_servers'"),
        ({"engine": "vllm_servers", "vllm": {"sync": "ipc"}}, "'disk' or 'nccl'"),
    ],
)
def test_a_transfer_that_the_engine_cannot_have_is_refused(keys: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        RolloutConfig.model_validate(keys)


def test_nccl_needs_the_student_on_a_gpu(model: Any) -> None:
    with pytest.raises(ConfigError, match="the student is on cpu: use 'disk'"):
        VLLMServersEngine(model, VLLMConfig(sync="nccl"), ServersConfig(urls=("http://127.0.0.1:1",)))
