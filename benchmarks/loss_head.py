"""The fused output head and objective against plain autograd, bare matrix products, TRL and Liger.

All compute a loss and the gradients of hidden states and head, at random inputs: the reverse KL on the teacher's top-K
ids with a bin for the rest, and against Liger the Jensen-Shannon divergence over the vocabulary, for which both sides
also project the teacher. ``time_vs_*`` is ours over theirs, in CPU seconds of the same round; memory is the growth of a
fresh process's peak with every position more; ``gradient_error_vs_gemm`` compares errors against fp64 at a
size that allows it. Bare GEMMs are in the dtype asked for, which a CPU may emulate: the head then does better.

``python -m benchmarks.loss_head [--positions N] [--width H] [--vocabulary V] [--dtype bfloat16] [--rounds 3]``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from agentopd.config.load import resolve_objective
from agentopd.config.objective import ObjectiveConfig
from agentopd.learner.fused_head import FusedHead, HeadStreams
from agentopd.learner.head import MIN_CHUNK, Head
from agentopd.learner.passes import compiles
from agentopd.learner.products import emulated
from agentopd.memory import keep_freed_memory
from agentopd.objective.support import bucketed
from benchmarks.harness import in_turn, peak_kb, ratio, report

TOP_K, ROW = 64, 128
PEERS = {"trl": "trl", "liger": "liger-kernel"}
NAMES = {"naive": "naive", "gemm": "bare GEMMs", "trl": "TRL's chunked top-K", "liger": "Liger's chunked JSD"}
WHOLE = ObjectiveConfig.model_validate(
    {"divergence": {"kind": "jsd"}, "stabiliser": {"cap": None, "sequence_budget": None}}
)


class Case:
    """Inputs of one size, and every way to the loss and its gradients."""

    def __init__(self, positions: int, width: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> None:
        g = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(positions, width, generator=g).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, generator=g) / width**0.5).to(device, dtype).requires_grad_()
        self.teacher_hidden = torch.randn(positions, width, generator=g).to(device, dtype)
        self.teacher_weight = self.weight.detach().roll(1, 0)
        self.ids = torch.randint(vocabulary, (positions, TOP_K), generator=g).to(device)
        self.teacher = torch.randn(positions, 2 * TOP_K, generator=g).log_softmax(-1)[:, :TOP_K].to(device)
        self.target = self.ids[:, 0]

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Of the hidden states and the head."""
        hidden, weight = torch.autograd.grad(loss, [self.hidden, self.weight])
        return hidden, weight

    @torch.no_grad()
    def logits(self) -> Tensor:
        """All of the student's."""
        return linear(self.hidden, self.weight)

    def fused(self) -> tuple[Tensor, Tensor]:
        """Ours, on the top-K."""

        def loss_of(start: int, stop: int, found: HeadStreams) -> Tensor:
            return bucketed(found.topk_logprobs_NK, self.teacher[start:stop]).sum()

        return self.gradients(self._head(resolve_objective("topk_opd")).loss(self.hidden, loss_of))

    def fused_whole(self) -> tuple[Tensor, Tensor]:
        """Ours, on whole distributions."""

        def loss_of(start: int, stop: int, found: HeadStreams) -> Tensor:
            assert found.divergence_N is not None
            return found.divergence_N.sum()

        return self.gradients(self._head(WHOLE).loss(self.hidden, loss_of))

    def naive(self) -> tuple[Tensor, Tensor]:
        """All logits at once, fp32 log-softmax, autograd."""
        logits = linear(self.hidden, self.weight)
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return self.gradients(bucketed(logprobs.gather(1, self.ids), self.teacher).sum())

    @torch.no_grad()
    def gemm(self) -> None:
        """The three matrix products that no exact head can do without."""
        for hidden in self.hidden.split(MIN_CHUNK):
            logits = linear(hidden, self.weight)
            logits @ self.weight
            logits.t() @ hidden

    def trl(self) -> tuple[Tensor, Tensor]:
        """TRL's chunks, recomputed in the backward pass."""
        from trl.experimental.async_distillation.async_distillation_trainer import _chunked_jsd_loss

        used = torch.ones_like(self.ids, dtype=torch.bool)
        loss, *_ = _chunked_jsd_loss(
            self.hidden, self.weight, None, 1.0, None, self.ids, self.teacher, used, 1.0, 1.0, True, None, 1, 256
        )
        return self.gradients(loss)

    def liger(self) -> tuple[Tensor, Tensor]:
        """Liger's chunks, with gradients in the forward pass."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
        mean = loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.target)
        return self.gradients(mean * len(self.hidden))

    def liger_triton(self) -> tuple[Tensor, Tensor]:
        """Liger's Triton kernel for the same divergence; on a GPU alone."""
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=0.5)
        mean = loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight)
        return self.gradients(mean * len(self.hidden))

    def _head(self, objective: ObjectiveConfig) -> FusedHead:
        positions, device = len(self.hidden), self.hidden.device
        batch: Any = SimpleNamespace(
            target_N=self.target, teacher_topk_ids_NK=self.ids, row_N=torch.arange(positions, device=device) // ROW,
            teacher_N=torch.zeros(positions, dtype=torch.int64, device=device), teachers=("teacher",),
            teacher_hidden_NG=self.teacher_hidden,
            supervised_N=torch.ones(positions, dtype=torch.bool, device=device),
        )  # fmt: skip
        return FusedHead(Head(self.weight, None), batch, objective, {"teacher": Head(self.teacher_weight, None)})


