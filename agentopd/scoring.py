"""Verdicts and teacher evidence for finished episodes.

A fault of the machinery (sandbox, judge, environment) becomes a verdict without an outcome, which the batch gives no
weight; it is never a score.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from agentopd.contracts import CandidateTeacher, Evidence, IntArray, Sandbox, ScoredEpisode, Teacher, Verifier
from agentopd.errors import InfraError, SandboxError, TaskError, TeacherError, boundary
from agentopd.types import Episode, StopReason, Task, Verdict, VerdictStatus

if TYPE_CHECKING:
    from agentopd.teachers.views import View

_ATTEMPTS = 2
"""A sandbox fault is retried once, on a fresh worker, before the verdict is given up."""


async def judge(task: Task, episode: Episode, verifier: Verifier, sandbox: Sandbox | None) -> Verdict:
    """The verdict on one episode; machinery faults come back as ``infra_error``, broken tasks as ``task_error``."""
    if episode.stop_reason is StopReason.ENV_ERROR:
        return Verdict.unjudged(VerdictStatus.INFRA_ERROR, episode.error, verifier=verifier.name)
    fault = ""
    for _ in range(_ATTEMPTS):
        try:
            with boundary(InfraError, f"verifier {verifier.name!r} on task {task.id!r}"):
                verdict = await verifier.verify(task, episode, sandbox)
            _check_certificates(verdict, episode, f"verifier {verifier.name!r} on task {task.id!r}")
            return verdict
        except TaskError as exc:
            return Verdict.unjudged(VerdictStatus.TASK_ERROR, str(exc), verifier=verifier.name)
        except SandboxError as exc:
            fault = str(exc)
        except InfraError as exc:
            return Verdict.unjudged(VerdictStatus.INFRA_ERROR, str(exc), verifier=verifier.name)
    return Verdict.unjudged(VerdictStatus.INFRA_ERROR, fault, verifier=verifier.name)


def _check_certificates(verdict: Verdict, episode: Episode, who: str) -> None:
    """Raise ``InfraError`` where a certificate covers nothing: whoever wrote it judged another episode."""
    for certificate in verdict.certificates:
        if problem := certificate.problem(episode):
            raise InfraError(f"{who}: its {certificate.kind!r} certificate {problem}")


class Teaching(Protocol):
    """Who scores which skill, and how each looks at an episode."""

    routes: dict[str, str]
    """Skill to teacher key."""
    by_key: dict[str, Teacher]
    views: dict[str, View]


async def gather_evidence(
    episodes: Sequence[Episode],
    teaching: Teaching,
    top_k: int,
    tasks: Mapping[str, Task],
    known: Sequence[Evidence | None] = (),
) -> list[Evidence | None]:
    """Evidence for each episode from the teacher its skill is routed to, but for those of which it is ``known``.

    Skills without a route, episodes without a sampled token, and those an environment fault ended, get None. A teacher
    with a view scores what the view shows; it needs the episode's task in ``tasks`` (task hash to task). Raises
    ``TeacherError`` for a route to a teacher that is not there.
    """
    results = list(known) or [None] * len(episodes)

    async def ask(key: str, indices: list[int]) -> None:
        mine, view = [episodes[i] for i in indices], teaching.views.get(key)
        shown = [view.show(tasks[episode.task_hash], episode) for episode in mine] if view else mine
        with boundary(TeacherError, f"teacher {key!r}"):
            answers = await teaching.by_key[key].score(shown, top_k)
        if view:
            answers = [view.read(*item) for item in zip(mine, shown, answers, strict=True)]
        for index, answer in zip(indices, answers, strict=True):
            results[index] = answer

    by_teacher = _routed(episodes, teaching.routes, teaching.by_key)
    unknown = {key: [i for i in indices if results[i] is None] for key, indices in sorted(by_teacher.items())}
    await asyncio.gather(*(ask(key, indices) for key, indices in unknown.items() if indices))
    return results


async def add_candidates(
    episodes: Sequence[Episode],
    evidence: Sequence[Evidence | None],
    candidates: Sequence[IntArray],
    teaching: Teaching,
    tasks: Mapping[str, Task],
) -> list[Evidence | None]:
    """Put the teacher's log-probs of the student's own ``candidates`` (n, K) beside its evidence.

    Raises ``TeacherError`` for a teacher that cannot score ids it did not choose.
    """
    results = list(evidence)
    for key, indices in sorted(_routed(episodes, teaching.routes, teaching.by_key).items()):
        teacher, view = teaching.by_key[key], teaching.views.get(key)
        if not isinstance(teacher, CandidateTeacher):
            raise TeacherError(f"teacher {key!r} cannot score ids that the student chose; use a local one")
        shown = [view.show(tasks[episodes[i].task_hash], episodes[i]) if view else episodes[i] for i in indices]
        ids = [candidates[i] for i in indices]
        for index, chosen, found in zip(indices, ids, await teacher.score_ids(shown, ids), strict=True):
            known = evidence[index]
            if known is not None:
                results[index] = replace(known, candidate_ids=chosen, candidate_logprobs=found)
    return results


async def add_reference(
    episodes: Sequence[Episode],
    evidence: Sequence[Evidence | None],
    routes: Mapping[str, str],
    references: Mapping[str, Teacher],
) -> list[Evidence | None]:
    """Put the frozen reference's log-probs of the sampled ids beside the teacher's evidence, or alone without one.

    ``routes`` leads from a skill to the key of its reference.
    """
    results = list(evidence)
    for key, indices in sorted(_routed(episodes, routes, references).items()):
        answers = await references[key].score([episodes[i] for i in indices], 0)
        for index, answer in zip(indices, answers, strict=True):
            results[index] = replace(evidence[index] or answer, ref_logprobs=answer.teacher_logprobs)
    return results


def _routed(
    episodes: Sequence[Episode], routes: Mapping[str, str], teachers: Mapping[str, Teacher]
) -> dict[str, list[int]]:
    """Indices of the episodes that can be scored, by the key their skill is routed to."""
    by_teacher: dict[str, list[int]] = defaultdict(list)
    for index, episode in enumerate(episodes):
        if _scorable(episode) and episode.skill in routes:
            by_teacher[routes[episode.skill]].append(index)
    unknown = sorted(by_teacher.keys() - teachers.keys())
    if unknown:
        known = ", ".join(sorted(teachers)) or "none"
        raise TeacherError(
            f"a skill is routed to teacher {unknown[0]!r}, and there is no such teacher (known: {known})"
        )
    return by_teacher


def _scorable(episode: Episode) -> bool:
    return episode.num_sampled > 0 and episode.stop_reason is not StopReason.ENV_ERROR


def assemble(
    episodes: Sequence[Episode],
    verdicts: Sequence[Verdict],
    evidence: Sequence[Evidence | None],
    old: frozenset[str],
    anchor: bool = False,
) -> list[ScoredEpisode]:
    """Zip the three into scored episodes; ``old`` names the replayed skills, ``anchor`` marks what is beside them."""
    return [
        ScoredEpisode(episode, verdict, item, replay=episode.skill in old, anchor=anchor)
        for episode, verdict, item in zip(episodes, verdicts, evidence, strict=True)
    ]
