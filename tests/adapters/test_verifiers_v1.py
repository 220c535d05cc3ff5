"""verifiers v1: tasksets of the real package, with tools, state and rewards of their own."""

import warnings
from itertools import islice

import pytest
from pydantic import Field

from agentopd.errors import EnvironmentFault, TaskError
from agentopd.types import Message
from agentopd_envs import tool_turn
from agentopd_envs.adapters.verifiers_v1 import from_taskset

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def vf():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("verifiers.v1", reason="the extra `verifiers` is not installed")


def says(text):
    return Message(role="assistant", content=text)


@pytest.fixture
def sums(vf):
    """An endless taskset of questions with two rewards and a metric."""

    class Data(vf.TaskData):
        answer: str

    class Sum(vf.Task[Data, vf.State, vf.TaskConfig]):
        @vf.reward
        async def right(self, trace) -> float:
            return float(trace.last_reply == self.data.answer)

        @vf.reward(weight=0.25)
        async def brief(self, trace) -> float:
            return float(len(trace.last_reply) < 9)

        @vf.metric
        async def turns(self, trace) -> float:
            return trace.num_turns

    class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
        INFINITE = True

        def load(self):
            n = 0
            while True:
                n += 1
                yield Sum(Data(prompt=f"{n} + 1 = ?", system_prompt="Only a number.", answer=str(n + 1)))

    return Sums(vf.TasksetConfig())


def test_a_taskset_is_scored_by_its_rewards(sums, play):
    env = from_taskset(sums, "sums")
    splits = {split: {task.prompt[-1].content for task in env.load_tasks(split, "micro", 9, 0)}
              for split in ("train", "eval", "retention")}  # fmt: skip
    assert len(set.union(*splits.values())) == 27
    (task,) = env.load_tasks("train", "micro", 1, 0)
    assert [message.role for message in task.prompt] == ["system", "user"] and env.tool_schemas(task) == ()
    answer = str(int(task.prompt[-1].content.split()[0]) + 1)
    seen, verdict = play(env, task, [says(answer)])
    assert tuple(seen) == task.prompt and verdict.outcome == 1.0
    assert verdict.components == {"right": 1.0, "brief": 1.0, "turns": 1.0}
    assert play(env, task, [says("0")])[1].outcome == 0.2
    assert play(env, task, [says(answer + " of course")])[1].outcome == 0.0


@pytest.fixture
def shelf(vf, tmp_path):
    """A taskset with a tool server whose state its reward reads, and a server for all tasks."""

    class Shelf(vf.State):
        placed: list[str] = Field(default_factory=list)

    class Placing(vf.Toolset[vf.ToolsetConfig, Shelf]):
        TOOL_PREFIX = None

        async def setup_task(self, task):
            self.room = task.room

        @vf.tool
        async def place(self, thing: str, times: int = 1) -> list[str]:
            """Place a thing. Args: thing: what; times: how often"""
            if len(self.state.placed) + times > self.room:
                raise ValueError("no room")
            self.state.placed += [thing] * times
            return self.state.placed

    class Clock(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
        @vf.tool(name="now")
        def look(self) -> dict[str, int]:
            """The time."""
            return {"hour": 7}

    class Data(vf.TaskData):
        thing: str
        room: int

    class Place(vf.Task[Data, Shelf, vf.TaskConfig]):
        @classmethod
        def toolsets(cls, config):
            return [Placing(vf.ToolsetConfig())]

        @vf.reward
        async def placed(self, trace) -> float:
            return float(trace.state.placed == [self.data.thing])

        @vf.metric
        async def answers(self, trace) -> float:
            return len(trace.tool_messages)

    class Placings(vf.Taskset[Place, vf.TasksetConfig]):
        @classmethod
        def toolsets(cls, config):
            return [Clock(vf.SharedToolsetConfig())]

        def load(self):
            return [Place(Data(prompt=f"Place the cup {n}.", thing=f"cup {n}", room=2)) for n in range(30)]

    return from_taskset(Placings(vf.TasksetConfig()), "placings")


def test_tools_of_a_taskset_share_the_state_that_rewards_read(shelf, play):
    tasks = [task for split in ("train", "eval", "retention") for task in shelf.load_tasks(split, "micro", None, 0)]
    assert len(tasks) == 30
    task = tasks[0]
    assert [schema.name for schema in shelf.tool_schemas(task)] == ["clock_now", "place"]
    thing = task.prompt[-1].content.removeprefix("Place the ").rstrip(".")
    place = tool_turn("place", thing=thing)
    seen, verdict = play(shelf, task, [tool_turn("clock_now"), place, says("Done.")])
    assert [message.content for message in seen[1:]] == ['{"hour":7}', f'["{thing}"]']
    assert verdict.outcome == 1.0 and verdict.components == {"placed": 1.0, "answers": 2.0}
    mistakes = [tool_turn("place", thing=thing, times=3), tool_turn("place"), tool_turn("drop"), says("Done.")]
    seen, verdict = play(shelf, task, mistakes)
    told = [message.content for message in seen[1:]]
    assert told[0] == "error: no room" and told[1].startswith("error: thing: ") and "unknown tool 'drop'" in told[2]
    assert verdict.outcome == 0.0
    assert play(shelf, task, [place] * 9)[1].outcome == 0.0


def test_what_needs_their_runtime_is_refused_when_it_is_loaded(vf):
    class Boxed(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
        async def setup(self, trace, runtime):
            pass

        @vf.reward
        async def solved(self, trace, runtime) -> float:
            return 1.0

    class Boxes(vf.Taskset[Boxed, vf.TasksetConfig]):
        def load(self):
            return [Boxed(vf.TaskData(prompt="?"))] * 40

    env = from_taskset(Boxes(vf.TasksetConfig()), "boxes")
    with pytest.raises(TaskError, match="setup, solved of Boxed need a runtime"):
        [list(islice(env.load_tasks(split, "micro", 1, 0), 1)) for split in ("train", "eval", "retention")]


def test_a_reward_that_raises_is_a_fault(vf, play):
    class Broken(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
        @vf.reward
        async def judged(self, trace) -> float:
            raise OSError("no judge answers")

    class Brokens(vf.Taskset[Broken, vf.TasksetConfig]):
        def load(self):
            return [Broken(vf.TaskData(prompt=f"{n}?")) for n in range(20)]

    env = from_taskset(Brokens(vf.TasksetConfig()), "brokens")
    with pytest.raises(EnvironmentFault, match="no judge answers"):
        play(env, next(iter(env.load_tasks("train", "micro", 1, 0))), [says("x")])


def test_the_taskset_of_the_page_is_certified(vf, certified, snippet):
    certificate = certified(snippet("from_taskset("), "Sums")
    assert certificate.passed, certificate.findings
