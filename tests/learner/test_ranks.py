"""Ranks on parts of a batch end where one rank on the whole batch does, whatever ZeRO splits over them."""

import json
import multiprocessing
import os
import socket
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.learner import worker

Left = tuple[dict[str, torch.Tensor], dict[str, float]]


def run(out: Path, ranks: int, stage: int, preset: str) -> Left:
    """Processes of one server that has imported everything: starting one costs little."""
    out.mkdir()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agentopd.learner.deepspeed", "agentopd.batching", "deepspeed"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=worker.run, args=(i, ranks, port, out, stage, preset)) for i in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
    assert (out / "export" / "model.safetensors").is_file()
    return torch.load(out / "weights.pt"), json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank without ZeRO leaves, by preset."""

    @cache
    def run_alone(preset: str) -> Left:
        return run(tmp_path_factory.mktemp("alone") / preset, 1, 0, preset)

    return run_alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "ranks", "stage"),
    [
        *(("verifier_calibrated", ranks, stage) for ranks in (1, 2, 4) for stage in (1, 2, 3)),
        *(
            pytest.param(preset, 2, stage, marks=pytest.mark.long)
            for preset, stage in [("verifier_calibrated", 0), ("sg_opd", 0), ("aopd", 0), ("topk_opd", 0)]
        ),
    ],
)
def test_ranks_equal_one(tmp_path, alone, preset, ranks, stage):
    one, one_metrics = alone(preset)
    found, metrics = run(tmp_path / "out", ranks, stage, preset)
    assert set(found) == set(one)
    for name, weight in one.items():
        assert_close(found[name], weight, atol=1e-4, rtol=0)
    assert metrics == pytest.approx(one_metrics, rel=1e-3, abs=1e-5)
