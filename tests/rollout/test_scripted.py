"""Gold, starter and empty turns played through an environment."""

import asyncio
from collections.abc import Callable
from typing import Any

from agentopd.rendering import ChatRenderer, HermesJSON
from agentopd.rollout import EpisodeSpec, run_episodes, run_scripted
from agentopd.types import Episode, Limits, Message, StopReason, Task, ToolCall

MakeTask = Callable[..., Task]
Talk = Callable[..., Any]


def says(content: str = "", **arguments: int) -> Message:
    calls = (ToolCall(name="add", arguments=arguments),) if arguments else ()
    return Message(role="assistant", content=content, tool_calls=calls)


GOLD = (says(n=1), says("Next.", n=2), says("Three."))


def script(spec: EpisodeSpec, turns: tuple[Message, ...], renderer: ChatRenderer | None = None) -> Episode:
    return asyncio.run(run_scripted(spec, turns, HermesJSON(), renderer))


def test_the_record_is_the_one_a_student_would_have_made(
    make_task: MakeTask, counter: type[Any], talk: Talk, renderer: ChatRenderer
) -> None:
    spec = EpisodeSpec(make_task(), counter, seed=3)
    gold = script(spec, GOLD, renderer)
    engine = talk(*[turn.text for turn in gold.turns])
    (student,) = asyncio.run(run_episodes([spec], engine, renderer))
    assert gold.token_ids == student.token_ids and gold.loss_mask == student.loss_mask
    assert gold.events == student.events and gold.final_state == student.final_state == {"total": 3}
    assert set(gold.rollout_logprobs) == {0.0}
    assert gold.stop_reason is StopReason.COMPLETED
    assert gold.turns[1].text == 'Next.\n<tool_call>\n{"name": "add", "arguments": {"n": 2}}\n</tool_call>'


def test_without_a_renderer_there_are_no_ids(make_task: MakeTask, counter: type[Any]) -> None:
    gold = script(EpisodeSpec(make_task(limits=Limits(max_tokens=1)), counter), GOLD)
    assert gold.token_ids == [] and gold.final_state == {"total": 3}
    assert (gold.skill, gold.group_id, gold.id) == ("counter", "t", "t#0")


def test_doing_nothing(make_task: MakeTask, counter: type[Any], renderer: ChatRenderer) -> None:
    noop = script(EpisodeSpec(make_task(), counter), (says(),), renderer)
    assert noop.stop_reason is StopReason.COMPLETED and noop.turns[0].text == ""
    assert noop.turns[0].token_ids == (renderer.end_of_turn_id,)


def test_a_script_that_runs_out(make_task: MakeTask, counter: type[Any], renderer: ChatRenderer) -> None:
    assert script(EpisodeSpec(make_task(), counter), (says(n=1),), renderer).stop_reason is StopReason.MAX_TURNS
    assert script(EpisodeSpec(make_task(), counter), ()).stop_reason is StopReason.MAX_TURNS


def test_limits_hold_for_scripts_too(make_task: MakeTask, counter: type[Any], renderer: ChatRenderer) -> None:
    cut = script(EpisodeSpec(make_task(limits=Limits(max_tokens=4)), counter), GOLD, renderer)
    assert cut.stop_reason is StopReason.MAX_TOKENS and cut.num_sampled == 4 and cut.final_state == {"total": 0}
