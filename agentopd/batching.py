"""Scored episodes into the one tensor record: who takes part in which component, and with what weight.

A fault is never a score. An episode that its environment broke, or that has no teacher evidence where one is needed,
leaves the batch, and so does one that cannot be trained on, with the reason; an unknown verdict leaves the verifier's
term and is neutral to the router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agentopd.config.objective import Blocks
from agentopd.config.objective_blocks import AbsoluteAdvantage, CandidatesPG, GroupAdvantage, RubricAdvantage
from agentopd.config.objective_data import GoldNLL, TeacherForwardKL
from agentopd.contracts import Evidence, ScoredEpisode
from agentopd.errors import ConfigError, EnvironmentFault, InfraError, TeacherError
from agentopd.objective.advantages import absolute_advantages, group_advantages
from agentopd.objective.candidates import candidate_table
from agentopd.objective.masks import ClassifyTokens, TokenClasses, hidden_tail
from agentopd.objective.microbatches import split_micro_batches
from agentopd.objective.repetition import looping_tail
from agentopd.objective.scales import PARTS, skill_counts, token_scales, unsolved_share
from agentopd.objective.streams import Batch
from agentopd.objective.suffix import fade_from, margins
from agentopd.objective.support import overlap
from agentopd.types import StopReason

__all__ = ["build_batch", "mask_reasons", "reason_to_leave_out", "split_micro_batches"]

MASKED = ("masked_special", "masked_repetition", "masked_suffix")
COUNTERS = (
    *("episodes", "unjudged", "env_error", "no_evidence", "quarantined", "truncated_dropped", "empty"),
    *("rows", "anchors", "tokens"),
    *MASKED,
)
INTEGERS = ("position_N", "turn_N", "skill_N", "segment_N")
FLAGS = ("policy_N", "special_N", "span_N", *PARTS)
LOGPROBS = ("rollout_logprobs_N", "teacher_logprobs_N", "ref_logprobs_N")
FLOATS = (*LOGPROBS, "overlap_N", "advantage_N", "sigma_N", "teacher_rest_N")
DTYPES = {**dict.fromkeys(INTEGERS, np.int64), **dict.fromkeys(FLAGS, np.bool_), **dict.fromkeys(FLOATS, np.float32)}

Array = npt.NDArray[Any]

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the data-parallel ranks and returns the sum."""


def single_process(tensor: Tensor) -> Tensor:
    """The all-reduce of one process: the identity."""
    return tensor


@dataclass(frozen=True)
class _Views:
    """What teacher and reference said of one episode's n sampled tokens, neutral where nothing supervises."""

    teacher: Array
    ref: Array
    overlap: Array
    topk_ids: Array
    topk_logprobs: Array
    hidden: Array
    rest: Array


@dataclass(frozen=True)
class _Row:
    """One episode that trains: its ids up to the last sampled token, and the streams of its n sampled tokens."""

    input_ids: list[int]
    truncated: bool
    streams: dict[str, Array]
    """Keyed by field of ``Batch``, shape (n,); ``*_part_N`` flag the tokens taking part in a component."""
    views: _Views
    teacher: str
    masked: dict[str, int] = field(default_factory=dict)
    """Tokens that each mask took from the teacher term."""


