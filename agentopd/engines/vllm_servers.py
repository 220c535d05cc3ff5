"""vLLM in servers of its own, token ids over HTTP: some that are started here, some that run elsewhere, or both.

Weights reach them through a folder that they can read. What they sample is checked like every engine's, by a canary
after every sync; ``pool`` looks after servers that die, hang, or come back with other weights.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from agentopd.config.engines import ServersConfig, VLLMConfig
from agentopd.contracts import Generation, GenerationRequest
from agentopd.engines.background import BackgroundLoop, Gate
from agentopd.engines.canary import Canary
from agentopd.engines.http import Address, Away
from agentopd.engines.pool import Pool, Replica, Weights
from agentopd.engines.requests import check_fits, context_limit
from agentopd.engines.server_process import ServerProcess
from agentopd.engines.token_client import Sampled, TokenClient
from agentopd.engines.vllm_process import environment, flags, require_vllm, sampler_args
from agentopd.engines.weight_sync import Checkpoint
from agentopd.errors import ConfigError, EngineError, boundary

_MODULE = "vllm.entrypoints.openai.api_server"
_KEPT = 2
"""Folders of weights: the newest, and the one that a server may still be reading."""


class VLLMServersEngine:
    """Samples from copies of ``model`` in several servers, which ``sync_weights`` brings up to date.

    Each rank of a launched job has servers of its own. Raises ``ConfigError`` where there is none for this rank, or
    vLLM is needed and not installed, and ``EngineError`` for what fails later. ``module`` is run to start a server.
    """

    lockstep = False

    def __init__(self, model: Any, vllm: VLLMConfig, servers: ServersConfig, module: str = _MODULE) -> None:
        if module == _MODULE and servers.started:
            require_vllm()
        self.max_context = context_limit(model.config, vllm.max_context)
        self.weight_version = 0
        self._vocab_size: int = model.config.vocab_size
        self._model = model
        self._vllm, self._servers = vllm, servers
        self._label = uuid.uuid4().hex[:8]
        self._canary = Canary(model, self.max_context, vllm.canary_bound)
        self._checkpoints: list[Checkpoint] = []
        self._turns = Gate()
        with ExitStack() as started, boundary(EngineError, "starting vLLM's servers"):
            self._folder = self._make_folder(started)
            self._loop = BackgroundLoop("vllm-servers")
            started.callback(self._loop.close)
            self._pool = Pool(self._replicas(module), servers, vllm.timeout_s, self._check_again)
            started.callback(lambda: self._wait(self._pool.close()))
            self._wait(self._pool.start(self._write()))
            self._wait(self._agree_on_context())
            self._check()
            self._started = started.pop_all()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One continuation per request, in order; cancelling the call aborts them in the servers."""
        for request in requests:
            check_fits(request, self.max_context)
            if not 0 <= min(request.token_ids) <= max(request.token_ids) < self._vocab_size:
                # vLLM would end on it, and every server it is asked of next.
                raise EngineError(f"a request has ids beyond the student's vocabulary of {self._vocab_size}")
        with boundary(EngineError, "generating with vLLM's servers"):
            return await self._loop.run(self._generate(requests))

    def updating(self) -> AbstractContextManager[object]:
        """Nothing to hold back: the servers sample from weights of their own."""
        return nullcontext()

    def sync_weights(self, version: int) -> dict[str, float]:
        """Give every server the learner's weights, and ask the canary on each.

        Turns under way end first, and others wait. Returns ``sync/canary``, the largest of the servers' mean
        differences in nats, and ``sync/replicas``, how many have the weights. Raises ``EngineError`` above its bound.
        """
        with boundary(EngineError, f"bringing vLLM's servers to weight version {version}"), self._between_turns():
            self.weight_version = version
            self._canary.forget()
            self._wait(self._pool.load(self._write()))
            return self._check()

    def sleep(self) -> None:
        """Nothing to free: the servers do not share the learner's memory."""

    async def aclose(self) -> None:
        """End the servers that were started here, and remove the weights left for them."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """``aclose`` for callers without an event loop."""
        self._started.close()

    @property
    def replicas(self) -> list[Replica]:
        """The servers."""
        return list(self._pool.replicas)

    def _make_folder(self, started: ExitStack) -> Path:
        parent = self._servers.folder
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="agentopd-servers-", dir=parent))
        folder.chmod(0o755)
        started.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _replicas(self, module: str) -> list[Replica]:
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        urls = self._servers.urls[rank::ranks]
        addresses = [Address.parse(url, "rollout.servers.urls") for url in urls]
        elsewhere = [Replica(f"server {address}", TokenClient(address)) for address in addresses]
        here = [
            Replica(f"server {number}", None, self._process(module, number, rank * self._servers.started + number))
            for number in range(self._servers.started)
        ]
        if not (elsewhere or here):
            raise ConfigError(f"rank {rank} has no server: give at least {ranks} rollout.servers.urls, or replicas")
        return [*here, *elsewhere]

    def _process(self, module: str, number: int, place: int) -> ServerProcess:
        variables = environment(self._vllm.timeout_s) | {
            # Without them a server takes no weights, and vLLM forks, which the launcher does not follow.
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        if self._servers.gpus:
            if place >= len(self._servers.gpus):
                raise ConfigError(f"rollout.servers.gpus names {len(self._servers.gpus)}, and {place + 1} are needed")
            variables["CUDA_VISIBLE_DEVICES"] = str(self._servers.gpus[place])
        args = {
            **sampler_args(self._vllm, self._model.dtype, self.max_context),
            "hf_overrides": Checkpoint.overrides,
            "enable_scale_out": True,
            "disable_uvicorn_access_log": True,
            "served_model_name": "student",
        }
        return ServerProcess(module, flags(args), variables, self._folder / f"server-{number}.log")

    def _write(self) -> Weights:
        """Leave the current weights in a folder of their own: a server may still be reading the ones before."""
        label = f"{self._label}:{self.weight_version}"
        path = self._folder / f"weights-{self.weight_version:06d}-{len(self._checkpoints)}"
        self._checkpoints.append(Checkpoint(self._model, path))
        for file in path.iterdir():
            file.chmod(0o644)  # servers may run as another user
        for old in self._checkpoints[:-_KEPT]:
            old.remove()
        return Weights(path, label)

    @contextmanager
    def _between_turns(self) -> Iterator[None]:
        # A turn that meets a fault is asked again, after an outage at the worst.
        self._loop.wait(self._turns.close(), self._patience)
        try:
            yield
        finally:
            self._loop.wait(self._turns.open(), self._vllm.timeout_s)

    @property
    def _patience(self) -> float:
        return self._servers.outage_s + self._servers.turn_timeout_s + self._vllm.timeout_s

    def _wait(self, work: Any) -> Any:
        return self._loop.wait(work, self._patience)

    async def _agree_on_context(self) -> None:
        for replica in self._pool.replicas:
            most = await replica.reach().max_context()
            if most < self.max_context and self._vllm.max_context is not None:
                raise EngineError(
                    f"{replica.name} takes {most} tokens, and rollout.vllm.max_context is {self.max_context}"
                )
            self.max_context = min(self.max_context, most)

    def _check(self) -> dict[str, float]:
        """Ask the canary on every server that is up; where none lives to answer, on who comes back.

        One forward pass, so that under ZeRO-3 the ranks stay together; who came up meanwhile is held to its result.
        """
        lives, sampled = self._wait(self._sampled_for_canary())
        gap = self._canary.check_several(sampled)
        self._wait(self._hold_newcomers(lives))
        return {"sync/canary": gap, "sync/replicas": float(len(self._pool.up))}

    async def _sampled_for_canary(self) -> tuple[dict[str, int], list[list[Generation]]]:
        """The life in which each was asked, and what it sampled; who fails leaves the pool until it is back."""
        sampled: list[list[Generation]] = []
        while not sampled:
            replicas = await self._pool.some_up()
            lives = {replica.name: replica.life for replica in replicas}
            answers = await asyncio.gather(*map(self._canary_on, replicas), return_exceptions=True)
            for replica, answer in zip(replicas, answers, strict=True):
                if isinstance(answer, Away):
                    self._pool.blame(replica, lives[replica.name], str(answer))
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    sampled.append(answer)
        return lives, sampled

    async def _hold_newcomers(self, lives: dict[str, int]) -> None:
        for replica in self._pool.up:
            if (life := replica.life) != lives.get(replica.name):
                try:
                    await self._check_again(replica)
                except Away as exc:
                    self._pool.blame(replica, life, str(exc))

    async def _canary_on(self, replica: Replica) -> list[Generation]:
        # Under the deadline of a start: the first log-probs that a server gives cost it a compilation.
        limit = self._vllm.timeout_s
        asked = (self._pool.sample_on(replica, request, limit) for request in self._canary.requests)
        return [self._generation(made) for made in await asyncio.gather(*asked)]

    async def _check_again(self, replica: Replica) -> None:
        self._canary.check_again(await self._canary_on(replica))

    async def _generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        async def turn(request: GenerationRequest) -> Generation:
            async with self._turns:
                return self._generation(await self._pool.sample(request))

        return list(await asyncio.gather(*map(turn, requests)))

    def _generation(self, made: Sampled) -> Generation:
        return Generation(made.token_ids, made.logprobs, made.finish_reason, self.weight_version)
