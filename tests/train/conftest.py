"""A run small enough for tests: the shipped micro models, a few prompts, one or two steps."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SMALL = (
    "train.prompts_per_step=6",
    "rollout.group_size=2",
    "eval.tasks_per_skill=4",
    "train.checkpoint_every=1",
    "threads=1",
)


@pytest.fixture
def quickstart() -> Path:
    return ROOT / "configs/quickstart.toml"


@pytest.fixture
def small(tmp_path):
    """Overrides for a small run in a fresh directory, the objective without its stages; more can be given."""

    def overrides(*more: str, name: str = "run", stages: bool = False) -> list[str]:
        return [*SMALL, *([] if stages else ["objective.stages=[]"]), f"run_dir={tmp_path / name}", *more]

    return overrides