def build_batch(
    scored: Sequence[ScoredEpisode],
    objective: Blocks,
    shares: Mapping[str, float],
    token_classes: ClassifyTokens,
    pad_id: int,
    all_reduce: AllReduce = single_process,
) -> Batch:
    """The tensor record of one optimiser step.

    ``shares`` maps every skill of the run to its share of the loss; it must hold the same names on every rank, and a
    prompt's whole group must be on one rank. ``all_reduce`` sums a tensor over ranks. An episode whose evidence does
    not fit it, or is not finite on a supervised token, is left out and named in ``quarantined``. Raises
    ``EnvironmentFault`` where all environments broke, and ``TeacherError`` where evidence is missing or unusable, and
    no rank has any other; a batch that masks emptied is no fault.
    """
    skills = tuple(sorted(shares))
    counts = dict.fromkeys(COUNTERS, 0)
    advantages = _advantages(scored, objective)
    rows: dict[int, _Row] = {}
    quarantined: dict[int, str] = {}
    for index, (item, advantage) in enumerate(zip(scored, advantages, strict=True)):
        if item.episode.skill not in shares:
            raise ConfigError(f"episode {item.episode.id!r} has skill {item.episode.skill!r}; shares has: {skills}")
        left_out = reason_to_leave_out(item, objective)
        counts["episodes"] += 1
        counts["unjudged"] += item.verdict.outcome is None
        if left_out:
            counts[left_out] += 1
            continue
        try:
            rows[index] = _row(item, objective, token_classes, advantage, skills.index(item.episode.skill))
        except InfraError as exc:
            quarantined[index] = str(exc)
    counts |= _sizes(list(rows.values())) | {"quarantined": len(quarantined)}
    batch, parts_CN = _stack(rows, skills, pad_id)
    counts_CS = all_reduce(skill_counts(parts_CN, batch, objective.masks.entropy_top_ratio))
    metrics = _reduced(counts, all_reduce)
    if 0 < metrics["batch/episodes"] == metrics["batch/env_error"]:
        raise EnvironmentFault(f"every environment of this step broke: {next((x.episode.error for x in scored), '')}")
    if metrics["batch/quarantined"] and not metrics["batch/rows"]:
        raise TeacherError(f"no episode of this batch can be trained on: {next(iter(quarantined.values()), metrics)}")
    lost = metrics["batch/no_evidence"] + metrics["batch/quarantined"]
    if objective.needs_teacher and lost and not counts_CS[0].any():
        raise TeacherError(f"the teacher has no token to act on in this batch: {metrics}")
    scales: dict[str, Any] = {**token_scales(batch, parts_CN, counts_CS, shares)}
    if isinstance(objective.anchor, GoldNLL) and objective.anchor.prompts == "unsolved":
        reach_S = unsolved_share(all_reduce(_prompt_counts(scored, rows, skills)))
        scales["anchor_scale_N"] = scales["anchor_scale_N"] * reach_S[batch.skill_N]
    return replace(batch, **scales, metrics=metrics, quarantined=quarantined)


def _sizes(rows: Sequence[_Row]) -> dict[str, int]:
    return {
        "rows": len(rows),
        "tokens": sum(len(row.streams["position_N"]) for row in rows),
        "anchors": sum(not row.streams["policy_N"][0] for row in rows),
        **{name: sum(row.masked.get(name, 0) for row in rows) for name in MASKED},
    }


def _reduced(counts: Mapping[str, int], all_reduce: AllReduce) -> dict[str, float]:
    totals = all_reduce(torch.tensor([counts[name] for name in COUNTERS], dtype=torch.float64)).tolist()
    return {f"batch/{name}": total for name, total in zip(COUNTERS, totals, strict=True)}


def _advantages(scored: Sequence[ScoredEpisode], objective: Blocks) -> list[float]:
    known = [not item.anchor and item.episode.stop_reason is not StopReason.ENV_ERROR for item in scored]
    if isinstance(objective.verifier, AbsoluteAdvantage):
        return absolute_advantages([x.verdict.outcome if ok else None for x, ok in zip(scored, known, strict=True)])
    if not isinstance(objective.verifier, GroupAdvantage | RubricAdvantage):
        return [0.0] * len(scored)
    rewards = [item.verdict.reward if ok else None for item, ok in zip(scored, known, strict=True)]
    groups = [item.episode.group_id or item.episode.id for item in scored]
    return group_advantages(rewards, groups, objective.verifier.normalise_std)


def reason_to_leave_out(item: ScoredEpisode, objective: Blocks) -> str:
    """The counter an episode without any weight goes to; '' where it trains."""
    if item.episode.stop_reason is StopReason.ENV_ERROR:
        return "env_error"
    if item.episode.stop_reason.truncated and objective.masks.truncated == "drop":
        return "truncated_dropped"
    if not item.episode.num_sampled:
        return "empty"
    read = isinstance(objective.anchor, TeacherForwardKL) if item.anchor else _reads_evidence(objective)
    return "no_evidence" if item.evidence is None and read else ""


