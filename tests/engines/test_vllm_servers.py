"""Two vLLM servers against Hugging Face on the same weights, in fp32, and against being killed, hung and taken over."""

import asyncio
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from typing import Any

import psutil
import pytest

from agentopd.build import build_policy
from agentopd.config.engines import ServersConfig, VLLMConfig
from agentopd.config.run import RolloutConfig
from agentopd.contracts import Engine, GenerationRequest, SamplingParams
from agentopd.engines import HFEngine, VLLMServersEngine
from agentopd.errors import EngineError
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
VLLM = {"max_context": 768, "timeout_s": 2000.0}


@pytest.fixture(scope="module")
def policy() -> Any:
    return build_policy("micro/student", "float32", RolloutConfig())


@pytest.fixture(scope="module")
def engine(policy: Any) -> Iterator[VLLMServersEngine]:
    vllm = VLLMConfig(**VLLM, max_num_seqs=32, kv_cache_gb=0.25)
    made = VLLMServersEngine(policy.model, vllm, ServersConfig(replicas=2, turn_timeout_s=120), cut_turns=True)
    yield made
    made.close()


@pytest.fixture
def moved(policy: Any, engine: VLLMServersEngine) -> Iterator[Any]:
    """The learner after an update that the servers have not seen; both are put back."""
    before = disturb(policy.model)
    yield policy.model
    policy.model.load_state_dict(before)
    engine.sync_weights(0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_servers_give_the_learners_logprobs_at_the_sampling_temperature(policy, engine, temperature):
    asked = requests(prompts(policy), temperature)
    assert isinstance(engine, Engine) and engine.max_context == 768
    assert largest_gap(policy.model, asked, generate(engine, asked)) < BOUND


def test_servers_renormalise_the_logprobs_of_a_nucleus(policy, engine):
    (row,) = prompts(policy, 1)
    (made,) = generate(engine, requests([row], top_p=0.8))
    assert made.logprobs == pytest.approx(nucleus_logprobs(policy.model, row, made.token_ids, 0.8), abs=1e-3)


def test_servers_decode_greedily_as_the_in_process_engine_does(policy, engine):
    asked = requests(prompts(policy), temperature=0.0, stop_ids=policy.renderer.end_of_turn_ids)
    assert generate(engine, asked) == generate(HFEngine(policy.model), asked)


def test_seeds_reproduce_on_any_server(policy, engine):
    (row,) = prompts(policy, 1)
    asked = requests([row] * 8, temperature=2.0)
    made = generate(engine, asked)
    assert [x.token_ids for x in generate(engine, asked[::-1])[::-1]] == [x.token_ids for x in made]
    assert len({x.token_ids for x in made}) > 1


def test_whole_episodes_over_servers_are_token_exact(policy, engine):
    tasks = list(islice(store.tasks("train", None, 0), 6))
    specs = [EpisodeSpec(task, ToolUseEnvironment, f"e{i}", skill="store", seed=i) for i, task in enumerate(tasks)]
    episodes = asyncio.run(run_episodes(specs, engine, policy.renderer))
    assert max(len(episode.turns) for episode in episodes) > 1
    assert largest_gap_of_episodes(policy.model, episodes) < BOUND


def test_a_sync_reaches_every_server(policy, engine, moved):
    asked = requests(prompts(policy), temperature=2.0)
    before = generate(engine, asked)
    assert largest_gap(moved, asked, before) > 0.01
    found = engine.sync_weights(7)
    assert found["sync/replicas"] == 2 and 0 <= found["sync/canary"] < BOUND
    for rows in (asked, asked[::-1]):
        after = generate(engine, rows)
        assert largest_gap(moved, rows, after) < BOUND
        assert {x.weight_version for x in after} == {7}


def test_an_update_cuts_turns_which_go_on_from_the_new_weights(policy, engine):
    params = SamplingParams(max_tokens=400)
    asked = [GenerationRequest(tuple(row), params, seed) for seed, row in enumerate(prompts(policy, 4))]
    gap = asyncio.run(
        cut_by_a_sync(engine, policy.model, asked, lambda: sum(replica.turns for replica in engine.replicas) == 4)
    )
    assert gap < BOUND


def test_ids_beyond_the_vocabulary_are_refused_before_they_reach_a_server(policy, engine):
    with pytest.raises(EngineError, match="beyond the student's vocabulary"):
        generate(engine, [GenerationRequest([10**6], SamplingParams(max_tokens=4), 0)])
    assert [replica.is_up for replica in engine.replicas] == [True, True]


def test_a_cancelled_call_leaves_the_servers_free_for_a_sync(policy, engine):
    async def scenario() -> None:
        asked = [GenerationRequest(tuple(row), SamplingParams(max_tokens=300), 0) for row in prompts(policy, 4)]
        call = asyncio.create_task(engine.generate(asked))
        while sum(replica.turns for replica in engine.replicas) < 4:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(scenario())
    lives = [replica.life for replica in engine.replicas]
    assert engine.sync_weights(0)["sync/replicas"] == 2
    assert [replica.life for replica in engine.replicas] == lives


async def disturbed(engine: VLLMServersEngine, asked: list[GenerationRequest], what: signal.Signals) -> Any:
    """Send a signal to every process of the first server while it works on ``asked``."""
    victim = engine.replicas[0]
    call = asyncio.create_task(engine.generate(asked))
    while not victim.turns:
        await asyncio.sleep(0.01)
    leader = psutil.Process(victim.process.pid)
    for process in [leader, *leader.children(recursive=True)]:
        os.kill(process.pid, what)
    made = await call
    async with asyncio.timeout(2000):
        while not victim.is_up:
            await asyncio.sleep(0.1)
    assert not leader.is_running() and victim.life > 1
    return made


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_is_replaced_and_the_results_are_the_same(policy, engine, moved, what):
    asked = requests(prompts(policy, 8), temperature=1.0)
    engine.sync_weights(3)
    undisturbed = generate(engine, asked)
    life = engine.replicas[0].life
    made = asyncio.run(disturbed(engine, asked, what))
    assert engine.replicas[0].life == life + 1
    assert [x.token_ids for x in made] == [x.token_ids for x in undisturbed]
    assert {x.weight_version for x in made} == {3}
    again = generate(engine, asked)
    assert largest_gap(moved, asked, again) < BOUND
    assert [x.token_ids for x in again] == [x.token_ids for x in undisturbed]


def test_a_server_started_elsewhere_is_used_and_its_owner_takes_it_back(policy, engine):
    """Two engines share a server: each notices the other's weights and puts its own in their place."""
    asked = requests(prompts(policy))
    mine = generate(engine, asked)
    address = str(engine.replicas[0].reach().address)
    other = VLLMServersEngine(policy.model, VLLMConfig(**VLLM), ServersConfig(urls=(address,)))
    try:
        assert [x.token_ids for x in generate(other, asked)] == [x.token_ids for x in mine]
    finally:
        other.close()
    assert engine.replicas[0].process.pid is not None
    assert [x.token_ids for x in generate(engine, asked)] == [x.token_ids for x in mine]
