"""What only GPUs can show of vLLM: weights through shared memory or NCCL, and sleep while the learner works."""

import asyncio
from importlib.util import find_spec

import pytest
import torch

from agentopd.config.engines import ServersConfig, VLLMConfig
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd.engines import VLLMEngine, VLLMServersEngine
from agentopd.errors import EngineError
from agentopd.models import load_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_weights_arrive_through_shared_memory_in_an_engine_that_slept():
    model = load_model("micro/student", "bfloat16")
    engine = VLLMEngine(model, VLLMConfig(max_context=768, kv_cache_gb=0.25, sync="ipc"))
    asked = [GenerationRequest(range(10, 60), SamplingParams(max_tokens=16), seed) for seed in range(4)]
    try:
        before = asyncio.run(engine.generate(asked))
        held = torch.cuda.mem_get_info()[0]
        engine.sleep()
        assert torch.cuda.mem_get_info()[0] > held
        with pytest.raises(EngineError, match="call sync_weights first"):
            asyncio.run(engine.generate(asked))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
        assert engine.sync_weights(1)["sync/canary"] < 0.05
        after = asyncio.run(engine.generate(asked))
        assert [x.logprobs for x in before] != [x.logprobs for x in after]
    finally:
        engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for the learner and another for the server")
def test_weights_arrive_by_nccl_in_a_server_on_another_gpu():
    model = load_model("micro/student", "bfloat16")
    vllm = VLLMConfig(max_context=768, kv_cache_gb=0.25, sync="nccl")
    engine = VLLMServersEngine(model, vllm, ServersConfig(gpus=(1,)))
    asked = [GenerationRequest(range(10, 60), SamplingParams(max_tokens=16), seed) for seed in range(4)]
    try:
        before = asyncio.run(engine.generate(asked))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
        found = engine.sync_weights(1)
        assert found["sync/sent"] == 1 and found["sync/canary"] < 0.05
        after = asyncio.run(engine.generate(asked))
        assert [x.logprobs for x in before] != [x.logprobs for x in after]
    finally:
        engine.close()