def _reads_evidence(objective: Blocks) -> bool:
    on_its_own = objective.source.kind == "teacher" and isinstance(objective.anchor, TeacherForwardKL)
    return objective.needs_teacher or objective.needs_reference or on_its_own


def _row(item: ScoredEpisode, objective: Blocks, token_classes: ClassifyTokens, advantage: float, skill: int) -> _Row:
    episode, policy = item.episode, not item.anchor
    turn_ids = np.array(episode.turn_ids)
    position = np.flatnonzero(turn_ids >= 0)
    if position[0] == 0:
        raise InfraError(f"episode {episode.id!r} has no prompt: its first sampled token has no log-prob")
    rollout_logprobs = np.array([x for turn in episode.turns for x in turn.rollout_logprobs])
    if not np.isfinite(rollout_logprobs).all():
        raise InfraError(f"episode {episode.id!r} was sampled with a log-prob that is not finite")
    n = len(position)
    classes = [token_classes(turn.token_ids) for turn in episode.turns]
    special = np.array([flag for found in classes for flag in found.special], dtype=bool)
    reasons = mask_reasons(item, objective, classes)
    taught = objective.needs_teacher and not item.anchor
    part = np.array([taught and not reason for reason in reasons], dtype=bool)
    masked = {f"masked_{reason}": reasons.count(reason) for reason in set(reasons)} if taught else {}
    anchored = objective.anchor.kind != "none" and (item.anchor or objective.source.kind in ("gold", "teacher"))
    segment = _alignment(item, objective, n)
    if segment is not None:  # only a segment's first token is compared
        part &= (segment >= 0) & (np.diff(segment, prepend=-1) != 0)
    views = _views(item, objective, part, anchored and isinstance(objective.anchor, TeacherForwardKL))
    judged = item.verdict.outcome is not None and objective.verifier.kind != "none"
    streams = {
        "position_N": position,
        "turn_N": turn_ids[position],
        "skill_N": np.full(n, skill),
        "segment_N": np.full(n, -1) if segment is None else segment,
        "rollout_logprobs_N": rollout_logprobs,
        "teacher_logprobs_N": views.teacher,
        "ref_logprobs_N": views.ref,
        "teacher_rest_N": views.rest,
        "overlap_N": views.overlap,
        "advantage_N": np.full(n, advantage),
        "sigma_N": verdict_signs(item, objective),
        "policy_N": np.full(n, policy),
        "special_N": special,
        "span_N": np.array([flag for found in classes for flag in found.in_span], dtype=bool),
        "teacher_part_N": part,
        "verifier_part_N": np.full(n, policy and judged),
        "anchor_part_N": np.full(n, anchored),
        "reference_part_N": np.full(n, policy and objective.reference.kl_coef > 0),
    }
    input_ids = episode.token_ids[: position[-1] + 1]
    teacher = item.evidence.teacher if item.evidence is not None else ""
    return _Row(input_ids, episode.stop_reason.truncated, streams, views, teacher, masked)


def mask_reasons(item: ScoredEpisode, objective: Blocks, classes: Sequence[TokenClasses]) -> list[str]:
    """Which mask keeps each sampled token (n,) from the teacher term, the first that does; '' where none does.

    "special", "tail", "repetition" or "suffix". The entropy mask is the learner's: it needs the student's distribution.
    """
    episode, masks = item.episode, objective.masks
    reasons = ["special" if flag and masks.special_tokens else "" for found in classes for flag in found.special]
    n = len(reasons)

    def hide(reason: str, start: int) -> None:
        reasons[start:] = [found or reason for found in reasons[start:]]

    if episode.stop_reason.truncated and masks.truncated == "mask_tail":
        hide("tail", n - hidden_tail(n))
    if masks.repetition == "mask":
        hide("repetition", n - looping_tail(episode.turns[-1].token_ids))
    if masks.suffix == "bic" and objective.needs_teacher and not item.anchor and not all(reasons):
        if item.evidence is None or item.evidence.candidate_logprobs is None:
            raise TeacherError(f"episode {episode.id!r}: no teacher log-probs of the student's candidates")
        margin = margins(item.evidence.candidate_logprobs[:, : masks.suffix_top_k])
        hide("suffix", fade_from(margin, _segments(classes), masks.suffix_min_keep))
    return reasons


