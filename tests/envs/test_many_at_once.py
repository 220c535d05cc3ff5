"""Many episodes at once share nothing: each carries a secret, and nobody else ever sees it."""

import asyncio

import pytest

from agentopd.rendering import HermesJSON
from agentopd.rollout import EpisodeSpec, run_scripted
from agentopd.types import Message
from agentopd_envs import tool_turn
from agentopd_envs.retail.environment import RetailEnvironment
from agentopd_envs.tool_use import ToolUseEnvironment

DONE = Message(role="assistant", content="Done.")


def with_secret(index, tasks):
    """A task whose world holds a secret in what its script reads and writes, and that script."""
    env_class = (ToolUseEnvironment, RetailEnvironment)[index % 2]
    task, secret = tasks[env_class], f"secret-{index:04}-{index * 7919 % 10007}"
    if env_class is ToolUseEnvironment:
        task = task.model_copy(update={"public": {"db": {secret: index}}})
        turns = [tool_turn("read", item=secret), tool_turn("write", item=secret, count=index + 1), DONE]
    else:
        tables = {**task.public["tables"]}
        order = next(iter(tables["orders"].values()))
        tables["orders"] = {order["order_id"]: {**order, "note": secret}}
        task = task.model_copy(update={"public": {**task.public, "tables": tables, "user_turns": [secret] * 2}})
        look = tool_turn("get_order", order_id=order["order_id"])
        move = tool_turn("change_address", order_id=order["order_id"], address=secret)
        turns = [look, DONE, move, look, DONE, DONE]
    return EpisodeSpec(task, env_class, id=secret), turns


@pytest.mark.slow
def test_episodes_that_run_at_once_never_see_each_others_secrets():
    tasks = {env: next(iter(env.load_tasks("train", "micro", 1, 0))) for env in (ToolUseEnvironment, RetailEnvironment)}
    specs = [with_secret(index, tasks) for index in range(256)]

    async def play_all():
        return await asyncio.gather(*(run_scripted(spec, turns, HermesJSON()) for spec, turns in specs))

    episodes = asyncio.run(play_all())
    secrets = [spec.id for spec, _ in specs]
    for (spec, turns), episode in zip(specs, episodes, strict=True):
        body = episode.model_dump_json()
        assert [secret for secret in secrets if secret in body] == [spec.id]
        assert len(episode.turns) == len(turns) and str(episode.final_state).count(spec.id)
