"""Playing environments without a model: scripted turns in, an episode and what the student saw out."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from agentopd.contracts import AssistantTurn, CaseResult, CaseStatus, EpisodeContext
from agentopd.errors import SandboxError
from agentopd.registry import verifiers
from agentopd.types import Episode, Message, StopReason, Turn
from agentopd_sandboxes.jail import JailSandbox

SHIPPED_VERIFIERS = {
    "math": "agentopd_verifiers.math:MathVerifier",
    "code": "agentopd_verifiers.code:CodeVerifier",
    "state": "agentopd_verifiers.state:StateVerifier",
    "calls": "agentopd_verifiers.calls:CallsVerifier",
}


class TrustingSandbox:
    """Runs cases in this very process: only for programs that the tests themselves wrote."""

    name = "trusting"
    capabilities = frozenset()

    async def start(self):
        pass

    async def aclose(self):
        pass

    async def run_cases(self, program, cases, limits=None):
        return [self._run(program.source, case) for case in cases]

    def _run(self, source, case):
        scope = {}
        try:
            exec(source, scope)
            scope["args"] = list(case.args)
            exec(case.setup, scope)
            return CaseResult(case.id, CaseStatus.VALUE, eval(case.expression, scope))
        except Exception as exc:
            return CaseResult(case.id, CaseStatus.EXCEPTION, detail=f"{type(exc).__name__}: {exc}")


@dataclass(frozen=True)
class Played:
    episode: Episode
    seen: tuple[Message, ...]
    """Every message the student was shown, the opening included."""


async def _play(env_class, task, turns: Sequence[Message], sandbox=None) -> Played:
    env = env_class()
    seen = list(await env.reset(task.student_view(), EpisodeContext(seed=0, rng=random.Random(0), sandbox=sandbox)))
    played, events = [], []
    for turn in turns:
        result = await env.step(AssistantTurn(turn.content, turn.tool_calls))
        seen += result.messages
        events += result.events
        played.append(
            Turn(
                token_ids=(),
                rollout_logprobs=(),
                text=turn.content,
                tool_calls=turn.tool_calls,
                results=result.messages,
            )
        )
        if result.done:
            break
    episode = Episode(
        id="e",
        task_id=task.id,
        task_hash=task.hash,
        env=task.env,
        split=task.split,
        prompt_ids=(),
        turns=tuple(played),
        stop_reason=StopReason.COMPLETED if result.done else StopReason.MAX_TURNS,
        events=tuple(events),
        final_state=env.state(),
    )
    await env.close()
    await env.close()
    return Played(episode, tuple(seen))


@pytest.fixture
def play():
    """``play(env_class, task, turns, sandbox=None)``."""
    return lambda *args, **kwargs: asyncio.run(_play(*args, **kwargs))


@pytest.fixture
def trusting_sandbox():
    return TrustingSandbox()


@pytest.fixture
def outcome():
    """``outcome(env_class, task, turns, sandbox=None)``: what the task's verifier says of scripted turns."""
    loaded = {}

    async def judge(env_class, task, turns, sandbox=None):
        played = await _play(env_class, task, turns, sandbox)
        name = env_class.verifier_for(task)
        if name not in loaded:
            loaded[name] = verifiers.get(SHIPPED_VERIFIERS.get(name, name))()
        verdict = await loaded[name].verify(task, played.episode, sandbox)
        if sandbox is not None:
            await sandbox.aclose()
        assert verdict.outcome is not None, verdict
        return verdict.outcome

    yield lambda *args, **kwargs: asyncio.run(judge(*args, **kwargs))
    for verifier in loaded.values():
        if hasattr(verifier, "close"):
            verifier.close()


@pytest.fixture
def outcomes():
    """``outcomes(env_class, tasks, turns_of, libraries=())``: by task id, in one jail; skips where no jail starts."""

    async def judge(env_class, tasks, turns_of, libraries=()):
        sandbox = JailSandbox(workers=2, libraries=libraries)
        try:
            await sandbox.start()
            found = {}
            for task in tasks:
                played = await _play(env_class, task, turns_of(task), sandbox)
                verifier = loaded.setdefault(name := env_class.verifier_for(task), verifiers.get(name)())
                found[task.id] = (await verifier.verify(task, played.episode, sandbox)).outcome
            return found
        except SandboxError as error:
            pytest.skip(f"no sandbox here: {error}")
        finally:
            await sandbox.aclose()

    loaded = {}
    yield lambda *args, **kwargs: asyncio.run(judge(*args, **kwargs))
    for verifier in loaded.values():
        if hasattr(verifier, "close"):
            verifier.close()
