"""One broken program with its tests, as a code-repair task: what QuixBugs and HumanEvalFix share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from agentopd.types import JSON, Limits, Message, Privileged, Source, Split, Task
from agentopd_envs.authoring import tool_turn
from agentopd_envs.cases import expectation
from agentopd_envs.micro.repair import SYSTEM

LIMITS = Limits(max_turns=8, max_tokens=2048)
NUM_SHOWN = 2


@dataclass(frozen=True)
class BrokenProgram:
    """``cases`` judge it; those of ``shown`` are in the prompt and run by ``run_tests``."""

    id: str
    entry_point: str
    description: str
    buggy: str
    gold: str
    cases: Sequence[JSON]
    shown: Sequence[JSON]
    source: Source
    files: Mapping[str, str] = field(default_factory=dict)

    def task(self, split: Split, seed: int) -> Task:
        """The code-repair task; its gold trajectory hands in the right program whole."""
        wanted = "\n\n".join(expectation(case) for case in self.shown)
        question = f"{self.description.strip()}\n\n{self.buggy.strip()}\n\nWhen it is right:\n\n{wanted}"
        return Task(
            id=self.id,
            env="code_repair",
            split=split,
            prompt=(Message(role="system", content=SYSTEM), Message(role="user", content=question)),
            public={
                "program": self.buggy,
                "files": dict(self.files),
                "entry_point": self.entry_point,
                "public_cases": list(self.shown),
            },
            hidden={"cases": list(self.cases), "gold": self.gold, "starter": self.buggy},
            privileged=Privileged(
                hint=first_change(self.buggy, self.gold),
                solution=self.gold,
                trajectory=(tool_turn("submit", code=self.gold),),
            ),
            limits=LIMITS,
            seed=seed,
            source=self.source.model_copy(update={"row": self.id}),
        )


def first_change(old: str, new: str) -> str:
    """Where a program first differs from the right one, in words: a hint that leaves the repair to be found."""
    mine, wanted = ([line.rstrip() for line in text.strip().splitlines()] for text in (old, new))
    for change, start, end, *_ in SequenceMatcher(None, mine, wanted, autojunk=False).get_opcodes():
        if change == "insert":
            after = mine[start].strip() if start < len(mine) else ""
            return f"Something is missing before `{after}`." if after else "Its end is missing."
        if change != "equal":
            wrong = next((line for line in mine[start:end] if line.strip()), "")
            return f"The line `{wrong.strip()}` is wrong."
    return ""
