"""The plan's arithmetic: worked out by hand, against real models, and as the page shows it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agentopd import capacity
from agentopd.capacity import PLANS, QWEN3, Hardware, Shape, figures
from agentopd.config.model import LoRAConfig
from agentopd.config.run import LearnerConfig
from agentopd.contracts import Evidence
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.models import load_model, load_shape
from agentopd.teachers.wire import pack_evidence
from agentopd.weights import add_lora
from tests.tiny import opd_batch, qwen3

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/scaling.md"


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tied):
    model = qwen3(50, tie_word_embeddings=tied)
    assert Shape.of(model.config).parameters == sum(weight.numel() for weight in model.parameters())


def test_published_sizes():
    assert QWEN3["0.6B"].parameters == 596_049_920
    assert QWEN3["8B"].parameters == 8_190_735_360
    assert QWEN3["8B"].kv_bytes_per_token == 2 * 36 * 8 * 128 * 2


def test_state_by_stage():
    """Eighteen bytes a parameter on one rank; on four, of twelve, sixteen and eighteen a quarter."""
    found = [capacity.state_bytes(1000, 4, stage) for stage in (0, 1, 2, 3)]
    assert found == [18_000, 2_000 + 4_000 + 3_000, 2_000 + 4_000, 4_500]
    assert capacity.state_bytes(1000, 1, 3) == 18_000
    assert capacity.state_bytes(1000, 1, 0, "float32") == 16_000
    assert capacity.state_bytes(1000, 4, 2, "float32") == 4_000 + 4_000  # ZeRO keeps masters of fp32 weights too


def test_the_state_is_what_adam_holds():
    """fp32: weights, gradients and two moments."""
    model = qwen3(50)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    held = [x for weight in model.parameters() for x in (weight, weight.grad, *optimizer.state[weight].values())]
    size = sum(x.nbytes for x in held if x.numel() > 1)
    assert size == capacity.state_bytes(Shape.of(model.config).parameters, 1, 0, "float32")


def test_an_answer_is_no_larger_than_planned():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(151_936, (512, 64), generator=g).numpy()
    logprobs = torch.randn(512, 64, generator=g).numpy()
    packed = pack_evidence(Evidence("t", logprobs[:, 0], ids, logprobs))
    assert 250 * 512 < len(packed) < capacity.evidence_bytes(512, 64) == 324 * 512


def test_a_step_by_hand():
    """One sequence of a model that is read once a token, on hardware of round numbers."""
    shape = QWEN3["0.6B"]
    assert capacity.decode_rate(shape, 1, 0, 2 * shape.parameters) == 1
    assert capacity.train_flops(10, 3) == 240 and capacity.train_flops(10, 3, recompute=False) == 180
    assert capacity.judge_cores(100, 10, 0.5) == 5
    assert capacity.sync_seconds(25_000_000_000, replicas=4, link=50e9, folder=100e9) == 1 + 2


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_the_plans_fit_their_gpus(plan):
    found, hardware = figures(plan), Hardware()
    assert plan.gpus == int(plan.name.split()[0])
    learner = found["state_gib"] + found["activations_gib"] + found["head_gib"]
    sampler = found["sampler_weights_gib"] + found["kv_gib"]
    together = learner + sampler + found["teacher_gib"]
    for part in (together,) if plan.shared else (learner, sampler, found["teacher_gib"]):
        assert part < hardware.memory_gib
    parts = [found[f"{name}_s"] for name in ("rollout", "score", "train")]
    assert found["step_s"] == pytest.approx((sum(parts) if plan.shared else max(parts)) + found["sync_s"])


def test_the_page_has_the_table():
    assert capacity.table() in PAGE.read_text()


@pytest.mark.parametrize(
    ("dtype", "stage", "rank"),
    [("float32", 0, None), ("float32", 2, None), ("bfloat16", 1, None), ("bfloat16", 1, 16)],
)
def test_a_checkpoint_is_as_large_as_planned(dtype, stage, rank, tmp_path):
    """Of the shipped student, within a tenth; what is written beside the tensors is a few tens of kilobytes."""
    model = load_model("micro/student", dtype)
    shape = Shape.of(model.config)
    trained = shape.parameters
    if rank is not None:
        pytest.importorskip("peft")
        add_lora(model, LoRAConfig(rank=rank))
        trained = capacity.lora_parameters(shape, rank, "all-linear")
        assert trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    objective, batch = opd_batch(1, 16, shape.vocabulary)
    learner = DeepSpeedLearner(model, LearnerConfig(zero_stage=stage), objective, total_steps=1)
    try:
        learner.step(batch)
        learner.save(tmp_path)
    finally:
        learner.close()
    found = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert found == pytest.approx(capacity.checkpoint_bytes(trained, stage, dtype), rel=0.1)


PEAK = """
import gc, re, sys
from pathlib import Path
from agentopd.config.run import LearnerConfig
from agentopd.learner import runtime
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.models import load_model, load_shape
from tests.tiny import opd_batch, qwen3

def kilobytes(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

objective, small = opd_batch(1, 16, 512)
warm = DeepSpeedLearner(qwen3(512), LearnerConfig(), objective, 2)  # what libraries take is no part of it
warm.step(small)
warm.close()
_, batch = opd_batch(32, 256, 512)
del warm
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
settings = LearnerConfig(micro_batch_tokens=8192, activation_checkpointing=sys.argv[2] == "checkpointed")
learner = DeepSpeedLearner(load_model("micro/student", sys.argv[1]), settings, objective, 2)
learner.step(batch)
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize(("dtype", "kept"), [("float32", "whole"), ("float32", "checkpointed"), ("bfloat16", "whole")])
def test_a_step_of_the_shipped_student_takes_what_is_estimated(dtype, kept):
    """State, a micro-batch of 8,192 tokens and the head, within a factor of 1.7 of the process's peak."""
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", PEAK, dtype, kept], capture_output=True, check=True, env=one, cwd=ROOT)
    measured, shape = int(ran.stdout.split()[-1]), Shape.of(load_shape("micro/student"))
    size = capacity.BYTES[dtype]
    estimated = (
        capacity.state_bytes(shape.parameters, 1, int(dtype == "bfloat16"), dtype)
        + capacity.activation_bytes(shape, 8192, size, kept == "checkpointed")
        + capacity.head_bytes(shape, 8192, size)
    )
    assert measured / 1.7 <= estimated <= 1.7 * measured, (measured, estimated)
