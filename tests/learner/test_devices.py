"""Which GPU a rank uses, told to a CUDA that is not there."""

import os
from types import SimpleNamespace

import pytest
import torch

from agentopd import models
from agentopd.build import build_policy
from agentopd.config.engines import VLLMConfig
from agentopd.config.run import RolloutConfig
from agentopd.engines import vllm, vllm_process
from tests.tiny import qwen3


class Stopped(Exception):
    """Far enough."""


@pytest.fixture
def rank_three(monkeypatch):
    """The fourth rank of a machine with GPUs; the devices that were set as current."""
    chosen: list[torch.device] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_rank_takes_its_device_before_anything_is_loaded(rank_three, monkeypatch):
    def load(*_):
        assert rank_three == [torch.device("cuda", 3)]
        raise Stopped

    monkeypatch.setattr(models, "load_tokenizer", load)
    with pytest.raises(Stopped):
        build_policy("micro/student", "float32", RolloutConfig())


@pytest.mark.parametrize(("visible", "seen"), [(None, "3"), ("4,5,6,7", "7"), ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-d")])
@pytest.mark.parametrize("device", [torch.device("cuda", 3), None])
def test_vllm_sees_the_gpu_of_its_rank_alone(rank_three, monkeypatch, visible, seen, device):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with vllm_process._environment(60.0, device, "scratch"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen and "LOCAL_RANK" not in os.environ
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_vllm_beside_the_learner_starts_on_the_models_device(rank_three, monkeypatch):
    def start(args, timeout_s, device):
        assert device == torch.device("cuda", 2)
        raise Stopped

    weight = SimpleNamespace(device=torch.device("cuda", 2))
    model = SimpleNamespace(config=qwen3(64).config, dtype=torch.float32, parameters=lambda: iter([weight]))
    monkeypatch.setattr(vllm, "DiskSync", lambda _: SimpleNamespace(engine_args={}, close=lambda: None))
    monkeypatch.setattr(vllm, "require_vllm", lambda: None)
    monkeypatch.setattr(vllm, "boundary", lambda *_: vllm.nullcontext())
    monkeypatch.setattr(vllm, "start", start)
    with pytest.raises(Stopped):
        vllm.VLLMEngine(model, VLLMConfig(sync="disk"))
