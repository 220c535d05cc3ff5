"""Rollout workers without Ray: one in this process, asked as the engine asks those on other machines."""

import asyncio

import pytest
import torch

from agentopd.config.rollout import RolloutConfig
from agentopd.config.scaleout import RayConfig
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd.engines import HFEngine
from agentopd.errors import EngineError
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


REQUESTS = [GenerationRequest((5, 6, 7), SamplingParams(max_tokens=6), seed=3)]


def student(tied):
    model = qwen3(64, tie_word_embeddings=tied)
    model.set_attn_implementation("agentopd")
    return model


def generated(engine):
    async def once():
        try:
            return await engine.generate(REQUESTS)
        finally:
            await engine.aclose()

    return asyncio.run(once())


@pytest.mark.parametrize("tied", [True, False])
def test_a_worker_has_all_weights_of_the_learner(engine_of, tied):
    model = student(tied)
    assert generated(engine_of(model))[0].token_ids == HFEngine(model).generate_now(REQUESTS)[0].token_ids


@pytest.mark.parametrize("put", [lambda name: name.replace("k_proj", "key"), lambda name: f"module.{name}"])
def test_weights_under_other_names_are_refused(engine_of, monkeypatch, put):
    true_put = Store.put
    monkeypatch.setattr(Store, "put", lambda weights: true_put({put(name): x for name, x in weights.items()}))
    with pytest.raises(EngineError, match=r"missing \['model\.\S+weight'.*unknown \['mod"):
        generated(engine_of(student(tied=True)))


def test_a_worker_with_stale_weights_ends_the_run(engine_of, monkeypatch):
    model = student(tied=True)
    engine = engine_of(model)
    first = engine._weights
    monkeypatch.setattr(Store, "put", lambda weights: first)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    engine.sync_weights(1)
    with pytest.raises(EngineError, match=r"samples from other weights|repeats \d+ of"):
        generated(engine)
