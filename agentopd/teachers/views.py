"""What a teacher is shown of an episode, and how its evidence is read back onto the student's tokens.

A view turns the student's episode into the one the teacher scores, and the teacher's evidence into evidence on the N
tokens that the student sampled. So every teacher, local or served, can be given a privileged prompt or another
tokenizer without knowing of it. Nothing a view adds is ever seen by the student: it works on finished episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from agentopd.contracts import Evidence
from agentopd.errors import TaskError, TeacherError
from agentopd.objective.alignment import Segment, align_bytes, first_ids, shared_ids, translate
from agentopd.rendering.pieces import as_text, token_bytes
from agentopd.rendering.templates import ChatRenderer, assistant_text
from agentopd.types import Episode, Message, Task, ToolSchema, Turn

Privilege = Literal["hint", "solution", "trajectory"]
Misread = Callable[[str, Task], Task]
"""The task that a teacher takes a skill's task for."""
ToolsOf = Callable[[str, Task], tuple[ToolSchema, ...]]
"""The tools a skill's environment offers on a task."""


class View(Protocol):
    """How one teacher looks at episodes."""

    def show(self, task: Task, episode: Episode) -> Episode:
        """The episode the teacher scores. Raises ``TaskError`` where the task lacks what the view needs."""
        ...

    def read(self, episode: Episode, shown: Episode, evidence: Evidence) -> Evidence:
        """Evidence on ``shown`` as evidence on the student's own tokens."""
        ...


@dataclass(frozen=True)
class Opening:
    """The messages a teacher's prompt is rendered from: the student's, after what only this teacher may see."""

    student: ChatRenderer
    tools: ToolsOf
    privilege: Privilege | None = None
    misread: Misread | None = None

    def messages(self, task: Task, episode: Episode) -> tuple[tuple[Message, ...], tuple[ToolSchema, ...]]:
        """Opening messages and tools. Raises ``TaskError`` unless the student's prompt can be told from the task."""
        tools = self.tools(episode.skill, task.student_view())
        if tuple(self.student.open(task.prompt, tools)) != episode.prompt_ids:
            raise TaskError(
                f"environment {task.env!r} opens task {task.id!r} with messages other than its prompt; a teacher "
                "with a prompt of its own (privileged, or of another tokenizer) needs them to be the same"
            )
        seen = task if self.misread is None else self.misread(episode.skill, task)
        return (seen.prompt if self.privilege is None else self._with_note(seen, self.privilege)), tools

    def _with_note(self, task: Task, privilege: Privilege) -> tuple[Message, ...]:
        """The prompt with the privileged text in front of its first user message."""
        note = privileged_text(task, privilege, self.student)
        first = next((i for i, message in enumerate(task.prompt) if message.role == "user"), None)
        if not note or first is None:
            lacking = "user message to put it in" if note else f"privileged {privilege}"
            raise TaskError(
                f"task {task.id!r} of {task.env!r} has no {lacking}: choose another context for the teacher"
            )
        message = task.prompt[first]
        noted = message.model_copy(update={"content": f"{note}\n\n{message.content}"})
        return (*task.prompt[:first], noted, *task.prompt[first + 1 :])