def gradient_error(positions: int) -> float:
    """Error of our bf16 head gradient against fp64, over that of one bf16 product of the exact fp64 factors."""
    case = Case(positions, 256, 4096, torch.bfloat16)
    exact = Case(positions, 256, 4096, torch.float64)
    exact.hidden, exact.weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    exact.teacher = case.teacher.double()
    logits = linear(exact.hidden, exact.weight).detach().requires_grad_()
    found = bucketed_loss(logits, exact.ids, exact.teacher)
    (slope,) = torch.autograd.grad(found, logits)
    expected = slope.t() @ exact.hidden.detach()
    one_product = slope.bfloat16().t() @ case.hidden.detach()
    ours = case.fused()[1]
    return float((ours.double() - expected).norm() / (one_product.double() - expected).norm())


def bucketed_loss(logits: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
    """The top-K loss of all logits at once, in their dtype."""
    logprobs = logits.log_softmax(-1).gather(1, ids)
    inside = (logprobs.exp() * (logprobs - teacher)).sum(-1)
    tail, other = (torch.log1p(-x.exp().sum(-1)) for x in (logprobs, teacher))
    return (inside + tail.exp() * (tail - other)).sum()


def once(way: str, positions: int, width: int, vocabulary: int, dtype: str) -> None:
    """One way to the gradients, once."""
    keep_freed_memory()
    getattr(Case(positions, width, vocabulary, getattr(torch, dtype)), way)()


def memory_slope(options: argparse.Namespace) -> float:
    """Growth of our peak with every position more, beyond one chunk, over the naive one's.

    Naive runs at a width of at most 64: its logits are as large, and are there sooner. Ours, hardly growing, is fitted
    over an eightfold range, and each peak is the lower of two, for they differ by some 90 MB at one size.
    """
    most, shape = max(options.positions, 2 * MIN_CHUNK), (options.vocabulary, options.dtype)

    def slope(way: str, width: int, sizes: Sequence[int]) -> float:
        peaks = [min(peak_kb(once, way, size, width, *shape) for _ in range(2)) for size in sizes]
        return float(np.polyfit(sizes, peaks, 1)[0])

    ours = slope("fused", options.width, [most // 2, most, 2 * most, 4 * most])
    return ours / slope("naive", min(options.width, 64), [most // 2, most])


def installed(package: str) -> bool:
    """Says which version of a peer runs, or that it is missing."""
    try:
        print(f"{package} {version(package)}")
    except PackageNotFoundError:
        print(f"{package} is not installed: skipped")
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    ways = ["naive", "gemm", *(way for way, package in PEERS.items() if installed(package))]
    used = ["fused", *ways, *(["fused_whole"] if "liger" in ways else [])]
    shape = options.width, options.vocabulary, getattr(torch, options.dtype)
    # Large enough for the passes over the vocabulary to be compiled now: once on a machine, loaded from disk later.
    small, case = Case(min(options.positions, 128), *shape), Case(options.positions, *shape)
    began = perf_counter()
    in_turn({way: getattr(small, way) for way in used}, 1)
    print(f"warmed up in {perf_counter() - began:.1f} s; passes are compiled: {compiles(small.logits())}")
    seconds = in_turn({way: getattr(case, way) for way in used}, options.rounds)
    faster = {
        way: ratio(f"fused head vs {NAMES[way]}", seconds["fused_whole" if way == "liger" else "fused"], seconds[way])
        for way in ways
    }
    print(f"products of {options.dtype} matrices are emulated: {emulated(case.weight)}")
    report(
        {f"speedup_vs_{way}": found for way, found in faster.items()},
        **{f"time_vs_{way}": round(1 / found.median, 3) for way, found in faster.items()},
        **{f"cpu_s_{way}": round(median(found), 2) for way, found in seconds.items()},
        memory_slope_vs_naive=round(memory_slope(options), 4),
        gradient_error_vs_gemm=round(gradient_error(4096), 3),
        **{key: getattr(options, key) for key in ("positions", "width", "vocabulary", "dtype", "rounds")},
        top_k=TOP_K,
    )


if __name__ == "__main__":
    main()
