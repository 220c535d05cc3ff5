"""Episodes kept for a reader, with the evidence behind every token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from agentopd.batching import verdict_signs
from agentopd.config.objective import Blocks
from agentopd.contracts import ScoredEpisode
from agentopd.objective.routers import shown_weight
from agentopd.runs import Run
from agentopd.tracking import KeptEpisode
from agentopd.types import Task


def keep_episodes(run: Run, blocks: Blocks, scored: Sequence[ScoredEpisode], tasks: Mapping[str, Task]) -> None:
    """Write ``tracking.episodes_per_step`` episodes of the step just taken, over skills, passes and failures in turn.

    ``blocks`` are those the step trained with.
    """
    if run.directory is not None and run.config.tracking.episodes_per_step:
        chosen = choose(scored, run.config.tracking.episodes_per_step)
        run.directory.keep_episodes(run.step, [inspected(run, blocks, item, tasks) for item in chosen])


def choose(scored: Sequence[ScoredEpisode], num: int) -> list[ScoredEpisode]:
    """Up to ``num`` episodes, round-robin over (skill, passed), so that every kind is seen."""
    kinds: dict[tuple[str, bool], list[ScoredEpisode]] = defaultdict(list)
    for item in scored:
        kinds[item.episode.skill, item.verdict.passed].append(item)
    chosen: list[ScoredEpisode] = []
    queues = [kinds[key] for key in sorted(kinds)]
    for depth in range(max(map(len, queues), default=0)):
        chosen += [queue[depth] for queue in queues if depth < len(queue)]
    return chosen[:num]


def inspected(run: Run, blocks: Blocks, item: ScoredEpisode, tasks: Mapping[str, Task]) -> KeptEpisode:
    """One episode with decoded tokens, both log-probs, and the router's weight on each sampled token.

    The weight shown is the router's, before caps and budgets; the metrics count those.
    """
    episode, evidence = item.episode, item.evidence
    special = [flag for turn in episode.turns for flag in run.classify(turn.token_ids).special]
    reasons = tuple("special" if flag and blocks.masks.special_tokens else "" for flag in special)
    teacher: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    if evidence is not None:
        teacher = tuple(evidence.teacher_logprobs.tolist())
        rollout = np.array([value for turn in episode.turns for value in turn.rollout_logprobs])
        delta = torch.tensor(evidence.teacher_logprobs - rollout)
        sigma = torch.from_numpy(verdict_signs(item, blocks)).to(delta)
        weight = shown_weight(blocks.router, sigma, delta)
        weights = tuple(0.0 if reason else float(value) for value, reason in zip(weight, reasons, strict=True))
    decode, config = run.policy.tokenizer.decode, run.skills[episode.skill].config
    return KeptEpisode(
        step=run.step,
        skill=episode.skill,
        replay=item.replay,
        episode=episode,
        verdict=item.verdict,
        task=tasks[episode.task_id],
        environment=config.env,
        verifier=config.verifier or "",
        tokens=tuple(decode([token], skip_special_tokens=False) for token in episode.token_ids),
        teacher_logprobs=teacher,
        weights=weights,
        mask_reasons=reasons,
    )
