"""reasoning-gym: every generator of the package as a task source, scored by its own scorer, strictly.

Some of its scorers pass the answer to Python's ``eval`` or to SymPy's parser, which evaluates too. Such a scorer is
only called with an answer that is data or plain arithmetic; anything else is wrong unseen.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from itertools import count, islice
from typing import Any

from agentopd.errors import ConfigError, TaskError
from agentopd.registry import register_environment
from agentopd.types import Episode, Limits, Message, Privileged, Source, Split, Task, Verdict, VerdictStatus
from agentopd_envs.authoring import SingleTurnEnvironment
from agentopd_envs.splits import split_of

SYSTEM = "Think step by step. Give the final answer between <answer> and </answer>, and nothing else there."
LIMITS = Limits(max_turns=1, max_tokens=4096)
CHUNK = 200
"""Problems made under one seed; the generators ask for their number beforehand."""
MAX_CHARS = 8192
MAX_POWER = 40

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_EVALUATES = re.compile(r"(?<!literal_)\beval\(|\bexec\(|\bparse_expr\(|\bsympify\(")
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt")
)
_PLAIN = (ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.UnaryOp, ast.BinOp, ast.Call,
          ast.operator, ast.unaryop)  # fmt: skip


@register_environment("reasoning_gym")
class ReasoningGym(SingleTurnEnvironment):
    """Endless problems of one generator (``source = "countdown"``), or of all of them in turn (``all``)."""

    name = "reasoning_gym"
    sources = ("all",)
    limits = LIMITS

    @classmethod
    def has_source(cls, source: str) -> bool:
        """``all``, or the name of a generator."""
        return source == "all" or source in generators()

    @classmethod
    def load_tasks(cls, split: Split, source: str, limit: int | None, seed: int) -> Iterator[Task]:
        """Tasks of one split; a problem is in the same split whatever the seed."""
        names = generators() if source == "all" else (source,)
        streams = [_problems(name, split, seed) for name in names]
        mixed = (next(streams[index % len(streams)]) for index in count())
        return islice(mixed, limit)

    @staticmethod
    def score(task: Task, episode: Episode) -> Verdict:
        """1 where the generator's own scorer gives full marks; ``raw`` is what it gives."""
        hidden = task.hidden
        chunk = _chunk(hidden["generator"], hidden["seed"])
        dataset, entry = chunk.dataset, chunk.entry(hidden["index"])
        if entry["question"] != hidden["question"]:
            raise TaskError(f"the installed reasoning-gym makes another problem of {task.id!r}: pin its version")
        found = _ANSWER.findall(episode.final_text)
        if not found:
            return Verdict(outcome=0.0, status=VerdictStatus.NO_ANSWER, reward=0.0, detail="no <answer>")
        answer = found[-1].strip()
        if len(answer) > MAX_CHARS or (_evaluates(hidden["generator"]) and not harmless(answer)):
            return Verdict(outcome=0.0, status=VerdictStatus.FORMAT, reward=0.0, detail="not plain data or arithmetic")
        raw = _score(dataset, answer, entry)
        right = raw == 1.0
        status = VerdictStatus.OK if right else VerdictStatus.WRONG
        return Verdict(outcome=float(right), status=status, reward=float(right), components={"raw": raw})


def generators() -> tuple[str, ...]:
    """The names of all generators, without those that only combine others. Raises ``ConfigError``."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError("reasoning_gym needs: pip install 'agentopd[reasoning-gym]'") from None
    return tuple(name for name in sorted(DATASETS) if name != "composite")


def harmless(answer: str) -> bool:
    """Whether evaluating a text can only be arithmetic of bounded size: no attribute, no index, no call but of a
    function of mathematics. A text that is no Python expression is evaluated by nobody, but SymPy would rewrite it.
    """
    try:
        tree = ast.parse(answer, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return bool(re.fullmatch(r"[\w\s.,;:+\-]*", answer)) and "__" not in answer
    return all(_is_plain(node) for node in ast.walk(tree))


def _is_plain(node: ast.AST) -> bool:
    if not isinstance(node, _PLAIN):
        return False
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    if isinstance(node, ast.Name):
        return "__" not in node.id
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift):
        return False
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        exponent = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
        bounded = not isinstance(exponent, ast.Constant) or (
            isinstance(exponent.value, int | float) and abs(exponent.value) <= MAX_POWER
        )
        return bounded and isinstance(exponent, ast.Constant | ast.Name)
    return True


def _score(dataset: Any, answer: str, entry: dict[str, Any]) -> float:
    """The scorer's number; a scorer that raises on this answer, and not on the right one, says that it is wrong."""
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception as exc:
        oracle = entry["answer"]
        if oracle is None or dataset.score_answer(oracle, entry) == 1.0:
            return 0.0
        raise TaskError(f"the scorer of {type(dataset).__name__} fails on its own answer: {exc}") from exc


class _Chunk:
    """The problems of one seed, made once and in order: some generators go on drawing with every problem."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._entries: list[dict[str, Any]] = []

    def entry(self, index: int) -> dict[str, Any]:
        while len(self._entries) <= index:
            self._entries.append(self.dataset[len(self._entries)])
        return self._entries[index]


@lru_cache(maxsize=256)
def _chunk(name: str, seed: int) -> _Chunk:
    import reasoning_gym

    return _Chunk(reasoning_gym.create_dataset(name, seed=seed, size=CHUNK))


@lru_cache(maxsize=256)
def _evaluates(name: str) -> bool:
    """Whether the scorer of a generator hands the answer to an evaluator, by its source."""
    from reasoning_gym.factory import DATASETS

    dataset, _ = DATASETS[name]
    module = inspect.getmodule(dataset)
    uses_sympy = "sympy" in inspect.getsource(module) if module else True
    source = inspect.getsource(dataset.score_answer)
    return any("eval(" in hit or "exec(" in hit or uses_sympy for hit in _EVALUATES.findall(source))


def _problems(name: str, split: Split, seed: int) -> Iterator[Task]:
    for chunk in count():
        chunk_seed = seed * 1_000_003 + chunk
        made = _chunk(name, chunk_seed)
        for index in range(CHUNK):
            entry = made.entry(index)
            if split_of(entry["question"]) == split:
                yield _task(name, entry, split, seed, chunk_seed, index)


def _task(name: str, entry: dict[str, Any], split: Split, seed: int, chunk_seed: int, index: int) -> Task:
    version = metadata.version("reasoning-gym")
    oracle = entry["answer"]
    gold = () if oracle is None else (Message(role="assistant", content=f"<answer>{oracle}</answer>"),)
    question = entry["question"]
    return Task(
        id=f"rg/{name}@{version}/{chunk_seed}/{index}",
        env="reasoning_gym",
        split=split,
        prompt=(Message(role="system", content=SYSTEM), Message(role="user", content=question)),
        hidden={"generator": name, "seed": chunk_seed, "index": index, "question": question},
        privileged=Privileged(solution=str(oracle or ""), trajectory=gold),
        limits=LIMITS,
        seed=seed,
        source=Source(dataset="reasoning_gym", revision=version, licence="Apache-2.0"),
    )
