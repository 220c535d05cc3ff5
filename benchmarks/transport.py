"""A teacher's answer on the wire: bytes a token at K = 64, and the time to pack and unpack it, against JSON.

Ids are uniform over a vocabulary of 151,936, which compresses least.

``python -m benchmarks.transport [--tokens 2048] [--pairs 5]``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np

from agentopd.contracts import Evidence
from agentopd.teachers import wire
from benchmarks.harness import compare, cpu_seconds, report

TOP_K, VOCABULARY = 64, 151_936


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    logprobs = -np.sort(rng.exponential(5, (options.tokens, TOP_K)), axis=1).astype(np.float32)
    evidence = Evidence("t", logprobs[:, 0], rng.integers(0, VOCABULARY, logprobs.shape), logprobs)
    assert evidence.topk_ids is not None
    rows = [
        dict(zip(ids.tolist(), lps.tolist(), strict=True)) for ids, lps in zip(evidence.topk_ids, logprobs, strict=True)
    ]
    packed = wire.pack_evidence(evidence)
    found = wire.unpack_evidence(packed, "t")
    assert found.topk_logprobs is not None and np.array_equal(found.topk_ids, evidence.topk_ids)

    def ours() -> None:
        wire.unpack_evidence(wire.pack_evidence(evidence), "t")

    def as_json() -> None:
        json.loads(json.dumps(rows))

    report(
        {"speedup_vs_json": compare("pack and unpack vs JSON", ours, as_json, options.pairs)},
        bytes_per_token=round(len(packed) / options.tokens, 1),
        json_bytes_per_token=round(len(json.dumps(rows)) / options.tokens, 1),
        microseconds_per_token=round(min(cpu_seconds(ours) for _ in range(3)) / options.tokens * 1e6, 2),
        largest_error_nat=round(float(np.abs(found.topk_logprobs - logprobs).max()), 5),
        top_k=TOP_K,
    )


if __name__ == "__main__":
    main()
