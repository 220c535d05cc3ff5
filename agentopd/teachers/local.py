"""A teacher (or reference policy) in this process: forward passes over finished episodes.

Tokens are taken from the episode as they are, never re-rendered. Scoring is at temperature 1, with log-probs in fp32,
and only on the tokens the student sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agentopd.contracts import Evidence, FloatArray, IntArray
from agentopd.errors import TeacherError, boundary
from agentopd.learner.head import Head, head_topk, hidden_states, output_head
from agentopd.objective.microbatches import bucket_by_length
from agentopd.types import Episode


class LocalTeacher:
    """Scores episodes with a Hugging Face causal LM, in length-sorted batches of ``batch_tokens`` padded tokens.

    ``vocab_size`` is the number of ids shared with the student: rows a checkpoint pads its vocabulary with are left
    out before the softmax. The model is used as it is (its device and dtype), without gradients.
    """

    def __init__(self, name: str, model: Any, batch_tokens: int = 16384, vocab_size: int | None = None) -> None:
        self.name = name
        self.batch_tokens = batch_tokens
        self._model = model
        self._vocab_size = vocab_size
        self.max_top_k: int | None = output_head(model, vocab_size).weight.shape[0]

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        """Evidence of each episode, in order; ``top_k`` is capped to the vocabulary, 0 leaves the top-K out.

        Raises ``TeacherError`` where a log-prob is not finite or the forward pass fails.
        """
        with boundary(TeacherError, f"teacher {self.name!r}"):
            scored = _score(self._model, episodes, top_k, self.batch_tokens, self._vocab_size)
        for episode, (logprobs, _, topk) in zip(episodes, scored, strict=True):
            if not (np.isfinite(logprobs).all() and np.isfinite(topk).all()):
                raise TeacherError(f"teacher {self.name!r} gave a non-finite log-prob on episode {episode.id!r}")
        return [
            Evidence(self.name, logprobs, ids if top_k else None, topk if top_k else None)
            for logprobs, ids, topk in scored
        ]

    async def aclose(self) -> None:
        """Nothing to release."""


def load_local_teacher(
    name: str, path: str | Path, dtype: torch.dtype = torch.bfloat16, batch_tokens: int = 16384
) -> LocalTeacher:
    """A teacher from a local directory or Hugging Face id. Raises ``TeacherError`` if it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    with boundary(TeacherError, f"teacher {name!r}: cannot load {str(path)!r}"):
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype)
    return LocalTeacher(name, model.eval().requires_grad_(False), batch_tokens)


def score_logprobs(model: Any, episodes: Sequence[Episode], batch_tokens: int = 16384) -> list[FloatArray]:
    """Log-probs of each episode's sampled tokens (n,) at temperature 1 under ``model``: the reference scorer."""
    return [logprobs for logprobs, _, _ in _score(model, episodes, 0, batch_tokens, None)]


@torch.no_grad()
def _score(
    model: Any, episodes: Sequence[Episode], top_k: int, batch_tokens: int, vocab_size: int | None
) -> list[tuple[FloatArray, IntArray, FloatArray]]:
    """Log-probs (n,), top-K ids and log-probs (n, K) of each episode's n sampled tokens."""
    head = output_head(model, vocab_size)
    k = min(top_k, head.weight.shape[0])
    empty = (np.zeros(0, np.float32), np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
    found: list[tuple[FloatArray, IntArray, FloatArray]] = [empty] * len(episodes)
    sampled = [index for index, episode in enumerate(episodes) if episode.num_sampled]
    positions = {index: np.flatnonzero(np.array(episodes[index].loss_mask)) for index in sampled}
    lengths = [int(positions[index][-1]) + 1 for index in sampled]
    for bucket in bucket_by_length(lengths, batch_tokens):
        members = [sampled[i] for i in bucket]
        rows = [episodes[index].token_ids[: int(positions[index][-1]) + 1] for index in members]
        scores = _forward(model, head, rows, [positions[index] for index in members], k)
        for index, score in zip(members, scores, strict=True):
            found[index] = score
    return found


def _forward(
    model: Any, head: Head, rows: list[list[int]], positions: list[npt.NDArray[np.intp]], k: int
) -> list[tuple[FloatArray, IntArray, FloatArray]]:
    """One right-padded forward pass over ``rows``."""
    device = head.weight.device
    input_ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids_BT[index, : len(row)] = torch.tensor(row)
    sizes = [len(position) for position in positions]
    row_N = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(sizes))
    position_N = torch.from_numpy(np.concatenate(positions))
    hidden_NH = hidden_states(model, input_ids_BT.to(device), row_N.to(device), position_N.to(device))
    streams = head_topk(hidden_NH, head, input_ids_BT[row_N, position_N].to(device), k)
    logprobs, ids, topk = ([part.numpy() for part in torch.split(stream.cpu(), sizes)] for stream in streams)
    return list(zip(logprobs, ids, topk, strict=True))
