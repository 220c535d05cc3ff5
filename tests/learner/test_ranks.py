"""Ranks on parts of a batch end where one rank on the whole batch does, by every preset and whatever ZeRO splits."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from agentopd.config.presets import PRESETS
from tests.learner import worker
from tests.learner.worker import Case
from tests.ranks import play

EVERY = [Case(path.stem) for path in sorted(worker.RECIPES.glob("*.toml"))]
SPLIT = [Case("verifier_calibrated", stage) for stage in (1, 2, 3)]
JOBS = {1: [*EVERY, *SPLIT], 2: [*EVERY, *SPLIT], 4: SPLIT}
"""What each number of ranks trains, one after the other in the same processes."""


def run(out: Path, ranks: int) -> Path:
    out.mkdir()
    play(worker.run, ranks, out, JOBS[ranks], limit_s=600)
    return out


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Where the job of so many ranks left what it trained."""

    @cache
    def job(ranks: int) -> Path:
        return run(tmp_path_factory.mktemp("jobs") / str(ranks), ranks)

    return job


def left(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and metrics."""
    assert (out / "metrics.json").is_file(), "its processes ended before it did"
    return torch.load(out / "weights.pt"), json.loads((out / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)  # all of a job, for whichever test comes first
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("ranks", "case"),
    [(2, case) for case in EVERY] + [(ranks, case) for ranks in JOBS for case in SPLIT],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_ranks_equal_one(jobs, ranks, case):
    one, one_metrics = left(jobs(1) / Case(case.recipe).name)
    found, metrics = left(jobs(ranks) / case.name)
    assert set(found) == set(one)
    for name, weight in one.items():
        assert_close(found[name], weight, atol=1e-4, rtol=0)
    assert metrics == pytest.approx(one_metrics, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("ranks", JOBS)
@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_a_job_exports_whole_weights(jobs, ranks, case):
    out = jobs(ranks) / case.name
    stored, (weights, _) = load_file(out / "export" / "model.safetensors"), left(out)
    assert stored and all(torch.equal(weight, weights[name]) for name, weight in stored.items())


def test_every_preset_is_among_them():
    assert {worker.objective_of(case.recipe).preset for case in EVERY} == set(PRESETS)
