"""The output head and the objective in one: the gradient is taken in the forward pass, one chunk of logits at a time.

The loss is a sum over rows, so it can be closed for a group of rows as soon as their streams are known: log-probs at
the ids that the objective reads and, where it compares whole distributions, the divergence. Its slope g on those makes
the gradient on the logits,

    dL/dz_v = sum_i g_i [v = id_i] - (sum_i g_i) p_v  +  g_D (k'_v - q_v sum_w k'_w),

with k' the slope of the divergence's kernel and q the student within the ids that both sides have. It is written over
the logits, and two matrix products later the chunk is gone. A group that does not fit a chunk (one long row) computes
its logits twice. Softmax arithmetic is in fp32 over blocks of the vocabulary that stay in a CPU's cache, and the head's
gradient is summed in fp32. Works on any device; source of the idea: Liger kernel (arXiv 2410.10989).

N positions, c positions of a chunk, H and G hidden widths of student and teacher, I ids read at each position, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agentopd.config.objective import Blocks
from agentopd.config.objective_blocks import NoDivergence
from agentopd.errors import ConfigError
from agentopd.learner.head import Head, LogSoftmax, chunk_size, fine, vocabulary_blocks
from agentopd.objective.divergences import Kernel, kernel
from agentopd.objective.streams import Batch


class HeadStreams(NamedTuple):
    """What an objective reads of the head: log-probs at the target (N,) and at the top-K ids (N, K), and where it asks
    for them the divergence to the teacher over whole distributions (N,) and the entropy (N,).
    """

    logprobs_N: Tensor
    topk_logprobs_NK: Tensor
    divergence_N: Tensor | None = None
    entropy_N: Tensor | None = None


LossOf = Callable[[int, int, HeadStreams], Tensor]
"""The loss (scalar) of the positions from start to stop, which are whole rows, given their streams."""


class FusedHead:
    """The head of one micro-batch; ``teacher_heads`` are those of local teachers, by name.

    ``chunk`` is the number of positions whose logits are held at once.
    """

    def __init__(
        self,
        head: Head,
        batch: Batch,
        objective: Blocks,
        teacher_heads: Mapping[str, Head],
        chunk: int | None = None,
    ) -> None:
        self.head = head
        self.chunk = chunk or chunk_size(head)
        self._batch, self._objective, self._teacher_heads = batch, objective, teacher_heads
        self._ids_NI = torch.cat([batch.target_N[:, None], batch.teacher_topk_ids_NK], dim=1)

    @torch.no_grad()
    def streams(self, hidden_NH: Tensor) -> HeadStreams:
        """The streams alone, without gradient."""
        return _joined([self._streams(hidden_NH, start, stop) for start, stop in self._groups()])

    def loss(self, hidden_NH: Tensor, loss_of: LossOf) -> Tensor:
        """The sum of ``loss_of`` over groups of rows (scalar), with gradient to the hidden states and the head.

        Raises ``ConfigError`` if a teacher's head is missing.
        """
        total: Tensor = _Fused.apply(hidden_NH, self.head.weight, self.head.bias, self, loss_of)  # type: ignore[no-untyped-call]
        return total

    def add_gradients(self, hidden_NH: Tensor, loss_of: LossOf, into: _Gradients) -> Tensor:
        """The loss (scalar); its gradients are written into ``into``."""
        losses = []
        for start, stop in self._groups():
            fits = stop - start <= self.chunk
            losses.append((self._once if fits else self._twice)(hidden_NH, start, stop, loss_of, into))
        return torch.stack(losses).sum()

    def _once(self, hidden_NH: Tensor, start: int, stop: int, loss_of: LossOf, into: _Gradients) -> Tensor:
        """The loss of a group that fits a chunk."""
        chunk = self._at(hidden_NH, start, stop)
        loss, slopes = _slopes(start, stop, chunk.streams(self._objective.needs_entropy), loss_of)
        into.add(start, hidden_NH[start:stop], chunk.into_gradient(slopes))
        return loss

    def _twice(self, hidden_NH: Tensor, start: int, stop: int, loss_of: LossOf, into: _Gradients) -> Tensor:
        """The loss of a group that does not: its streams first, and the logits again for the gradient."""
        loss, slopes = _slopes(start, stop, self._streams(hidden_NH, start, stop), loss_of)
        for a, b in _cuts(start, stop, self.chunk):
            cut = [None if slope is None else slope[a - start : b - start] for slope in slopes]
            into.add(a, hidden_NH[a:b], self._at(hidden_NH, a, b).into_gradient(cut))
        return loss

    def _streams(self, hidden_NH: Tensor, start: int, stop: int) -> HeadStreams:
        entropy = self._objective.needs_entropy
        return _joined([self._at(hidden_NH, a, b).streams(entropy) for a, b in _cuts(start, stop, self.chunk)])

    def _at(self, hidden_NH: Tensor, start: int, stop: int) -> _Chunk:
        other = None
        if self._objective.needs_full_vocabulary:
            other = self._teacher_logits(start, stop)
        student = LogSoftmax(self.head.logits(hidden_NH[start:stop]))
        return _Chunk(student, self._ids_NI[start:stop], other and _Comparison(student.logits, *other))

    def _teacher_logits(self, start: int, stop: int) -> tuple[Tensor, Tensor, Kernel]:
        """The teacher's logits (c, V), the flags of positions to compare (c,), and how."""
        batch, divergence = self._batch, self._objective.divergence
        assert not isinstance(divergence, NoDivergence)
        name = batch.teachers[int(batch.teacher_N[start])]
        head = self._teacher_heads.get(name)
        if head is None:
            raise ConfigError(f"teacher {name!r} is not in this process: whole distributions cannot be compared")
        hidden_cG = batch.teacher_hidden_NG[start:stop, : head.weight.shape[1]].to(head.weight.dtype)
        return head.logits(hidden_cG), batch.supervised_N[start:stop], kernel(divergence)

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Positions of whole rows: as many as fit a chunk, of one teacher where distributions are compared."""
        teacher_N, alike = self._batch.teacher_N, not self._objective.needs_full_vocabulary
        _, counts = torch.unique_consecutive(self._batch.row_N, return_counts=True)
        start = stop = 0
        for end in counts.cumsum(0).tolist():
            together = end - start <= self.chunk and (alike or bool(teacher_N[start] == teacher_N[stop]))
            if stop > start and not together:
                yield start, stop
                start = stop
            stop = end
        yield start, stop


class _Gradients:
    """Gradients of the hidden states and, where they train, of the head's weight and bias."""

    def __init__(self, hidden_NH: Tensor, head: Head, needed: Sequence[bool]) -> None:
        self._weight = head.weight
        self.hidden_NH = torch.empty_like(hidden_NH)
        self.weight_VH = torch.zeros_like(head.weight, dtype=fine(head.weight)) if needed[1] else None
        self.bias_V = torch.zeros_like(head.bias, dtype=fine(head.weight)) if head.bias is not None else None

    def add(self, start: int, hidden_cH: Tensor, slope_cV: Tensor) -> None:
        """The share of the positions from ``start``, given the loss's gradient on their logits."""
        torch.mm(slope_cV, self._weight, out=self.hidden_NH[start : start + len(hidden_cH)])
        if self.bias_V is not None:
            self.bias_V += slope_cV.sum(0, dtype=self.bias_V.dtype)
        if self.weight_VH is None:
            return
        for block in vocabulary_blocks(slope_cV):
            if self.weight_VH.dtype == hidden_cH.dtype:
                self.weight_VH[block].addmm_(slope_cV[:, block].t(), hidden_cH)
            else:
                self.weight_VH[block] += slope_cV[:, block].t() @ hidden_cH


