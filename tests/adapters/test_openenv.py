"""OpenEnv: a real server with environments of the real package, one session an episode."""

import asyncio
import importlib.util
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from agentopd.errors import ConfigError, EnvironmentFault
from agentopd.types import Message
from agentopd_envs import tool_turn
from agentopd_envs.adapters.messages import MessageEpisode
from agentopd_envs.adapters.openenv import from_openenv

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROWS = [{"seed": n} for n in range(40)]


def says(text):
    return Message(role="assistant", content=text)


def first(env):
    return next(iter(env.load_tasks("train", "micro", 1, 0)))


@pytest.fixture(scope="module")
def openenv():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("openenv.core", reason="the extra `openenv` is not installed")
        import openenv.core.env_server.http_server as server
    return server


@pytest.fixture(scope="module")
def serve(openenv):
    """``serve(environment, action, observation, sessions=32)``: the address of a server that runs until the end."""
    import uvicorn

    running = []

    def start(environment, action, observation, sessions=32):
        app = openenv.create_fastapi_app(environment, action, observation, max_concurrent_envs=sessions)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def echo(serve, tmp_path_factory):
    """The environment that ``openenv init`` writes: it pays for the length of a message."""
    template = Path(importlib.util.find_spec("openenv").submodule_search_locations[0]) / "cli/templates/openenv_env"
    folder = tmp_path_factory.mktemp("server")
    for source, name in (("models.py", "models"), ("server/__ENV_NAME___environment.py", "echo_environment")):
        text = (template / source).read_text().replace("__ENV_CLASS_NAME__", "Echo")
        (folder / f"{name}.py").write_text(text.replace("__ENV_TITLE_NAME__", "Echo").replace("__ENV_NAME__", "echo"))
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    models, environment = sys.modules.pop("models"), sys.modules.pop("echo_environment")
    return serve(environment.EchoEnvironment, models.EchoAction, models.EchoObservation)


def test_an_action_of_several_observed_fields_is_what_the_student_writes(echo, play):
    env = from_openenv(echo, [{"prompt": f"Say {n} words.", "seed": n} for n in range(9)], "echo")
    task = first(env)
    assert env.tool_schemas(task) == () and task.prompt[0].content.startswith("Say ")
    task = task.model_copy(update={"limits": task.limits.model_copy(update={"max_turns": 2})})
    seen, verdict = play(env, task, [says("four"), says("x" * 20), says("never")])
    assert seen[0].content.startswith(task.prompt[0].content + "\n\n") and "Echo environment ready!" in seen[0].content
    assert '"echoed_message": "four"' in seen[1].content and "original_message" not in seen[1].content
    assert verdict.outcome == 1.0 and verdict.components == {"steps": 2.0}
    assert play(env, task, [says("x" * 20), says("four")])[1].outcome == 0.4
    total = from_openenv(echo, ROWS, "echo", reward="sum")
    task = first(total).model_copy(update={"limits": task.limits})
    assert play(total, task, [says("abc"), says("four")])[1].outcome == pytest.approx(0.7)


def test_many_sessions_share_nothing(echo):
    env = from_openenv(echo, ROWS, "echo")
    tasks = list(env.load_tasks("train", "micro", 16, 0))

    async def run(task, index):
        episode = MessageEpisode(env, task)
        await episode.open()
        seen = [await episode.act(f"secret {index}") for _ in range(3)]
        await episode.close()
        return all(f'"secret {index}"' in message.content for answers in seen for message in answers)

    async def run_all():
        return await asyncio.gather(*(run(task, index) for index, task in enumerate(tasks)))

    assert len(tasks) == 16 and all(asyncio.run(run_all()))


@pytest.fixture(scope="module")
def lamp(openenv, serve):
    """Written with their base class: an action of two fields, over when the lamp is as asked."""
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Turn(Action):
        colour: str
        level: int

    class Seen(Observation):
        lamp: str = "off"

    class Lamp(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self):
            super().__init__()
            self._state = State()

        def reset(self, seed=None, episode_id=None, **kwargs):
            self._goal = f"red {seed}"
            return Seen(lamp="off")

        def step(self, action, timeout_s=None, **kwargs):
            if action.colour == "plaid":
                raise RuntimeError("a lamp has no pattern")
            now = f"{action.colour} {action.level}"
            return Seen(lamp=now, done=now == self._goal, reward=float(now == self._goal))

        @property
        def state(self):
            return self._state

    return serve(Lamp, Turn, Seen)


