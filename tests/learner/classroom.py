"""What every objective reads, from real tiny models: answers in text, verdicts, teachers (one with another tokenizer),
a reference, the student's candidates scored, and gold beside the student's answers.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from agentopd.config.objective import Blocks, ObjectiveConfig, anchor_coef
from agentopd.contracts import ScoredEpisode
from agentopd.rendering import ChatRenderer, HermesJSON
from agentopd.teachers.local import LocalTeacher
from agentopd.teachers.views import CrossTokenizerView, Opening
from agentopd.teaching import Teachers
from agentopd.train import score
from agentopd.types import Episode, Message, StepCertificate, StopReason, Task, Turn, Verdict, VerdictStatus
from tests.tiny import byte_bpe, qwen3
from tests.token_classes import token_classifier

SHARES = {"a": 0.75, "b": 0.25}
GROUPS = 10
"""Prompts of one step, each answered twice."""
WORDS = "the answer to question is that we it what What 3 4 7 + = : . <"
MATHS = ["What is 3 + 4? 3 + 4 = 7. The answer is 7."] * 20
PROSE = ["The answer to the question is that we answer it: the answer is what it is."] * 20


@cache
def renderers() -> tuple[ChatRenderer, ChatRenderer]:
    """The student's tokenizer and the other one."""
    ours, theirs = byte_bpe(MATHS, 300), byte_bpe(PROSE, 340)
    return ChatRenderer(ours, HermesJSON()), ChatRenderer(theirs, HermesJSON())


def sharp(vocab_size: int, seed: int, **changes: Any) -> Any:
    """A model that is far from uniform: tokens differ in entropy and teachers in taste by more than rounding does."""
    return qwen3(vocab_size, seed, initializer_range=0.2, tie_word_embeddings=True, **changes)


@dataclass(frozen=True)
class Member:
    """One episode, and the number of the prompt it answers."""

    group: int
    item: ScoredEpisode


