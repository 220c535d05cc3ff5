"""Student and teacher compared over whole distributions, with the gradient on the student's logits.

c positions of a chunk, V ids of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from agentopd.learner.head import LogSoftmax
from agentopd.learner.products import vocabulary_blocks
from agentopd.objective.divergences import KernelWithSlope


class Comparison(Protocol):
    """A divergence at the positions flagged ``part``, and 0 elsewhere."""

    divergence_c: Tensor
    """In nats."""
    rest_slope_c: Tensor | None
    """How it changes with the log-probs of what follows in the token's segment; None where it does not."""

    def add_gradient(self, gradient: Tensor, block: slice, scale_c: Tensor) -> None:
        """Add its gradient on one block of the student's logits, times ``scale_c``, to ``gradient``."""
        ...


class Nowhere:
    """No position takes part: a divergence of 0. ``merged`` where other positions' changes with what follows."""

    def __init__(self, student: LogSoftmax, merged: bool) -> None:
        self.divergence_c = torch.zeros_like(student.log_total_c1[:, 0])
        self.rest_slope_c = torch.zeros_like(self.divergence_c) if merged else None

    def add_gradient(self, gradient: Tensor, block: slice, scale_c: Tensor) -> None:
        """Nothing."""


class Pointwise:
    """The divergence over the ids that both have, a sum over ids, block by block."""

    rest_slope_c: Tensor | None = None

    def __init__(self, logits_cV: Tensor, other_cV: Tensor, part_c: Tensor, kernel: KernelWithSlope) -> None:
        width = min(logits_cV.shape[1], other_cV.shape[1])
        self._student, self._teacher = LogSoftmax(logits_cV[:, :width]), LogSoftmax(other_cV[:, :width])
        self._part_c, self._kernel, self._width = part_c, kernel, width
        self.divergence_c = self._slope_c = torch.zeros_like(self._student.log_total_c1[:, 0])
        for block in vocabulary_blocks(self._student.logits):
            value, slope = self._shares(block)
            self.divergence_c = self.divergence_c + torch.where(part_c, value.sum(-1), 0.0)
            self._slope_c = self._slope_c + slope.sum(-1)

    def add_gradient(self, gradient: Tensor, block: slice, scale_c: Tensor) -> None:
        """As ``Comparison`` says."""
        shared = slice(block.start, min(block.stop, self._width))
        if shared.start < shared.stop:
            _, slope = self._shares(shared)
            slope -= self._student.block(shared).exp_().mul_(self._slope_c[:, None])
            gradient[:, : slope.shape[1]] += slope * torch.where(self._part_c, scale_c, 0.0)[:, None]

    def _shares(self, block: slice) -> tuple[Tensor, Tensor]:
        """Each id's share of the divergence, and its derivative by the student's log-prob."""
        return self._kernel(self._student.block(block), self._teacher.block(block))


class Merged:
    """The divergence of distributions that are merged over segments (``objective.gold``).

    It sorts masses, so it is not taken in blocks; ``rest_c2`` are the log-probs that both sides are multiplied by.
    """

    def __init__(
        self,
        student: LogSoftmax,
        teacher: LogSoftmax,
        rest_c2: Tensor,
        part_c: Tensor,
        divergence: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        everything = slice(None)
        ours = (student.block(everything) + rest_c2[:, :1]).requires_grad_()
        with torch.enable_grad():
            value_c = divergence(ours, teacher.block(everything) + rest_c2[:, 1:])
            (self._slope_cV,) = torch.autograd.grad(value_c.sum(), ours)
        self._student = student
        self._slope_cV *= part_c[:, None]
        self.divergence_c = torch.where(part_c, value_c.detach(), 0.0)
        self._total_c = self._slope_cV.sum(-1)
        self.rest_slope_c: Tensor | None = self._total_c

    def add_gradient(self, gradient: Tensor, block: slice, scale_c: Tensor) -> None:
        """As ``Comparison`` says."""
        shared = self._student.block(block).exp_().mul_(self._total_c[:, None])
        gradient += (self._slope_cV[:, block] - shared) * scale_c[:, None]
