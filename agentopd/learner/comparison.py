"""Student and teacher compared over whole distributions, with the gradient on the student's logits.

c positions of a chunk, V ids of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from agentopd.learner import passes
from agentopd.learner.head import LogSoftmax
from agentopd.learner.passes import Elements, Part
from agentopd.objective.divergences import KernelWithSlope


class Comparison(Protocol):
    """A divergence at the positions flagged ``part``, and 0 elsewhere."""

    divergence_c: Tensor
    """In nats."""
    rest_slope_c: Tensor | None
    """How it changes with the log-probs of what follows in the token's segment; None where it does not."""

    def gradient(self, taken_c: Tensor, scale_c: Tensor) -> Sequence[Part]:
        """The student's softmax times ``taken_c``, plus the divergence's gradient on its logits times ``scale_c``."""
        ...


class Nowhere:
    """No position takes part: a divergence of 0. ``merged`` where other positions' changes with what follows."""

    def __init__(self, student: LogSoftmax, merged: bool) -> None:
        self._student = student
        self.divergence_c = torch.zeros_like(student.log_total_c1[:, 0])
        self.rest_slope_c = torch.zeros_like(self.divergence_c) if merged else None

    def gradient(self, taken_c: Tensor, scale_c: Tensor) -> Sequence[Part]:
        """As ``Comparison`` says."""
        return [softmax(self._student, taken_c)]


class Pointwise:
    """The divergence over the ids that both have, a sum over ids."""

    rest_slope_c: Tensor | None = None

    def __init__(self, student: LogSoftmax, other_cV: Tensor, part_c: Tensor, kernel: KernelWithSlope) -> None:
        width = min(student.logits.shape[1], other_cV.shape[1])
        alike = width == student.logits.shape[1]
        self._student, self._part_c, self._kernel, self._width = student, part_c, kernel, width
        self._cut = student if alike else LogSoftmax(student.logits[:, :width])
        self._teacher = LogSoftmax(other_cV[:, :width])
        value_c, self._slope_c = passes.summed(self._part(_shares(kernel)))
        self.divergence_c = torch.where(part_c, value_c, 0.0)

    def gradient(self, taken_c: Tensor, scale_c: Tensor) -> Sequence[Part]:
        """As ``Comparison`` says."""
        scale_c = torch.where(self._part_c, scale_c, 0.0)
        # Where ids are left out of the comparison, what it makes of the others' softmax is larger than their own.
        larger_c = (self._student.log_total_c1 - self._cut.log_total_c1)[:, 0].exp()
        shared = self._part(_slope(self._kernel), taken_c / larger_c - self._slope_c * scale_c, scale_c)
        if self._cut is self._student:
            return [shared]
        return [shared, softmax(self._student, taken_c, self._width)]

    def _part(self, elements: Elements, *columns_c: Tensor) -> Part:
        columns = [x[:, None] for x in columns_c]
        totals = self._cut.log_total_c1, self._teacher.log_total_c1
        return Part(elements, (self._cut.logits, self._teacher.logits), (*totals, *columns))


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
        ours = (student.everywhere() + rest_c2[:, :1]).requires_grad_()
        with torch.enable_grad():
            value_c = divergence(ours, teacher.everywhere() + rest_c2[:, 1:])
            (self._slope_cV,) = torch.autograd.grad(value_c.sum(), ours)
        self._student = student
        self._slope_cV *= part_c[:, None]
        self.divergence_c = torch.where(part_c, value_c.detach(), 0.0)
        self._total_c = self._slope_cV.sum(-1)
        self.rest_slope_c: Tensor | None = self._total_c

    def gradient(self, taken_c: Tensor, scale_c: Tensor) -> Sequence[Part]:
        """As ``Comparison`` says."""
        columns = self._student.log_total_c1, (taken_c - self._total_c * scale_c)[:, None], scale_c[:, None]
        return [Part(_softmax_and_slope, (self._student.logits, self._slope_cV), columns)]


def softmax(student: LogSoftmax, taken_c: Tensor, start: int = 0) -> Part:
    """The student's softmax times ``taken_c``, at the ids from ``start`` on."""
    return Part(_softmax, (student.logits[:, start:],), (student.log_total_c1, taken_c[:, None]))


def _softmax(logits: Tensor, log_total_c1: Tensor, taken_c1: Tensor) -> Tensor:
    return (logits - log_total_c1).exp_().mul_(taken_c1)


def _softmax_and_slope(
    logits: Tensor, slope: Tensor, log_total_c1: Tensor, taken_c1: Tensor, scale_c1: Tensor
) -> Tensor:
    return (logits - log_total_c1).exp_().mul_(taken_c1).addcmul_(slope, scale_c1)


@cache
def _shares(kernel: KernelWithSlope) -> Elements:
    """Each id's share of the divergence, and its derivative by the student's log-prob."""

    def shares(logits: Tensor, other: Tensor, log_total_c1: Tensor, other_total_c1: Tensor) -> tuple[Tensor, Tensor]:
        return kernel(logits - log_total_c1, other - other_total_c1)

    return shares


@cache
def _slope(kernel: KernelWithSlope) -> Elements:
    """The softmax and that derivative, each times a column."""

    def slope(
        logits: Tensor, other: Tensor, log_total_c1: Tensor, other_total_c1: Tensor, taken_c1: Tensor, scale_c1: Tensor
    ) -> Tensor:
        logprobs = logits - log_total_c1
        taken = logprobs.exp().mul_(taken_c1)
        _, found = kernel(logprobs, other - other_total_c1)
        return taken.addcmul_(found, scale_c1)

    return slope
