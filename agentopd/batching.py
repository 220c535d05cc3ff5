"""Scored episodes into the one tensor record: who takes part in which component, and with what weight.

A fault is never a score. An episode that its environment broke, or that has no teacher evidence where one is needed,
leaves the batch; an unknown verdict leaves the verifier's term and is neutral to the router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agentopd.config.objective import ObjectiveConfig
from agentopd.config.objective_blocks import CalibratedRouter, GroupAdvantage
from agentopd.config.objective_data import GoldNLL
from agentopd.contracts import Evidence, ScoredEpisode
from agentopd.errors import ConfigError, TeacherError
from agentopd.objective.advantages import group_advantages
from agentopd.objective.masks import ClassifyTokens, hidden_tail
from agentopd.objective.microbatches import split_micro_batches
from agentopd.objective.streams import AllReduce, Batch, single_process
from agentopd.types import StopReason

__all__ = ["build_batch", "split_micro_batches", "verdict_signs"]

COUNTERS = ("episodes", "unjudged", "env_error", "no_evidence", "truncated_dropped", "empty", "rows", "tokens")
INTEGERS = ("position_N", "turn_N", "skill_N")
PARTS = ("teacher_part_N", "verifier_part_N", "anchor_part_N", "reference_part_N")
FLAGS = ("special_N", "span_N", *PARTS)
FLOATS = ("rollout_logprobs_N", "teacher_logprobs_N", "ref_logprobs_N", "advantage_N", "sigma_N")
DTYPES = {**dict.fromkeys(INTEGERS, np.int64), **dict.fromkeys(FLAGS, np.bool_), **dict.fromkeys(FLOATS, np.float32)}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Row:
    """One episode that trains: its ids up to the last sampled token, and the streams of its n sampled tokens."""

    input_ids: list[int]
    truncated: bool
    streams: dict[str, Array]
    """Keyed by field of ``Batch``, shape (n,); ``*_part_N`` flag the tokens taking part in a component."""
    topk_ids: Array
    topk_logprobs: Array


def build_batch(
    scored: Sequence[ScoredEpisode],
    objective: ObjectiveConfig,
    shares: Mapping[str, float],
    token_classes: ClassifyTokens,
    pad_id: int,
    all_reduce: AllReduce = single_process,
) -> Batch:
    """The tensor record of one optimiser step.

    ``shares`` maps every skill of the run to its share of the loss; it must hold the same names on every rank, and a
    prompt's whole group must be on one rank. ``all_reduce`` sums a tensor over ranks. Raises ``TeacherError`` where
    evidence does not fit its episode, is not finite on a supervised token, or is missing altogether on all ranks.
    """
    skills = tuple(sorted(shares))
    counts = dict.fromkeys(COUNTERS, 0)
    advantages = _advantages(scored, objective)
    rows = []
    for item, advantage in zip(scored, advantages, strict=True):
        if item.episode.skill not in shares:
            raise ConfigError(f"episode {item.episode.id!r} has skill {item.episode.skill!r}; shares has: {skills}")
        left_out = _reason_to_leave_out(item, objective)
        counts["episodes"] += 1
        counts["unjudged"] += item.verdict.outcome is None
        if left_out:
            counts[left_out] += 1
        else:
            rows.append(_row(item, objective, token_classes, advantage, skills.index(item.episode.skill)))
    counts["rows"], counts["tokens"] = len(rows), sum(len(row.streams["position_N"]) for row in rows)
    batch, parts_CN = _stack(rows, skills, pad_id)
    counts_CS = all_reduce(_skill_counts(parts_CN, batch))
    metrics = _reduced(counts, all_reduce)
    if objective.needs_teacher and metrics["batch/episodes"] and not counts_CS[0].any():
        raise TeacherError(f"the teacher has no token to act on in this batch: {metrics}")
    return replace(batch, **_scales(batch, parts_CN, counts_CS, shares), metrics=metrics)


def _reduced(counts: Mapping[str, int], all_reduce: AllReduce) -> dict[str, float]:
    totals = all_reduce(torch.tensor([counts[name] for name in COUNTERS], dtype=torch.float64)).tolist()
    return {f"batch/{name}": total for name, total in zip(COUNTERS, totals, strict=True)}


def _advantages(scored: Sequence[ScoredEpisode], objective: ObjectiveConfig) -> list[float]:
    if not isinstance(objective.verifier, GroupAdvantage):
        return [0.0] * len(scored)
    rewards = [None if item.episode.stop_reason is StopReason.ENV_ERROR else item.verdict.reward for item in scored]
    groups = [item.episode.group_id or item.episode.id for item in scored]
    return group_advantages(rewards, groups, objective.verifier.normalise_std)


def _reason_to_leave_out(item: ScoredEpisode, objective: ObjectiveConfig) -> str:
    """The counter an episode without any weight goes to; '' where it trains."""
    if item.episode.stop_reason is StopReason.ENV_ERROR:
        return "env_error"
    if item.evidence is None and (objective.needs_teacher or objective.needs_reference):
        return "no_evidence"
    if item.episode.stop_reason.truncated and objective.masks.truncated == "drop":
        return "truncated_dropped"
    return "" if item.episode.num_sampled else "empty"


def _row(
    item: ScoredEpisode, objective: ObjectiveConfig, token_classes: ClassifyTokens, advantage: float, skill: int
) -> _Row:
    episode = item.episode
    turn_ids = np.array(episode.turn_ids)
    position = np.flatnonzero(turn_ids >= 0)
    if position[0] == 0:
        raise ValueError(f"episode {episode.id!r} has no prompt: its first sampled token has no log-prob")
    n = len(position)
    classes = [token_classes(turn.token_ids) for turn in episode.turns]
    special = np.array([flag for found in classes for flag in found.special], dtype=bool)
    part = np.full(n, objective.needs_teacher)
    if objective.masks.special_tokens:
        part &= ~special
    if episode.stop_reason.truncated and objective.masks.truncated == "mask_tail":
        part[n - hidden_tail(n) :] = False
    teacher, ref, topk_ids, topk_logprobs = _evidence_streams(item, objective, part)
    judged = item.verdict.outcome is not None and isinstance(objective.verifier, GroupAdvantage)
    streams = {
        "position_N": position,
        "turn_N": turn_ids[position],
        "skill_N": np.full(n, skill),
        "rollout_logprobs_N": np.array([x for turn in episode.turns for x in turn.rollout_logprobs]),
        "teacher_logprobs_N": teacher,
        "ref_logprobs_N": ref,
        "advantage_N": np.full(n, advantage),
        "sigma_N": verdict_signs(item, objective),
        "special_N": special,
        "span_N": np.array([flag for found in classes for flag in found.in_span], dtype=bool),
        "teacher_part_N": part,
        "verifier_part_N": np.full(n, judged),
        "anchor_part_N": np.full(n, isinstance(objective.anchor, GoldNLL)),
        "reference_part_N": np.full(n, objective.needs_reference),
    }
    input_ids = episode.token_ids[: position[-1] + 1]
    return _Row(input_ids, episode.stop_reason.truncated, streams, topk_ids, topk_logprobs)


def verdict_signs(item: ScoredEpisode, objective: ObjectiveConfig) -> Array:
    """The verdict's sign per sampled token; a step's certificate overrides the episode's where the router uses it."""
    verdict, turns = item.verdict, item.episode.turns
    if verdict.outcome is None:
        return np.zeros(item.episode.num_sampled)
    sigma = [[2 * verdict.outcome - 1] * len(turn.token_ids) for turn in turns]
    if isinstance(objective.router, CalibratedRouter) and objective.router.use_certificates:
        for certificate in verdict.certificates:
            steps = sigma[certificate.turn]
            end = len(steps) if certificate.end is None else min(certificate.end, len(steps))
            steps[certificate.start : end] = [float(certificate.sign)] * max(0, end - certificate.start)
    return np.array([value for steps in sigma for value in steps])


