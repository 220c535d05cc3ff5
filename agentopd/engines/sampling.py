"""Sampling whose randomness belongs to the request, not to the batch it happens to share.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_BLOCK = 64
"""Uniforms drawn at once per stream."""


class UniformStreams:
    """One counter-based stream of uniforms per request seed (Philox): draw t of a seed is the same in any batch.

    ``drawn`` are the draws of each seed that are left out at its beginning, none by default.
    """

    def __init__(self, seeds: Sequence[int], drawn: Sequence[int] = ()) -> None:
        self._streams = [np.random.Generator(np.random.Philox(key=seed % 2**64)) for seed in seeds]
        for stream, count in zip(self._streams, drawn, strict=False):
            stream.random(count, dtype=np.float32)
        self._block = np.empty((len(seeds), 0), dtype=np.float32)
        self._next = 0

    def draw(self) -> torch.Tensor:
        """The next uniform of every stream: (B,) float32 in [0, 1), multiples of 2^-24."""
        if self._next == self._block.shape[1]:
            self._block = np.stack([stream.random(_BLOCK, dtype=np.float32) for stream in self._streams])
            self._next = 0
        self._next += 1
        return torch.from_numpy(self._block[:, self._next - 1].copy())

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every stream but those of ``rows``."""
        self._streams = [self._streams[row] for row in rows]
        self._block = self._block[list(rows)]


def sample(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by inverting the cumulative distribution at ``uniform_B``, and their log-probs: (B,) each.

    Log-probs are fp32 and those of the distribution sampled from: after temperature and top-p. At temperature 0 that
    distribution is a point: the arg max, with log-prob 0.
    """
    if temperature == 0:
        best_B, tokens_B = logits_BV.float().max(-1)
        # Zero, unless the logits are broken: then not a number, which the engine refuses.
        return tokens_B, best_B - best_B
    logprobs_BV = torch.log_softmax(logits_BV.float() / temperature, dim=-1)
    if top_p >= 1:
        index_B = _invert(logprobs_BV.exp(), uniform_B, logprobs_BV.shape[-1])
        return index_B, _pick(logprobs_BV, index_B)
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.exp()
    # The smallest set that reaches top_p: a token stays while the mass before it is below top_p.
    kept_B = ((probs_BV.cumsum(-1) - probs_BV) < top_p).sum(-1).clamp(min=1)
    outside_BV = torch.arange(sorted_BV.shape[-1], device=sorted_BV.device) >= kept_B[:, None]
    sorted_BV = torch.log_softmax(sorted_BV.masked_fill(outside_BV, float("-inf")), dim=-1)
    index_B = _invert(sorted_BV.exp(), uniform_B, kept_B)
    return _pick(order_BV, index_B), _pick(sorted_BV, index_B)


def _invert(probs_BV: torch.Tensor, uniform_B: torch.Tensor, size: torch.Tensor | int) -> torch.Tensor:
    """First index whose cumulative probability exceeds ``uniform``, among the first ``size``."""
    total_BV = probs_BV.cumsum(-1)
    target_B1 = uniform_B.to(probs_BV.device)[:, None] * total_BV[:, -1:]
    index_B = torch.searchsorted(total_BV, target_B1, right=True)[:, 0]
    # Rounding in a parallel scan may step past the last candidate.
    return index_B.clamp(max=size - 1) if isinstance(size, int) else torch.minimum(index_B, size - 1)


def _pick(values_BV: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    return values_BV.gather(-1, index_B[:, None])[:, 0]
