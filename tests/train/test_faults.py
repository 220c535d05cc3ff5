"""Faults in real runs: killed in every phase, a full disk, poisoned evidence. docs/faults.md has the table."""

import asyncio
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.contracts import Evidence, Teacher
from agentopd.runs import Run
from agentopd.tracking import QuarantinedEpisode, RunDirectory, read_jsonl
from agentopd.train import train
from benchmarks import faults

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]  # one run is what the others are held to


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    assert faults.in_a_process(path) == 0
    return path


@pytest.mark.parametrize("kind", ["kill", "term"])
def test_a_run_struck_in_every_phase_ends_like_one_left_alone(whole, tmp_path, kind):
    path = tmp_path / "run"
    assert faults.struck_run(path, faults.PHASES, random.Random(0), kind) == []
    expected, found = faults.results(whole), faults.results(path)
    assert [name for name, value in expected.items() if found.get(name) != value] == []
    assert not list(path.glob("checkpoints/.partial-*"))


@pytest.mark.parametrize(
    ("phase", "step", "measured"), [("base", 0, []), ("verify", 0, ["base"]), ("update", 2, ["base", "teacher"])]
)
def test_a_run_killed_before_its_first_checkpoint_begins_again(whole, tmp_path, phase, step, measured):
    path = tmp_path / "run"
    fault = faults.Fault(phase, step, 0.0)
    assert faults.in_a_process(path, fault, "train.checkpoint_every=4") == faults.EXIT_CODES["kill"]
    assert not any((path / "checkpoints").iterdir())
    assert [row["step"] for row in read_jsonl(path / "metrics.jsonl")] == list(range(1, step + 1))
    kept = {file.stem: file.stat().st_ino for file in path.glob("eval/*.json")}
    assert sorted(kept) == measured
    assert faults.in_a_process(path) == 0
    assert {name: (path / f"eval/{name}.json").stat().st_ino for name in kept} == kept, "what was measured is kept"
    assert faults.results(path) == faults.results(whole)


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_sigterm_after_the_last_step_lets_the_run_end(whole, tmp_path, delay_s):
    last = faults.Fault("checkpoint", len(faults.PHASES), delay_s, "term")
    assert faults.in_a_process(tmp_path / "run", last) == 0
    assert faults.results(tmp_path / "run") == faults.results(whole)


FULL_DISK = """
mount -t tmpfs -o "size=$SIZE" none "$DISK"
"$PYTHON" -m agentopd.cli train "$CONFIG" --plain --set "run_dir=$DISK/run" "$@" 2> "$OUT/said"
echo $? > "$OUT/code"
ls -A "$DISK/run/checkpoints" > "$OUT/checkpoints"
mount -o remount,size=1g "$DISK"
"$PYTHON" -m agentopd.cli resume "$DISK/run" --plain && cp -r "$DISK/run" "$OUT/run"
"""


def on_a_small_disk(tmp_path: Path, size: str, *overrides: str) -> list[str]:
    """A run on a disk that fills, resumed with more space and copied to ``run``; the checkpoints it had when it fell.

    A checkpoint of the micro student takes 23.1 MiB, its export 3.3.
    """
    alone = ["unshare", "--mount", "--user", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own, for a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    environment = {"DISK": disk, "OUT": tmp_path, "SIZE": size, "PYTHON": sys.executable, "CONFIG": faults.CONFIG}
    settings = [part for override in (*faults.OVERRIDES, *overrides) for part in ("--set", override)]
    subprocess.run(
        ["env", *(f"{k}={v}" for k, v in environment.items()), *alone, "sh", "-c", FULL_DISK, "sh", *settings],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (line,) = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("error")]
    assert "is full: free some of it" in line and f"agentopd resume {disk}/run" in line
    assert (tmp_path / "code").read_text() == "1\n"
    return (tmp_path / "checkpoints").read_text().split()


def test_a_full_disk_stops_a_run_with_one_line_and_its_checkpoints_whole(whole, tmp_path):
    assert on_a_small_disk(tmp_path, "52m") == ["step-000001", "step-000002"]
    assert faults.results(tmp_path / "run") == faults.results(whole)


def test_a_disk_that_is_full_at_the_end_costs_a_resume_and_no_step(tmp_path):
    assert on_a_small_disk(tmp_path, "25m", "train.steps=1") == ["step-000001"]
    found = faults.results(tmp_path / "run")
    assert [row["step"] for row in found["metrics"]] == [1] and "final.json" in found


class Flawed:
    """The teacher, but for one number of one episode."""

    def __init__(self, real: Teacher) -> None:
        self.name, self.max_top_k = real.name, real.max_top_k
        self.spoilt: list[str] = []
        self._real = real

    async def score(self, episodes, top_k) -> list[Evidence]:
        first, *rest = await self._real.score(episodes, top_k)
        spoilt = first.teacher_logprobs.copy()
        spoilt[0] = np.nan
        self.spoilt.append(episodes[0].id)
        return [replace(first, teacher_logprobs=spoilt), *rest]

    async def aclose(self) -> None:
        await self._real.aclose()


def test_a_poisoned_episode_is_quarantined_and_the_run_goes_on(quickstart, small):
    run = Run.start(load_run_config(quickstart, small("train.steps=1", "tracking.episodes_per_step=12")))
    flawed = run.teachers.by_key["default"] = Flawed(run.teachers.by_key["default"])
    asyncio.run(train(run, make_console(plain=True)))
    (row,) = read_jsonl(run.root / "metrics.jsonl")
    assert (row["batch/quarantined"], row["batch/rows"] - row["batch/anchors"]) == (1, 11)
    directory = RunDirectory.open(run.root)
    (line,) = (directory.quarantined / "step_000001.jsonl").read_text().splitlines()
    found = QuarantinedEpisode.model_validate_json(line)
    assert found.episode.id == flawed.spoilt[0] and "log-prob nan at sampled token 0" in found.reason
    assert np.isnan(found.teacher_logprobs[0]) and np.isfinite(found.teacher_logprobs[1:]).all()
    assert found.episode.id not in {kept.episode.id for kept in directory.kept_episodes()}