def _evidence_streams(
    item: ScoredEpisode, objective: ObjectiveConfig, part: Array
) -> tuple[Array, Array, Array, Array]:
    """Teacher, reference, top-K ids and top-K log-probs, checked where they supervise and neutral elsewhere."""
    evidence, n = item.evidence, len(part)
    teacher, ref = np.zeros(n), np.zeros(n)
    ids, topk = np.zeros((n, 0), np.int64), np.zeros((n, 0), np.float32)
    if evidence is None:
        return teacher, ref, ids, topk
    who = f"teacher {evidence.teacher!r} on episode {item.episode.id!r}"
    if objective.needs_teacher:
        teacher = _finite(evidence.teacher_logprobs, part, who)
    if objective.top_k:
        ids, topk = _topk_streams(evidence, part, who)
    if objective.needs_reference:
        if evidence.ref_logprobs is None:
            raise TeacherError(f"{who}: no reference log-probs, but objective.reference.kl_coef is on")
        ref = _finite(evidence.ref_logprobs, np.ones(n, dtype=bool), f"reference policy on episode {item.episode.id!r}")
    return teacher, ref, ids, topk


def _finite(logprobs: Array, part: Array, who: str) -> Array:
    """The log-probs with 0 where they do not supervise; raises where one that does is not finite."""
    if logprobs.shape != part.shape:
        raise TeacherError(f"{who}: log-probs of shape {logprobs.shape} for {len(part)} sampled tokens")
    bad = np.flatnonzero(part & ~np.isfinite(logprobs))
    if len(bad):
        raise TeacherError(f"{who}: log-prob {logprobs[bad[0]]} at sampled token {bad[0]} of {len(part)}")
    return np.where(part, logprobs, 0.0)


