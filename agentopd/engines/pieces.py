"""A turn that weight updates cut: each piece sampled from the weights of its time, the next one going on after it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from agentopd.contracts import Generation, GenerationRequest
from agentopd.engines.background import Gate

CUT = "abort"
"""How a piece ends that is not the last of its turn; vLLM's word for it."""


class Pieces:
    """What is sampled of ``request``, piece by piece."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._stretches: list[tuple[int, int]] = []
        """The first token, and the version of the weights, of what was sampled from the same ones."""
        self._finish_reason = CUT

    @property
    def is_whole(self) -> bool:
        """Whether the last piece was no cut one."""
        return self._finish_reason != CUT

    @property
    def rest(self) -> GenerationRequest:
        """What is left to sample."""
        count, request = len(self._token_ids), self._request
        if not count:
            return request
        params = replace(request.params, max_tokens=request.params.max_tokens - count)
        token_ids = (*request.token_ids, *self._token_ids)
        return replace(request, token_ids=token_ids, params=params, drawn=request.drawn + count)

    def add(self, piece: Generation) -> None:
        """Go on by what was sampled of ``rest``; a piece that was cut at once has no tokens."""
        if piece.token_ids and (not self._stretches or self._stretches[-1][1] != piece.weight_version):
            self._stretches.append((len(self._token_ids), piece.weight_version))
        self._token_ids += piece.token_ids
        self._logprobs += piece.logprobs
        self._finish_reason = piece.finish_reason

    def generation(self) -> Generation:
        """The turn, once it is whole."""
        (_, version), *updates = self._stretches
        ids, logprobs = tuple(self._token_ids), tuple(self._logprobs)
        return Generation(ids, logprobs, self._finish_reason, version, tuple(updates))


async def in_pieces(
    request: GenerationRequest, gate: Gate, sample: Callable[[GenerationRequest], Awaitable[Generation]]
) -> Generation:
    """The turn by ``sample``, whose pieces end where an update closes ``gate`` and cuts them."""
    pieces = Pieces(request)
    while not pieces.is_whole:
        async with gate:
            pieces.add(await sample(pieces.rest))
    return pieces.generation()
