"""Environment classes in TRL's style, ours exported and one written by hand, played as environments."""

import pytest

from agentopd.errors import ConfigError
from agentopd.types import Message, Task
from agentopd_envs import tool_turn
from agentopd_envs.adapters.trl import to_trl
from agentopd_envs.adapters.trl_classes import from_trl


class Counter:
    """A counter to bring to a number."""

    def reset(self, goal=3, **kwargs):
        self.goal, self.total = goal, 0
        return f" Count to {goal}."

    def add(self, n: int) -> str:
        """
        Add to the counter.

        Args:
            n: how much to add
        """
        if n < 1:
            raise ValueError("add something")
        self.total += n
        return f"{self.total}"

    async def get_reward(self) -> float:
        return float(self.total == self.goal)


DONE = Message(role="assistant", content="Done.")


def test_a_class_in_trls_style_is_an_environment(play):
    env = from_trl(Counter, [{"prompt": f"Task {n}.", "goal": n} for n in range(3, 40)], "counter")
    tasks = {split: list(env.load_tasks(split, "micro", None, 0)) for split in ("train", "eval", "retention")}
    assert sum(map(len, tasks.values())) == 37 and all(tasks.values())
    (schema,) = env.tool_schemas(task := tasks["train"][0])
    assert schema.name == "add" and schema.parameters["properties"]["n"]["description"] == "how much to add"
    goal = task.public["row"]["goal"]
    seen, verdict = play(env, task, [tool_turn("add", n=0), tool_turn("add", n=goal), DONE])
    assert [message.content for message in seen] == [
        f"Task {goal}. Count to {goal}.", "error: add something", str(goal)]  # fmt: skip
    assert verdict.outcome == 1.0
    assert play(env, task, [DONE])[1].outcome == 0.0


@pytest.mark.parametrize("name", ["tool_use", "examples/my_env.py:Thermostat"])
def test_what_was_exported_comes_back_the_same(name, play):
    made, rows = to_trl(name, limit=20)
    env = from_trl(made, rows, "back")
    task = next(iter(env.load_tasks("train", "micro", 1, 0)))
    gold = Task.model_validate_json(task.public["row"]["task"]).privileged.trajectory
    assert play(env, task, gold)[1].outcome == 1.0
    assert play(env, task, [DONE])[1].outcome == 0.0


def test_a_class_without_a_reward_is_refused():
    with pytest.raises(ConfigError, match="no method 'get_reward'"):
        from_trl(type("Bare", (), {"reset": lambda self: None}), [], "bare")


def test_with_gold_it_can_be_certified(certified, snippet):
    certificate = certified(snippet("from_trl("), "Mine")
    assert certificate.passed, certificate.findings
