"""The base classes: schemas from hints, calls checked before they run, every call recorded."""

import asyncio
import itertools
import random
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from agentopd.contracts import AssistantTurn, Environment, EpisodeContext, Verifier
from agentopd.errors import EnvironmentFault, InfraError, RegistryError, TaskError
from agentopd.registry import environments, verifiers
from agentopd.types import Episode, MalformedCall, Message, StopReason, Task, ToolCall, Verdict, VerdictStatus
from agentopd_envs import BaseEnvironment, SingleTurnEnvironment, ToolEnvironment, ToolError, tool, tool_turn

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_env.py"


class Bench(ToolEnvironment):
    """A bench for the tests: every kind of tool, and a log of what really ran."""

    name = "bench"

    def setup(self):
        self.ran = []

    @tool(mutates=True)
    async def put(self, count: Annotated[int, Field(ge=0)], title: str = "none", copy: list[str] | None = None) -> str:
        """Put things down,
        carefully.

        Args:
            count: how many,
                at least none
            title: what to call them
        """
        self.ran.append((count, title, copy))
        return f"{count} {title}"

    @tool
    def refuse(self) -> str:
        """Never works."""
        raise ToolError("not today")

    @tool
    def crash(self) -> str:
        """Has a bug."""
        raise KeyError("bug")

    @tool
    def unprintable(self) -> object:
        """Returns what JSON cannot hold."""
        return object()

    @tool
    def nothing(self) -> None:
        """Returns None."""

    @tool
    def data(self) -> dict[str, int]:
        """Returns data."""
        return {"a": 1}

    @tool
    def stop(self) -> str:
        """Ends the episode."""
        self.finish()
        return "bye"

    @staticmethod
    def score(task, episode):
        return task.hidden["score"]


def bench_task(**changes) -> Task:
    task = Bench.new_task("go", hidden={"score": 1.0}, gold=["done"])
    return task.model_copy(update={"id": "bench/0", **changes})


def step(*calls: ToolCall, malformed=(), task=None, env=None):
    async def run():
        bench = env or Bench()
        await bench.reset(task or bench_task(), EpisodeContext(0, random.Random(0)))
        return bench, await bench.step(AssistantTurn("text", calls, malformed))

    return asyncio.run(run())


def call(name: str, **arguments) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


# --- the example people copy -----------------------------------------------------------------------------------------


def test_example_is_short_and_whole(play, outcome):
    assert len(EXAMPLE.read_text().splitlines()) <= 25
    env_class = environments.get(f"{EXAMPLE}:Thermostat")
    assert environments.get("thermostat") is env_class and env_class.name == "thermostat"
    assert isinstance(env_class(), Environment)
    (task,) = env_class.load_tasks("train", "micro", 1, 0)
    assert outcome(env_class, task, env_class.gold_turns(task)) == 1.0
    assert outcome(env_class, task, env_class.starter_turns(task)) == 0.0
    assert (
        outcome(env_class, task, [tool_turn("change", by="a lot"), Message(role="assistant", content="Done.")]) == 0.0
    )
    gold = play(env_class, task, env_class.gold_turns(task))
    assert gold.episode.final_state == {"degrees": task.hidden["goal"]}
    assert [message.content for message in gold.seen][1:] == [str(task.hidden["goal"])]


def test_generated_tasks_repeat_and_never_cross_splits():
    env_class = environments.get(f"{EXAMPLE}:Thermostat")
    bodies = {}
    for split, seed in itertools.product(("train", "eval", "retention"), (0, 1)):
        tasks = list(env_class.load_tasks(split, "micro", 60, seed))
        assert tasks == list(env_class.load_tasks(split, "micro", 60, seed))
        assert len({task.id for task in tasks}) == 60 and {task.split for task in tasks} == {split}
        bodies.setdefault(split, set()).update(task.prompt for task in tasks)
    assert not bodies["train"] & bodies["eval"] and not bodies["train"] & bodies["retention"]
    assert not bodies["eval"] & bodies["retention"]


def test_a_generator_with_one_problem_cannot_fill_every_split():
    class Single(SingleTurnEnvironment):
        name = "single"

        @classmethod
        def generate(cls, rng):
            return cls.new_task("always this")

    filled = []
    for split in ("train", "eval", "retention"):
        try:
            filled += list(Single.load_tasks(split, "micro", 1, 0))
        except TaskError as error:
            assert "more distinct problems" in str(error)
    assert len(filled) == 1


