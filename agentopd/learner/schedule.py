"""The learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from agentopd.config.run import LearnerConfig


def learning_rate(config: LearnerConfig, step: int, total_steps: int) -> float:
    """Rate of ``step`` (from 0): linear warm-up, then constant, linear or cosine down to ``min_lr_ratio``.

    The warm-up's first step already moves (rate lr / warmup_steps); past ``total_steps`` the rate stays at its end.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def scheduled_rate(config: LearnerConfig, step: int, stretches: Sequence[int]) -> float:
    """Rate of ``step`` (from 0) where every stretch of so many steps has a schedule of its own; the last one lasts."""
    start = 0
    for length in stretches[:-1]:
        if step < start + length:
            return learning_rate(config, step - start, length)
        start += length
    return learning_rate(config, step - start, stretches[-1])
