"""vLLM in a process of its own against Hugging Face on the same weights, in fp32: what differs is rounding alone."""

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from typing import Any

import pytest
import torch

from agentopd.build import build_policy
from agentopd.config.engines import VLLMConfig
from agentopd.config.run import RolloutConfig
from agentopd.contracts import Engine, GenerationRequest, SamplingParams
from agentopd.engines import HFEngine, VLLMEngine
from agentopd.errors import ConfigError, EngineError
from agentopd.rollout import EpisodeSpec, run_episodes
from agentopd_envs.micro import store
from agentopd_envs.tool_use import ToolUseEnvironment
from tests.engines.learner_view import (
    cut_by_a_sync,
    disturb,
    generate,
    largest_gap,
    largest_gap_of_episodes,
    nucleus_logprobs,
    prompts,
    requests,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

BOUND = 1e-4
"""Largest difference of a log-prob in fp32."""


@pytest.fixture(scope="module")
def policy() -> Any:
    return build_policy("micro/student", "float32", RolloutConfig())


@pytest.fixture(scope="module")
def engine(policy: Any) -> Iterator[VLLMEngine]:
    config = VLLMConfig(max_context=768, max_num_seqs=32, kv_cache_gb=0.25, timeout_s=2000)
    made = VLLMEngine(policy.model, config, cut_turns=True)
    yield made
    made.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_learner_at_the_sampling_temperature(policy, engine, temperature):
    asked = requests(prompts(policy), temperature)
    assert isinstance(engine, Engine) and engine.max_context == 768
    assert largest_gap(policy.model, asked, generate(engine, asked)) < BOUND


def test_top_p_logprobs_are_renormalised(policy, engine):
    (row,) = prompts(policy, 1)
    (made,) = generate(engine, requests([row], top_p=0.8))
    assert made.logprobs == pytest.approx(nucleus_logprobs(policy.model, row, made.token_ids, 0.8), abs=1e-3)


def test_greedy_equals_the_in_process_engine(policy, engine):
    asked = requests(prompts(policy), temperature=0.0, stop_ids=policy.renderer.end_of_turn_ids)
    assert generate(engine, asked) == generate(HFEngine(policy.model), asked)


def test_seeds_reproduce_and_differ(policy, engine):
    (row,) = prompts(policy, 1)
    asked = requests([row] * 8, temperature=2.0)
    made = generate(engine, asked)
    again = generate(engine, asked)
    assert [x.token_ids for x in again] == [x.token_ids for x in made]
    assert [x.token_ids for x in generate(engine, asked[3:5])] == [x.token_ids for x in made[3:5]]
    assert len({x.token_ids for x in made}) > 1


def test_more_prompts_at_once_than_one_batch_holds(policy, engine):
    """vLLM on a CPU cannot prefill a seeded request in parts: its process would end here."""
    rows = [(8 * row)[:600] for row in prompts(policy, 32)]
    asked = requests(rows)
    assert sum(map(len, rows)) > 2 * 4096
    assert largest_gap(policy.model, asked, generate(engine, asked)) < BOUND


def test_rows_end_at_a_stop_id_or_at_their_limit(policy, engine):
    stop = policy.renderer.end_of_turn_ids
    asked = [
        GenerationRequest(tuple(row), SamplingParams(1.0, 1.0, 6 + 90 * (index % 2), stop), index)
        for index, row in enumerate(prompts(policy, 12))
    ]
    made = generate(engine, asked)
    for request, generation in zip(asked, made, strict=True):
        *body, last = generation.token_ids
        assert not set(body) & set(stop)
        assert generation.finish_reason == ("stop" if last in stop else "length")
        assert generation.finish_reason == "stop" or len(generation.token_ids) == request.params.max_tokens
    assert {generation.finish_reason for generation in made} == {"stop", "length"}


def test_requests_that_do_not_fit_are_refused(engine):
    params = SamplingParams(max_tokens=24)
    with pytest.raises(EngineError, match="does not fit a context of 768"):
        generate(engine, [GenerationRequest([5] * 745, params, 0)])


def test_cancelling_a_call_aborts_its_requests(policy, engine):
    async def scenario() -> None:
        params = SamplingParams(max_tokens=300)
        asked = [GenerationRequest(tuple(row), params, 0) for row in prompts(policy, 4)]
        call = asyncio.create_task(engine.generate(asked))
        while engine.unfinished < 4:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while engine.unfinished:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_whole_episodes_are_token_exact_and_scored_by_the_sampler(policy, engine):
    tasks = list(islice(store.tasks("train", None, 0), 6))
    specs = [EpisodeSpec(task, ToolUseEnvironment, f"e{i}", skill="store", seed=i) for i, task in enumerate(tasks)]
    episodes = asyncio.run(run_episodes(specs, engine, policy.renderer))
    assert max(len(episode.turns) for episode in episodes) > 1
    assert largest_gap_of_episodes(policy.model, episodes) < BOUND


@pytest.fixture
def moved(policy: Any, engine: VLLMEngine) -> Iterator[Any]:
    """The learner after an update that the engine has not seen; both are put back."""
    before = disturb(policy.model)
    yield policy.model
    policy.model.load_state_dict(before)
    engine.sync_weights(0)


def test_a_sync_changes_the_samples_and_satisfies_the_canary(policy, engine, moved):
    asked = requests(prompts(policy), temperature=2.0)
    before = generate(engine, asked)
    assert largest_gap(moved, asked, before) > 0.01
    found = engine.sync_weights(7)
    after = generate(engine, asked)
    assert 0 <= found["sync/canary"] < BOUND
    assert largest_gap(moved, asked, after) < BOUND
    assert [x.token_ids for x in before] != [x.token_ids for x in after]
    assert {x.weight_version for x in after} == {7}


def test_an_update_cuts_turns_which_go_on_from_the_new_weights(policy, engine):
    params = SamplingParams(max_tokens=400)
    asked = [GenerationRequest(tuple(row), params, seed) for seed, row in enumerate(prompts(policy, 4))]
    gap = asyncio.run(cut_by_a_sync(engine, policy.model, asked, lambda: engine.unfinished == 4))
    assert gap < BOUND


class WithoutHead:
    """A sync as vLLM's own reload does it with tied embeddings: the output head is not sent."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def push(self, llm: Any) -> None:
        checkpoint = self.inner._checkpoint
        checkpoint.write()
        (checkpoint.path / "lm_head.safetensors").unlink()
        llm.call("collective_rpc", "reload_weights", kwargs={"weights_path": str(checkpoint.path)})


def test_the_canary_catches_a_stale_output_head(engine, moved):
    good = engine._sync
    engine._sync = WithoutHead(good)
    try:
        with pytest.raises(EngineError, match="samples from other weights"):
            engine.sync_weights(1)
    finally:
        engine._sync = good
    assert engine.sync_weights(2)["sync/canary"] < BOUND


def test_the_canary_catches_a_cache_of_the_old_weights(engine, moved):
    engine.sync_weights(1)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.mul_(1.01)
    engine._sync.push(engine._llm)
    with pytest.raises(EngineError, match="samples from other weights"):
        engine._check()
    assert engine.sync_weights(2)["sync/canary"] < BOUND


def test_shared_gpu_memory_needs_a_gpu(policy, engine):
    with pytest.raises(ConfigError, match="there is no GPU"):
        VLLMEngine(policy.model, VLLMConfig(sync="ipc"))


def test_a_cache_too_small_for_the_context_is_told_by_the_keys_that_set_them(policy):
    """One full-length request of the micro student takes more than 1 MiB of keys and values."""
    with pytest.raises(ConfigError, match=r"vllm\.kv_cache_gb gives .* or lower rollout\.vllm\.max_context"):
        VLLMEngine(policy.model, VLLMConfig(kv_cache_gb=2**-10, timeout_s=2000))
