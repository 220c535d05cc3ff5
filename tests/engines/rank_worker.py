"""One rank of a job whose ranks share servers: what it does in a test, and what it leaves behind for it."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from agentopd.config.engines import ServersConfig, VLLMConfig
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.run import LearnerConfig
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd.engines import VLLMServersEngine
from agentopd.engines.http import Address, ask_json
from agentopd.errors import EngineError
from agentopd.learner import runtime
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.models import load_model
from tests.engines.socket_trainer import SocketTrainer
from tests.engines.token_server import read
from tests.tiny import qwen3

ROOT = Path(__file__).resolve().parents[2]
COUNT, EPISODES = 8, 6
LARGE = 1e3
"""A bound for a canary of servers that sample by arithmetic."""


@dataclass
class Rank:
    """The student under a ZeRO stage, the engine, and what this rank saw."""

    urls: list[str]
    out: Path
    stage: int = 0
    bound: float | None = LARGE
    sync: Literal["disk", "nccl"] = "disk"
    student: str = ""
    """A model's name; a tiny random one if there is none."""
    model: Any = field(init=False)
    engine: VLLMServersEngine = field(init=False)
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = load_model(self.student, "float32") if self.student else qwen3(400, max_position_embeddings=128)
        vllm = VLLMConfig(canary_bound=self.bound, timeout_s=60.0, sync=self.sync)
        servers = ServersConfig(urls=self.urls, folder=str(self.out / "weights"), turn_timeout_s=60, outage_s=60)
        trainer = SocketTrainer if self.sync == "nccl" else None
        self.engine = VLLMServersEngine(
            self.model, vllm, servers, open_trainer=trainer
        )  # before the learner, as in a run
        config = LearnerConfig(zero_stage=self.stage)
        self.learner = DeepSpeedLearner(self.model, config, ObjectiveConfig(preset="vanilla"), 9)

    def update(self, step: int) -> None:
        """Move the weights, and give them to the servers."""
        weights = list(self.model.parameters())
        with torch.no_grad():
            if self.stage == 3:
                from deepspeed import zero

                with zero.GatheredParameters(weights, modifier_rank=0):
                    self._move(weights)
            else:
                self._move(weights)
        self.engine.sync_weights(step)

    def _move(self, weights: list[torch.Tensor]) -> None:
        for weight in weights if runtime.rank() == 0 or self.stage < 3 else ():
            weight.add_(0.01)

    def sample(self) -> None:
        """Play the first turns of some episodes; remember them and what the newest folder of weights holds."""
        first = EPISODES * runtime.rank()
        params = SamplingParams(max_tokens=COUNT)
        asked = [GenerationRequest((7,), params, first + i, f"{i}") for i in range(EPISODES)]
        made = asyncio.run(self.engine.generate(asked))
        folders: list[Path] = []
        while not folders or not folders[-1].name.startswith(f"weights-{self.engine.weight_version:06d}"):
            folders = sorted((self.out / "weights").glob("agentopd-servers-*/weights-*"), key=lambda x: x.name)
        self.seen.append(
            {
                "tokens": [x.token_ids for x in made],
                "logprobs": [x.logprobs for x in made],
                "version": sorted({x.weight_version for x in made}),
                "weights": read(folders[-1]),
                "folders": [x.name for x in folders],
            }
        )

    def state(self, url: str) -> Any:
        """What a server counts."""
        return asyncio.run(ask_json(Address.parse(url, "url"), "GET", "/state", None, 10))


def updates(rank: Rank) -> None:
    """Three syncs with turns between them."""
    rank.sample()
    for step in (1, 2, 3):
        rank.update(step)
        rank.sample()
        runtime.barrier()  # what a rank saw of the folder is of this step


def a_server_restarts(rank: Rank) -> None:
    """The first server is killed and comes back without the weights, between syncs and again around one."""
    victim, other = Address.parse(rank.urls[0], "url"), None
    rank.update(1)
    for step in (2, 3):
        if runtime.rank() == 0:
            if other is not None:
                other.kill()
                other.wait()
            else:
                os.kill(int((rank.out / "pid").read_text()), 9)
        runtime.barrier()
        if step == 3:
            rank.update(step)
        if runtime.rank() == 0:
            module = [sys.executable, "-m", "tests.engines.token_server", "--host", victim.host]
            words = [*module, "--port", str(victim.port), "--model", str(rank.out / "empty")]
            other = subprocess.Popen(words, cwd=ROOT)
        deadline = time.monotonic() + 60
        while True:  # until it has answered every rank
            rank.sample()
            life = next(x.life for x in rank.engine.replicas if x.name.endswith(f":{victim.port}"))
            if not runtime.all_reduce_max(life < step) or time.monotonic() > deadline:
                break
            rank.seen.pop()
        runtime.barrier()
    if runtime.rank() == 0:
        rank.seen[-1]["state"] = rank.state(rank.urls[0])
    runtime.barrier()
    if other is not None:
        other.kill()
        other.wait()


def one_canary_fails(rank: Rank) -> None:
    """The second rank alone finds its canary out of bounds."""
    if runtime.rank() == 1:
        rank.engine._canary.bound = 1e-9
    rank.update(1)


def nothing_can_be_written(rank: Rank) -> None:
    """The folder is gone, which only the rank that writes can see."""
    shutil.rmtree(rank.out / "weights", ignore_errors=True)
    rank.update(1)


def nothing_can_be_claimed(rank: Rank) -> None:
    """A server refuses the first rank, before weights are sent that the other must read along."""
    if runtime.rank() == 0:

        async def refused(*_: Any) -> Any:
            raise EngineError("403 Forbidden")

        rank.engine._pool.claim = refused
    rank.update(1)


SCENARIOS: dict[str, Callable[[Rank], None]] = {
    x.__name__: x
    for x in (updates, a_server_restarts, one_canary_fails, nothing_can_be_written, nothing_can_be_claimed)
}


def run(number: int, ranks: int, port: int, out: Path, scenario: str, options: dict[str, Any]) -> None:
    """What a launcher would start: the rank finds the others by its environment."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in where.items()}
    torch.set_num_threads(1)
    left: dict[str, Any] = {"seen": []}
    rank = None
    try:
        rank = Rank(out=out, **options)
        left["seen"] = rank.seen
        SCENARIOS[scenario](rank)
    except EngineError as exc:
        left["error"] = str(exc)
    (out / f"rank-{number}.json").write_text(json.dumps(left))
    if rank is not None:
        rank.engine.close()
