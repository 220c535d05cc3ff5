"""How vLLM is ended, and how a start that failed is told, without vLLM."""

import asyncio

import pytest
import torch

from agentopd.config.engines import VLLMConfig
from agentopd.engines.background import BackgroundLoop
from agentopd.engines.vllm_process import KEYS, BlockingLLM, blaming_the_cache, sampler_args
from agentopd.errors import ConfigError
from agentopd.models import load_shape


class FakeLLM:
    """Reads results from a process until told to stop, as vLLM's does."""

    def __init__(self) -> None:
        self.reading_at_shutdown: list[bool] = []

    async def start(self) -> None:
        self.output_handler = asyncio.create_task(asyncio.sleep(3600))

    def shutdown(self) -> None:
        self.reading_at_shutdown.append(not self.output_handler.done())


def test_nobody_reads_from_the_process_when_it_ends():
    """vLLM would log that as a failure."""
    llm, loop = FakeLLM(), BackgroundLoop("test")
    blocking = BlockingLLM(llm, loop, timeout_s=5)
    blocking.wait(llm.start())
    blocking.close()
    blocking.close()
    assert llm.reading_at_shutdown == [False, False] and loop.closed


@pytest.mark.parametrize(("dtype", "needed"), [(torch.bfloat16, "0.0015"), (torch.float32, "0.0029")])
def test_a_start_that_its_cache_explains_names_the_keys(dtype, needed):
    """vLLM raises the reason in its own process, and here no more than this."""
    shape, fault = load_shape("micro/teacher"), RuntimeError("Engine core initialization failed.")
    small = sampler_args(VLLMConfig(kv_cache_gb=0.001), dtype, max_context=1024)
    told = f"one request of 1,024 tokens takes about {needed} GiB .* {KEYS[1]} gives 0.001: .* or lower {KEYS[0]}"
    with pytest.raises(ConfigError, match=told), blaming_the_cache(shape, small, KEYS):
        raise fault


def test_a_start_that_its_cache_does_not_explain_keeps_its_fault():
    large = sampler_args(VLLMConfig(), torch.float32, max_context=1024)
    with (
        pytest.raises(RuntimeError, match="Engine core"),
        blaming_the_cache(load_shape("micro/teacher"), large, KEYS),
    ):
        raise RuntimeError("Engine core initialization failed.")
