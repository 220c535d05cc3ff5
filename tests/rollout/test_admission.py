"""How many episodes of a skill are under way at once, and who waits for whom."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentopd.contracts import AssistantTurn, GenerationRequest, StepResult
from agentopd.rollout import EpisodeSpec, RolloutOptions, run_episodes, stream_episodes
from agentopd.rollout.runner import Admission
from agentopd.types import Task


def test_leavers_admit_the_next_of_their_skill() -> None:
    queue = Admission(["a", "b", "a", "a", "b"], {"a": 1})
    assert queue.live == {0, 1, 4}
    assert queue.leave(1) is None and queue.live == {0, 4}
    assert queue.leave(0) == 2 and queue.live == {2, 4}
    assert queue.leave(2) == 3 and queue.leave(3) is None and queue.live == {4}


@pytest.mark.parametrize("lockstep", [True, False])
def test_live_episodes_are_bounded_and_results_do_not_change(
    lockstep: bool, make_task: Callable[..., Task], counter: type[Any], talk: Callable[..., Any]
) -> None:
    live, most = 0, 0

    class Watched(counter):  # type: ignore[misc]
        async def reset(self, *args: Any) -> Any:
            nonlocal live, most
            live += 1
            most = max(most, live)
            return await super().reset(*args)

        async def close(self) -> None:
            nonlocal live
            live -= 1
            await super().close()

    say = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'
    specs = [EpisodeSpec(make_task(id=str(n)), Watched, id=str(n), skill="x", seed=n) for n in range(7)]

    def tokens(options: RolloutOptions) -> list[list[int]]:
        engine = talk(say, say, "Done.", lockstep=lockstep)
        return [item.token_ids for item in asyncio.run(run_episodes(specs, engine, engine.renderer, options))]

    free = tokens(RolloutOptions())
    assert most == 7
    most = 0
    assert tokens(RolloutOptions(max_live={"x": 2})) == free and most == 2


@pytest.mark.parametrize(("lockstep", "own"), [(True, frozenset({"slow"})), (False, frozenset())])
def test_a_slow_environment_does_not_hold_up_the_others(
    lockstep: bool, own: frozenset[str], make_task: Callable[..., Task], counter: type[Any], talk: Callable[..., Any]
) -> None:
    released = asyncio.Event()

    class Slow(counter):  # type: ignore[misc]
        async def step(self, action: AssistantTurn) -> StepResult:
            await released.wait()
            return await super().step(action)

    say = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'
    specs = [EpisodeSpec(make_task(), env, id=f"{env.__name__}{n}", skill=skill)
             for n in range(2) for env, skill in ((Slow, "slow"), (counter, "fast"))]  # fmt: skip
    finished: list[str] = []

    async def note(spec: EpisodeSpec, episode: Any) -> str:
        finished.append(spec.skill)
        if finished == ["fast", "fast"]:
            released.set()
        return spec.skill

    engine = talk(say, "Done.", lockstep=lockstep)

    async def play() -> Sequence[str]:
        options = RolloutOptions(own_batches=own)
        return await asyncio.wait_for(stream_episodes(specs, engine, engine.renderer, note, options), 20)

    asyncio.run(play())
    assert finished == ["fast", "fast", "slow", "slow"]
    assert all(isinstance(request, GenerationRequest) for batch in engine.batches for request in batch)
