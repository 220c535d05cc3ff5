"""What the episodes of one step say, as numbers keyed by skill name."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

import psutil

from agentopd.contracts import ScoredEpisode
from agentopd.learner import runtime
from agentopd.objective.repetition import looping_tail, repeats
from agentopd.types import Episode, Verdict

_AVERAGED = (
    *("success", "retry_success", "reward", "tokens", "turns"),
    *("truncated", "repetition", "malformed", "flagged", "diff_cost"),
)


class Clock:
    """Seconds by phase of one step, and the memory resident at its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.resident: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.resident[name] = resident_mib()

    def metrics(self) -> dict[str, float]:
        """``time/<phase>`` in seconds and ``memory/<phase>`` in MiB."""
        seconds = {f"time/{name}": value for name, value in self.seconds.items()}
        return seconds | {f"memory/{name}": value for name, value in self.resident.items()}


def step_metrics(judged: Sequence[tuple[Episode, Verdict]], again: Set[str] = frozenset()) -> dict[str, float]:
    """Per skill: success, reward, tokens, turns, truncation, repetition, malformed calls, flags, unjudged; all ranks.

    Success and reward average over judged episodes only, the cost of a patch over those that passed; a skill without
    such episodes has no such entry. Tasks drawn ``again`` (by hash), because they were failed, say nothing of the
    success on tasks at large: theirs is ``retry_success``.
    """
    rows = [_row(episode, verdict, episode.task_hash in again) for episode, verdict in judged]
    by_skill: dict[str, list[dict[str, float]]] = defaultdict(list)
    for part in runtime.gather_objects(rows):
        for skill, row in part:
            by_skill[skill].append(row)
    metrics: dict[str, float] = {}
    for skill, found in sorted(by_skill.items()):
        for key in _AVERAGED:
            values = [row[key] for row in found if key in row]
            if values:
                metrics[f"{skill}/{key}"] = sum(values) / len(values)
        metrics[f"{skill}/infra_errors"] = sum(row["unjudged"] for row in found)
        metrics[f"{skill}/episodes"] = len(found)
    every = [row for found in by_skill.values() for row in found]
    metrics["rollout/episodes"] = len(every)
    metrics["rollout/tokens"] = sum(row["tokens"] for row in every)
    return metrics


def _row(episode: Episode, verdict: Verdict, again: bool) -> tuple[str, dict[str, float]]:
    row: dict[str, float] = {
        "tokens": episode.num_sampled,
        "turns": len(episode.turns),
        "truncated": float(episode.stop_reason.truncated),
        "repetition": float(any(repeats(turn.text) or looping_tail(turn.token_ids) for turn in episode.turns)),
        "malformed": sum(len(turn.malformed) for turn in episode.turns),
        "flagged": float(bool(verdict.flags)),
        "unjudged": verdict.outcome is None or verdict.reward is None,
    }
    if verdict.outcome is not None and verdict.reward is not None:
        row |= {"retry_success": verdict.outcome} if again else {"success": verdict.outcome, "reward": verdict.reward}
    if verdict.passed and "diff_cost" in verdict.components:
        row["diff_cost"] = verdict.components["diff_cost"]
    return episode.skill, row


def cost_metrics(scored: Sequence[ScoredEpisode]) -> dict[str, float]:
    """Tokens that teachers read and that replay sampled in one step, over all ranks."""
    teacher = sum(len(item.episode.token_ids) for item in scored if item.evidence is not None)
    replay = sum(item.episode.num_sampled for item in scored if item.replay)
    parts = runtime.gather_objects([(teacher, replay)])
    pairs = [pair for part in parts for pair in part]
    return {"teacher/tokens": sum(read for read, _ in pairs), "replay/tokens": sum(played for _, played in pairs)}


def staleness_metrics(judged: Sequence[tuple[Episode, Verdict]], step: int) -> dict[str, float]:
    """How many updates older than the weights of ``step`` those were that sampled a token: mean and most, all ranks."""
    turns = [turn for episode, _ in judged for turn in episode.turns]
    ages = [(step - version, size) for turn in turns for version, size in turn.weight_spans]
    every = [pair for part in runtime.gather_objects(ages) for pair in part]
    tokens = sum(size for _, size in every)
    mean = sum(age * size for age, size in every) / tokens if tokens else 0.0
    return {"rollout/staleness": mean, "rollout/staleness_max": max((age for age, _ in every), default=0)}


def resident_mib() -> float:
    """Memory of this process, in MiB."""
    return float(psutil.Process().memory_info().rss) / 2**20


def cpu_seconds() -> float:
    """CPU time of this process and everything it started (the sandbox), since the start."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.Error:  # it ended meanwhile; its parent has its time
            continue
        total += used.user + used.system + getattr(used, "children_user", 0.0) + getattr(used, "children_system", 0.0)
    return total
