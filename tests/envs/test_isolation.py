"""Nothing hidden reaches the student, and episodes share nothing."""

import asyncio
import random

import pytest

from agentopd.contracts import AssistantTurn, EpisodeContext
from agentopd.types import Message, Privileged
from agentopd_envs import tool_turn
from agentopd_envs.code_repair import CodeRepairEnvironment
from agentopd_envs.math import MathEnvironment
from agentopd_envs.tool_use import ToolUseEnvironment

CANARY = "CANARY-7f3a"
ENVIRONMENTS = [MathEnvironment, CodeRepairEnvironment, ToolUseEnvironment]

PROBES = {
    "math": [Message(role="assistant", content="\\boxed{1}")],
    "code_repair": [
        tool_turn("run_tests"),
        tool_turn("edit", old="no such text", new="x"),
        tool_turn("edit", old="return", new="return 0 *"),
        tool_turn("run_tests"),
        tool_turn("submit", code="x"),
        tool_turn("gold"),
        tool_turn("submit"),
    ],
    "tool_use": [
        tool_turn("read", item=CANARY[:6]),
        tool_turn("read", item="goal"),
        tool_turn("write", item="x", count=1),
        tool_turn("read"),
        Message(role="assistant", content="Done."),
    ],
}


def canaried(task):
    """The task with a canary in every hidden and privileged field."""
    hidden = {**task.hidden, "canary": CANARY, "answer": CANARY, "gold": CANARY, "cases": [{"id": CANARY}]}
    privileged = Privileged(hint=CANARY, solution=CANARY, trajectory=(Message(role="assistant", content=CANARY),))
    return task.model_copy(update={"hidden": hidden, "privileged": privileged})


@pytest.mark.parametrize("env_class", ENVIRONMENTS)
def test_no_canary_reaches_the_student(env_class, play, trusting_sandbox):
    for task in env_class.load_tasks("train", "micro", 5, 0):
        poisoned = canaried(task)
        played = play(env_class, poisoned, PROBES[env_class.name], trusting_sandbox)
        schemas = [schema.model_dump_json() for schema in env_class.tool_schemas(poisoned.student_view())]
        shown = [message.model_dump_json() for message in played.seen] + schemas
        assert not [text for text in shown if CANARY in text]
        assert CANARY not in str(played.episode.final_state)


@pytest.mark.parametrize("env_class", ENVIRONMENTS)
def test_the_student_view_is_all_an_environment_needs(env_class, play, trusting_sandbox):
    """Gold played on the student view gives the same messages as on any other copy: nothing else is read."""
    (task,) = env_class.load_tasks("train", "micro", 1, 0)
    first = play(env_class, task, env_class.gold_turns(task), trusting_sandbox)
    second = play(env_class, canaried(task), env_class.gold_turns(task), trusting_sandbox)
    assert first.seen == second.seen and first.episode.final_state == second.episode.final_state


@pytest.mark.data
@pytest.mark.parametrize(
    ("env_class", "source"),
    [(MathEnvironment, "gsm8k"), (ToolUseEnvironment, "bfcl"), (CodeRepairEnvironment, "quixbugs")],
)
def test_no_canary_of_a_benchmark_reaches_the_student(env_class, source, data_dir, play, trusting_sandbox):
    for task in env_class.load_tasks("eval", source, 5, 0):
        poisoned = canaried(task)
        probes = [turn for turn in PROBES[env_class.name] if turn.tool_calls[:1] != PROBES["code_repair"][0].tool_calls]
        played = play(env_class, poisoned, probes)
        assert CANARY not in "".join(message.model_dump_json() for message in played.seen)
        assert CANARY not in str([schema.model_dump() for schema in env_class.tool_schemas(poisoned.student_view())])


@pytest.mark.parametrize("env_class", [CodeRepairEnvironment, ToolUseEnvironment])
def test_concurrent_episodes_share_nothing(env_class, play):
    """Eight episodes of one task, stepped in turn; those that act do not touch those that wait."""
    (task,) = env_class.load_tasks("train", "micro", 1, 0)
    before = task.model_dump_json()
    gold = env_class.gold_turns(task)

    async def run():
        envs = [env_class() for _ in range(8)]
        for index, env in enumerate(envs):
            await env.reset(task.student_view(), EpisodeContext(index, random.Random(index)))
        untouched = envs[1].state()
        for turn in gold:
            await asyncio.gather(*(env.step(AssistantTurn(turn.content, turn.tool_calls)) for env in envs[::2]))
        return untouched, [env.state() for env in envs]

    untouched, states = asyncio.run(run())
    assert all(state == untouched for state in states[1::2])
    assert all(state == states[0] != untouched for state in states[::2])
    assert task.model_dump_json() == before, "an episode never writes to its task"


def test_states_are_snapshots():
    async def run():
        (task,) = ToolUseEnvironment.load_tasks("train", "micro", 1, 0)
        env = ToolUseEnvironment()
        await env.reset(task.student_view(), EpisodeContext(0, random.Random(0)))
        before = env.state()
        item = next(iter(before["db"]))
        await env.step(AssistantTurn("", tool_turn("write", item=item, count=99).tool_calls))
        return before["db"][item], env.state()["db"][item]

    before, after = asyncio.run(run())
    assert (before, after) != (99, 99) and after == 99
