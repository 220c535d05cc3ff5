"""Episodes kept for a reader, with the evidence behind every token."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from agentopd.batching import mask_reasons, reason_to_leave_out
from agentopd.config.objective import Blocks
from agentopd.contracts import ScoredEpisode
from agentopd.objective.guidance import Guidance
from agentopd.objective.streams import Batch
from agentopd.runs import Run
from agentopd.tracking import KeptEpisode
from agentopd.types import Task


def inspect(
    run: Run, blocks: Blocks, scored: Sequence[ScoredEpisode], batch: Batch, tasks: Mapping[str, Task]
) -> list[KeptEpisode]:
    """``tracking.episodes_per_step`` episodes of the step about to be taken, as the learner sees them before it.

    ``batch`` was built from ``scored`` and more; ``tasks`` leads from a task's hash to the task. Only the process with
    the run directory keeps any.
    """
    num = run.config.tracking.episodes_per_step if run.directory is not None else 0
    row_of = {source: row for row, source in enumerate(batch.source_B.tolist())}
    sound = [index for index in range(len(scored)) if index not in batch.quarantined]
    chosen = [sound[index] for index in choose([scored[index] for index in sound], num)]
    rows = [row_of[index] for index in chosen if index in row_of]
    seen = iter(run.learner.inspect(batch.select_rows(rows)))
    return [
        _kept(run, blocks, scored[index], tasks, next(seen))
        if index in row_of
        else _kept(run, blocks, scored[index], tasks)
        for index in chosen
    ]


def choose(scored: Sequence[ScoredEpisode], num: int) -> list[int]:
    """Indices of up to ``num`` episodes, round-robin over (skill, passed), so that every kind is seen."""
    kinds: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for index, item in enumerate(scored):
        kinds[item.episode.skill, item.verdict.passed].append(index)
    chosen: list[int] = []
    queues = [kinds[key] for key in sorted(kinds)]
    for depth in range(max(map(len, queues), default=0)):
        chosen += [queue[depth] for queue in queues if depth < len(queue)]
    return chosen[:num]


def _kept(
    run: Run,
    blocks: Blocks,
    item: ScoredEpisode,
    tasks: Mapping[str, Task],
    seen: tuple[Tensor, Guidance | None] | None = None,
) -> KeptEpisode:
    """One episode with decoded tokens; an episode that ``seen`` says nothing of took no part in the update."""
    episode = item.episode
    decode, config = run.policy.tokenizer.decode, run.skills[episode.skill].config
    return KeptEpisode(
        step=run.step + 1,
        skill=episode.skill,
        replay=item.replay,
        episode=episode,
        verdict=item.verdict,
        task=tasks[episode.task_hash],
        environment=config.env,
        verifier=config.verifier or "",
        tokens=tuple(decode([token], skip_special_tokens=False) for token in episode.token_ids),
        **{name: stream for name, stream in _streams(run, blocks, item, seen).items() if _finite(stream)},
    )


def _finite(stream: Sequence[float | str]) -> bool:
    return all(isinstance(value, str) or math.isfinite(value) for value in stream)


def _streams(
    run: Run, blocks: Blocks, item: ScoredEpisode, seen: tuple[Tensor, Guidance | None] | None
) -> dict[str, Any]:
    """The token streams that only teacher, batch and learner know."""
    taught = () if item.evidence is None else tuple(item.evidence.teacher_logprobs.tolist())
    found: dict[str, Any] = {"teacher_logprobs": taught}
    if seen is None:
        return found | {"mask_reasons": (reason_to_leave_out(item, blocks),) * item.episode.num_sampled}
    logprobs_N, guidance = seen
    found["old_logprobs"] = tuple(logprobs_N.tolist())
    if guidance is None:
        return found
    reasons = mask_reasons(item, blocks, [run.classify(turn.token_ids) for turn in item.episode.turns])
    part, weight = guidance.part_N.tolist(), guidance.weight_N.tolist()
    return found | {
        "agreement": tuple(guidance.routed.agreement_N.tolist()),
        "weights": tuple(value if taken else 0.0 for value, taken in zip(weight, part, strict=True)),
        "mask_reasons": tuple("" if taken else reason or _UNNAMED for reason, taken in zip(reasons, part, strict=True)),
    }


_UNNAMED = "not compared"  # by the learner: below the entropy mask's ratio, or inside a segment of another tokenizer
