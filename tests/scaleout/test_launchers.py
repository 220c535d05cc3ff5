"""Runs under the launchers that docs/scaling.md names: two ranks, each a process that the launcher started."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from agentopd.cli import main
from agentopd.tracking import read_jsonl
from tests.scaleout.conftest import PATHS, ROOT

RUN = """
run_dir = "run"
threads = 1
suite = { skills = [{ name = "math", env = "math" }] }
teachers.default.model = "micro/teacher"
objective = { preset = "verifier_calibrated", stages = [] }
train = { steps = 1, prompts_per_step = 2, checkpoint_every = 1 }
rollout.group_size = 2
eval = { tasks_per_skill = 2, start_kl = false }
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the run that the page starts."""
    (tmp_path / "my_run.toml").write_text(RUN)
    return tmp_path


def environment():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": PATHS, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_deepspeeds_own_argument_is_no_mistake(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "argv", ["cli.py", "--local_rank=1", "train", "absent.toml"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "no config file at 'absent.toml'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_documented_deepspeed_command_trains_on_two_ranks(folder):
    line = re.search(r"^deepspeed --hostfile .*$", (ROOT / "docs/scaling.md").read_text(), re.MULTILINE)
    # A file of hosts makes it ask every one by SSH, this machine too; without, it starts what it would start there.
    here = f"--num_accelerators 2 --master_port {free_port()}"
    words = line[0].replace("--hostfile hosts", here).split()
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (row,) = read_jsonl(folder / "run/metrics.jsonl")
    assert row["rollout/episodes"] == 4
    assert list(folder.glob("run/checkpoints/**/rng_rank1.pt"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_signalling_the_ranks_under_torchrun_saves_and_ends_with_zero(folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = ["-m", "agentopd.cli", "train", "my_run.toml", "--plain", "--set", "train.steps=1000"]
    log, ranks = folder / "log", []
    with log.open("w") as out:
        agent = subprocess.Popen([*launcher, *run], cwd=folder, env=environment(), stdout=out, stderr=out)
    try:
        while not (folder / "run/metrics.jsonl").is_file():
            assert agent.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        ranks = [child for child in psutil.Process(agent.pid).children() if "train" in child.cmdline()]
        assert len(ranks) == 2
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        assert agent.wait(200) == 0, log.read_text()[-2000:]
    finally:
        for process in ranks or [agent]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    rows = read_jsonl(folder / "run/metrics.jsonl")
    assert f"stopped after step {len(rows)}, saved: agentopd resume run" in log.read_text()
    assert list(folder.glob(f"run/checkpoints/step-{len(rows):06d}/**/rng_rank1.pt"))