class _Fused(torch.autograd.Function):
    """Gradients wait in the context until the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, fused: FusedHead, loss_of: LossOf
    ) -> Tensor:
        gradients = _Gradients(hidden_NH, fused.head, ctx.needs_input_grad)
        loss = fused.add_gradients(hidden_NH, loss_of, gradients)
        ctx.save_for_backward(gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, *rest = ctx.saved_tensors
        scaled = [None if x is None else (x * slope).to(ctx.dtype) for x in rest]
        return (hidden_NH * slope).to(hidden_NH.dtype), *scaled, None, None


class _Chunk(NamedTuple):
    """The student's logits at a few positions, the ids read there (c, I), and the comparison with the teacher."""

    student: LogSoftmax
    ids_cI: Tensor
    comparison: _Comparison | None

    def streams(self, entropy: bool) -> HeadStreams:
        """What the objective reads here."""
        found_cI = self.student.at(self.ids_cI)
        return HeadStreams(
            found_cI[:, 0],
            found_cI[:, 1:],
            None if self.comparison is None else self.comparison.divergence_c,
            self.student.entropy() if entropy else None,
        )

    def into_gradient(self, slopes: Sequence[Tensor | None]) -> Tensor:
        """Overwrite the logits (c, V) with the loss's gradient on them, given its slopes on the first three streams."""
        target_c, topk_cK, divergence_c = slopes
        assert target_c is not None and topk_cK is not None
        slope_cI = torch.cat([target_c[:, None], topk_cK], dim=1)
        logits_cV, taken_c1 = self.student.logits, -slope_cI.sum(-1, keepdim=True)
        for block in vocabulary_blocks(logits_cV):
            gradient = self.student.block(block).exp_().mul_(taken_c1)
            # before the cast: where p is near 1 the two parts nearly cancel
            inside_cI = (self.ids_cI >= block.start) & (self.ids_cI < block.stop)
            local_cI = torch.where(inside_cI, self.ids_cI - block.start, 0)
            gradient.scatter_add_(1, local_cI, torch.where(inside_cI, slope_cI, 0.0))
            if self.comparison is not None and divergence_c is not None:
                self.comparison.add_gradient(gradient, block, divergence_c)
            logits_cV[:, block] = gradient
        return logits_cV


