"""BFCL multi turn: the leaderboard's own API classes, run in the sandbox and judged by its rules, turn by turn.

The classes come from the distribution ``bfcl-eval``, installed without its dependencies; nothing of it is imported
here, and its evaluation of model text is not used. An API's state is a function of its initial configuration and the
calls so far, so every call is one fresh sandboxed process that plays the calls again: nothing is kept between calls
that could be reached from outside, and an episode can be judged from its log of calls alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

from agentopd.contracts import Case, CaseStatus, Program, Sandbox
from agentopd.errors import ConfigError, EnvironmentFault, SandboxError, TaskError, ToolError
from agentopd.registry import register_environment, register_verifier
from agentopd.types import JSON, Episode, Message, Task, ToolCall, ToolSchema, VerdictStatus
from agentopd_envs.authoring import TaskLoader, tool_turn, unknown_tool
from agentopd_envs.conversation import ConversationEnvironment
from agentopd_envs.datasets import bfcl_multi_turn as source
from agentopd_verifiers.judge import Finding, JudgingVerifier, hidden_field

_PACKAGE = "bfcl_eval/eval_checker/multi_turn_eval/func_source_code"
_MODULES = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
_LONG_CONTEXT = "def __getattr__(name):\n    return ''\n"
"""Stands for 190 kB of text that only the long-context categories read."""
_DRIVER = """
import copy, importlib, json

def plain(value):
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "__dict__"):
        own = {key: item for key, item in vars(value).items() if not key.startswith("_") and key != "parent"}
        return {"__repr__": type(value).__name__, **plain(own)}
    return str(value)

def shown(value):
    if isinstance(value, dict):
        try:
            return json.dumps(value)
        except Exception:
            return str(value)
    return value if isinstance(value, str) else str(value)

def play(modules, config, turns):
    apis = {}
    for name, module in modules.items():
        apis[name] = getattr(importlib.import_module(module), name)()
        if hasattr(apis[name], "_load_scenario"):
            apis[name]._load_scenario(copy.deepcopy(config[name]), long_context=False)
    played = []
    for calls in turns:
        results = []
        for api, function, arguments in calls:
            try:
                results.append([True, shown(getattr(apis[api], function)(**copy.deepcopy(arguments)))])
            except Exception as exc:
                results.append([False, f"Error during execution: {exc}"])
        state = {name: plain({k: v for k, v in vars(api).items() if k[:1] != "_"}) for name, api in apis.items()}
        played.append({"results": results, "state": state})
    return played
"""
Calls = Sequence[Sequence[ToolCall]]


@register_environment("bfcl_multi_turn")
class BfclMultiTurnEnvironment(ConversationEnvironment):
    """Requests that follow one another, over the leaderboard's simulated APIs (source ``bfcl``)."""

    name = "bfcl_multi_turn"
    verifier = "bfcl_multi_turn"
    libraries: ClassVar[tuple[str, ...]] = ("mpmath",)
    loaders: ClassVar[dict[str, TaskLoader]] = {"bfcl": source.tasks}
    sources = tuple(loaders)

    @classmethod
    def tool_schemas(cls, task: Task) -> tuple[ToolSchema, ...]:
        """The functions of the task's APIs."""
        return tuple(ToolSchema.model_validate(schema) for api in task.public["apis"].values() for schema in api)

    @classmethod
    def mutating_tools(cls) -> None:  # type: ignore[override]
        """Not known: the data does not say which functions only read."""

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """A call of the first function without arguments, then only words."""
        closing = Message(role="assistant", content="Done.")
        return (
            tool_turn(cls.tool_schemas(task)[0].name),
            *(closing for _ in range(len(task.public["user_turns"]) + 1)),
        )

    @classmethod
    def wrong_turns(cls, task: Task) -> tuple[tuple[Message, ...], ...]:
        """All calls but those of the last request; success claimed without a call."""
        gold = task.privileged.trajectory
        last = max(index for index, turn in enumerate(gold) if turn.tool_calls)
        spoken = tuple(turn for turn in gold if not turn.tool_calls)
        return (*gold[:last], *gold[last + 1 :]), spoken

    def setup(self) -> None:
        """No call has been made."""
        self._calls_of_turns: list[list[ToolCall]] = [[]]

    async def call_tool(self, call: ToolCall) -> str:
        """Play all calls so far and this one in the sandbox; the result of this one."""
        offered = self.tool_schemas(self.task)
        if all(call.name != schema.name for schema in offered):
            raise unknown_tool(call.name, offered)
        if self.ctx.sandbox is None:
            raise EnvironmentFault("bfcl_multi_turn needs a sandbox, and the episode was given none")
        *before, current = self._calls_of_turns
        turns = [*before, [*current, call]]
        played = await play_calls(self.ctx.sandbox, self.task, turns)
        self._calls_of_turns = turns
        ok, result = played[-1]["results"][-1]
        if not ok:
            raise ToolError(result)
        return str(result)

    def yielded(self) -> None:
        """The next calls belong to the next request."""
        self._calls_of_turns.append([])

    def state(self) -> JSON:
        """The calls made for each request the student has answered or is answering."""
        return {"calls": [[call.model_dump() for call in calls] for calls in self._calls_of_turns]}


