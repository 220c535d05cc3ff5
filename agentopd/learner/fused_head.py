"""The output head and the objective in one: the gradient is taken in the forward pass, one chunk of logits at a time.

The loss is a sum over rows, so it can be closed for a group of rows as soon as their streams are known: log-probs at
the ids that the objective reads and, where it compares whole distributions, the divergence. Its slope g on those makes
the gradient on the logits,

    dL/dz_v = sum_i g_i [v = id_i] - (sum_i g_i) p_v  +  g_D (k'_v - q_v sum_w k'_w),

with k' the slope of the divergence's kernel and q the student within the ids that are compared. It is written over
the logits, and two matrix products later the chunk is gone. A group that does not fit a chunk (one long row) computes
its logits twice. Softmax arithmetic is in fp32 (``passes``), and the head's gradient is summed in fp32. Works on any
device; source of the idea: Liger kernel (arXiv 2410.10989).

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
from agentopd.config.objective_data import GOLD
from agentopd.errors import ConfigError
from agentopd.learner import passes, products
from agentopd.learner.comparison import Comparison, Merged, Nowhere, Pointwise, softmax
from agentopd.learner.head import Head, LogSoftmax, chunk_size, head_logprobs
from agentopd.learner.passes import Part, fine
from agentopd.objective.divergences import kernel, with_slope
from agentopd.objective.gold import gold_divergence, rest_logprobs
from agentopd.objective.streams import Batch


class HeadStreams(NamedTuple):
    """What an objective reads of the head: log-probs at the target (N,) and at the top-K ids (N, K), and where it asks
    for them the divergence to the teacher over whole distributions (N,) and the entropy (N,).
    """

    logprobs_N: Tensor
    topk_logprobs_NK: Tensor
    divergence_N: Tensor | None = None
    entropy_N: Tensor | None = None


class _Found(NamedTuple):
    """The streams, and how the divergence changes with the log-probs of what follows in the token's segment (N,)."""

    streams: HeadStreams
    rest_slope_N: Tensor | None


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
        self._rest_N2: Tensor | None = None

    @torch.no_grad()
    def streams(self, hidden_NH: Tensor) -> HeadStreams:
        """The streams alone, without gradient."""
        self._rest_N2 = self._rests(hidden_NH)
        return _joined([self._found(hidden_NH, start, stop).streams for start, stop in self._groups()])

    def loss(self, hidden_NH: Tensor, loss_of: LossOf) -> Tensor:
        """The sum of ``loss_of`` over groups of rows (scalar), with gradient to the hidden states and the head.

        Raises ``ConfigError`` if a teacher's head is missing.
        """
        total: Tensor = _Fused.apply(hidden_NH, self.head.weight, self.head.bias, self, loss_of)  # type: ignore[no-untyped-call]
        return total

    def add_gradients(self, hidden_NH: Tensor, loss_of: LossOf, into: _Gradients) -> Tensor:
        """The loss (scalar); its gradients are written into ``into``."""
        self._rest_N2, losses = self._rests(hidden_NH), []
        for start, stop in self._groups():
            fits = stop - start <= self.chunk
            losses.append((self._once if fits else self._twice)(hidden_NH, start, stop, loss_of, into))
        return torch.stack(losses).sum()

    def _once(self, hidden_NH: Tensor, start: int, stop: int, loss_of: LossOf, into: _Gradients) -> Tensor:
        """The loss of a group that fits a chunk."""
        chunk = self._at(hidden_NH, start, stop)
        loss, slopes = self._slopes(start, stop, chunk.found(self._objective.needs_entropy), loss_of)
        into.add(start, hidden_NH[start:stop], chunk.into_gradient(slopes))
        return loss

    def _twice(self, hidden_NH: Tensor, start: int, stop: int, loss_of: LossOf, into: _Gradients) -> Tensor:
        """The loss of a group that does not: its streams first, and the logits again for the gradient."""
        loss, slopes = self._slopes(start, stop, self._found(hidden_NH, start, stop), loss_of)
        for a, b in _cuts(start, stop, self.chunk):
            cut = [None if slope is None else slope[a - start : b - start] for slope in slopes]
            into.add(a, hidden_NH[a:b], self._at(hidden_NH, a, b).into_gradient(cut))
        return loss

    def _slopes(self, start: int, stop: int, found: _Found, loss_of: LossOf) -> tuple[Tensor, list[Tensor | None]]:
        """The loss of a group, and its slopes on log-probs, top-K log-probs and (where there is one) divergence."""
        streams = found.streams
        leaves = [x.requires_grad_() for x in streams[:3] if x is not None]
        with torch.enable_grad():
            if found.rest_slope_N is not None and streams.divergence_N is not None:
                segments = self._batch.row_N[start:stop], self._batch.segment_N[start:stop]
                rest_N = rest_logprobs(streams.logprobs_N, *segments)
                moved_N = found.rest_slope_N * (rest_N - rest_N.detach())
                streams = streams._replace(divergence_N=streams.divergence_N + moved_N)
            loss = loss_of(start, stop, streams)
            slopes = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return loss.detach(), [*slopes, *[None] * (3 - len(leaves))]

    def _found(self, hidden_NH: Tensor, start: int, stop: int) -> _Found:
        chunks = (self._at(hidden_NH, a, b) for a, b in _cuts(start, stop, self.chunk))
        found = [chunk.found(self._objective.needs_entropy) for chunk in chunks]
        return _Found(_joined([x.streams for x in found]), _concatenated([x.rest_slope_N for x in found]))

    def _at(self, hidden_NH: Tensor, start: int, stop: int) -> _Chunk:
        student = LogSoftmax(self.head.logits(hidden_NH[start:stop]))
        comparison = self._comparison(student, start, stop) if self._objective.needs_full_vocabulary else None
        return _Chunk(student, self._ids_NI[start:stop], comparison)

    def _comparison(self, student: LogSoftmax, start: int, stop: int) -> Comparison:
        batch, divergence, alignment = self._batch, self._objective.divergence, self._objective.alignment
        assert not isinstance(divergence, NoDivergence)
        part_c = batch.supervised_N[start:stop]
        if not part_c.any():  # a rank without episodes knows no teacher, nor does a row beside the student's
            return Nowhere(student, merged=isinstance(alignment, GOLD))
        name = batch.teachers[int(batch.teacher_N[start])]
        head = self._teacher_heads.get(name)
        if head is None:
            raise ConfigError(f"teacher {name!r} is not in this process: whole distributions cannot be compared")
        hidden_cG = batch.teacher_hidden_NG[start:stop, : head.weight.shape[1]].to(head.weight.dtype)
        other_cV = head.logits(hidden_cG)
        if not isinstance(alignment, GOLD):
            return Pointwise(student, other_cV, part_c, with_slope(divergence))
        assert self._rest_N2 is not None
        compare = kernel(divergence)

        def merged(ours: Tensor, theirs: Tensor) -> Tensor:
            return gold_divergence(ours, theirs, head.student_ids, compare, alignment.matched_weight)

        return Merged(student, LogSoftmax(other_cV), self._rest_N2[start:stop], part_c, merged)

    def _rests(self, hidden_NH: Tensor) -> Tensor | None:
        """Joint log-probs of what follows in the token's segment, the student's and the teacher's (N, 2), if read."""
        if not isinstance(self._objective.alignment, GOLD):
            return None
        batch = self._batch
        own_N, _ = head_logprobs(hidden_NH, self.head, batch.target_N, self._ids_NI[:, :0], self.chunk)
        return torch.stack([rest_logprobs(own_N, batch.row_N, batch.segment_N), batch.teacher_rest_N], dim=1)

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
        self.weight_VH = torch.empty_like(head.weight, dtype=fine(head.weight)) if needed[1] else None
        self.bias_V = torch.zeros_like(head.bias, dtype=fine(head.weight)) if head.bias is not None else None

    def add(self, start: int, hidden_cH: Tensor, slope_cV: Tensor) -> None:
        """The share of the positions from ``start``, given the loss's gradient on their logits."""
        products.into_hidden(slope_cV, self._weight, self.hidden_NH[start : start + len(hidden_cH)])
        if self.bias_V is not None:
            self.bias_V += slope_cV.sum(0, dtype=self.bias_V.dtype)
        if self.weight_VH is not None:
            products.add_to_weight(self.weight_VH, slope_cV, hidden_cH, first=start == 0)


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
        scaled = [None if x is None else products.scaled(x, slope, ctx.dtype) for x in rest]
        return products.scaled(hidden_NH, slope, hidden_NH.dtype), *scaled, None, None