class Classroom:
    """The same episodes on every rank. Skill ``a`` has a teacher of the student's width, ``b`` a narrower one."""

    def __init__(self, objective: ObjectiveConfig) -> None:
        self.renderer, other = renderers()
        vocab = len(self.renderer.tokenizer)
        self.start = sharp(vocab, 0).requires_grad_(False)
        stages = list(objective.every_stage())
        whole = any(blocks.needs_full_vocabulary for blocks in stages)
        alignment = next((blocks.alignment.kind for blocks in stages if blocks.alignment.kind != "same"), "same")
        narrow = vocab if alignment == "same" else len(other.tokenizer)
        models = {"wide": sharp(vocab, 1), "narrow": sharp(narrow, 2, hidden_size=16)}
        view = CrossTokenizerView(Opening(self.renderer, lambda skill, task: ()), other, project=alignment == "simct")
        reference = LocalTeacher("before", sharp(vocab, 3).requires_grad_(False))
        self.teachers = Teachers(
            routes={"a": "wide", "b": "narrow"},
            by_key={
                name: LocalTeacher(name, model.requires_grad_(False), keep_hidden=whole)
                for name, model in models.items()
            },
            views={} if alignment == "same" else {"narrow": view},
            reference_routes=dict.fromkeys(SHARES, "before"),
            references={"before": reference},
        )
        seven, equals = (self.renderer.encode_turn(text)[0] for text in "7=")
        self.classify = token_classifier(self.renderer.special_ids, seven, equals)

    def student(self) -> Any:
        """The student as it starts."""
        return sharp(len(self.renderer.tokenizer), 0)

    def members(self, blocks: Blocks, progress: float, seed: int) -> list[Member]:
        """The scored episodes of one step."""
        rng = np.random.default_rng(seed)
        tasks = [self._task(seed, group) for group in range(GROUPS)]
        judged = list(self._judged(tasks, rng))
        beside = []
        if blocks.source.kind == "student" and anchor_coef(blocks.anchor, progress) > 0:
            passed = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)
            beside = [(self._episode(task, rng, "beside"), passed) for task in tasks[::3]]
        found = [*self._score(blocks, tasks, judged), *self._score(blocks, tasks, beside, anchor=True)]
        return [Member(int(item.episode.group_id), item) for item in found]

    def _score(
        self, blocks: Blocks, tasks: list[Task], judged: list[tuple[Episode, Verdict]], anchor: bool = False
    ) -> list[ScoredEpisode]:
        run = SimpleNamespace(
            blocks=blocks, teachers=self.teachers, policy=SimpleNamespace(model=self.start), old_skills=frozenset()
        )
        return asyncio.run(score(run, judged, {task.hash: task for task in tasks}, anchor=anchor))

    def _judged(self, tasks: list[Task], rng: np.random.Generator) -> Iterator[tuple[Episode, Verdict]]:
        """Of every group one passes and one fails; some verdicts are missing, some have certificates."""
        episodes = [self._episode(task, rng, str(copy)) for task in tasks for copy in range(2)]
        sampled = asyncio.run(LocalTeacher("start", self.start).score(episodes, 0))
        for index, (episode, evidence) in enumerate(zip(episodes, sampled, strict=True)):
            noisy = iter((evidence.teacher_logprobs + rng.normal(0, 0.3, episode.num_sampled)).tolist())
            turns = tuple(
                turn.model_copy(update={"rollout_logprobs": tuple(next(noisy) for _ in turn.token_ids)})
                for turn in episode.turns
            )
            signs = (StepCertificate(turn=0, sign=1, kind="toy"),) if index % 3 == 0 else ()
            outcome = float(index % 2)
            status = VerdictStatus.OK if outcome else VerdictStatus.WRONG
            verdict = Verdict(outcome=outcome, status=status, reward=outcome, certificates=signs)
            if index % 11 == 10:
                verdict = Verdict.unjudged(VerdictStatus.INFRA_ERROR, "gone")
            yield episode.model_copy(update={"turns": turns}), verdict

    def _task(self, seed: int, group: int) -> Task:
        prompt = Message(role="user", content=f"What is {group % 4} + {seed}" + " + 3" * (group % 3))
        return Task(id=str(group), env="toy", prompt=(prompt,))

    def _episode(self, task: Task, rng: np.random.Generator, name: str) -> Episode:
        group = int(task.id)
        cut = name == "1" and group % 4 == 3
        turns = [self._turn(rng, last=index == 1, cut=cut and index == 1) for index in range(2)]
        return Episode(
            id=f"{group}/{name}",
            task_id=task.id,
            task_hash=task.hash,
            env="toy",
            split="train",
            skill=("a", "b")[group % 2],
            group_id=str(group),
            prompt_ids=tuple(self.renderer.open(task.prompt)),
            turns=tuple(turns),
            stop_reason=StopReason.MAX_TOKENS if cut else StopReason.COMPLETED,
        )

    def _turn(self, rng: np.random.Generator, last: bool, cut: bool) -> Turn:
        text = " ".join(rng.choice(WORDS.split(), rng.integers(2, 7)))
        ids = self.renderer.encode_turn(text)
        ids = ids[:-1] if cut else ids
        results = () if last else (Message(role="user", content="and then"),)
        return Turn(
            token_ids=tuple(ids),
            rollout_logprobs=(0.0,) * len(ids),
            observation_ids=tuple(self.renderer.observe(results)) if results else (),
            text=text,
            results=results,
            finish_reason="length" if cut else "stop",
        )


def share_of(members: list[Member], rank: int, ranks: int, step: int) -> list[ScoredEpisode]:
    """The episodes of one rank's groups; in the second step only the first rank has any."""
    return [member.item for member in members if owner(member.group, step, ranks) == rank]


def owner(group: int, step: int, ranks: int) -> int:
    """The rank that has a group's episodes: ranks always differ in how many they have."""
    return 0 if ranks == 1 or step == 1 or group < 2 else 1 + group % (ranks - 1)
