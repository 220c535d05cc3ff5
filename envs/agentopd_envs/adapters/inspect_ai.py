"""Export to inspect_ai: any environment as a task for ``inspect eval``, its viewer and its logs.

A sample is a task, the solver plays it with inspect's model, the score is the verdict. What could not be judged is an
error of the sample and never a score.
"""

from __future__ import annotations

from typing import Any

from agentopd.contracts import Sandbox
from agentopd.errors import ConfigError, InfraError
from agentopd.registry import environments
from agentopd.types import MalformedCall, Message, Split, Task, ToolCall, Verdict
from agentopd_envs.adapters.messages import MessageEpisode


def to_inspect(
    env: str,
    source: str = "micro",
    split: Split = "eval",
    limit: int | None = 100,
    seed: int = 0,
    sandbox: Sandbox | None = None,
) -> Any:
    """An ``inspect_ai.Task`` of an environment's tasks; ``sandbox`` runs programs where the environment has any."""
    try:
        import inspect_ai
        from inspect_ai.dataset import Sample
    except ImportError:
        raise ConfigError("the export needs: pip install 'agentopd[inspect]'") from None
    env_cls = environments.get(env)
    samples = [
        Sample(
            id=task.id,
            input=[_to_inspect(message) for message in task.prompt],
            target=task.privileged.solution,
            metadata={"task": task.model_dump(mode="json")},
        )
        for task in env_cls.load_tasks(split, source, limit, seed)
    ]
    return inspect_ai.Task(
        name=f"{env_cls.name}-{split}", dataset=samples, solver=_solver(env_cls, sandbox), scorer=_scorer()
    )


def _solver(env_cls: Any, sandbox: Sandbox | None) -> Any:
    from inspect_ai.model import get_model
    from inspect_ai.solver import solver

    @solver(name="agentopd_episode")  # type: ignore[untyped-decorator]
    def play() -> Any:
        async def solve(state: Any, generate: Any) -> Any:
            task = Task.model_validate(state.metadata["task"])
            episode = MessageEpisode(env_cls, task, sandbox, task.seed)
            try:
                state.messages = [_to_inspect(message) for message in await episode.open()]
                tools = [_tool(schema) for schema in env_cls.tool_schemas(task.student_view())]
                while not episode.done:
                    output = await get_model().generate(state.messages, tools=tools)
                    state.output = output
                    state.messages.append(output.message)
                    answers = await episode.act(output.message.text, *_calls(output.message))
                    state.messages += _answers(answers, output.message)
                state.store.set("verdict", (await episode.verdict()).model_dump(mode="json"))
            finally:
                await episode.close()
            return state

        return solve

    return play()


def _scorer() -> Any:
    from inspect_ai.scorer import Score, mean, scorer, stderr

    @scorer(metrics=[mean(), stderr()], name="agentopd_verdict")  # type: ignore[untyped-decorator]
    def judge() -> Any:
        async def score(state: Any, target: Any) -> Any:
            verdict = Verdict.model_validate(state.store.get("verdict"))
            if verdict.outcome is None:
                raise InfraError(f"no verdict ({verdict.status}): {verdict.detail}")
            details = {"status": verdict.status.value, "reward": verdict.reward, **verdict.components}
            return Score(
                value=verdict.outcome, answer=state.output.completion, explanation=verdict.detail, metadata=details
            )

        return score

    return judge()


def _tool(schema: Any) -> Any:
    from inspect_ai.tool import ToolInfo, ToolParams

    parameters = {"type": "object", **schema.parameters}
    return ToolInfo(name=schema.name, description=schema.description, parameters=ToolParams.model_validate(parameters))


def _calls(message: Any) -> tuple[list[ToolCall], list[MalformedCall]]:
    made = message.tool_calls or []
    calls = [ToolCall(name=call.function, arguments=call.arguments) for call in made if not call.parse_error]
    malformed = [MalformedCall(raw=str(call.arguments), reason=call.parse_error) for call in made if call.parse_error]
    return calls, malformed


def _to_inspect(message: Message) -> Any:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    return kinds[message.role](content=message.content)


def _answers(answers: tuple[Message, ...], asked: Any) -> list[Any]:
    """Tool results under the ids of their calls: those of good calls in order, then those of malformed ones."""
    from inspect_ai.model import ChatMessageTool

    made = sorted(asked.tool_calls or [], key=lambda call: bool(call.parse_error))
    results = [answer for answer in answers if answer.role == "tool"]
    found = [
        ChatMessageTool(content=answer.content, tool_call_id=call.id, function=call.function)
        for answer, call in zip(results, made, strict=False)
    ]
    return [*found, *(_to_inspect(answer) for answer in answers if answer.role != "tool")]
