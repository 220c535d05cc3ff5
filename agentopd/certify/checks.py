"""The checks behind a certificate. Each is a coroutine from a stage to a finding; none needs a model."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, ClassVar

from agentopd.certify.certificate import Finding, sample_tasks
from agentopd.certify.probes import Trajectory, leaves, near_misses, random_turns
from agentopd.certify.stage import NOOP, Played, Stage
from agentopd.contracts import Case, CaseResult, EpisodeContext, Program, SandboxLimits
from agentopd.errors import SandboxError, UserError
from agentopd.scoring import judge
from agentopd.types import Message, Privileged, Task, ToolSchema

REPEATS = 3
RANDOM_EPISODES = 4
SLACK = 0.05
"""Share of random episodes that may pass beyond what the environment declares as ``chance``."""
_TOOL_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}")
_CANARY = "CANARY-7f3a91c2"
_TELLING = 12
"""Characters from which a hidden string is telling: shorter ones turn up by chance."""


class Failed(Exception):
    """What a check raises; the text becomes the finding."""


Check = Callable[[Stage], Awaitable[str]]


async def run_check(check: Check, stage: Stage) -> Finding:
    """Run one check; whatever it raises is its finding, except the user's own mistakes and cancellation."""
    name = check.__name__
    try:
        return Finding(check=name, passed=True, detail=await check(stage))
    except Failed as exc:
        return Finding(check=name, passed=False, detail=str(exc))
    except UserError:
        raise
    except Exception as exc:
        return Finding(check=name, passed=False, detail=f"{type(exc).__name__}: {exc}")


async def round_trip(stage: Stage) -> str:
    """Tasks survive being written to disk, have distinct ids, and carry limits that hold their gold trajectory."""
    for task in stage.tasks:
        if Task.model_validate_json(task.model_dump_json()) != task:
            raise Failed(f"task {task.id!r} is not the same after a round trip through JSON: use plain data only")
        if task.env != stage.skill.env.name:
            raise Failed(f"task {task.id!r} names environment {task.env!r}, not {stage.skill.env.name!r}")
    if len({task.id for task in stage.tasks}) < len(stage.tasks):
        raise Failed("two tasks share an id")
    return f"{len(stage.tasks)} tasks"


async def schemas(stage: Stage) -> str:
    """Tool schemas are JSON schemas of objects, with distinct plain names."""
    count = 0
    for task in stage.tasks:
        tools = stage.skill.env.tool_schemas(task.student_view())
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise Failed(f"task {task.id!r} offers two tools of one name: {', '.join(names)}")
        for tool in tools:
            _check_schema(tool)
        count = max(count, len(tools))
    return f"{count} tools"


async def gold(stage: Stage) -> str:
    """The gold trajectory of every task scores 1."""
    for task in stage.tasks:
        if not stage.gold(task):
            raise Failed(f"task {task.id!r} has no gold trajectory: give `new_task` a `gold`, or write `gold_turns`")
    await _all_score(stage, [(task, stage.gold(task)) for task in stage.tasks], 1.0, "the gold trajectory")
    return "scores 1 on every task"


async def noop(stage: Stage) -> str:
    """Saying nothing scores 0."""
    await _all_score(stage, [(task, NOOP) for task in stage.tasks], 0.0, "doing nothing")
    return "scores 0 on every task"


async def starter(stage: Stage) -> str:
    """What the student is given to start from scores 0."""
    turns = stage.skill.env.starter_turns  # type: ignore[attr-defined]
    await _all_score(stage, [(task, tuple(turns(task))) for task in stage.tasks], 0.0, "the starting point")
    return "scores 0 on every task"


async def wrong(stage: Stage) -> str:
    """The environment's own wrong solutions score below 1."""
    made = getattr(stage.skill.env, "wrong_turns", lambda task: ())
    probes = [(task, _messages(turns)) for task in stage.tasks for turns in made(task)]
    for played in await stage.play_all(probes):
        if played.verdict.outcome is None or played.verdict.passed:
            raise Failed(
                f"a wrong solution of task {played.episode.task_id!r} has {played.what}; it must score below 1"
            )
    return f"{len(probes)} wrong solutions score below 1" if probes else "none declared (write `wrong_turns`)"


async def random_calls(stage: Stage) -> str:
    """Random valid calls (random answers, where there are no tools) do not solve tasks."""
    probes = [
        (task, random_turns(stage.skill.env, task, random.Random(f"{task.id}/{index}")))
        for task in stage.tasks
        for index in range(RANDOM_EPISODES)
    ]
    played = await stage.play_all(probes)
    if broken := [item for item in played if item.verdict.outcome is None]:
        raise Failed(f"random calls on task {broken[0].episode.task_id!r} could not be judged: {broken[0].what}")
    rate, chance = _pass_rate(played), getattr(stage.skill.env, "chance", 0.0)
    if rate > chance + SLACK:
        raise Failed(
            f"random calls solve {rate:.0%} of episodes (declared chance: {chance:.0%}), for one on task "
            f"{next(item for item in played if item.verdict.passed).episode.task_id!r}"
        )
    return f"solve {rate:.0%} of {len(played)} episodes"


