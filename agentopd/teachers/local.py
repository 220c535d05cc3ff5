"""A teacher (or reference policy) in this process: forward passes over finished episodes.

Tokens are taken from the episode as they are, never re-rendered. Scoring is at temperature 1, with log-probs in fp32,
and only on the tokens the student sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agentopd.contracts import Evidence, FloatArray, IntArray
from agentopd.errors import TeacherEndedError, TeacherError, boundary
from agentopd.learner.body import hidden_states
from agentopd.learner.head import Head, head_logprobs, head_topk, output_head
from agentopd.objective.microbatches import bucket_by_length
from agentopd.teachers.ids import check_ids, scored_ids
from agentopd.types import Episode

_ACCELERATOR_ERRORS: tuple[type[Exception], ...] = (
    (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
)
"""What every later call meets too, in this process; memory that ran out is another error."""


class LocalTeacher:
    """Scores episodes with a Hugging Face causal LM, in length-sorted batches of ``batch_tokens`` padded tokens.

    ``vocab_size`` is the number of ids shared with the student: rows a checkpoint pads its vocabulary with are left
    out before the softmax, and have the log-prob -inf where an episode or a candidate names one. The model is used as
    it is (its device and dtype), without gradients. ``keep_hidden`` adds its last hidden states to the evidence, for a
    learner that compares whole distributions with ``head``.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        batch_tokens: int = 16384,
        vocab_size: int | None = None,
        keep_hidden: bool = False,
    ) -> None:
        self.name = name
        self.batch_tokens = batch_tokens
        self.keep_hidden = keep_hidden
        self._model = model
        self._vocab_size = vocab_size
        self.max_top_k: int | None = output_head(model, vocab_size).weight.shape[0]

    @property
    def head(self) -> Head:
        """The output projection on the ids shared with the student."""
        return output_head(self._model, self._vocab_size)

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        """Evidence of each episode, in order; ``top_k`` is capped to the vocabulary, 0 leaves the top-K out.

        A log-prob that is not finite is handed on. Raises ``TeacherError`` where the forward pass fails, as
        ``QuestionError`` for ids that the model does not have, and as ``TeacherEndedError`` where its accelerator is
        of no more use.
        """
        with self._faults(episodes):
            scored = _score(self._model, episodes, top_k, self.batch_tokens, self._vocab_size, self.keep_hidden)
        return [
            Evidence(
                self.name,
                found.logprobs,
                found.ids if top_k else None,
                found.topk if top_k else None,
                hidden=found.hidden if self.keep_hidden else None,
            )
            for found in scored
        ]

    async def score_ids(self, episodes: Sequence[Episode], ids: Sequence[IntArray]) -> list[FloatArray]:
        """Full-vocabulary log-probs (n, K) at given ids (n, K), the student's own candidates say, for each episode.

        Raises as ``score`` does.
        """
        with self._faults(episodes):
            return _at_ids(self._model, episodes, ids, self.batch_tokens, self._vocab_size)

    async def aclose(self) -> None:
        """Nothing to release."""

    @contextmanager
    def _faults(self, episodes: Sequence[Episode]) -> Iterator[None]:
        rows = self._model.get_input_embeddings().num_embeddings
        for episode in episodes:
            check_ids(self.name, rows, scored_ids(episode))
        with boundary(TeacherError, f"teacher {self.name!r}"):
            try:
                yield
            except _ACCELERATOR_ERRORS as exc:
                raise TeacherEndedError(f"teacher {self.name!r}: {type(exc).__name__}: {exc}") from exc


def top_ids(model: Any, episodes: Sequence[Episode], k: int, batch_tokens: int = 16384) -> list[IntArray]:
    """The ``k`` most likely ids (n, k) before each sampled token under ``model``: a student's own candidates."""
    return [found.ids for found in _score(model, episodes, k, batch_tokens, None)]


