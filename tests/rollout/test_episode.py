"""One student episode: what is recorded, and everything that can end it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentopd.contracts import AssistantTurn, Environment, Sandbox, StepResult
from agentopd.rendering import ChatRenderer
from agentopd.rollout import EpisodeSpec, RolloutOptions, run_episodes
from agentopd.rollout.runner import turn_seed
from agentopd.types import Episode, Limits, Message, StopReason, Task, ToolCall

MakeTask = Callable[..., Task]
Talk = Callable[..., Any]


def add(n: int) -> str:
    return f'<tool_call>\n{{"name": "add", "arguments": {{"n": {n}}}}}\n</tool_call>'


def fail(how: str) -> str:
    return f'<tool_call>\n{{"name": "fail", "arguments": {{"how": "{how}"}}}}\n</tool_call>'


def play(task: Task, env_cls: type[Any], engine: Any, options: RolloutOptions | None = None) -> Episode:
    spec = EpisodeSpec(task, env_cls, id="e0", group_id="g0", skill="counting", seed=5)
    (episode,) = asyncio.run(run_episodes([spec], engine, engine.renderer, options or RolloutOptions()))
    return episode


def test_the_fake_is_an_environment(counter: type[Any]) -> None:
    assert isinstance(counter(), Environment)


def test_what_a_finished_episode_records(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    task = make_task()
    episode = play(task, counter, talk(add(1), add(2), "Three."))
    assert episode.stop_reason is StopReason.COMPLETED and episode.error == ""
    assert (episode.id, episode.group_id, episode.skill, episode.seed) == ("e0", "g0", "counting", 5)
    assert (episode.task_id, episode.task_hash, episode.env) == ("t", task.hash, "counter")
    assert [turn.text for turn in episode.turns] == [add(1), add(2), "Three."]
    assert episode.turns[0].tool_calls == (ToolCall(name="add", arguments={"n": 1}),)
    assert episode.turns[0].results[0].content.startswith("1 (roll ")
    assert [turn.weight_version for turn in episode.turns] == [4, 4, 4]
    assert [event.turn for event in episode.events] == [0, 1]
    assert episode.final_state == {"total": 3}
    assert episode.turns[-1].observation_ids == ()
    assert sum(episode.loss_mask) == episode.num_sampled
    assert set(episode.timings) == {"env_s", "act_s"}
    assert counter.opened[0].closed == 1


def test_a_turn_knows_the_tokens_of_its_calls(
    make_task: MakeTask, counter: type[Any], talk: Talk, renderer: ChatRenderer
) -> None:
    said = f"So: {add(1)} <tool_call>{{}}</tool_call> {add(2)}"
    turn = play(make_task(limits=Limits(max_turns=1)), counter, talk(said)).turns[0]
    texts = [turn.text[start:end] for start, end in turn.call_spans]
    assert texts == [add(1), add(2), "<tool_call>{}</tool_call>"]
    for text, span in zip(texts, turn.call_spans, strict=True):
        first, last = turn.token_span(*span) or (0, 0)
        assert renderer.decode_turn(turn.token_ids[first:last]) == text
    assert turn.token_span(0, len(said)) == (0, len(turn.token_ids) - 1)
    assert turn.token_span(3, 3) is None


def test_token_in_token_out(make_task: MakeTask, counter: type[Any], talk: Talk, renderer: ChatRenderer) -> None:
    engine = talk(add(1), add(2), "Three.")
    # Rendering any assistant message but the renderer's own stand-ins, or the prompt beside one, now fails.
    poison = """\
{%- for m in messages if m.role == 'assistant' and m.content not in ('a stand-in turn', 'answer') %}
{{- raise_exception('history was re-rendered') }}{%- endfor %}
{%- for m in messages if messages | length > 1 and m.content == 'Count to 3.' %}
{{- raise_exception('the prompt was re-rendered') }}{%- endfor %}"""
    renderer.tokenizer.chat_template = poison + renderer.tokenizer.chat_template
    episode = play(make_task(), counter, engine)
    assert episode.stop_reason is StopReason.COMPLETED
    fed = [list(batch[0].token_ids) for batch in engine.batches]
    assert fed[0] == list(episode.prompt_ids)
    for turn, before, after in zip(episode.turns, fed, fed[1:], strict=False):
        assert after == before + list(turn.token_ids) + list(turn.observation_ids)
    assert episode.token_ids == fed[-1] + list(episode.turns[-1].token_ids)
    assert [batch[0].seed for batch in engine.batches] == [turn_seed(5, turn) for turn in range(3)]
    assert len({turn_seed(seed, turn) for seed in range(20) for turn in range(20)}) == 400


def test_the_student_and_the_environment_see_no_secrets(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    engine = talk(add(1), "Done.")
    episode = play(make_task(), counter, engine)
    assert "CANARY" not in counter.opened[0].task.model_dump_json()
    assert "CANARY" not in engine.renderer.decode_turn(episode.token_ids)


BROKEN_CALL = "<tool_call>\n{oops\n</tool_call>"


@pytest.mark.parametrize(
    ("limits", "texts", "reason", "turns"),
    [
        (Limits(max_turns=2), [add(1)], StopReason.MAX_TURNS, 2),
        (Limits(max_turns=20, max_tokens=50), [add(1)], StopReason.MAX_TOKENS, None),
        (Limits(max_turn_tokens=5), [add(1)], StopReason.MAX_TOKENS, 1),
        (Limits(max_turns=50, max_tokens=5000), [add(1)], StopReason.CONTEXT_OVERFLOW, None),
        (Limits(max_tokens=5000), ["word " * 300], StopReason.CONTEXT_OVERFLOW, 1),
        (Limits(max_tool_calls=2), [add(1), add(1), add(1)], StopReason.TOOL_BUDGET, 3),
        (Limits(), [BROKEN_CALL], StopReason.PARSE_ERROR, 3),
        (Limits(), [""], StopReason.COMPLETED, 1),
    ],
)
def test_stop_reasons(
    make_task: MakeTask,
    counter: type[Any],
    talk: Talk,
    limits: Limits,
    texts: list[str],
    reason: StopReason,
    turns: int | None,
) -> None:
    engine = talk(*texts)
    episode = play(make_task(limits=limits), counter, engine)
    assert episode.stop_reason is reason
    assert turns is None or len(episode.turns) == turns
    assert episode.num_sampled <= limits.max_tokens
    assert len(episode.token_ids) <= engine.max_context
    assert counter.opened[0].closed == 1 and episode.final_state == {"total": counter.opened[0].total}


def test_a_cut_turn_is_recorded_but_not_acted_on(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    engine = talk(add(7) + " and more")
    room = len(engine.renderer.encode_turn(add(7)))
    episode = play(make_task(limits=Limits(max_tokens=room)), counter, engine)
    assert episode.stop_reason is StopReason.MAX_TOKENS and episode.turns[0].finish_reason == "length"
    assert episode.turns[0].tool_calls and episode.final_state == {"total": 0}


def test_a_prompt_that_does_not_fit(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    engine = talk("hi")
    episode = play(make_task(prompt="word " * 200), counter, engine)
    assert episode.stop_reason is StopReason.CONTEXT_OVERFLOW and episode.turns == () and engine.batches == []


def test_malformed_calls_are_answered_until_the_limit(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    episode = play(make_task(), counter, talk(BROKEN_CALL, add(1), "Done."))
    assert episode.stop_reason is StopReason.COMPLETED
    assert "invalid JSON" in episode.turns[0].results[0].content
    once = play(make_task(), counter, talk(BROKEN_CALL), RolloutOptions(max_malformed=1))
    assert once.stop_reason is StopReason.PARSE_ERROR and len(once.turns) == 1


@pytest.mark.parametrize(
    ("public", "text", "complaint"),
    [
        ({"broken": ["reset"]}, "", "RuntimeError: reset broke"),
        ({"broken": ["state"]}, "Done.", "RuntimeError: state broke"),
        ({}, fail("bug"), "KeyError: 'oops'"),
        ({}, fail("sandbox"), "SandboxError: jail died"),
        ({}, '<tool_call>{"name": "silent"}</tool_call>', "neither messages nor done"),
    ],
)
def test_environment_faults_are_episodes_without_a_score(
    make_task: MakeTask, counter: type[Any], talk: Talk, public: dict[str, Any], text: str, complaint: str
) -> None:
    episode = play(make_task(**public), counter, talk(text))
    assert episode.stop_reason is StopReason.ENV_ERROR
    assert complaint in episode.error and "'counter'" in episode.error and "'t'" in episode.error
    assert counter.opened[0].closed == 1


def test_a_constructor_that_raises(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    class Unbuildable(counter):  # type: ignore[misc]
        def __init__(self) -> None:
            raise OSError("no display")

    episode = play(make_task(), Unbuildable, talk("hi"))
    assert episode.stop_reason is StopReason.ENV_ERROR and "OSError: no display" in episode.error


def test_a_tool_error_is_shown_to_the_student(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    episode = play(make_task(), counter, talk(fail("tool"), "Sorry."))
    assert episode.stop_reason is StopReason.COMPLETED
    assert episode.turns[0].results[0].content == "error: no such counter"


def test_half_a_character_from_an_environment_ends_no_run(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    class Garbler(counter):  # type: ignore[misc]
        async def step(self, action: AssistantTurn) -> StepResult:
            if self.turns:
                raise RuntimeError("\ud800 is no key")
            self.turns += 1
            return StepResult((Message(role="tool", content="half of \ud83d"),))

    episode = play(make_task(), Garbler, talk(add(1)))
    assert episode.turns[0].results[0].content == "half of ?"
    assert episode.stop_reason is StopReason.ENV_ERROR and "? is no key" in episode.error
    assert Episode.model_validate_json(episode.model_dump_json()) == episode


def test_a_failed_clean_up_keeps_the_result(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    episode = play(make_task(broken=["close"]), counter, talk(add(3), "Done."))
    assert episode.stop_reason is StopReason.COMPLETED and episode.final_state == {"total": 3}
    assert episode.events[-1].kind == "close_failed" and "close broke" in episode.events[-1].data["error"]


def test_wall_time_of_the_environment(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    hangs = make_task(limits=Limits(wall_s=0.05), sleep_s=30)
    episode = play(hangs, counter, talk(add(1)))
    assert episode.stop_reason is StopReason.TIMEOUT and len(episode.turns) == 1
    assert episode.final_state == {"total": 0} and counter.opened[0].closed == 1


def test_a_reset_beyond_the_wall_limit_is_a_fault(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    episode = play(make_task(limits=Limits(wall_s=0.05), broken=["slow"]), counter, talk(add(1)))
    assert episode.stop_reason is StopReason.ENV_ERROR and episode.turns == ()
    assert episode.error == "environment 'counter', reset of task 't' took more than 0.05 s"
    assert counter.opened[0].closed == 1


def test_an_environment_timeout_error_is_its_own_fault(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    class Impatient(counter):  # type: ignore[misc]
        async def step(self, action: AssistantTurn) -> StepResult:
            raise TimeoutError("upstream")

    episode = play(make_task(), Impatient, talk("hi"))
    assert episode.stop_reason is StopReason.ENV_ERROR and "upstream" in episode.error


def test_the_environment_is_given_the_sandbox(make_task: MakeTask, counter: type[Any], talk: Talk) -> None:
    class NoSandbox:
        name = "none"

    box: Sandbox = NoSandbox()  # type: ignore[assignment]
    play(make_task(), counter, talk("hi"), RolloutOptions(sandbox=box))
    assert counter.opened[0].context.sandbox is box and counter.opened[0].context.seed == 5