async def others(stage: Stage) -> str:
    """The solution of another task is not taken for this one's."""
    pairs = list(zip(stage.tasks, [*stage.tasks[1:], stage.tasks[0]], strict=True))
    probes = [(task, stage.gold(other)) for task, other in pairs if stage.gold(task) != stage.gold(other)]
    chance = getattr(stage.skill.env, "chance", 0.0)
    rate = _pass_rate(await stage.play_all(probes))
    if rate > chance + 0.25:
        raise Failed(f"the solution of another task passes {rate:.0%} of the time: does the verdict use `task.hidden`?")
    return f"solve {rate:.0%} of {len(probes)} tasks"


async def near(stage: Stage) -> str:
    """Small changes to the gold trajectory are noticed: not every change of one kind may pass."""
    notes = []
    variants = [(task, near_misses(stage.skill.env, task, stage.gold(task))) for task in stage.tasks]
    for kind in ("number", "argument", "dropped"):
        probes = [(task, turns) for task, found in variants for turns in found[kind][:4]]
        if not probes:
            continue
        rate = _pass_rate(await stage.play_all(probes))
        if rate == 1.0:
            raise Failed(f"no change of kind {kind!r} to the gold trajectory is ever noticed ({len(probes)} tried)")
        notes.append(f"{kind} {rate:.0%}")
    return "pass: " + ", ".join(notes) if notes else "nothing to change"


async def faults(stage: Stage) -> str:
    """What cannot be judged is not scored: no hidden data, no record of the episode, a sandbox that fails."""
    task = stage.tasks[0]
    played = await stage.play(task, stage.gold(task))
    verifier = type(stage.verifier(task))()  # A fresh one remembers no program that it has seen run.
    sandbox = stage.judge.sandbox if verifier.needs_sandbox else None
    if task.hidden:
        bare = task.model_copy(update={"hidden": {}})
        verdict = await judge(bare, played.episode, verifier, sandbox)
        if verdict.outcome is not None:
            raise Failed(
                f"a task without its hidden data was scored {verdict.outcome}: read it with `task.hidden['…']`, so "
                "that a broken task is never a score"
            )
    empty = played.episode.model_copy(update={"final_state": {}, "events": (), "turns": ()})
    if (await judge(task, empty, verifier, sandbox)).outcome not in (None, 0.0):
        raise Failed("an episode with nothing in it was not scored 0")
    forgetful = type(verifier)()
    if verifier.needs_sandbox and (await judge(task, played.episode, forgetful, FailingSandbox())).outcome is not None:
        raise Failed("a sandbox that fails became a score; let SandboxError pass")
    return "leave no score"


async def determinism(stage: Stage) -> str:
    """Tasks, episodes and verdicts repeat exactly."""
    for _ in range(REPEATS - 1):
        if sample_tasks(stage.skill) != list(stage.tasks):
            raise Failed("tasks differ when loaded again under one seed: draw only from the `rng` that is given")
    for task in stage.tasks[:4]:
        for turns in (stage.gold(task), random_turns(stage.skill.env, task, random.Random(task.id))):
            seen = {_trace(await stage.play(task, turns, seed=1)) for _ in range(REPEATS)}
            if len(seen) > 1:
                raise Failed(
                    f"task {task.id!r}: the same calls under the same seed gave different episodes or verdicts"
                )
    return f"{REPEATS} of {REPEATS} runs agree"


async def leaks(stage: Stage) -> str:
    """Nothing hidden or privileged reaches the student."""
    for task in stage.tasks:
        prompt = "\n".join(message.content for message in task.prompt)
        for text in (task.privileged.hint, task.privileged.solution):
            if len(text) >= _TELLING and text in prompt:
                raise Failed(f"task {task.id!r}: the prompt holds privileged text {text[:40]!r}")
        names = [tool.name for tool in stage.skill.env.tool_schemas(task.student_view())]
        known = prompt + json.dumps([task.public, names], ensure_ascii=False)
        secrets = [text for text in leaves(task.hidden) if len(text) >= _TELLING and text not in known]
        turns = random_turns(stage.skill.env, task, random.Random(f"{task.id}/leaks"))
        for played in await stage.play_all([(task, NOOP), (task, turns)]):
            if found := [text for text in secrets if text in played.told]:
                raise Failed(f"task {task.id!r}: the student was shown hidden text {found[0][:40]!r}")
        if _CANARY in (await stage.play(_with_canary(task), turns)).told:
            raise Failed(f"task {task.id!r}: a canary in the hidden or privileged part reached the student")
    return "no hidden text in any message"


