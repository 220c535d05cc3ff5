"""One rank of a job: train a tiny model on this rank's episodes and leave weights and metrics behind."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch

from agentopd.batching import build_batch
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.run import LearnerConfig
from agentopd.learner import runtime
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.weights import full_weights
from tests.token_classes import token_classifier

SHARES = {"a": 0.75, "b": 0.25}
OVERRIDES: dict[str, Any] = {
    "sg_opd": {"stabiliser": {"phi_scale": 0.5}, "router": {"extrapolation": 1.0}},
    "topk_opd": {"masks": {"entropy_top_ratio": 0.3}},
}
"""What makes a preset exercise a mean over the whole batch, or a mask only the learner sees."""


def fixtures() -> Any:
    spec = importlib.util.spec_from_file_location("learner_fixtures", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def owner(group: int, step: int, ranks: int) -> int:
    """The rank that has a group's episodes."""
    return 0 if ranks == 1 or step == 1 or group < 2 else 1 + group % (ranks - 1)


def train(make: Any, stage: int, out: Path, objective: ObjectiveConfig) -> dict[str, float]:
    """Three steps; in the second only the first rank has episodes, and ranks always differ in micro-batches."""
    config = LearnerConfig(lr=1e-2, warmup_steps=0, zero_stage=stage, micro_batch_tokens=128)
    learner = DeepSpeedLearner(make._model(), config, objective, total_steps=3)
    rank, ranks = runtime.rank(), runtime.world_size()
    metrics: dict[str, float] = {}
    for step in range(3):
        scored = make._scored(24, seed=step)
        mine = [item for index, item in enumerate(scored) if owner(index // 2, step, ranks) == rank]
        batch = build_batch(mine, objective, SHARES, token_classifier({3}), 0, runtime.all_reduce)
        metrics = learner.step(batch)
    learner.save(out / "state")
    learner.load(out / "state")
    weights = {name: weight.clone() for name, weight in full_weights(learner.module)}
    if rank == 0:
        torch.save(weights, out / "weights.pt")
        (out / "metrics.json").write_text(json.dumps(metrics))
    learner.export(out / "export")
    return metrics


def run(rank: int, ranks: int, port: int, out: Path, stage: int, preset: str) -> None:
    """What a launcher would start: the rank finds the others by its environment."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in where.items()}
    torch.set_num_threads(1)
    make = fixtures()
    train(make, stage, out, make._objective(preset, **OVERRIDES.get(preset, {})))