class _Chunk(NamedTuple):
    """The student's logits at a few positions, the ids read there (c, I), and the comparison with the teacher."""

    student: LogSoftmax
    ids_cI: Tensor
    comparison: Comparison | None

    def found(self, entropy: bool) -> _Found:
        """What the objective reads here."""
        found_cI, entropy_c = self.student.at(self.ids_cI), self.student.entropy() if entropy else None
        if self.comparison is None:
            return _Found(HeadStreams(found_cI[:, 0], found_cI[:, 1:], None, entropy_c), None)
        streams = HeadStreams(found_cI[:, 0], found_cI[:, 1:], self.comparison.divergence_c, entropy_c)
        return _Found(streams, self.comparison.rest_slope_c)

    def into_gradient(self, slopes: Sequence[Tensor | None]) -> Tensor:
        """Overwrite the logits (c, V) with the loss's gradient on them, given its slopes on the first three streams."""
        target_c, topk_cK, divergence_c = slopes
        assert target_c is not None and topk_cK is not None
        slope_cI = torch.cat([target_c[:, None], topk_cK], dim=1)
        taken_c = -slope_cI.sum(-1)
        if self.comparison is None or divergence_c is None:
            parts: Sequence[Part] = [softmax(self.student, taken_c)]
        else:
            parts = self.comparison.gradient(taken_c, divergence_c)
        passes.overwrite(self.student.logits, parts, self.ids_cI, slope_cI)
        return self.student.logits


def _cuts(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for a in range(start, stop, size):
        yield a, min(a + size, stop)


def _joined(parts: Sequence[HeadStreams]) -> HeadStreams:
    return parts[0] if len(parts) == 1 else HeadStreams(*(_concatenated(column) for column in zip(*parts, strict=True)))


def _concatenated(column: Sequence[Tensor | None]) -> Any:
    return None if column[0] is None else torch.cat([x for x in column if x is not None])
