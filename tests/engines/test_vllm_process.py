"""How vLLM is ended, without vLLM."""

import asyncio

from agentopd.engines.background import BackgroundLoop
from agentopd.engines.vllm_process import BlockingLLM


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