class _Comparison:
    """The divergence of student and teacher over the ids both have, at positions flagged ``part`` (elsewhere 0)."""

    def __init__(self, logits_cV: Tensor, other_cV: Tensor, part_c: Tensor, kernel: Kernel) -> None:
        width = min(logits_cV.shape[1], other_cV.shape[1])
        self._student, self._teacher = LogSoftmax(logits_cV[:, :width]), LogSoftmax(other_cV[:, :width])
        self._part_c, self._kernel, self._width = part_c, kernel, width
        self.divergence_c = self._slope_c = torch.zeros_like(self._student.log_total_c1[:, 0])
        for block in vocabulary_blocks(self._student.logits):
            value, slope = self._value_and_slope(block)
            self.divergence_c = self.divergence_c + torch.where(part_c, value.sum(-1), 0.0)
            self._slope_c = self._slope_c + slope.sum(-1)

    def add_gradient(self, gradient: Tensor, block: slice, scale_c: Tensor) -> None:
        """Add the divergence's gradient on one block of the student's logits, times ``scale_c``."""
        shared = slice(block.start, min(block.stop, self._width))
        if shared.start < shared.stop:
            _, slope = self._value_and_slope(shared)
            slope -= self._student.block(shared).exp_().mul_(self._slope_c[:, None])
            gradient[:, : slope.shape[1]] += slope * torch.where(self._part_c, scale_c, 0.0)[:, None]

    def _value_and_slope(self, block: slice) -> tuple[Tensor, Tensor]:
        """Each id's share of the divergence, and its derivative by the student's log-prob."""
        log_p, log_q = self._student.block(block).requires_grad_(), self._teacher.block(block)
        with torch.enable_grad():
            value = self._kernel(log_p, log_q)
            (slope,) = torch.autograd.grad(value.sum(), log_p)
        return value.detach(), slope


def _slopes(start: int, stop: int, found: HeadStreams, loss_of: LossOf) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of a group of rows, and its slopes on log-probs, top-K log-probs and (where there is one) divergence."""
    leaves = [x.requires_grad_() for x in found[:3] if x is not None]
    with torch.enable_grad():
        loss = loss_of(start, stop, found)
        slopes = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return loss.detach(), [*slopes, *[None] * (3 - len(leaves))]


def _cuts(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for a in range(start, stop, size):
        yield a, min(a + size, stop)


def _joined(parts: Sequence[HeadStreams]) -> HeadStreams:
    return parts[0] if len(parts) == 1 else HeadStreams(*(_concatenated(column) for column in zip(*parts, strict=True)))


def _concatenated(column: Sequence[Tensor | None]) -> Any:
    return None if column[0] is None else torch.cat([x for x in column if x is not None])
