"""A teacher read from disk: log-probs computed once on fixed rollouts (Lightning OPD, arXiv 2604.13010).

``teacher.json`` says who computed them, with which tokenizer and at which K; it is compared when the folder is opened,
because log-probs of another teacher bias every update and those of another tokenizer mean nothing. Each episode has
one file, named by the hash of its sampled and observed ids, so that evidence can never meet other tokens.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from agentopd.contracts import Evidence, Teacher
from agentopd.errors import ConfigError, TeacherError
from agentopd.types import Episode, Record

_HEADER = "teacher.json"
_FIELDS = ("teacher_logprobs", "topk_ids", "topk_logprobs")


class StoreHeader(Record):
    """Who computed the stored evidence."""

    teacher: str
    """Identity of the teacher's weights."""
    tokenizer: str
    """Hash of the tokenizer whose ids were scored."""
    top_k: int = 0
    student: str = ""
    """Identity of the model that sampled the rollouts."""


def episode_digest(episode: Episode) -> str:
    """Content address of an episode's tokens: ids and which of them were sampled (hex, 32 digits)."""
    digest = hashlib.sha256()
    digest.update(np.array(episode.token_ids, np.int64).tobytes())
    digest.update(np.array(episode.loss_mask, np.uint8).tobytes())
    return digest.hexdigest()[:32]


class StoredTeacher:
    """Evidence from a folder; with ``live`` given, episodes that are not there yet are scored by it and stored.

    Raises ``ConfigError`` where the folder was written by another teacher, tokenizer, student or a smaller K, unless
    ``allow_mismatch``.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        header: StoreHeader,
        live: Teacher | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        self.name = name
        self.max_top_k: int | None = header.top_k
        self._root, self._live, self._header = Path(root), live, header
        path = self._root / _HEADER
        if path.is_file():
            self._check(path, allow_mismatch)
        elif live is None:
            raise ConfigError(f"no stored teacher log-probs at {str(root)!r}: it has no {_HEADER}")

    def _check(self, path: Path, allow_mismatch: bool) -> None:
        try:
            stored = StoreHeader.model_validate_json(path.read_text())
        except ValidationError:
            raise ConfigError(f"{path} does not say who computed the log-probs beside it: delete the folder") from None
        if stored.top_k < self._header.top_k:
            raise ConfigError(f"{path}: stored with top-K {stored.top_k}, but the objective reads {self._header.top_k}")
        for field in () if allow_mismatch else ("teacher", "tokenizer", "student"):
            ours, theirs = getattr(self._header, field), getattr(stored, field)
            if ours != theirs:
                raise ConfigError(
                    f"{path}: stored with {field} {theirs!r}, but this run's is {ours!r}; store the rollouts again, "
                    "or set objective.source.allow_mismatch = true to accept the bias"
                )

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        """Evidence of each episode, in order. Raises ``TeacherError`` for one that is neither stored nor live."""
        found = [self._read(episode, top_k) for episode in episodes]
        missing = [index for index, evidence in enumerate(found) if evidence is None]
        if missing and self._live is None:
            raise TeacherError(f"no stored log-probs for episode {episodes[missing[0]].id!r} in {str(self._root)!r}")
        if missing and self._live is not None:
            answers = await self._live.score([episodes[i] for i in missing], self._header.top_k)
            for index, answer in zip(missing, answers, strict=True):
                found[index] = answer
                if np.isfinite(answer.teacher_logprobs).all():
                    self._store(episodes[index], answer)
                    found[index] = self._read(episodes[index], top_k)
        return [evidence for evidence in found if evidence is not None]

    def _path(self, episode: Episode) -> Path:
        digest = episode_digest(episode)
        return self._root / digest[:2] / f"{digest}.npz"

    def _read(self, episode: Episode, top_k: int) -> Evidence | None:
        path = self._path(episode)
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            fields: dict[str, Any] = {name: arrays[name] for name in _FIELDS if name in arrays}
        if fields["teacher_logprobs"].shape != (episode.num_sampled,):
            raise TeacherError(
                f"{path}: log-probs of shape {fields['teacher_logprobs'].shape} for episode {episode.id!r}"
            )
        for name in _FIELDS[1:]:
            fields[name] = fields[name][:, :top_k] if top_k and name in fields else None
        return Evidence(self.name, **fields)

    def _store(self, episode: Episode, evidence: Evidence) -> None:
        header = self._root / _HEADER
        if not header.is_file():
            _write(header, self._header.model_dump_json().encode())
        arrays = {name: getattr(evidence, name) for name in _FIELDS if getattr(evidence, name) is not None}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        _write(self._path(episode), buffer.getvalue())

    async def aclose(self) -> None:
        """Release the live teacher, if there is one."""
        if self._live is not None:
            await self._live.aclose()


def _write(path: Path, data: bytes) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_bytes(data)
    partial.replace(path)