@register_verifier("bfcl_multi_turn")
class BfclMultiTurnVerifier(JudgingVerifier):
    """Outcome 1 if after every request the state is that of the ground truth and what it reported was reported.

    The leaderboard's rules (gorilla, ``multi_turn_checker.py``): states of all APIs equal, turn by turn; the results of
    a turn's ground truth among all results so far, in any order; calls where there have to be some.
    """

    name: ClassVar[str] = "bfcl_multi_turn"
    version: ClassVar[str] = "1"
    needs_sandbox: ClassVar[bool] = True

    async def judge(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Finding:
        """Play the ground truth and the recorded calls, each in a process of its own, and compare."""
        truth = _calls(hidden_field(task, "ground_truth", list))
        made = _calls(episode.final_state.get("calls") or [])
        if sandbox is None:
            raise SandboxError("the bfcl_multi_turn verifier needs a sandbox and was given none")
        try:
            wanted = await play_calls(sandbox, task, truth)
        except ToolError as exc:
            raise SandboxError(f"task {task.id}: the ground truth could not be played: {exc}") from exc
        self._check_installed(task, wanted)
        made = [*made[: len(truth)], *([] for _ in range(len(truth) - len(made)))]
        try:
            found = await play_calls(sandbox, task, made)
        except ToolError as exc:
            return Finding(0.0, VerdictStatus.WRONG, detail=str(exc))
        right = [_turn_is_right(turn, wanted, found) for turn in range(len(truth))]
        asked = sum(map(len, truth))
        status = VerdictStatus.OK if all(right) else VerdictStatus.WRONG if any(made) else VerdictStatus.NO_ANSWER
        return Finding(
            float(all(right)),
            status,
            components={"turns": float(len(right)), "turns_right": float(sum(right)), "expected_calls": float(asked)},
            detail="" if all(right) else f"request {right.index(False) + 1} of {len(right)} was not carried out",
        )

    def _check_installed(self, task: Task, wanted: Sequence[JSON]) -> None:
        """The ground truth has to lead where the data set says: another version of the classes would not."""
        results = [[result for _, result in turn["results"]] for turn in wanted]
        for key, value in (("results", results), ("final_state", wanted[-1]["state"])):
            if source.digest(value) != hidden_field(task, key, str):
                raise TaskError(f"the installed bfcl-eval does not lead to the recorded {key}; install another version")


async def play_calls(sandbox: Sandbox, task: Task, turns: Calls) -> list[JSON]:
    """For each turn the results [ran, text] of its calls and the state of every API after it.

    Raises ``ToolError`` if the arguments of the last call made it take too long or too much, ``SandboxError`` if the
    classes could not be run.
    """
    apis: Mapping[str, list[JSON]] = task.public["apis"]
    owner = {schema["name"]: api for api, schemas in apis.items() for schema in schemas}
    modules = {name: f"{_PACKAGE.replace('/', '.')}.{_MODULES[name]}" for name in apis}
    calls = [[[owner[call.name], call.name, call.arguments] for call in turn] for turn in turns]
    program = Program(_DRIVER, {f"{_PACKAGE}/long_context.py": _LONG_CONTEXT, **_sources(tuple(apis))})
    case = Case("play", "play(*args)", args=(modules, task.public["config"], calls))
    (result,) = await sandbox.run_cases(program, [case])
    if result.status is CaseStatus.EXCEPTION:
        raise SandboxError(f"task {task.id}: the APIs cannot be run: {result.detail}")
    if result.status is not CaseStatus.VALUE:
        raise ToolError(f"the call was not carried out ({result.status}: {result.detail})")
    played: list[JSON] = result.value
    return played


def _turn_is_right(turn: int, wanted: Sequence[JSON], found: Sequence[JSON]) -> bool:
    if not wanted[turn]["results"]:
        return True
    if not found[turn]["results"] or found[turn]["state"] != wanted[turn]["state"]:
        return False
    left = [result for played in found[: turn + 1] for _, result in played["results"]]
    for _, result in wanted[turn]["results"]:
        if result not in left:
            return False
        left.remove(result)
    return True


def _calls(turns: Sequence[Sequence[JSON]]) -> list[list[ToolCall]]:
    return [[ToolCall.model_validate(call) for call in calls] for calls in turns]


@cache
def _sources(apis: tuple[str, ...]) -> dict[str, str]:
    """The files of the classes, as the sandbox gets them."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("bfcl_multi_turn needs the API classes: pip install --no-deps bfcl-eval")
    root = Path(next(iter(spec.submodule_search_locations))).parent
    return {f"{_PACKAGE}/{_MODULES[api]}.py": (root / _PACKAGE / f"{_MODULES[api]}.py").read_text() for api in apis}
