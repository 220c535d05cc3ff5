"""Rewards from a rubric instead of the verifier: the teacher's answers, the student's group, one blind judgement.

The verifier's own verdict stays what success is measured by; the rubric's is what is trained on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

from agentopd.config.objective_blocks import RubricAdvantage
from agentopd.config.teachers import ChatTeacherConfig
from agentopd.errors import TeacherError
from agentopd.evaluate import Judged, stable_seed
from agentopd.learner import runtime
from agentopd.runs import Run
from agentopd.teachers.chat import Question, any_text, plain_messages
from agentopd.teachers.rubric import Grades
from agentopd.types import Episode, StopReason, Task

_LOG = logging.getLogger(__name__)


async def reward(run: Run, judged: Sequence[Judged], tasks: Mapping[str, Task]) -> list[Judged]:
    """The episodes with the verdicts to train on: the rubric's where the objective has one, else the verifier's own.

    Groups are graded concurrently. A fault of teacher or judge leaves its group unjudged. Raises ``TeacherError`` where
    no rank has a group for which they gave any answer: the step would train on nothing, and so would the next. Where
    none of their answers was of use the rubric trains on nothing, and a warning says so.
    """
    advantage = run.blocks.verifier
    if not isinstance(advantage, RubricAdvantage):
        return list(judged)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, (episode, _) in enumerate(judged):
        if episode.stop_reason is not StopReason.ENV_ERROR:
            groups[episode.group_id].append(index)
    results = list(judged)
    unanswered: list[str] = []
    unjudged: list[str] = []

    async def grade(group: str, indices: list[int]) -> None:
        episodes = [judged[i][0] for i in indices]
        grades = await _grade(run, episodes, tasks[episodes[0].task_hash], advantage.teacher_answers)
        unanswered.extend(filter(None, [grades.unanswered]))
        unjudged.extend(filter(None, [grades.fault]))
        for index, verdict in zip(indices, grades.verdicts, strict=True):
            results[index] = (judged[index][0], verdict)

    await asyncio.gather(*(grade(group, indices) for group, indices in groups.items()))
    counts, faults = zip(*runtime.gather_objects((len(groups), unanswered)), strict=True)
    everywhere = [fault for found in faults for fault in found]
    if 0 < sum(counts) == len(everywhere):
        raise TeacherError(f"every episode of this step is unjudged, no question was answered: {everywhere[0]}")
    if 0 < len(groups) == len(unjudged):
        _LOG.warning("no group of this step could be judged, so the rubric trains on nothing: %s", unjudged[0])
    return results


def transcript(episode: Episode) -> str:
    """An episode as a judge reads it: the answer alone, or every turn with what came back."""
    if len(episode.turns) == 1:
        return episode.final_text
    lines = []
    for turn in episode.turns:
        lines.append(f"[answerer]\n{turn.text}")
        lines += [f"[{message.role}]\n{message.content}" for message in turn.results]
    return "\n".join(lines)


async def _grade(run: Run, episodes: Sequence[Episode], task: Task, num: int) -> Grades:
    assert run.teachers.judge is not None
    try:
        references = await _references(run, episodes[0].skill, task, num)
    except TeacherError as exc:
        return Grades.none(len(episodes), exc, teacher=episodes[0].skill)
    question = "\n\n".join(message.content for message in task.prompt)
    seed = stable_seed("judge", run.config.seed, episodes[0].group_id)
    return await run.teachers.judge.grade(question, references, [transcript(item) for item in episodes], seed)


async def _references(run: Run, skill: str, task: Task, num: int) -> list[str]:
    """``num`` answers of the skill's teacher, from its endpoint or as an actor in the environment."""
    key = run.teachers.routes[skill]
    endpoint, config = run.teachers.texts.get(key), run.config.teachers.get(key)
    if endpoint is None or not isinstance(config, ChatTeacherConfig):
        (answers,) = await run.teachers.demonstrators[key].answer([(skill, task)], num)
        return [transcript(episode) for episode, _ in answers]
    messages = plain_messages(task.prompt)
    questions = [Question(messages, config.temperature, config.max_tokens, copy) for copy in range(num)]
    return list(await asyncio.gather(*(endpoint.ask(question, any_text) for question in questions)))
