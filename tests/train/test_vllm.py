"""The whole loop with rollouts by vLLM."""

import asyncio
import math
from importlib.util import find_spec

import pytest

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.runs import Run
from agentopd.tracking import RunDirectory, read_jsonl
from agentopd.train import train

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]


@pytest.mark.parametrize("engine", ["vllm", "vllm_servers"])
def test_a_run_with_vllm_rollouts(quickstart, small, engine):
    overrides = small(
        f"rollout.engine={engine}",
        "rollout.vllm.max_context=768",
        "rollout.vllm.kv_cache_gb=0.25",
        "rollout.vllm.timeout_s=2000",
        "train.steps=2",
        "model.dtype=float32",
    )
    run = Run.start(load_run_config(quickstart, overrides))
    asyncio.run(train(run, make_console(plain=True)))
    rows = read_jsonl(run.root / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert math.isfinite(row["loss/total"]) and row["time/sync"] > 0
        assert 0 <= row["sync/canary"] < 1e-4 and abs(row["student/mismatch_kl"]) < 1e-6
    assert {file.stem for file in (run.root / "eval").glob("*.json")} == {"base", "teacher", "final"}
    kept = list(RunDirectory.open(run.root).kept_episodes())
    assert {turn.weight_version for item in kept for turn in item.episode.turns} == {0, 1}
