"""Episodes and evidence between processes, compactly: three bytes per id, half precision per top-K log-prob.

A question is JSON and holds ids alone. An answer is compressed binary, little-endian: N and K, the log-probs of the
N sampled tokens in fp32, then N x K ids (their low, middle and high bytes apart, which compresses best), and N x K
log-probs in fp16, whose error is below 0.01 nat down to a log-prob of -20.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from agentopd.contracts import Evidence, FloatArray, IntArray
from agentopd.types import Episode, StopReason, Turn

_HEAD = struct.Struct("<II")
MAX_ID = 2**24 - 1


def pack_episodes(episodes: Sequence[Episode], **more: Any) -> bytes:
    """A question about episodes: prompt ids, and sampled and observed ids turn by turn; ``more`` is plain data."""
    rows = [[e.prompt_ids, [[t.token_ids, t.observation_ids] for t in e.turns]] for e in episodes]
    return json.dumps({"episodes": rows, **more}, separators=(",", ":")).encode()


def unpack_episodes(body: bytes) -> tuple[list[Episode], dict[str, Any]]:
    """The episodes of a question, with nothing but their ids, and what came with them. Raises ``ValueError``."""
    question = json.loads(body)
    episodes = [
        Episode(
            id=str(index),
            task_id="",
            task_hash="",
            env="",
            split="train",
            prompt_ids=tuple(prompt),
            turns=tuple(
                Turn(token_ids=ids, rollout_logprobs=(0.0,) * len(ids), observation_ids=seen) for ids, seen in turns
            ),
            stop_reason=StopReason.COMPLETED,
        )
        for index, (prompt, turns) in enumerate(question.pop("episodes"))
    ]
    return episodes, question


def pack_evidence(evidence: Evidence) -> bytes:
    """A teacher's answer for one episode. Raises ``ValueError`` for ids beyond three bytes."""
    n, topk_ids, topk = len(evidence.teacher_logprobs), evidence.topk_ids, evidence.topk_logprobs
    if topk_ids is None or topk is None:
        topk_ids, topk = np.zeros((n, 0), np.int64), np.zeros((n, 0), np.float32)
    if topk_ids.size and topk_ids.max() > MAX_ID:
        raise ValueError(f"token id {topk_ids.max()} does not fit three bytes")
    planes = np.ascontiguousarray(topk_ids, "<u4")[..., None].view(np.uint8)[..., :3]
    parts = [evidence.teacher_logprobs.astype("<f4"), np.moveaxis(planes, -1, 0), topk.astype("<f2")]
    return zlib.compress(_HEAD.pack(n, topk_ids.shape[1]) + b"".join(part.tobytes() for part in parts), level=1)


def unpack_evidence(data: bytes, teacher: str) -> Evidence:
    """What ``pack_evidence`` packed; K = 0 leaves the top-K out. Raises ``ValueError`` for anything else."""
    try:
        raw = zlib.decompress(data)
        n, k = _HEAD.unpack_from(raw)
    except (zlib.error, struct.error) as exc:
        raise ValueError(f"not a teacher's answer: {exc}") from None
    if len(raw) != _HEAD.size + 4 * n + 5 * n * k:
        raise ValueError(f"an answer of {len(raw)} bytes for {n} tokens and K = {k}")
    logprobs = np.frombuffer(raw, "<f4", n, _HEAD.size).astype(np.float32)
    if not k:
        return Evidence(teacher, logprobs)
    planes = np.frombuffer(raw, np.uint8, 3 * n * k, _HEAD.size + 4 * n).reshape(3, n, k).astype(np.int64)
    topk = np.frombuffer(raw, "<f2", n * k, _HEAD.size + 4 * n + 3 * n * k).reshape(n, k)
    ids: IntArray = planes[0] | planes[1] << 8 | planes[2] << 16
    return Evidence(teacher, logprobs, ids, topk.astype(np.float32))


def pack_logprobs(logprobs_NK: FloatArray) -> bytes:
    """Log-probs (N, K) of ids that the other side knows."""
    half: npt.NDArray[np.float16] = logprobs_NK.astype("<f2")
    return zlib.compress(_HEAD.pack(*half.shape) + half.tobytes(), level=1)


def unpack_logprobs(data: bytes) -> FloatArray:
    """What ``pack_logprobs`` packed. Raises ``ValueError`` for anything else."""
    try:
        raw = zlib.decompress(data)
        shape = _HEAD.unpack_from(raw)
        return np.frombuffer(raw, "<f2", -1, _HEAD.size).reshape(shape).astype(np.float32)
    except (zlib.error, struct.error) as exc:
        raise ValueError(f"not a teacher's answer: {exc}") from None


def join(parts: Sequence[bytes]) -> bytes:
    """Several answers as one body."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def split(body: bytes) -> list[bytes]:
    """The answers of one body. Raises ``ValueError`` where it was cut off."""
    parts, at = [], 0
    while at < len(body):
        if at + 4 > len(body):
            raise ValueError("an answer was cut off")
        (size,) = struct.unpack_from("<I", body, at)
        parts.append(body[at + 4 : at + 4 + size])
        if len(parts[-1]) != size:
            raise ValueError("an answer was cut off")
        at += 4 + size
    return parts
