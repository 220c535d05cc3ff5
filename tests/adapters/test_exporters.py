"""Exports: the same episodes and verdicts under inspect_ai's and TRL's own machinery."""

import asyncio
import inspect

import pytest

from agentopd.errors import ConfigError, ToolError
from agentopd.types import Task
from agentopd_envs.adapters.inspect_ai import to_inspect
from agentopd_envs.adapters.messages import MessageEpisode
from agentopd_envs.adapters.trl import to_trl
from agentopd_envs.math import MathEnvironment
from agentopd_envs.tool_use import ToolUseEnvironment


async def played(env_cls, task, turns):
    episode = MessageEpisode(env_cls, task)
    await episode.open()
    for turn in turns:
        if not episode.done:
            await episode.act(turn.content, turn.tool_calls)
    verdict = await episode.verdict()
    await episode.close()
    return verdict


@pytest.mark.parametrize("env_cls", [ToolUseEnvironment, MathEnvironment])
def test_an_episode_in_messages_is_judged_like_any_other(env_cls):
    (task,) = env_cls.load_tasks("train", "micro", 1, 0)
    assert asyncio.run(played(env_cls, task, env_cls.gold_turns(task))).reward == 1.0
    assert asyncio.run(played(env_cls, task, env_cls.starter_turns(task))).reward == 0.0


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_trl_drives_the_tools_and_reads_the_reward():
    made, rows = to_trl("tool_use", limit=4)
    env = made()
    for row in rows:
        task = Task.model_validate_json(row["task"])
        for steps, reward in ((slice(None), 1.0), (slice(0, 1), 0.0)):
            assert env.reset(**row) is None
            for call in [call for turn in task.privileged.trajectory for call in turn.tool_calls][steps]:
                getattr(env, call.name)(**call.arguments)
            assert env.get_reward() == reward
    with pytest.raises(ToolError, match="over"):
        env.read(item="x")


def test_trl_gets_instances_that_share_nothing():
    made, rows = to_trl("tool_use", limit=2)
    one, other = made(), made()
    one.reset(**rows[0])
    other.reset(**rows[1])
    stock = Task.model_validate_json(rows[0]["task"]).public["db"]
    item, count = next(iter(stock.items()))
    one.write(item, count + 1)
    assert one.read(item) == str(count + 1) and other.get_reward() == 0.0


def test_trls_own_schema_of_a_tool_is_the_tools():
    chat = pytest.importorskip("transformers.utils", reason="transformers has no chat template utilities")
    made, _ = to_trl("tool_use", limit=1)
    (schema,) = [item for item in ToolUseEnvironment.tool_schemas(
        next(iter(ToolUseEnvironment.load_tasks("train", "micro", 1, 0)))) if item.name == "write"]  # fmt: skip
    theirs = chat.get_json_schema(made().write)["function"]
    assert theirs["name"] == "write" and theirs["description"] == schema.description
    assert theirs["parameters"]["required"] == ["item", "count"]
    assert theirs["parameters"]["properties"]["count"]["type"] == "integer"


@pytest.mark.slow
def test_trl_finds_the_methods_it_looks_for():
    pytest.importorskip("trl", reason="the extra `trl` is not installed")
    made, _ = to_trl("tool_use", limit=1)
    names = [name for name, _ in inspect.getmembers(made, predicate=inspect.isfunction) if name[0] != "_"]
    assert sorted(names) == ["get_reward", "read", "reset", "write"]


@pytest.mark.parametrize("env", ["math", "retail"])
def test_what_is_more_than_tool_calls_is_not_exported(env):
    with pytest.raises(ConfigError, match="more than tool calls"):
        to_trl(env, limit=3)


# --- inspect_ai ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env", ["tool_use", "math"])
def test_inspect_evaluates_gold_and_nothing(env, tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai", reason="the extra `inspect` is not installed")
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput, ModelUsage, get_model
    from inspect_ai.tool import ToolCall

    def says(content, calls=()):
        made = [ToolCall(id=f"c{index}", function=call.name, arguments=call.arguments)
                for index, call in enumerate(calls)]  # fmt: skip
        message = ChatMessageAssistant(content=content, tool_calls=made or None)
        # Usage is given, or the mock would count tokens with an encoding that it has to download.
        return ModelOutput(model="mock", choices=[ChatCompletionChoice(message=message)], usage=ModelUsage())

    task = to_inspect(env, limit=3)
    gold = [Task.model_validate(sample.metadata["task"]).privileged.trajectory for sample in task.dataset]
    turns = iter([turn for trajectory in gold for turn in trajectory])

    def solve(messages, tools, choice, config):
        turn = next(turns)
        return says(turn.content, turn.tool_calls)

    def give_up(messages, tools, choice, config):
        return says("I do not know.")

    for policy, wanted in ((solve, 1.0), (give_up, 0.0)):
        model = get_model("mockllm/model", custom_outputs=policy, memoize=False)
        (log,) = inspect_ai.eval(task, model=model, max_samples=1, log_dir=str(tmp_path), display="none")
        assert log.status == "success", log.error
        assert [sample.scores["agentopd_verdict"].value for sample in log.samples] == [wanted] * 3