# --- tools -----------------------------------------------------------------------------------------------------------


def test_schema_comes_from_hints_and_docstring():
    schema = Bench.tool_schemas(bench_task())[0]
    assert (schema.name, schema.description) == ("put", "Put things down, carefully.")
    assert schema.parameters["required"] == ["count"]
    properties = schema.parameters["properties"]
    assert properties["count"] == {"description": "how many, at least none", "minimum": 0, "type": "integer"}
    assert properties["title"] == {"default": "none", "description": "what to call them", "type": "string"}
    assert properties["copy"]["anyOf"][0] == {"items": {"type": "string"}, "type": "array"}


def test_a_parameter_without_a_hint_is_an_error_at_definition():
    with pytest.raises(TypeError, match="'item' needs a name and a type hint"):

        class Unhinted(ToolEnvironment):
            @tool
            def look(self, item):
                """Look."""


@pytest.mark.parametrize(
    ("made", "answer"),
    [
        (call("put", count=2), "2 none"),
        (call("put", count="3", title="cups"), "3 cups"),
        (call("put", count=1, title="\ud800"), "1 ?"),
        (call("nothing"), "ok"),
        (call("data"), '{"a": 1}'),
        (call("refuse"), "error: not today"),
        (call("put"), "error: count: Field required"),
        (call("put", count=-1), "error: count: Input should be greater than or equal to 0"),
        (call("put", count=1, where="here"), "error: where: Extra inputs are not permitted"),
        (call("put", count="x", copy="y"), "error: count: Input should be a valid integer"),
        (call("Put", count=1), "error: unknown tool 'Put'; there is: put, refuse"),
        (call("setup"), "error: unknown tool 'setup'"),
    ],
)
def test_every_call_is_answered_and_recorded(made, answer):
    env, result = step(made)
    assert result.messages[0].role == "tool" and result.messages[0].name == made.name
    assert result.messages[0].content.startswith(answer) and not result.done
    (event,) = result.events
    assert event.kind == "tool_call" and event.turn == 0
    ok = not answer.startswith("error")
    assert event.data == {
        "name": made.name,
        "arguments": made.arguments,
        "validated": event.data["validated"],
        "ok": ok,
        "result": result.messages[0].content,
        "mutates": made.name == "put",
        "changes": [{"path": ["ran"], "value": env.ran}] if env.ran else [],
    }
    assert bool(env.ran) == (ok and made.name == "put"), "arguments are checked before the tool runs"


@pytest.mark.parametrize(
    ("made", "validated"),
    [
        (call("put", count="3"), {"count": 3, "title": "none", "copy": None}),
        (call("nothing"), {}),
        (call("put", count="x"), None),
        (call("nowhere"), None),
    ],
)
def test_what_a_tool_was_given_is_recorded_beside_what_was_written(made, validated):
    (event,) = step(made)[1].events
    assert (event.data["arguments"], event.data["validated"]) == (made.arguments, validated)


@pytest.mark.parametrize("name", ["crash", "unprintable"])
def test_anything_but_a_tool_error_is_a_fault(name):
    with pytest.raises(EnvironmentFault, match=f"bench: tool '{name}'"):
        step(call(name))


def test_setup_that_raises_is_a_fault():
    class NoSetup(Bench):
        def setup(self):
            raise RuntimeError("disk full")

    with pytest.raises(EnvironmentFault, match="disk full"):
        step(env=NoSetup())


def test_malformed_calls_are_answered():
    _, result = step(call("nothing"), malformed=(MalformedCall(raw="{", reason="unbalanced"),))
    assert [message.content for message in result.messages] == ["ok", "error: malformed tool call: unbalanced"]
    assert result.events[1].kind == "malformed_call" and result.events[1].data == {"raw": "{", "reason": "unbalanced"}


def test_a_turn_without_calls_ends_the_episode():
    _, result = step()
    assert result.done and not result.messages and not result.events


def test_calls_after_the_one_that_ends_are_not_made():
    env, result = step(call("stop"), call("put", count=1))
    assert result.done and not env.ran and [event.data["name"] for event in result.events] == ["stop"]