def _alignment(item: ScoredEpisode, objective: Blocks, n: int) -> Array | None:
    """Segment of every sampled token (n,); each token its own for a teacher that shares the tokenizer."""
    if objective.alignment.kind == "same" or item.evidence is None:
        return None
    return np.arange(n) if item.evidence.segments is None else item.evidence.segments


def _segments(classes: Sequence[TokenClasses]) -> Array:
    """Segment number of every sampled token: its turn, or its sentence where there is one turn only."""
    if len(classes) == 1 and classes[0].ends_segment:
        ends = np.array(classes[0].ends_segment, dtype=np.int64)
        return np.cumsum(ends) - ends
    return np.repeat(np.arange(len(classes)), [len(found.special) for found in classes])


def verdict_signs(item: ScoredEpisode, objective: Blocks) -> Array:
    """The verdict's sign per sampled token; a step's certificate overrides the episode's where the router uses it."""
    verdict, turns = item.verdict, item.episode.turns
    if verdict.outcome is None:
        return np.zeros(item.episode.num_sampled)
    sigma = [[2 * verdict.outcome - 1] * len(turn.token_ids) for turn in turns]
    if objective.uses_certificates:
        for certificate in verdict.certificates:
            steps = sigma[certificate.turn]
            end = len(steps) if certificate.end is None else min(certificate.end, len(steps))
            steps[certificate.start : end] = [float(certificate.sign)] * max(0, end - certificate.start)
    return np.array([value for steps in sigma for value in steps])


def _views(item: ScoredEpisode, objective: Blocks, part: Array, anchored: bool) -> _Views:
    """Teacher and reference, checked where they supervise and neutral elsewhere."""
    evidence, n = item.evidence, len(part)
    zeros, no_ids, no_hidden = np.zeros(n), np.zeros((n, 0), np.int64), np.zeros((n, 0), np.float32)
    if evidence is None or (item.anchor and not anchored):
        return _Views(zeros, zeros, zeros, no_ids, no_hidden, no_hidden, zeros)
    who = f"teacher {evidence.teacher!r} on episode {item.episode.id!r}"
    teacher = _finite(evidence.teacher_logprobs, part, who) if part.any() else zeros
    ids, topk, shared = no_ids, no_hidden, zeros
    if objective.top_k:
        ids, topk = _topk_streams((evidence.topk_ids, evidence.topk_logprobs), part | anchored, who)
    if objective.student_top_k and part.any():
        chosen = _topk_streams((evidence.candidate_ids, evidence.candidate_logprobs), part, who)
        if objective.top_k:
            shared = overlap(torch.from_numpy(chosen[0]), torch.from_numpy(ids)).numpy()
        if isinstance(objective.divergence, CandidatesPG):
            k = objective.divergence.top_k  # masks and anchors may have asked for more
            theirs, own = (ids[:, :k], topk[:, :k]), (chosen[0][:, :k], chosen[1][:, :k])
            ids, topk = candidate_table(theirs, own, objective.divergence.support)
    hidden = no_hidden
    if objective.needs_full_vocabulary and part.any():
        if evidence.hidden is None or len(evidence.hidden) != n:
            raise TeacherError(f"{who}: whole distributions are compared, and it gave no hidden states for {n} tokens")
        hidden = evidence.hidden
    rest = zeros if evidence.rest_logprobs is None else _finite(evidence.rest_logprobs, part, who)
    return _Views(teacher, _reference(evidence, objective, n, item), shared, ids, topk, hidden, rest)


def _reference(evidence: Evidence, objective: Blocks, n: int, item: ScoredEpisode) -> Array:
    if not objective.needs_reference or item.anchor:
        return np.zeros(n)
    if evidence.ref_logprobs is None:
        raise TeacherError(
            f"teacher {evidence.teacher!r} on episode {item.episode.id!r}: no reference log-probs, but "
            "objective.reference.kl_coef or an extrapolation is on"
        )
    return _finite(evidence.ref_logprobs, np.ones(n, dtype=bool), f"reference policy on episode {item.episode.id!r}")


