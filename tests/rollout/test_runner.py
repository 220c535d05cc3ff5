"""Many episodes at once: batches, order, overlap, failure, determinism."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from agentopd.contracts import Generation, GenerationRequest
from agentopd.engines import HFEngine
from agentopd.errors import EngineError
from agentopd.rendering import ChatRenderer
from agentopd.rollout import EpisodeSpec, RolloutOptions, run_episodes, stream_episodes
from agentopd.types import Episode, Limits, StopReason, Task
from tests.tiny import qwen3

MakeTask = Callable[..., Task]
Talk = Callable[..., Any]
ADD = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'


def specs(make_task: MakeTask, env_cls: type[Any], turns: Sequence[int], **public: Any) -> list[EpisodeSpec]:
    """Episodes that stop after the given numbers of turns."""
    return [
        EpisodeSpec(make_task(f"t{i}", Limits(max_turns=count), **public), env_cls, id=f"e{i}", seed=i)
        for i, count in enumerate(turns)
    ]


def test_lockstep_calls_hold_every_live_episode_in_order(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    engine = talk(ADD)
    todo = specs(make_task, counter, [1, 3, 2, 3])
    episodes = asyncio.run(run_episodes(todo, engine, engine.renderer))
    assert [len(batch) for batch in engine.batches] == [4, 3, 2]
    assert [episode.id for episode in episodes] == ["e0", "e1", "e2", "e3"]
    assert [len(episode.turns) for episode in episodes] == [1, 3, 2, 3]
    # Within a call, requests come in episode order: each continues the call before.
    assert [len(request.token_ids) for request in engine.batches[2]] == [
        len(episodes[i].token_ids) - len(episodes[i].turns[-1].token_ids) for i in (1, 3)
    ]


def test_without_lockstep_each_request_goes_alone(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    engine = talk(ADD, lockstep=False)
    episodes = asyncio.run(run_episodes(specs(make_task, counter, [1, 2]), engine, engine.renderer))
    assert [len(batch) for batch in engine.batches] == [1, 1, 1]
    assert [len(episode.turns) for episode in episodes] == [1, 2]


def test_nothing_to_do(talk: Talk) -> None:
    engine = talk("hi")
    assert asyncio.run(run_episodes([], engine, engine.renderer)) == []


def test_finished_episodes_are_handed_on_while_others_sample(
    make_task: MakeTask, counter: type[Any], talk: Talk
) -> None:
    engine = talk(ADD)
    calls_when_handed: dict[str, int] = {}

    async def judge(spec: EpisodeSpec, episode: Episode) -> str:
        calls_when_handed[spec.id] = len(engine.batches)
        await asyncio.sleep(0)
        return f"judged {episode.id}"

    todo = specs(make_task, counter, [1, 4])
    results = asyncio.run(stream_episodes(todo, engine, engine.renderer, judge))
    assert results == ["judged e0", "judged e1"]
    assert calls_when_handed["e0"] < 4 == calls_when_handed["e1"]


def test_a_slow_judge_does_not_hold_up_the_batch(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    engine = talk(ADD)
    finished = asyncio.Event()

    async def judge(spec: EpisodeSpec, episode: Episode) -> None:
        if spec.id == "e0":
            await asyncio.wait_for(finished.wait(), 5)
        else:
            finished.set()

    asyncio.run(stream_episodes(specs(make_task, counter, [1, 3]), engine, engine.renderer, judge))


class FailingEngine:
    """Fails at its second call."""

    max_context, lockstep = 400, True

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        if self.inner.batches:
            raise EngineError("the server went away")
        made: list[Generation] = await self.inner.generate(requests)
        return made

    def sync_weights(self, version: int) -> dict[str, float]:
        return {}

    def sleep(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


def test_an_engine_failure_is_raised_and_everything_closed(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    engine = FailingEngine(talk(ADD))
    with pytest.raises(EngineError, match="went away"):
        asyncio.run(run_episodes(specs(make_task, counter, [2, 2, 2]), engine, engine.inner.renderer))
    assert [env.closed for env in counter.opened] == [1, 1, 1]


def test_a_failing_judge_stops_the_rest(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    engine = talk(ADD)

    async def judge(spec: EpisodeSpec, episode: Episode) -> None:
        raise ZeroDivisionError("judge bug")

    with pytest.raises(ZeroDivisionError):
        asyncio.run(stream_episodes(specs(make_task, counter, [1, 50]), engine, engine.renderer, judge))
    assert len(engine.batches) < 10 and [env.closed for env in counter.opened] == [1, 1]


@pytest.fixture
def tiny_model(renderer: ChatRenderer) -> Any:
    return qwen3(
        len(renderer.tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=160,
        initializer_range=0.3,
        tie_word_embeddings=True,
    ).train()


def test_episodes_repeat_under_their_seeds(
    make_task: MakeTask, counter: type[Any], renderer: ChatRenderer, tiny_model: Any
) -> None:
    class Chatty(counter):  # type: ignore[misc]
        """Goes on after any text, with a random message that takes a random time."""

        async def step(self, action: Any) -> Any:
            result = await super().step(action)
            await asyncio.sleep(torch.rand(()).item() / 100)
            note = str(self.context.rng.random())
            return type(result)((self.task.prompt[0].model_copy(update={"content": note}),))

    limits = Limits(max_turns=3, max_turn_tokens=400, max_tokens=400)
    todo = [EpisodeSpec(make_task(f"t{i // 2}", limits), Chatty, id=f"e{i}", seed=i) for i in range(6)]

    def once(batch_size: int = 256) -> list[Episode]:
        engine = HFEngine(tiny_model, batch_size)
        made = asyncio.run(run_episodes(todo, engine, renderer, RolloutOptions(temperature=0.9)))
        return [episode.model_copy(update={"timings": {}}) for episode in made]

    first = once()
    assert first == once()
    assert [episode.token_ids for episode in first] == [episode.token_ids for episode in once(batch_size=2)]
    assert len({tuple(episode.token_ids) for episode in first}) == 6
    assert {episode.stop_reason for episode in first} <= {StopReason.MAX_TURNS, StopReason.CONTEXT_OVERFLOW}
    assert any(len(episode.turns) > 1 for episode in first)
