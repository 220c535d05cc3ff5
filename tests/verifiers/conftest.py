"""Builders of tasks and episodes, and a sandbox that is a plain child process per case."""

import ast
import asyncio
import json
import subprocess
import sys

import pytest

from agentopd.contracts import CaseResult, CaseStatus
from agentopd.rendering import HermesJSON
from agentopd.rollout import EpisodeSpec, RolloutOptions, run_scripted
from agentopd.types import Episode, Event, Message, StopReason, Task, ToolCall, Turn

RUNNER = """
import json, os, sys

def run(source, case):
    space = {"__name__": "solution"}
    try:
        exec(source, space)
        space["args"] = case["args"]
        exec(case["setup"], space)
        return ["value", repr(eval(case["expression"], space))]
    except Exception as exc:
        return ["exception", f"{type(exc).__name__}: {exc}"]

request = json.load(sys.stdin)
for case in request["cases"]:
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(2, 1)
        found = run(request["source"], case)
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    raw = os.read(read, 65536)
    os.close(read)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    reply = json.loads(raw) if raw else ["crash" if code < 0 else "no_result", ""]
    os.write(1, json.dumps(reply).encode() + b"\\n")
"""


class ProcessSandbox:
    """No isolation but a process per case: for programs written in these tests. Counts what it was asked."""

    name = "process"
    capabilities = frozenset({"pid"})

    def __init__(self):
        self.runs = []

    async def start(self):
        pass

    async def aclose(self):
        pass

    async def run_cases(self, program, cases, limits=None):
        self.runs.append([case.id for case in cases])
        request = {"source": program.source, "cases": [vars(case) for case in cases]}
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", RUNNER],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return [self._result(case, line) for case, line in zip(cases, done.stdout.splitlines(), strict=True)]

    @staticmethod
    def _result(case, line):
        kind, text = json.loads(line)
        if kind != "value":
            return CaseResult(case.id, CaseStatus(kind), detail=text)
        try:
            return CaseResult(case.id, CaseStatus.VALUE, ast.literal_eval(text))
        except (ValueError, SyntaxError):
            return CaseResult(case.id, CaseStatus.PROTOCOL, detail=text)


@pytest.fixture
def process_sandbox():
    return ProcessSandbox()


@pytest.fixture
def make_task():
    def build(hidden, public=None, **fields):
        prompt = (Message(role="user", content="?"),)
        return Task(id="t", env="e", prompt=prompt, hidden=hidden, public=public or {}, **fields)

    return build


@pytest.fixture
def make_episode():
    def build(text="", *, calls=(), malformed=(), final_state=None, stop_reason=StopReason.COMPLETED, error=""):
        """One turn per call of ``calls`` ((name, arguments, ok)), then one turn that says ``text``."""
        turns = [
            Turn(token_ids=(1,), rollout_logprobs=(0.0,), tool_calls=(ToolCall(name=name, arguments=arguments),))
            for name, arguments, _ in calls
        ]
        turns.append(Turn(token_ids=(1,), rollout_logprobs=(0.0,), text=text, malformed=malformed))
        events = [
            Event(turn=index, kind="tool_call", data={"name": name, "arguments": arguments, "ok": ok, "result": ""})
            for index, (name, arguments, ok) in enumerate(calls)
        ]
        return Episode(
            id="ep",
            task_id="t",
            task_hash="",
            env="e",
            split="train",
            prompt_ids=(0,),
            turns=tuple(turns),
            stop_reason=stop_reason,
            error=error,
            events=tuple(events),
            final_state=final_state or {},
        )

    return build


@pytest.fixture
def act():
    """Play scripted turns in an environment; every character the student wrote is a token of its own."""

    def run(env_cls, task, turns, sandbox=None):
        spec, options = EpisodeSpec(task, env_cls), RolloutOptions(sandbox=sandbox)
        episode = asyncio.run(run_scripted(spec, turns, HermesJSON(), options=options))
        return episode.model_copy(update={"turns": tuple(map(spelled, episode.turns))})

    return run


def spelled(turn):
    """The turn with one token per character."""
    n = len(turn.text)
    tokens = {"token_ids": tuple(range(n)), "rollout_logprobs": (0.0,) * n, "token_ends": tuple(range(1, n + 1))}
    return turn.model_copy(update=tokens)


@pytest.fixture
def certified():
    """What a verdict certifies: (turn, sign, kind, the text covered)."""

    def read(verdict, episode):
        assert not any(item.problem(episode) for item in verdict.certificates)
        return [
            (item.turn, item.sign, item.kind, episode.turns[item.turn].text[item.start : item.end])
            for item in verdict.certificates
        ]

    return read


@pytest.fixture
def judge():
    """Run a verifier to its verdict."""

    def run(verifier, task, episode, sandbox=None):
        return asyncio.run(verifier.verify(task, episode, sandbox))

    return run
