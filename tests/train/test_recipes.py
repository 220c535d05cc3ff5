"""Every recipe trains end to end on the micro suite: a few prompts, as few steps as show every stage."""

import asyncio
import math
from pathlib import Path

import pytest

from agentopd.config import PRESETS, load_run_config
from agentopd.console import make_console
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).resolve().parents[2] / "configs/recipes"
FEWER_TASKS = [f"suite.skills.{name}.num_train_tasks=4" for name in ("math", "repair", "store")]
"""Drawing a thousand takes longer than training on these."""


def test_every_preset_has_a_recipe():
    assert {path.stem for path in RECIPES.glob("*.toml")} >= set(PRESETS)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_trains(recipe, small, honest_server):
    config = load_run_config(recipe)
    more = [f"judge.base_url={honest_server.base_url}", "judge.api_key_env=none"] if config.judge else []
    steps = 5 if config.objective.stages else 1
    more += [*FEWER_TASKS, f"train.steps={steps}", "train.prompts_per_step=3", "eval.tasks_per_skill=1"]
    config = load_run_config(recipe, small(*more, stages=True))
    asyncio.run(train(Run.start(config), make_console(plain=True)))
    rows = read_jsonl(Path(config.run_dir) / "metrics.jsonl")
    assert len(rows) == steps
    for done, row in enumerate(rows):
        blocks = config.objective.at(done / steps)
        assert math.isfinite(row["loss/total"])
        assert row.get("learner/grad_norm", 0.0) >= 0
        if blocks.source.kind in ("student", "offline") or blocks.source.model_dump().get("filter_correct") is False:
            assert row["rollout/episodes"] == 3 * config.rollout.group_size
        if blocks.needs_teacher:
            special = row.get("distill/masked_special", 0.0)
            unaligned = blocks.alignment.kind != "same" or blocks.masks.suffix != "off"
            assert row["distill/coverage"] + special > (0.5 if unaligned else 0.99)