async def closing(stage: Stage) -> str:
    """``close`` may be called twice, and before ``reset``."""
    task = stage.tasks[0]
    fresh = stage.skill.env()
    await fresh.close()
    used = stage.skill.env()
    await used.reset(task.student_view(), EpisodeContext(0, random.Random(0), stage.judge.sandbox))
    await used.close()
    await used.close()
    return "idempotent"


async def isolation(stage: Stage) -> str:
    """Episodes that run at once share nothing: each is what it is alone."""
    probes = [(task, stage.gold(task)) for task in stage.tasks]
    probes += [(task, random_turns(stage.skill.env, task, random.Random(task.id))) for task in stage.tasks]
    alone = [_trace(await stage.play(task, turns)) for task, turns in probes]
    together = [_trace(played) for played in await stage.play_all(probes)]
    for (task, _), one, other in zip(probes, alone, together, strict=True):
        if one != other:
            raise Failed(f"task {task.id!r} went differently among {len(probes)} episodes: keep state on `self` only")
    return f"{len(probes)} episodes at once"


async def sandbox(stage: Stage) -> str:
    """The sandbox starts and isolates what the environment asks for, where one is needed."""
    wanted = frozenset(getattr(stage.skill.env, "capabilities", ()))
    if not wanted and not any(stage.verifier(task).needs_sandbox for task in stage.tasks):
        return "not needed"
    await stage.judge.sandbox.start()
    present = stage.judge.sandbox.capabilities
    if missing := sorted(wanted - present):
        raise Failed(f"the sandbox lacks {', '.join(missing)}; it has: {', '.join(sorted(present)) or 'nothing'}")
    return ", ".join(sorted(present))


CHECKS: tuple[Check, ...] = (
    sandbox, round_trip, schemas, gold, noop, starter, wrong, others, near, random_calls, faults, determinism, leaks,
    closing, isolation,
)  # fmt: skip
"""In the order they run and are shown."""


class FailingSandbox:
    """A sandbox whose every case is the machinery's fault."""

    name: ClassVar[str] = "failing"

    @property
    def capabilities(self) -> frozenset[str]:
        """None."""
        return frozenset()

    async def start(self) -> None:
        """Nothing to start."""

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None = None
    ) -> list[CaseResult]:
        """Always a fault."""
        raise SandboxError("this sandbox always fails")

    async def aclose(self) -> None:
        """Nothing to close."""


async def _all_score(stage: Stage, probes: Sequence[tuple[Task, Trajectory]], outcome: float, what: str) -> None:
    for played in await stage.play_all(probes):
        if played.verdict.outcome != outcome:
            raise Failed(f"{what} of task {played.episode.task_id!r} has {played.what}; it must score {outcome:g}")


def _messages(turns: Iterable[Message | str]) -> Trajectory:
    return tuple(Message(role="assistant", content=turn) if isinstance(turn, str) else turn for turn in turns)


def _pass_rate(played: Iterable[Played]) -> float:
    passed = [item.verdict.passed for item in played]
    return sum(passed) / len(passed) if passed else 0.0


def _trace(played: Played) -> str:
    """All of an episode but the time it took."""
    verdict = played.verdict
    parts: list[Any] = [
        [message.model_dump() for message in played.seen],
        played.episode.final_state,
        [event.model_dump() for event in played.episode.events],
        [played.episode.stop_reason, played.episode.error, verdict.outcome, verdict.status, verdict.reward],
    ]
    return json.dumps(parts, sort_keys=True, default=str)


def _with_canary(task: Task) -> Task:
    planted = {key: f"{value} {_CANARY}" if isinstance(value, str) else value for key, value in task.hidden.items()}
    marked = Privileged(hint=_CANARY, solution=_CANARY, trajectory=task.privileged.trajectory)
    return task.model_copy(update={"hidden": {**planted, "canary": _CANARY}, "privileged": marked})


def _check_schema(tool: ToolSchema) -> None:
    if not _TOOL_NAME.fullmatch(tool.name):
        raise Failed(f"tool name {tool.name!r}: use letters, digits, '_', '.' and '-', 64 at most")
    parameters = tool.parameters
    properties = parameters.get("properties", {})
    if parameters.get("type", "object") != "object" or not isinstance(properties, dict):
        raise Failed(f"tool {tool.name!r}: parameters must be a JSON schema of an object")
    if missing := [key for key in parameters.get("required", ()) if key not in properties]:
        raise Failed(f"tool {tool.name!r} requires {missing[0]!r}, which is no parameter")
    if bad := [key for key, schema in properties.items() if not isinstance(schema, dict)]:
        raise Failed(f"tool {tool.name!r}: the schema of {bad[0]!r} is not an object")
    json.dumps(parameters, allow_nan=False)


async def all_findings(stage: Stage) -> list[Finding]:
    """Every check in order; one that needs a sandbox which does not start ends the list."""
    findings = []
    for check in CHECKS:
        findings.append(await run_check(check, stage))
        if check is sandbox and not findings[-1].passed:
            break
        await asyncio.sleep(0)
    return findings