def _finite(logprobs: Array, part: Array, who: str) -> Array:
    """The log-probs with 0 where they do not supervise; raises where one that does is not finite."""
    if logprobs.shape != part.shape:
        raise TeacherError(f"{who}: log-probs of shape {logprobs.shape} for {len(part)} sampled tokens")
    bad = np.flatnonzero(part & ~np.isfinite(logprobs))
    if len(bad):
        raise TeacherError(f"{who}: log-prob {logprobs[bad[0]]} at sampled token {bad[0]} of {len(part)}")
    return np.where(part, logprobs, 0.0)


def _topk_streams(given: tuple[Array | None, Array | None], part: Array, who: str) -> tuple[Array, Array]:
    """Top-K (or candidate) ids and log-probs; -inf marks unused slots, and every slot of unsupervised tokens."""
    ids, logprobs = given
    if ids is None or logprobs is None or ids.shape != logprobs.shape or ids.shape[0] != len(part):
        raise TeacherError(f"{who}: top-K evidence is missing or does not fit {len(part)} sampled tokens")
    kept = np.where(part[:, None], logprobs, -np.inf)
    used = np.isfinite(kept)
    bad = np.flatnonzero((~used & (kept != -np.inf)).any(-1) | (part & ~used.any(-1)))
    if len(bad):
        raise TeacherError(f"{who}: unusable top-K log-probs at sampled token {bad[0]} of {len(part)}")
    return np.where(used, ids, 0), kept


def _stack(sources: Mapping[int, _Row], skills: tuple[str, ...], pad_id: int) -> tuple[Batch, Tensor]:
    """The batch with all scales 0, and the flags (C, N) of tokens taking part in each of the C components."""
    rows = list(sources.values())
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
    teachers = tuple(sorted({row.teacher for row in rows}))
    zeros_N = torch.zeros(len(row_N))
    batch = Batch(
        skills=skills,
        input_ids_BT=input_ids_BT,
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        truncated_B=torch.tensor([row.truncated for row in rows], dtype=torch.bool),
        source_B=torch.tensor(list(sources), dtype=torch.int64),
        row_N=row_N,
        target_N=input_ids_BT[row_N, stacked["position_N"]],
        teachers=teachers,
        teacher_N=torch.tensor([teachers.index(row.teacher) for row in rows], dtype=torch.int64)[row_N],
        teacher_topk_ids_NK=_slots([row.views.topk_ids for row in rows], 0, np.int64),
        teacher_topk_logprobs_NK=_slots([row.views.topk_logprobs for row in rows], -np.inf, np.float32),
        teacher_hidden_NG=_slots([row.views.hidden for row in rows], 0, np.float32),
        teacher_scale_N=zeros_N,
        verifier_scale_N=zeros_N,
        anchor_scale_N=zeros_N,
        reference_scale_N=zeros_N,
        **stacked,
    )
    return batch, parts_CN


def _slots(tables: Sequence[Array], unused: float, dtype: type[np.generic]) -> Tensor:
    """Tables of (n, k) stacked to (N, widest k); teachers may differ in K."""
    width = max((table.shape[1] for table in tables), default=0)
    padded = [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=unused) for x in tables]
    return torch.from_numpy(np.concatenate([np.zeros((0, width)), *padded]).astype(dtype))


def _prompt_counts(scored: Sequence[ScoredEpisode], rows: Mapping[int, _Row], skills: tuple[str, ...]) -> Tensor:
    """Prompts of each skill that the anchor answers, and all that were judged (2, S)."""
    students = [x.episode for x in scored if not x.anchor and x.verdict.outcome is not None]
    tried = {(episode.group_id, episode.task_hash): episode.skill for episode in students}
    anchored = [scored[index].episode.skill for index in rows if scored[index].anchor]
    counts = [[found.count(name) for name in skills] for found in (anchored, list(tried.values()))]
    return torch.tensor(counts, dtype=torch.float64)