class _Scored(NamedTuple):
    """Of one episode's n sampled tokens: log-probs (n,), top-K ids and log-probs (n, K), hidden states (n, H or 0)."""

    logprobs: FloatArray
    ids: IntArray
    topk: FloatArray
    hidden: FloatArray


def with_outputs_swapped(model: Any, one: int, other: int) -> Any:
    """The model with what it gives to two tokens exchanged: it says ``one`` wherever it would have said ``other``.

    Shares everything but the output projection, which is a copy.
    """
    swapped = copy.copy(model)
    swapped._modules = dict(model._modules)
    head = copy.deepcopy(model.get_output_embeddings())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter[[one, other]] = parameter[[other, one]]
    swapped.set_output_embeddings(head)
    return swapped


def _score(
    model: Any,
    episodes: Sequence[Episode],
    top_k: int,
    batch_tokens: int,
    vocab_size: int | None,
    keep_hidden: bool = False,
) -> list[_Scored]:
    head = output_head(model, vocab_size)
    k, width = min(top_k, head.weight.shape[0]), head.weight.shape[1] if keep_hidden else 0
    nothing = (np.zeros(0, np.float32), np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
    found = [_Scored(*nothing, np.zeros((0, width), np.float32))] * len(episodes)
    for members, hidden_NH, target_N, sizes in _hidden(model, head, episodes, batch_tokens):
        streams = (*head_topk(hidden_NH, head, target_N, k), hidden_NH[:, :width].float())
        parts = zip(*(torch.split(stream.cpu(), sizes) for stream in streams), strict=True)
        for index, part in zip(members, parts, strict=True):
            found[index] = _Scored(*(values.numpy() for values in part))
    return found


@torch.no_grad()
def _at_ids(
    model: Any, episodes: Sequence[Episode], ids: Sequence[IntArray], batch_tokens: int, vocab_size: int | None
) -> list[FloatArray]:
    """Log-probs (n, K) at ``ids`` of each episode's n sampled tokens."""
    head = output_head(model, vocab_size)
    found = [np.zeros(chosen.shape, np.float32) for chosen in ids]
    for members, hidden_NH, target_N, sizes in _hidden(model, head, episodes, batch_tokens):
        chosen_NK = torch.from_numpy(np.concatenate([ids[index] for index in members])).to(hidden_NH.device)
        _, logprobs_NK = head_logprobs(hidden_NH, head, target_N, chosen_NK)
        for index, part in zip(members, torch.split(logprobs_NK.cpu(), sizes), strict=True):
            found[index] = part.numpy()
    return found


@torch.no_grad()
def _hidden(
    model: Any, head: Head, episodes: Sequence[Episode], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor, list[int]]]:
    """Length-sorted batches: members, hidden states (N, H), targets (N,), sampled tokens per member."""
    sampled = [index for index, episode in enumerate(episodes) if episode.num_sampled]
    positions = {index: np.flatnonzero(np.array(episodes[index].loss_mask)) for index in sampled}
    lengths = [int(positions[index][-1]) + 1 for index in sampled]
    for bucket in bucket_by_length(lengths, batch_tokens):
        members = [sampled[i] for i in bucket]
        rows = [episodes[index].token_ids[: int(positions[index][-1]) + 1] for index in members]
        yield members, *_forward(model, head, rows, [positions[index] for index in members])


def _forward(
    model: Any, head: Head, rows: list[list[int]], positions: list[npt.NDArray[np.intp]]
) -> tuple[Tensor, Tensor, list[int]]:
    """One right-padded forward pass over ``rows``: hidden states (N, H), targets (N,) and tokens per row."""
    device = head.weight.device
    input_ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids_BT[index, : len(row)] = torch.tensor(row)
    sizes = [len(position) for position in positions]
    row_N = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(sizes))
    position_N = torch.from_numpy(np.concatenate(positions))
    hidden_NH = hidden_states(model, input_ids_BT.to(device), row_N.to(device), position_N.to(device))
    return hidden_NH, input_ids_BT[row_N, position_N].to(device), sizes