def _topk_streams(evidence: Evidence, part: Array, who: str) -> tuple[Array, Array]:
    """Top-K ids and log-probs; -inf marks a slot the teacher left unused, and every slot of unsupervised tokens."""
    ids, logprobs = evidence.topk_ids, evidence.topk_logprobs
    if ids is None or logprobs is None or ids.shape != logprobs.shape or ids.shape[0] != len(part):
        raise TeacherError(f"{who}: top-K evidence is missing or does not fit {len(part)} sampled tokens")
    kept = np.where(part[:, None], logprobs, -np.inf)
    used = np.isfinite(kept)
    bad = np.flatnonzero((~used & (kept != -np.inf)).any(-1) | (part & ~used.any(-1)))
    if len(bad):
        raise TeacherError(f"{who}: unusable top-K log-probs at sampled token {bad[0]} of {len(part)}")
    return np.where(used, ids, 0), kept


def _stack(rows: Sequence[_Row], skills: tuple[str, ...], pad_id: int) -> tuple[Batch, Tensor]:
    """The batch with all scales 0, and the flags (C, N) of tokens taking part in each of the C components."""
    lengths = [len(row.input_ids) for row in rows]
    input_ids_BT = torch.full((len(rows), max(lengths, default=0)), pad_id, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids_BT[index, : lengths[index]] = torch.tensor(row.input_ids)
    sizes = torch.tensor([len(row.streams["position_N"]) for row in rows], dtype=torch.int64)
    row_N = torch.repeat_interleave(torch.arange(len(rows)), sizes)
    stacked: dict[str, Any] = {
        name: torch.from_numpy(np.concatenate([np.zeros(0, dtype), *(row.streams[name] for row in rows)]).astype(dtype))
        for name, dtype in DTYPES.items()
    }
    parts_CN = torch.stack([stacked.pop(name) for name in PARTS])
    width = max((row.topk_ids.shape[1] for row in rows), default=0)
    zeros_N = torch.zeros(len(row_N))
    batch = Batch(
        skills=skills,
        input_ids_BT=input_ids_BT,
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        truncated_B=torch.tensor([row.truncated for row in rows], dtype=torch.bool),
        row_N=row_N,
        target_N=input_ids_BT[row_N, stacked["position_N"]],
        teacher_topk_ids_NK=_slots([row.topk_ids for row in rows], width, 0, np.int64),
        teacher_topk_logprobs_NK=_slots([row.topk_logprobs for row in rows], width, -np.inf, np.float32),
        teacher_scale_N=zeros_N,
        verifier_scale_N=zeros_N,
        anchor_scale_N=zeros_N,
        reference_scale_N=zeros_N,
        **stacked,
    )
    return batch, parts_CN


def _slots(tables: Sequence[Array], width: int, unused: float, dtype: type[np.generic]) -> Tensor:
    """Tables of (n, k <= width) stacked to (N, width); teachers may differ in K."""
    padded = [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=unused) for x in tables]
    return torch.from_numpy(np.concatenate([np.zeros((0, width)), *padded]).astype(dtype))


def _skill_counts(parts_CN: Tensor, batch: Batch) -> Tensor:
    """Tokens of each skill taking part in each component (C, S)."""
    zeros_CS = torch.zeros(len(PARTS), len(batch.skills), dtype=torch.float64)
    return zeros_CS.index_add(1, batch.skill_N, parts_CN.double())


def _scales(batch: Batch, parts_CN: Tensor, counts_CS: Tensor, shares: Mapping[str, float]) -> dict[str, Any]:
    """For each component, every token's share of its skill over the skill's global count of tokens taking part."""
    share_S = torch.tensor([shares[name] for name in batch.skills], dtype=torch.float64)
    unit_CS = share_S / counts_CS.clamp(min=1)
    scales_CN = torch.where(parts_CN, unit_CS[:, batch.skill_N], 0.0).float()
    return {name.replace("_part_", "_scale_"): scale_N for name, scale_N in zip(PARTS, scales_CN, strict=True)}
