"""vLLM's ``nccl`` weight transfer between the learner and real servers on a CPU, with sockets in the place of NCCL."""

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from agentopd.build import build_policy
from agentopd.config.engines import ServersConfig, VLLMConfig
from agentopd.config.run import RolloutConfig
from agentopd.engines import VLLMServersEngine
from agentopd.engines.broadcast import nccl_trainer
from tests.engines.learner_view import disturb, generate, largest_gap, prompts, requests

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

WIRE = str(Path(__file__).parent / "cpu_wire")
BOUND = 1e-4
MARKS = re.compile(r"\.lock$|^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$|vllm|agentopd")
"""Of what vLLM and we leave in a temporary folder."""


@pytest.fixture(scope="module")
def policy() -> Any:
    return build_policy("micro/student", "float32", RolloutConfig())


@pytest.fixture(scope="module")
def engine(policy: Any) -> Iterator[VLLMServersEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", WIRE)
        patch.syspath_prepend(WIRE)
        from vllm.distributed.device_communicators import pynccl

        patch.setattr(pynccl, "PyNcclCommunicator", pynccl.PyNcclCommunicator)
        patch.setattr(torch.cuda, "current_stream", torch.cuda.current_stream)
        patch.setattr(torch.accelerator, "current_device_index", torch.accelerator.current_device_index)
        import cpu_wire

        cpu_wire.install()
        vllm = VLLMConfig(max_context=768, timeout_s=2000, max_num_seqs=32, kv_cache_gb=0.25, sync="nccl")
        servers = ServersConfig(replicas=2, turn_timeout_s=120)
        before = set(os.listdir(tempfile.gettempdir()))
        made = VLLMServersEngine(policy.model, vllm, servers, open_trainer=partial(nccl_trainer, packed=False))
        yield made
        made.close()
        left = set(os.listdir(tempfile.gettempdir())) - before
        assert not [name for name in left if MARKS.search(name)]


def test_weights_reach_servers_by_the_transfer_and_the_canary_agrees(policy, engine):
    before = disturb(policy.model)
    found = engine.sync_weights(1)
    asked = requests(prompts(policy), 1.0)
    assert found["sync/sent"] == 2 and 0 <= found["sync/canary"] < BOUND
    assert largest_gap(policy.model, asked, generate(engine, asked)) < BOUND
    policy.model.load_state_dict(before)
    assert engine.sync_weights(2)["sync/sent"] == 2
    assert largest_gap(policy.model, asked, generate(engine, asked)) < BOUND


def test_a_server_that_was_killed_reads_the_folder_and_joins_the_next_transfer(policy, engine):
    disturb(policy.model)
    engine.sync_weights(3)
    lives = [replica.life for replica in engine.replicas]
    os.kill(engine.replicas[0].process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 600
    while engine.replicas[0].life == lives[0] or not engine.replicas[0].is_up:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    asked = requests(prompts(policy), 1.0)
    assert largest_gap(policy.model, asked, generate(engine, asked)) < BOUND
    disturb(policy.model)
    found = engine.sync_weights(4)
    assert found["sync/sent"] == found["sync/replicas"] == 2
    assert largest_gap(policy.model, asked, generate(engine, asked)) < BOUND
