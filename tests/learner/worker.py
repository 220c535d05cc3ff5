"""One rank of a job: trains a tiny student by one objective after another and leaves weights and metrics behind."""

import json
import os
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agentopd.batching import build_batch
from agentopd.config.load import merged_objective
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.run import LearnerConfig
from agentopd.learner import runtime
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.weights import full_weights
from tests.learner.classroom import SHARES, Classroom, share_of

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
CHANGES: dict[str, Any] = {
    "sg_opd": {"stabiliser": {"phi_scale": 0.5}},
    "topk_opd": {"masks": {"entropy_top_ratio": 0.3}},
}
"""What makes a preset exercise a mean over the whole batch, or a mask only the learner sees."""


class Case(NamedTuple):
    """What one job trains: the objective of a recipe, under a ZeRO stage."""

    recipe: str
    stage: int = 0

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.recipe}-{self.stage}"


def objective_of(recipe: str) -> ObjectiveConfig:
    """The recipe's own, with its change."""
    table = tomllib.loads((RECIPES / f"{recipe}.toml").read_text())["objective"]
    return ObjectiveConfig.model_validate(merged_objective({**table, **CHANGES.get(recipe, {})}))


def train(case: Case, out: Path) -> None:
    """Two passes a step, so that clips and trust regions act. Objectives in stages get to the last of them."""
    objective = objective_of(case.recipe)
    room, steps = Classroom(objective), 5 if objective.stages else 2
    passes = {"epochs": 2, "max_epoch_kl": 100.0}
    # A weight without gradient must not be moved by the sign of a rounding error.
    config = LearnerConfig(lr=1e-2, eps=1e-4, warmup_steps=0, zero_stage=case.stage, micro_batch_tokens=512, **passes)
    learner = DeepSpeedLearner(room.student(), config, objective, steps, room.teachers.heads())
    rank, ranks = runtime.rank(), runtime.world_size()
    metrics: dict[str, float] = {}
    for step in range(steps):
        blocks = objective.at(learner.progress)
        mine = share_of(room.members(blocks, learner.progress, step), rank, ranks, step)
        batch = build_batch(mine, blocks, SHARES, room.classify, 0, runtime.all_reduce)
        assert not batch.quarantined, batch.quarantined
        metrics |= {f"{step}/{name}": value for name, value in learner.step(batch).items()}
    if case.recipe == "verifier_calibrated":
        learner.save(out / "state")
        learner.load(out / "state")
        learner.export(out / "export")
    weights = {name: weight.clone() for name, weight in full_weights(learner.module)}
    if rank == 0:
        torch.save(weights, out / "weights.pt")
        (out / "metrics.json").write_text(json.dumps(metrics))
    learner.close()


def run(rank: int, ranks: int, port: int, out: Path, cases: list[Case]) -> None:
    """What a launcher would start: the rank finds the others by its environment."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in where.items()}
    torch.set_num_threads(1)
    for case in cases:
        (out / case.name).mkdir(exist_ok=True)
        train(case, out / case.name)
