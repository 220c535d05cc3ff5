"""Judged rollouts on disk, addressed by what determines them: task, actor, sampling settings and judge.

One file per key, written whole under a temporary name and renamed, so ranks and runs may share a folder. The first
line is the key itself; a file whose key differs is refused, never read as something else.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from agentopd.errors import UserError
from agentopd.types import Episode, Record, Verdict

Judged = tuple[Episode, Verdict]


class RolloutKey(Record):
    """Everything that the sampled tokens and their verdicts depend on."""

    task_hash: str
    skill: str
    actor: str
    """Identity of the model that acts and of its tokenizer."""
    judge: str
    """Environment and verifier with their versions."""
    num: int
    """Episodes of this task."""
    temperature: float
    top_p: float
    codec: str
    max_malformed: int
    seed: int

    @property
    def digest(self) -> str:
        """Content address (hex, 32 digits)."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]


class _Line(Record):
    episode: Episode
    verdict: Verdict


class RolloutCache:
    """A folder of judged rollouts."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, key: RolloutKey) -> Path:
        """Where a key's rollouts are, or would be."""
        return self.root / key.digest[:2] / f"{key.digest}.jsonl"

    def get(self, key: RolloutKey) -> list[Judged] | None:
        """The rollouts of a key, None where there are none. Raises ``UserError`` for a file that cannot be read."""
        path = self.path(key)
        if not path.is_file():
            return None
        with path.open() as file:  # whose lines end at line feeds alone: JSON leaves U+2028 and its like as they are
            head, *rest = file
        try:
            if RolloutKey.model_validate_json(head) != key:
                raise UserError(f"{path} holds the rollouts of another key; delete it")
            lines = [_Line.model_validate_json(line) for line in rest]
        except ValidationError as exc:
            raise UserError(f"{path} is not a file of rollouts ({exc.error_count()} errors); delete it") from None
        return [(line.episode, line.verdict) for line in lines]

    def put(self, key: RolloutKey, judged: Sequence[Judged]) -> None:
        """Store the rollouts of a key, replacing older ones."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [_Line(episode=episode, verdict=verdict) for episode, verdict in judged]
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        with os.fdopen(handle, "w") as file:
            file.write("".join(f"{record.model_dump_json()}\n" for record in [key, *lines]))
        os.replace(partial, path)