@dataclass(frozen=True)
class Misreading:
    """Takes a share of the tasks for another one of their skill; which and for which follows from the task's hash."""

    share: float
    others: Callable[[str], Sequence[Task]]
    """Tasks of a skill to choose from."""

    def __call__(self, skill: str, task: Task) -> Task:
        """The task itself, or another one. Raises ``TaskError`` where the skill has no other prompt."""
        digest = int(task.hash, 16)
        if digest % 1000 >= round(1000 * self.share):
            return task
        others = [other for other in self.others(skill) if other.prompt != task.prompt]
        if not others:
            raise TaskError(f"skill {skill!r} has no task to take {task.id!r} for: set misread_share = 0")
        return others[digest // 1000 % len(others)]


def privileged_text(task: Task, privilege: Privilege, renderer: ChatRenderer) -> str:
    """What a task tells its teacher: its hint, its solution, or its gold trajectory as it has to be written."""
    if privilege == "trajectory":
        return "\n".join(assistant_text(turn, renderer.codec) for turn in task.privileged.trajectory)
    return task.privileged.hint if privilege == "hint" else task.privileged.solution


@dataclass(frozen=True)
class PrivilegedView:
    """The student's turns verbatim after a prompt that also holds the task's privileged text."""

    opening: Opening

    def show(self, task: Task, episode: Episode) -> Episode:
        """The same sampled and observation ids; only the prompt differs."""
        prompt_ids = self.opening.student.open(*self.opening.messages(task, episode))
        return episode.model_copy(update={"prompt_ids": tuple(prompt_ids)})

    def read(self, episode: Episode, shown: Episode, evidence: Evidence) -> Evidence:
        """The sampled tokens are the same, so the evidence is."""
        return evidence


class CrossTokenizerView:
    """The student's text in the teacher's tokens and chat template, turn by turn; evidence aligned by bytes.

    Evidence read back has ``segments``. The teacher's log-prob of a token is that of its whole segment, and its top-K
    are student ids, at the segment's first position. With ``project`` a teacher token that the student lacks counts
    for the student token it begins with; without, it is dropped. Ending the turn is the same act on both sides; other
    special tokens, and what cannot be aligned, are in no segment.
    """

    def __init__(self, opening: Opening, teacher: ChatRenderer, project: bool = True) -> None:
        self.opening, self.teacher = opening, teacher
        student = opening.student
        self._ours, self._theirs = token_bytes(student.tokenizer), token_bytes(teacher.tokenizer)
        self.shared = shared_ids(self._ours, self._theirs)
        self._ids = first_ids(self._ours, self._theirs, student.encode_turn) if project else self.shared.copy()
        for table in (self.shared, self._ids):
            table[teacher.end_of_turn_id] = student.end_of_turn_id

    def show(self, task: Task, episode: Episode) -> Episode:
        """The episode as the teacher would have read and written it."""
        prompt_ids = self.teacher.open(*self.opening.messages(task, episode))
        turns = tuple(self._turn(turn) for turn in episode.turns)
        return episode.model_copy(update={"prompt_ids": tuple(prompt_ids), "turns": turns})

    def _turn(self, turn: Turn) -> Turn:
        ids = self.teacher.encode_turn(turn.text)
        if turn.finish_reason == "length":
            ids = ids[:-1]
        observed = self.teacher.observe(turn.results) if turn.observation_ids else []
        return turn.model_copy(
            update={
                "token_ids": tuple(ids),
                "rollout_logprobs": (0.0,) * len(ids),
                "observation_ids": tuple(observed),
            }
        )

    def read(self, episode: Episode, shown: Episode, evidence: Evidence) -> Evidence:
        """Evidence on the student's tokens (N,). Raises ``TeacherError`` where the teacher gave no distribution."""
        n, k = episode.num_sampled, 0 if evidence.topk_ids is None else evidence.topk_ids.shape[1]
        if not k and evidence.hidden is None:
            raise TeacherError(f"teacher {evidence.teacher!r} has another tokenizer and gave no top-K")
        logprobs, rest, segments = np.zeros(n, np.float32), np.zeros(n, np.float32), np.full(n, -1, np.int64)
        ids, topk = np.zeros((n, k), np.int64), np.full((n, k), -np.inf, np.float32)
        hidden = None if evidence.hidden is None else np.zeros((n, evidence.hidden.shape[1]), np.float32)
        ours, theirs, count = _sampled(episode), _sampled(shown), 0
        for segment in self._aligned(episode, shown):
            (s0, s1), (t0, t1) = segment
            spelled = evidence.teacher_logprobs[t0:t1].sum()
            if k:
                spelled = self._begun(segment, ours[s0:s1], theirs[t0], evidence)
                ids[s0], topk[s0] = self._support(segment, ours[s0], theirs[t0], evidence, spelled)
                if not np.isfinite(topk[s0]).any():
                    continue
            if hidden is not None and evidence.hidden is not None:
                hidden[s0] = evidence.hidden[t0]
            logprobs[s0:s1] = spelled
            rest[s0] = evidence.teacher_logprobs[t0 + 1 : t1].sum()
            segments[s0:s1] = count
            count += 1
        found = Evidence(evidence.teacher, logprobs, hidden=hidden, segments=segments, rest_logprobs=rest)
        return replace(found, topk_ids=ids, topk_logprobs=topk) if k else found

    def _aligned(self, episode: Episode, shown: Episode) -> Iterator[Segment]:
        """The segments of all turns, counted over the whole episode's sampled tokens."""
        ours = theirs = 0
        for mine, its in zip(episode.turns, shown.turns, strict=True):
            for (s0, s1), (t0, t1) in self._segments(mine.token_ids, its.token_ids):
                yield Segment((ours + s0, ours + s1), (theirs + t0, theirs + t1))
            ours, theirs = ours + len(mine.token_ids), theirs + len(its.token_ids)

    def _segments(self, ours: Sequence[int], theirs: Sequence[int]) -> list[Segment]:
        """Segments of one turn without a special token on either side, and the end of the turn."""
        body, other = _body(ours, self.opening.student), _body(theirs, self.teacher)
        found = align_bytes(
            _spelled(body, self._ours, self.opening.student), _spelled(other, self._theirs, self.teacher)
        )
        met = (found[-1].student[1], found[-1].teacher[1]) if found else (0, 0)
        kept = [
            segment
            for segment in found
            if all(self._ours[index] is not None for index in ours[slice(*segment.student)])
            and all(self._theirs[index] is not None for index in theirs[slice(*segment.teacher)])
        ]
        if met == (len(body), len(other)) and len(body) < len(ours) and len(other) < len(theirs):
            kept.append(Segment((len(body), len(ours)), (len(other), len(theirs))))
        return kept

    def _begun(self, segment: Segment, mine: Sequence[int], its: int, evidence: Evidence) -> np.float32:
        """The teacher's log-prob of a segment's text: of its own tokens there, or of one token that begins with it.

        The latter is what a teacher writes where the student went on wrongly, and the text was cut unlike its habit.
        """
        assert evidence.topk_ids is not None and evidence.topk_logprobs is not None
        t0, t1 = segment.teacher
        joint = evidence.teacher_logprobs[t0:t1].sum()
        text = b"".join(self._ours[token] or b"" for token in mine)
        if not text or segment.one_to_one:
            return np.float32(joint)
        counted = its if t1 - t0 == 1 else -1
        longer = [i != counted and (self._theirs[i] or b"").startswith(text) for i in evidence.topk_ids[t0].tolist()]
        return np.float32(np.logaddexp.reduce(evidence.topk_logprobs[t0][longer], initial=joint))

    def _support(
        self, segment: Segment, mine: int, its: int, evidence: Evidence, spelled: np.float32
    ) -> tuple[Any, Any]:
        """The teacher's top-K at a segment's first position as student ids.

        In a longer segment the first token of either side is left out: its mass is the segment's own slot. Where the
        segment is one token of the student's, that slot is this token's, with the log-prob of the text (``spelled``).
        """
        assert evidence.topk_ids is not None and evidence.topk_logprobs is not None
        (s0, s1), (t0, _) = segment
        found, kept = translate(evidence.topk_ids[t0], evidence.topk_logprobs[t0], self._ids)
        if not segment.one_to_one:
            kept = np.where(np.isin(found, (mine, self._ids[its])), -np.inf, kept)
            if s1 - s0 == 1:
                slot = int(kept.argmin())
                found[slot], kept[slot] = mine, spelled
        return found, kept


def _sampled(episode: Episode) -> list[int]:
    return [token for turn in episode.turns for token in turn.token_ids]


def _body(ids: Sequence[int], renderer: ChatRenderer) -> Sequence[int]:
    """A turn's ids without its end-of-turn token."""
    return ids[:-1] if ids and ids[-1] in renderer.end_of_turn_ids else ids


def _spelled(body: Sequence[int], table: Sequence[bytes | None], renderer: ChatRenderer) -> list[bytes]:
    """What a turn's ids show as in its text, special tokens spelled out."""
    spelling = renderer.tokenizer.convert_ids_to_tokens
    return as_text([table[index] or str(spelling(index)).encode() for index in body])