def test_turns_are_counted():
    async def run():
        env = Bench()
        await env.reset(bench_task(), EpisodeContext(0, random.Random(0)))
        return [(await env.step(AssistantTurn("", (call("nothing"),)))).events[0].turn for _ in range(3)]

    assert asyncio.run(run()) == [0, 1, 2]


def test_a_task_may_offer_some_tools_only():
    task = bench_task(tools=("nothing",))
    assert [schema.name for schema in Bench.tool_schemas(task)] == ["nothing"]
    _, result = step(call("put", count=1), task=task)
    assert "unknown tool 'put'; there is: nothing" in result.messages[0].content
    with pytest.raises(TaskError, match="offers tool 'fly'"):
        Bench.tool_schemas(bench_task(tools=("fly",)))


def test_an_override_without_the_mark_is_no_tool():
    class Quiet(Bench):
        def crash(self):
            """No tool."""

    assert "crash" not in [schema.name for schema in Quiet.tool_schemas(bench_task())]


class Timed(Bench):
    """Tools that are bounded."""

    @tool(budget=2)
    def look(self) -> str:
        """Look."""
        return "seen"

    @tool(timeout_s=0.01)
    async def linger(self) -> str:
        """Never comes back."""
        await asyncio.sleep(60)
        return "late"


def test_a_budget_and_a_timeout_are_told_to_the_student():
    _, result = step(*[call("look")] * 3, call("linger"), call("nothing"), env=Timed())
    assert [message.content for message in result.messages] == [
        "seen",
        "seen",
        "error: no calls of 'look' are left; there were 2",
        "error: 'linger' took longer than 0.01 s and was stopped",
        "ok",
    ]
    assert {name: options.budget for name, options in Timed.tool_options().items() if options.budget} == {"look": 2}
    assert Timed.mutating_tools() == {"put"}


def test_only_an_async_tool_can_have_a_timeout():
    with pytest.raises(TypeError, match="only an async method"):
        tool(timeout_s=1.0)(lambda self: None)
    with pytest.raises(TypeError, match="above 0"):
        tool(budget=0)(lambda self: None)


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(score) -> Verdict:
    verifier = verifiers.get(Bench.verifier_for(bench_task()))()
    assert isinstance(verifier, Verifier)
    task = bench_task(hidden={"score": score})
    episode = Episode(
        id="e",
        task_id=task.id,
        task_hash=task.hash,
        env="bench",
        split="train",
        prompt_ids=(),
        turns=(),
        stop_reason=StopReason.COMPLETED,
    )
    return asyncio.run(verifier.verify(task, episode, None))


def test_a_score_becomes_a_verdict():
    assert (judge(1.0).status, judge(1.0).outcome) == (VerdictStatus.OK, 1.0)
    assert (judge(0.25).status, judge(0.25).reward) == (VerdictStatus.WRONG, 0.25)
    assert judge(True).passed
    given = Verdict.unjudged(VerdictStatus.AMBIGUOUS, "who knows")
    assert (judge(given).status, judge(given).outcome, judge(given).detail) == (given.status, None, "who knows")


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan"), "much", None])
def test_a_bad_score_is_a_fault_and_never_a_zero(score):
    with pytest.raises(InfraError, match=r"Bench\.score"):
        judge(score)


def test_an_environment_that_cannot_be_judged_or_fed_says_so():
    class Bare(BaseEnvironment):
        name = "bare"

    with pytest.raises(TaskError, match=r"a `verifier` or a `score`"):
        Bare.verifier_for(bench_task())
    with pytest.raises(TaskError, match="write `generate`"):
        list(Bare.load_tasks("train", "micro", 1, 0))
    with pytest.raises(RegistryError, match="unknown dataset 'gsm8k'"):
        Bare.load_tasks("train", "gsm8k", 1, 0)


def test_a_named_verifier_wins_over_a_score():
    class Named(Bench):
        verifier = "state"

        @staticmethod
        def score(task, episode):
            return 1.0

    assert Named.verifier_for(bench_task()) == "state"


def test_unknown_environment_file_is_a_user_error():
    with pytest.raises(RegistryError, match="no such file"):
        environments.get("examples/not_there.py:Env")