def test_an_action_of_several_fields_is_a_tool(lamp, play):
    env = from_openenv(lamp, ROWS, "lamp")
    task = first(env)
    seed = task.public["row"]["seed"]
    (schema,) = env.tool_schemas(task)
    assert schema.name == "act" and sorted(schema.parameters["properties"]) == ["colour", "level"]
    wrong = [tool_turn("act", colour="red"), tool_turn("turn"), tool_turn("act", colour="red", level=seed + 1)]
    seen, verdict = play(env, task, [*wrong, tool_turn("act", colour="red", level=seed), says("never")])
    told = [message.content for message in seen]
    assert told[0] == "off" and "do not fit its schema" in told[1] and "unknown tool 'turn'" in told[2]
    assert told[3:] == [f"red {seed + 1}"] and verdict.outcome == 1.0
    assert play(env, task, [says("I will not.")])[1].outcome == 0.0
    with pytest.raises(EnvironmentFault, match="a lamp has no pattern"):
        play(env, task, [tool_turn("act", colour="plaid", level=1)])


@pytest.fixture(scope="module")
def counter(openenv, serve):
    """Written with their MCP base class: its tools are the student's."""
    from fastmcp import FastMCP
    from openenv.core.env_server.mcp_environment import MCPEnvironment
    from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
    from openenv.core.env_server.types import Observation, State

    class Counter(MCPEnvironment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self):
            mcp = FastMCP("counter")

            @mcp.tool
            def add(n: int) -> int:
                """Add to the counter."""
                if n < 0:
                    raise ValueError("only upwards")
                self._total += n
                return self._total

            super().__init__(mcp)
            self._total, self._state = 0, State()

        def reset(self, seed=None, episode_id=None, **kwargs):
            self._total, self._goal = 0, seed
            return Observation(metadata={"goal": seed})

        def step(self, action, timeout_s=None, **kwargs):
            seen = super().step(action, timeout_s=timeout_s, **kwargs)
            return seen.model_copy(update={"reward": float(self._total == self._goal)})

        async def step_async(self, action, timeout_s=None, **kwargs):
            seen = await super().step_async(action, timeout_s=timeout_s, **kwargs)
            return seen.model_copy(update={"reward": float(self._total == self._goal)})

        def _step_impl(self, action, timeout_s=None, **kwargs):
            raise ValueError("tools only")

        @property
        def state(self):
            return self._state

    return serve(Counter, CallToolAction, CallToolObservation)


def test_the_tools_of_an_mcp_environment_are_the_students(counter, play):
    rows = [{"prompt": f"Count to {n}.", "seed": n} for n in range(3, 43)]
    env = from_openenv(counter, rows, "counter")
    task = first(env)
    (schema,) = env.tool_schemas(task)
    assert (schema.name, schema.description) == ("add", "Add to the counter.")
    goal = task.public["row"]["seed"]
    turns = [tool_turn("add", n=-1), tool_turn("add", n="x"), tool_turn("add", n=goal), says("Done.")]
    seen, verdict = play(env, task, turns)
    told = [message.content for message in seen]
    assert told[0].startswith(f"Count to {goal}.") and told[1].startswith("error: ") and "only upwards" in told[1]
    assert told[2].startswith("error: ") and told[3] == str(goal) and verdict.outcome == 1.0
    assert play(env, task, [tool_turn("add", n=goal - 1), says("Done.")])[1].outcome == 0.0


def test_a_full_server_is_a_fault_and_no_server_an_error(openenv, serve, play):
    from openenv.core.env_server.types import Action, Observation, State

    class One(openenv.Environment):
        def reset(self, seed=None, episode_id=None, **kwargs):
            return Observation()

        def step(self, action, timeout_s=None, **kwargs):
            return Observation()

        @property
        def state(self):
            return State()

    env = from_openenv(serve(One, Action, Observation, sessions=1), ROWS, "one")

    async def two_at_once():
        one, other = MessageEpisode(env, first(env)), MessageEpisode(env, first(env))
        await one.open()
        try:
            await other.open()
        finally:
            await one.close()
            await other.close()

    with pytest.raises(EnvironmentFault, match="CAPACITY"):
        asyncio.run(two_at_once())
    with pytest.raises(ConfigError, match="no OpenEnv server answers at"):
        from_openenv("http://127.0.0.1:9", ROWS, "none")
