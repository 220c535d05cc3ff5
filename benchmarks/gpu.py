"""The suite for one GPU: output head and whole step at real widths, as shares of what its matrix products reach.

``ceiling_tflops`` is the best of a few square products of the dtype, measured here. The head runs at widths of 2048 and
4096 over 151,936 ids, against the naive loss, its bare products, TRL's chunks and Liger's, in chunks and in Triton; a
share is the head's 6 T H V operations in its time over the ceiling. The step is a random Qwen3 of 0.6B with a teacher
of its shape: sampling by the in-process engine, the teacher's forward pass, and the learner, whose share counts 6
operations a weight and token: of the body for every token, of the head for the sampled ones. Memory is the peak that
torch allocated. A peer that fails is named, and the rest goes on.

``python -m benchmarks.gpu [--rounds 5] [--positions 8192] [--student 0.6B]``; without a GPU it exits with 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from agentopd.attention import ATTENTION
from agentopd.capacity import QWEN3, Shape
from agentopd.contracts import SamplingParams
from agentopd.objective.masks import TokenClasses
from benchmarks.e2e_step import Ours, Speech
from benchmarks.loss_head import PEERS, Case, installed

WIDTHS, VOCABULARY = (2048, 4096), 151_936
STOP = 1
"""The id that ends a random model's answer; it is as likely as any other, so answers run to their limit."""


@dataclass(frozen=True)
class StepSize:
    """One step of a random model."""

    prompts: int = 64
    prompt: int = 512
    new: int = 256
    steps: int = 3


def synchronised(device: str) -> float:
    """Wall-clock seconds once everything that was asked of the device is done; CPU seconds on a CPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one run."""
    started = synchronised(device)
    work()
    return synchronised(device) - started


def seconds(work: Callable[[], object], device: str, rounds: int) -> float:
    """Median of a few runs after one that does not count."""
    work()
    return median(timed(work, device) for _ in range(rounds))


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """The most that torch had allocated on the GPU; 0 on a CPU."""
    if device == "cpu":
        work()
        return 0
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def ceiling(device: str, dtype: torch.dtype, sizes: Sequence[int], rounds: int) -> float:
    """Operations a second of the fastest of some square products."""
    rates = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / seconds(lambda a=a, b=b: a @ b, device, rounds))  # type: ignore[misc]
    return max(rates)


def head(case: Case, ways: Sequence[str], most: float, rounds: int) -> dict[str, Any]:
    """Times against ours with their spread, all in turn, shares of the ceiling, and peaks.

    A peer that fails, for want of memory or otherwise, is named in ``failed`` and takes none of the others along.
    """
    device = case.hidden.device.type
    positions, width = case.hidden.shape
    peaks, failed = {}, {}
    for way in ("fused", "fused_whole", *ways):
        try:
            getattr(case, way)()  # a peer may compile
            peaks[way] = peak_bytes(getattr(case, way), device)
        except Exception as error:
            if way not in ways:
                raise
            failed[way] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    taken = {way: list[float]() for way in peaks}
    for _ in range(rounds):
        for way, found in taken.items():
            found.append(timed(getattr(case, way), device))
    figures: dict[str, Any] = {"failed": failed} if failed else {}
    for way in (way for way in ways if way in peaks):
        ours = taken["fused_whole" if way.startswith("liger") else "fused"]
        ratios = [own / theirs for own, theirs in zip(ours, taken[way], strict=True)]
        spread = {"": median(ratios), "_low": min(ratios), "_high": max(ratios)}
        figures |= {f"time_vs_{way}{end}": round(value, 3) for end, value in spread.items()}
    figures |= {f"ms_{way}": round(1e3 * median(found), 3) for way, found in taken.items()}
    figures |= {f"gib_{way}": round(peak / 2**30, 3) for way, peak in peaks.items()}
    operations = 6 * positions * width * len(case.weight)
    return {**figures, "share_of_ceiling": round(operations / median(taken["fused"]) / most, 3)}


def random_model(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A Qwen3 with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        attn_implementation=ATTENTION,
    )
    return Qwen3ForCausalLM(config).to(device, dtype).eval()


def step(shape: Shape, size: StepSize, device: str, dtype: torch.dtype, most: float) -> dict[str, float]:
    """Seconds of each part of a step, tokens a second, and the learner's share of the ceiling."""
    torch.manual_seed(0)
    student, teacher = random_model(shape, dtype, device), random_model(shape, dtype, device)
    prompts = torch.randint(3, shape.vocabulary, (size.prompts, size.prompt)).tolist()
    params = SamplingParams(max_tokens=size.new, stop_ids=(STOP,))
    speech = Speech(params, plain_tokens, 0, lambda: synchronised(device))
    ours = Ours(student, teacher, [tuple(prompt) for prompt in prompts], speech, whole=False)
    ours.step(size.prompts)
    ours.spent = dict.fromkeys(ours.spent, 0.0)
    found = [ours.step(size.prompts) for _ in range(size.steps)]
    sampled = sum(tokens for _, tokens in found)
    read = sampled + size.steps * size.prompts * size.prompt
    rates = [tokens / taken for taken, tokens in found]
    table = shape.vocabulary * shape.width  # an embedding is looked up; a head sees what was sampled alone
    body = shape.parameters - table * (1 if shape.tied else 2)
    operations = 6 * (body * read + table * sampled)
    return {
        **{f"s_{part}": round(spent / size.steps, 4) for part, spent in ours.spent.items()},
        "sampled_tokens_per_s": round(sampled / ours.spent["rollout"], 1),
        "tokens_per_s": round(sampled / sum(taken for taken, _ in found), 1),
        "tokens_per_s_low": round(min(rates), 1),
        "tokens_per_s_high": round(max(rates), 1),
        "learner_share_of_ceiling": round(operations / ours.spent["learner"] / most, 4),
    }


def plain_tokens(ids: Sequence[int]) -> TokenClasses:
    """Tokens of no class."""
    return TokenClasses(special=(False,) * len(ids), in_span=(False,) * len(ids), ends_segment=())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--student", choices=sorted(QWEN3), default="0.6B")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu needs a GPU, and torch finds none: run it where torch.cuda.is_available()", file=sys.stderr
        )
        sys.exit(2)
    dtype, name = torch.bfloat16, torch.cuda.get_device_name(0)
    most = ceiling("cuda", dtype, (4096, 8192, 16384), options.rounds)
    print(f"{name}: matrix products reach {most / 1e12:.0f} TFLOP/s")
    peers = [way for way, package in PEERS.items() if installed(package)]
    ways = ["naive", "gemm", *peers, *(["liger_triton"] if "liger" in peers else [])]
    figures: dict[str, Any] = {"device": name, "ceiling_tflops": round(most / 1e12, 1), "rounds": options.rounds}
    for width in WIDTHS:
        case = Case(options.positions, width, VOCABULARY, dtype, "cuda")
        figures[f"head_{width}"] = head(case, ways, most, options.rounds)
        print(f"head, H = {width}: {json.dumps(figures[f'head_{width}'])}")
        del case
        torch.cuda.empty_cache()
    size = StepSize()
    figures["step"] = {**step(QWEN3[options.student], size, "cuda", dtype, most), **asdict(size)}
    print(f"step, {options.student}: {json.dumps(figures['step'])}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
