"""Rollout workers without Ray: one in this process, asked as the engine asks those on other machines."""

import asyncio

import pytest
import torch

from agentopd.config.rollout import RolloutConfig
from agentopd.config.scaleout import RayConfig
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd.engines import HFEngine
from agentopd.scaleout import rollout
from tests.tiny import qwen3


class Store:
    """Ray's object store: what is put is a copy, and is awaited."""

    @staticmethod
    def put(weights):
        kept = {name: weight.clone() for name, weight in weights.items()}

        class Reference:
            def __await__(self):
                yield from ()
                return kept

        return Reference()


class InProcess:
    """A pool of one worker."""

    def __init__(self, worker_cls, arguments, *rest):
        self.worker = worker_cls(*arguments)

    async def call(self, method, *arguments, home):
        return await getattr(self.worker, method)(*arguments)

    async def aclose(self):
        await self.worker.aclose()


@pytest.fixture
def engine_of(monkeypatch):
    monkeypatch.setattr(rollout, "connect", lambda config: Store)
    monkeypatch.setattr(rollout, "ActorPool", InProcess)
    return lambda model: rollout.RayEngine(model, RolloutConfig(), RayConfig(rollout_workers=1))


def test_a_worker_samples_from_what_a_guard_rolled_back_to(engine_of):
    model, restored = qwen3(64, seed=1), qwen3(64, seed=2)
    for each in (model, restored):
        each.set_attn_implementation("agentopd")
    engine = engine_of(model)
    requests = [GenerationRequest((5, 6, 7), SamplingParams(max_tokens=6), seed=3)]

    async def rolled_back():
        engine.sync_weights(7)
        discarded = await engine.generate(requests)
        model.load_state_dict(restored.state_dict())
        engine.sync_weights(7)
        found = await engine.generate(requests)
        await engine.aclose()
        return discarded, found

    discarded, found = asyncio.run(rolled_back())
    (expected,) = HFEngine(restored).generate_now(requests)
    assert found[0].token_ids == expected.token_ids != discarded[0].token_ids
    assert torch.allclose(torch.tensor(found[0].logprobs), torch.tensor(expected.logprobs))
    assert found[0].weight_version == 7
