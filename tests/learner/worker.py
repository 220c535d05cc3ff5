"""One rank of a launched job: train a tiny model on this rank's episodes and leave weights and metrics behind.

torchrun --nproc-per-node 2 worker.py OUT ZERO_STAGE [PRESET]
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from agentopd.batching import build_batch
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.run import LearnerConfig
from agentopd.learner import runtime
from agentopd.learner.deepspeed import DeepSpeedLearner
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


def train(make: Any, stage: int, out: Path, objective: ObjectiveConfig) -> dict[str, float]:
    """Three steps; the second has no episode on the last rank, and ranks always differ in micro-batches."""
    config = LearnerConfig(lr=1e-2, warmup_steps=0, zero_stage=stage, micro_batch_tokens=128)
    learner = DeepSpeedLearner(make._model(), config, objective, total_steps=3)
    rank, ranks = runtime.rank(), runtime.world_size()
    metrics: dict[str, float] = {}
    for step in range(3):
        scored = make._scored(24, seed=step)
        cut = len(scored) if step == 1 else 4
        mine = scored if ranks == 1 else (scored[:cut] if rank == 0 else scored[cut:])
        batch = build_batch(mine, objective, SHARES, token_classifier({3}), 0, runtime.all_reduce)
        metrics = learner.step(batch)
    learner.save(out / "state")
    learner.load(out / "state")
    if rank == 0:
        torch.save(learner.module.state_dict(), out / "weights.pt")
        (out / "metrics.json").write_text(json.dumps(metrics))
    learner.export(out / "export")
    return metrics


if __name__ == "__main__":
    torch.set_num_threads(1)
    make = fixtures()
    train(make, int(sys.argv[2]), Path(sys.argv[1]), make._objective(*sys.argv[3:], **OVERRIDES.get(sys.argv[-1], {})))
