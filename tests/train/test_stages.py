"""A continual run with a guard, on the shipped micro models: stages, rolling back, and resuming in the middle of it."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import pytest

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.report import build_report
from agentopd.report.collect import collect
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train

pytestmark = pytest.mark.slow

STAGES = """
[[stages]]
name = "first"
steps = 2
skills = ["repair"]
[[stages]]
name = "second"
steps = 2
skills = ["store"]
"""
# A learning rate that breaks the student, so that the guard has something to do.
BREAKING = (
    "learner.lr=3e-2",
    "learner.warmup_steps=0",
    "train.eval_every=1",
    "train.prompts_per_step=4",
    "train.keep_checkpoints=9",
    "eval.tasks_per_skill=4",
    "suite.retention.tolerated_drop=0.01",
    "guard.enabled=true",
    "guard.roll_back=0.05",
)


def metrics(path: Path) -> list[dict]:
    rows = read_jsonl(path / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]


def test_a_guarded_continual_run_acts_and_resumes_exactly(quickstart, small, tmp_path):
    config_file = tmp_path / "continual.toml"
    text = re.sub(r"^steps = .*\n", "", quickstart.read_text(), flags=re.MULTILINE)
    suite = quickstart.parent / "suites/micro.toml"
    config_file.write_text(text.replace('"suites/micro.toml"', f'"{suite}"') + STAGES)
    config = load_run_config(config_file, small(*BREAKING))
    path = Path(config.run_dir)
    asyncio.run(train(Run.start(config), make_console(plain=True)))
    whole = metrics(path)
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    assert "store/success" not in whole[1] and "repair/success" in whole[1]
    assert whole[0]["replay/share/math"] == pytest.approx(0.3)
    assert {"replay/share/math", "replay/share/repair"} <= whole[2].keys()
    assert all(row["teacher/tokens"] > 0 for row in whole) and whole[0]["replay/tokens"] > 0

    events = read_jsonl(path / "events.jsonl")
    assert {"roll_back", "raise_share", "lower_lr"} <= {event["action"] for event in events}
    lowered = next(event for event in events if event["action"] == "lower_lr")
    assert whole[lowered["step"]]["learner/lr"] < whole[0]["learner/lr"]
    stages = {file.stem for file in (path / "eval").glob("*.json")}
    assert {"base", "step_000001", "after_first", "step_000003", "final"} <= stages
    assert set(json.loads((path / "eval/step_000001.json").read_text())["tasks"]) == {"math", "repair"}
    assert set(json.loads((path / "eval/after_first.json").read_text())["tasks"]) == {"math", "repair", "store"}
    matrix = collect(path).retention()
    assert matrix is not None and matrix.by_skill["store"].forward is not None
    assert matrix.by_skill["repair"].verdict is not None and matrix.by_skill["store"].verdict is None
    assert matrix.start_kl[0] == pytest.approx((0, 0, 0), abs=0.02) and max(matrix.start_kl[1][:2]) > 0.05
    assert build_report(path).stat().st_size > 20_000

    for later in (3, 4):  # as if the run had stopped after its second step
        shutil.rmtree(path / f"checkpoints/step-{later:06d}")
    resumed = Run.resume(path)
    assert set(resumed.evals) == {"base", "teacher", "step_000001", "after_first"}, "every skill's first score"
    asyncio.run(train(resumed, make_console(plain=True)))
    assert metrics(path) == whole
    assert read_jsonl(path / "events.jsonl") == events
