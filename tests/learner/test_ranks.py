"""Two ranks on halves of a batch end where one rank on the whole batch does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]


def run(out: Path, ranks: int, stage: int, preset: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(WORKER), str(out), str(stage), preset]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (out / "export" / "model.safetensors").is_file()
    return torch.load(out / "weights.pt"), json.loads((out / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "stage"),
    [
        ("verifier_calibrated", 2),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [("verifier_calibrated", 0), ("sg_opd", 0), ("aopd", 0), ("topk_opd", 0)]
        ),
    ],
)
def test_two_ranks_equal_one(tmp_path, preset, stage):
    one, one_metrics = run(tmp_path / "one", 1, stage, preset)
    two, two_metrics = run(tmp_path / "two", 2, stage, preset)
    assert set(one) == set(two)
    for name, weight in one.items():
        assert_close(two[name], weight, atol=1e-4, rtol=0)
    assert two_metrics == pytest.approx(one_metrics, rel=1e-3, abs=1e-5)
