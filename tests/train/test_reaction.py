"""Replay that answers what it sees, in real runs."""

import asyncio
from pathlib import Path

import pytest

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train

pytestmark = pytest.mark.slow

BUDGETED = (
    *("replay.policy=budgeted", "replay.share=0.5", "replay.max_share=0.8", "suite.retention.tolerated_drop=0.02"),
    *("train.prompts_per_step=24", "train.eval_every=50", "train.checkpoint_every=none", "learner.warmup_steps=0"),
)


def test_a_skill_that_a_step_destroys_is_replayed_more_in_the_next(quickstart, small):
    """Half of 24 prompts are math's: they are the reference; then one update with an absurd rate breaks the student."""
    config = load_run_config(quickstart, small(*BUDGETED, "train.steps=3", "learner.lr=1.0"))
    asyncio.run(train(Run.start(config), make_console(plain=True)))
    rows = read_jsonl(Path(config.run_dir) / "metrics.jsonl")
    assert rows[0]["math/success"] > 0.6 and rows[1]["math/success"] == 0
    assert [row["replay/share/math"] for row in rows] == [0.5, 0.5, 0.8]
    (event,) = read_jsonl(Path(config.run_dir) / "events.jsonl")
    assert (event["step"], event["action"], event["skill"]) == (2, "replay_shares", "math")
    assert (event["before"], event["after"]) == (0.5, 0.8) and event["drop"] > 0.4
