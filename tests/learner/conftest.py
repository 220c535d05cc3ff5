"""A tiny random model and batches it can be trained on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from agentopd.batching import build_batch
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.presets import PRESETS
from agentopd.contracts import Evidence, ScoredEpisode
from agentopd.objective.streams import Batch
from agentopd.types import Episode, StopReason, Turn, Verdict, VerdictStatus
from tests.tiny import qwen3
from tests.token_classes import token_classifier

VOCAB = 64


def _model(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    return qwen3(VOCAB, seed, tie_word_embeddings=tied, max_position_embeddings=128).to(dtype)


def _objective(name: str = "verifier_calibrated", **blocks: Any) -> ObjectiveConfig:
    base = {**PRESETS[name], "preset": name}
    return ObjectiveConfig.model_validate({**base, **{k: {**base.get(k, {}), **v} for k, v in blocks.items()}})


def _scored(count: int = 6, seed: int = 0, k: int = 32) -> list[ScoredEpisode]:
    """Two-turn episodes of two skills in groups of two, with random evidence; every other one passed."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        turns = []
        for size in rng.integers(2, 7, size=2):
            logprobs = tuple(float(x) for x in rng.uniform(-4.3, -4.0, size))
            turns.append(
                Turn(
                    token_ids=tuple(int(x) for x in rng.integers(3, VOCAB, size)),
                    rollout_logprobs=logprobs,
                    observation_ids=(1, 2),
                )
            )
        episode = Episode(
            id=f"e{index}",
            task_id="t",
            task_hash="h",
            env="toy",
            split="train",
            skill=("a", "b")[index // 2 % 2],
            group_id=f"g{index // 2}",
            prompt_ids=tuple(int(x) for x in rng.integers(3, VOCAB, rng.integers(2, 9))),
            turns=tuple(turns),
            stop_reason=StopReason.COMPLETED,
        )
        n = episode.num_sampled
        logits = torch.tensor(rng.normal(size=(n, VOCAB)), dtype=torch.float32).log_softmax(-1)
        topk = logits.topk(min(k, VOCAB))
        ids = torch.tensor([i for turn in turns for i in turn.token_ids])
        evidence = Evidence(
            "toy", logits.gather(1, ids[:, None])[:, 0].numpy(), topk.indices.numpy(), topk.values.numpy()
        )
        outcome = float(index % 2)
        status = VerdictStatus.OK if outcome else VerdictStatus.WRONG
        found.append(ScoredEpisode(episode, Verdict(outcome=outcome, status=status, reward=outcome), evidence))
    return found


def _batch(objective: ObjectiveConfig | None = None, count: int = 6, seed: int = 0, **kwargs: Any) -> Batch:
    objective = objective or _objective()
    return build_batch(_scored(count, seed), objective, {"a": 0.75, "b": 0.25}, token_classifier({3}), 0, **kwargs)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    return _model


@pytest.fixture(scope="session")
def objective() -> Callable[..., ObjectiveConfig]:
    return _objective


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    return _batch


@pytest.fixture(scope="session")
def scored() -> Callable[..., list[ScoredEpisode]]:
    return _scored
