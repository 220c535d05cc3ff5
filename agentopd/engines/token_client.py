"""vLLM's own HTTP server as a sampler sees it: token ids in, ids and their log-probs out (``/inference/v1/generate``).

Loading weights and the version they carry need the server's development mode (``VLLM_SERVER_DEV_MODE=1``), sampling
``--enable-scale-out``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopd.contracts import GenerationRequest
from agentopd.engines.http import Address, Away, Refused, ask_json
from agentopd.engines.pieces import CUT
from agentopd.engines.requests import check_finite
from agentopd.engines.vllm_process import sampling_args
from agentopd.errors import EngineError

_PROBE_S, _RESET_PAUSE_S = 10.0, 0.02
_NOT_FINITE = -9999.0
"""What the server writes for log-probs that JSON cannot hold."""
_HOW = (
    "start it with VLLM_SERVER_DEV_MODE=1, --enable-scale-out, --skip-tokenizer-init, "
    "--logprobs-mode processed_logprobs and --generation-config vllm"
)


@dataclass(frozen=True)
class Sampled:
    """One continuation: ids, log-probs of the distribution sampled from, and the weights the server says it has."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: frozenset[str]


@dataclass(frozen=True)
class TokenClient:
    """Talks to one server. Its methods raise ``Away`` for what may work later, ``EngineError`` for what never will."""

    address: Address

    async def alive(self) -> None:
        """Return if the server says that it is well."""
        await self._ask("GET", "/health", None, _PROBE_S)

    async def max_context(self) -> int:
        """Most tokens of a prompt and its continuation together."""
        answer = await self._ask("GET", "/v1/models", None, _PROBE_S)
        return int(answer["data"][0]["max_model_len"])

    async def version(self) -> str:
        """The label of its weights: what ``load`` gave it last, or what it was started with."""
        return str((await self._ask("GET", "/weight_info", None, _PROBE_S))["weight_version"])

    async def sample(self, request: GenerationRequest, name: str, timeout_s: float) -> Sampled:
        """One continuation, called ``name``; cancelling aborts it in the server."""
        question = {"request_id": name, "token_ids": list(request.token_ids), "sampling_params": sampling_args(request)}
        return _sampled(await self._ask("POST", "/inference/v1/generate", question, timeout_s), request)

    async def cut(self, names: Collection[str]) -> None:
        """End continuations where they are; their answers have what was sampled so far."""
        if names:  # the server takes none for all, whoever asked for them
            question = {"request_ids": [f"generate-tokens-{name}" for name in names]}
            await self._ask("POST", "/abort_requests", question, _PROBE_S)

    async def load(self, path: Path, version: str, timeout_s: float, meanwhile: str = "changing") -> None:
        """Make the server's weights those in the folder ``path``, and forget what it cached under others.

        Until all of that is done their label is ``meanwhile``, so that nobody takes what is sampled for either's.
        """
        await self.name(meanwhile, timeout_s)
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        await self._ask("POST", "/collective_rpc", reload, timeout_s)
        await self.settle(version, timeout_s)

    async def settle(self, version: str, timeout_s: float) -> None:
        """Forget what the server cached under other weights than those it was given, and label these."""
        try:
            async with asyncio.timeout(timeout_s):
                # What is still at work, if only on requests that were just aborted, holds the cache.
                while not (await self._ask("POST", "/reset_prefix_cache", None, timeout_s))["success"]:
                    if await self.version() == version:
                        return  # another rank brought the same weights, emptied the cache, and samples already
                    await asyncio.sleep(_RESET_PAUSE_S)
        except TimeoutError:
            raise Away(f"its prefix cache could not be emptied for {timeout_s:g} s") from None
        await self.name(version, timeout_s)

    async def name(self, version: str, timeout_s: float) -> None:
        """Change the label of its weights, and nothing else."""
        await self._ask("POST", "/update_weight_version", {"new_version": version}, timeout_s)

    async def workers(self) -> int:
        """The processes that hold its weights."""
        return int((await self._ask("GET", "/get_world_size", None, _PROBE_S))["world_size"])

    async def transfer(self, phase: str, question: Any, timeout_s: float) -> None:
        """One phase of vLLM's own weight transfer."""
        await self._ask("POST", f"/{phase}", question, timeout_s)

    async def _ask(self, method: str, path: str, question: Any, timeout_s: float) -> Any:
        try:
            return await ask_json(self.address, method, path, question, timeout_s)
        except Refused as exc:
            how = f": {_HOW}" if exc.status in (403, 404) else ""
            raise EngineError(f"the server at {self.address} refuses {path} ({exc}){how}") from None


def _logprob(entry: Any) -> float:
    value = float(entry["logprob"])
    return value if value > _NOT_FINITE else -math.inf


def _sampled(answer: Any, request: GenerationRequest) -> Sampled:
    try:
        (choice,) = answer["choices"]
        ids = tuple(choice["token_ids"])
        logprobs = tuple(_logprob(entry) for entry in choice["logprobs"]["content"])
        reason = choice["finish_reason"]
        versions = frozenset(str(span["version"]) for span in choice.get("weight_versions") or ())
    except (KeyError, TypeError, ValueError) as exc:
        raise EngineError(f"not an answer of vLLM's: {type(exc).__name__}: {exc}") from exc
    if reason not in ("stop", "length", CUT):
        raise Away(f"it ended a request with {reason!r}")
    if not int(reason != CUT) <= len(ids) == len(logprobs) <= request.params.max_tokens:
        raise EngineError(f"{len(ids)} ids and {len(logprobs)} log-probs for max_tokens={request.params.max_tokens}")
    check_finite(logprobs)
    greedy = request.params.temperature == 0
    return Sampled(ids, (0.0,) * len(ids) if greedy else logprobs, reason, versions)
