"""Training tasks that are held-out tasks in other words: found, listed, and by default not trained on.

What is compared is all that defines a problem: the prompt without its system message, and the public state (a table or
a program often decides the answer while the wording recurs). Two tasks overlap if their texts are equal, if enough of
the shorter one's n-grams occur in the other (Brown et al. 2020, appendix C, with a share instead of a single hit, since
procedural tasks share their phrases), or, with an embedding model, if they are close and hold the same numbers.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from agentopd.config.decontamination import DecontaminationConfig
from agentopd.contracts import FloatArray
from agentopd.mixture.embedding import Embed
from agentopd.types import Record, Task

_CHUNK = 64


class Overlap(Record):
    """A training task and the held-out task it overlaps with."""

    skill: str
    task_id: str
    heldout_skill: str
    heldout_id: str
    kind: str
    """``same``, ``ngram`` or ``embedding``."""
    score: float


class Decontaminator:
    """Compares training tasks with the held-out tasks of all skills; ``found`` holds what overlapped so far."""

    def __init__(
        self, heldout: Mapping[str, Sequence[Task]], config: DecontaminationConfig, embed: Embed | None = None
    ) -> None:
        self.config = config
        self.found: dict[tuple[str, str], Overlap] = {}
        self._off = config.action == "off"
        self._names = [] if self._off else [(skill, task.id) for skill, tasks in heldout.items() for task in tasks]
        words = [] if self._off else [words_of(task) for tasks in heldout.values() for task in tasks]
        self._same = {tuple(text): index for index, text in enumerate(words)}
        self._sizes: list[int] = []
        self._index: dict[int, list[int]] = defaultdict(list)
        for index, text in enumerate(words):
            grams = self._ngrams(text)
            self._sizes.append(len(grams))
            for gram in grams:
                self._index[gram].append(index)
        self._embed = None if self._off or not words else embed
        self._numbers = [_numbers(text) for text in words]
        self._vectors = self._embed([" ".join(text) for text in words]) if self._embed else None

    def kept(self, skill: str, tasks: Iterable[Task]) -> Iterator[Task]:
        """The tasks that may be trained on, in order; what overlaps is added to ``found``."""
        if self._off:
            yield from tasks
            return
        source = iter(tasks)
        while chunk := list(islice(source, _CHUNK)):
            for task, overlap in zip(chunk, self._check(skill, chunk), strict=True):
                if overlap is not None:
                    self.found[skill, task.id] = overlap
                if overlap is None or self.config.action == "list":
                    yield task

    def _check(self, skill: str, tasks: Sequence[Task]) -> list[Overlap | None]:
        words = [words_of(task) for task in tasks]
        matches = [self._by_words(text) for text in words]
        if self._embed is not None and self._vectors is not None:
            close = self._embed([" ".join(text) for text in words]) @ self._vectors.T
            for row, text in enumerate(words):
                matches[row] = matches[row] or self._by_meaning(close[row], text)
        return [
            match and Overlap(skill=skill, task_id=task.id, heldout_skill=self._names[match[0]][0],
                              heldout_id=self._names[match[0]][1], kind=match[1], score=round(match[2], 4))
            for task, match in zip(tasks, matches, strict=True)
        ]  # fmt: skip

    def _by_words(self, text: Sequence[str]) -> tuple[int, str, float] | None:
        if (same := self._same.get(tuple(text))) is not None:
            return same, "same", 1.0
        grams = self._ngrams(text)
        shared = Counter(index for gram in grams for index in self._index.get(gram, ()))
        # Not the one with most in common: a short task is contained in full by fewer n-grams than a long one shares.
        shares = ((count / min(len(grams), self._sizes[index]), index) for index, count in shared.items())
        share, index = max(shares, default=(0.0, -1))
        return (index, "ngram", share) if share >= self.config.overlap else None

    def _by_meaning(self, similarity: FloatArray, text: Sequence[str]) -> tuple[int, str, float] | None:
        numbers = _numbers(text)
        close = (index for index in np.argsort(-similarity) if similarity[index] >= self.config.similarity)
        found = next((int(index) for index in close if self._numbers[index] == numbers), None)
        return None if found is None else (found, "embedding", float(similarity[found]))

    def _ngrams(self, text: Sequence[str]) -> set[int]:
        n = self.config.ngram
        return {hash(tuple(text[start : start + n])) for start in range(len(text) - n + 1)}


def words_of(task: Task) -> list[str]:
    """Words and signs of the prompt and the public state, normalised."""
    prompt = [message.content for message in task.prompt if message.role != "system"]
    public = json.dumps(task.public, ensure_ascii=False, sort_keys=True) if task.public else ""
    text = unicodedata.normalize("NFKC", "\n".join([*prompt, public])).casefold()
    return re.findall(r"\w+|[^\w\s]", text)


def _numbers(text: Sequence[str]) -> Counter[str]:
    return Counter(word for word in text if word.isdigit())
