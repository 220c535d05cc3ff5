"""vLLM in servers of its own, token ids over HTTP: some that are started here, some that run elsewhere, or both.

Weights reach them through a folder that they can read, or from GPU to GPU (``broadcast``), with the folder for those
who come back. What they sample is checked like every engine's, by a canary after every sync; ``pool`` looks after
servers that die, hang, or come back with other weights.

Servers that run elsewhere are shared by the ranks of a launched job: the first rank writes the weights once, gives them
to every server and asks the canary, and all ranks sample. Ranks meet between turns only, on the thread of their caller.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from agentopd.config.engines import ServersConfig, VLLMConfig
from agentopd.contracts import Generation, GenerationRequest
from agentopd.engines.background import BackgroundLoop, Gate
from agentopd.engines.broadcast import SERVER_ARGS, Broadcast, OpenTrainer, WeightStream
from agentopd.engines.canary import Canary
from agentopd.engines.http import Address, Away
from agentopd.engines.pieces import in_pieces
from agentopd.engines.pool import Pool, Replica
from agentopd.engines.requests import check_fits, context_limit
from agentopd.engines.server_process import ServerProcess
from agentopd.engines.together import together
from agentopd.engines.token_client import Sampled, TokenClient
from agentopd.engines.vllm_process import (
    KEYS,
    blaming_the_cache,
    environment,
    flags,
    require_vllm,
    sampler_args,
    scratch_folder,
)
from agentopd.engines.weight_folder import WeightFolder, Weights
from agentopd.engines.weight_sync import Checkpoint
from agentopd.errors import ConfigError, EngineError, boundary
from agentopd.learner import runtime
from agentopd.weights import full_weights

_MODULE = "vllm.entrypoints.openai.api_server"


class VLLMServersEngine:
    """Samples from copies of ``model`` in several servers, which ``sync_weights`` brings up to date.

    In a launched job every rank has those of its own that it starts, and shares those of ``servers.urls``: every rank
    must then make one, and call ``sync_weights``. Raises ``ConfigError`` where vLLM is needed and not installed, or the
    config does not fit the job, and ``EngineError`` for what fails later, on every rank alike. ``module`` is run to
    start a server, and ``open_trainer`` replaces vLLM's sender of weights. With ``cut_turns`` an update does not wait
    for the turns under way, which go on after it from the new weights.
    """

    lockstep = False

    def __init__(
        self,
        model: Any,
        vllm: VLLMConfig,
        servers: ServersConfig,
        module: str = _MODULE,
        open_trainer: OpenTrainer | None = None,
        cut_turns: bool = False,
    ) -> None:
        if vllm.sync == "nccl" and open_trainer is None and model.device.type != "cuda":
            raise ConfigError(
                f"rollout.vllm.sync = 'nccl' sends from GPU to GPU, and the student is on {model.device}: use 'disk'"
            )
        if (module == _MODULE and servers.started) or (vllm.sync == "nccl" and open_trainer is None):
            require_vllm()
        self.max_context = context_limit(model.config, vllm.max_context)
        self.weight_version = 0
        self._vocab_size: int = model.config.vocab_size
        self._model = model
        self._vllm, self._servers = vllm, servers
        self._canary = Canary(model, self.max_context, vllm.canary_bound)
        self._open_trainer = open_trainer
        self._turns = Gate()
        self._cuts = cut_turns
        self._shared = self._is_shared()
        with ExitStack() as started, boundary(EngineError, "starting vLLM's servers"):
            together(lambda: self._prepare(started, module))
            weights = self._write()
            args = sampler_args(vllm, model.dtype, self.max_context)
            with blaming_the_cache(model.config, args, KEYS) if servers.started else nullcontext():
                together(lambda: self._wait(self._pool.start(weights, self._mine)))
            together(lambda: self._wait(self._join(weights)))
            if self._broadcast is not None:
                started.callback(self._broadcast.leave)
                together(self._meet)
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
        """Give every server the learner's weights, and ask the canary on each. Every rank must call it.

        No turn is under way meanwhile, on any rank, and new ones wait. Returns ``sync/canary``, the largest of the
        servers' mean differences in nats, ``sync/replicas``, how many this rank can ask, and of ``nccl`` ``sync/sent``,
        how many servers took the weights by it. Raises ``EngineError`` above its bound, and for what failed on another
        rank.
        """
        with boundary(EngineError, f"bringing vLLM's servers to weight version {version}"), self._between_turns():
            self.weight_version = version
            self._canary.forget()
            if self._broadcast is not None:
                sent = self._send(self._broadcast)
                return {"sync/sent": float(sent), **self._check()}
            weights = self._write()
            together(lambda: self._wait(self._pool.load(weights, self._mine)))
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

    def _prepare(self, started: ExitStack, module: str) -> None:
        """What needs no other rank: a folder, a loop, and a pool whose servers are not asked yet."""
        self._folder = WeightFolder(self._model, self._servers.folder if self._is_first else None)
        started.callback(self._folder.remove)
        self._scratch = started.enter_context(scratch_folder())
        self._loop = BackgroundLoop("vllm-servers")
        started.callback(self._loop.close)
        here, elsewhere = self._replicas(module)
        self._mine = [*here, *elsewhere] if self._is_first else here
        """Those to which this rank brings the weights of a sync, and that it asks the canary of."""
        self._broadcast = self._make_broadcast() if self._vllm.sync == "nccl" else None
        self._pool = Pool([*here, *elsewhere], self._servers, self._vllm.timeout_s, self._check_again)
        started.callback(lambda: self._wait(self._pool.close()))

    def _make_broadcast(self) -> Broadcast:
        stream = WeightStream(self._model, keeps=self._is_first)
        return Broadcast(stream, self._loop, self._vllm.timeout_s, self._open_trainer)

    def _is_shared(self) -> bool:
        """Whether there are other ranks that sample from the same servers."""
        if not self._servers.urls or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return False
        runtime.start()
        machines = set(runtime.gather_objects(socket.gethostname()))
        if self._servers.folder is None and len(machines) > 1:
            raise ConfigError(
                f"the ranks run on {len(machines)} machines and share rollout.servers.urls: "
                "give rollout.servers.folder, a folder that the servers and the ranks see under the same path"
            )
        return True

    @property
    def _first(self) -> int:
        """The rank that writes the weights of this one's servers."""
        return 0 if self._shared else runtime.rank()

    @property
    def _is_first(self) -> bool:
        return runtime.rank() == self._first

    def _replicas(self, module: str) -> tuple[list[Replica], list[Replica]]:
        """Servers that this rank starts, and those that run elsewhere."""
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        count, gpus, urls = self._servers.started, len(self._servers.gpus), self._servers.urls
        if gpus and gpus < count * ranks:
            raise ConfigError(f"rollout.servers.gpus names {gpus}, and {count * ranks} are needed")
        # A rank's first episodes go to the servers it names first: each rank begins elsewhere.
        urls = urls[(skipped := rank * len(urls) // ranks) :] + urls[:skipped]
        addresses = [Address.parse(url, "rollout.servers.urls") for url in urls]
        elsewhere = [Replica(f"server {address}", TokenClient(address)) for address in addresses]
        here = [
            Replica(f"server {number}", None, self._process(module, number, rank * count + number))
            for number in range(count)
        ]
        return here, elsewhere

    def _process(self, module: str, number: int, place: int) -> ServerProcess:
        variables = environment(self._vllm.timeout_s, self._scratch) | {
            # Without them a server takes no weights, and vLLM forks, which the launcher does not follow.
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        if self._servers.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = str(self._servers.gpus[place])
        args = {
            **sampler_args(self._vllm, self._model.dtype, self.max_context),
            **(SERVER_ARGS if self._vllm.sync == "nccl" else {}),
            "hf_overrides": Checkpoint.overrides,
            "enable_scale_out": True,
            "disable_uvicorn_access_log": True,
            "served_model_name": "student",
        }
        return ServerProcess(module, flags(args), variables, self._folder.path / f"server-{number}.log")

    def _write(self) -> Weights:
        """The current weights on disk, as this rank or the first one wrote them."""

        def work() -> Weights | None:
            if not self._is_first:
                self._read_along()
                return None
            weights = self._folder.next(self.weight_version)
            self._folder.write(weights)
            return weights

        return self._of_the_first(together(work))

    def _meet(self) -> None:
        """Make a group with this rank's servers, so that one which takes no part is found at once."""
        assert self._broadcast is not None
        try:
            self._broadcast.join(self._mine)
        except (Away, EngineError) as exc:
            how = f"--weight-transfer-config '{json.dumps(SERVER_ARGS['weight_transfer_config'])}'"
            raise EngineError(
                f"{exc}; rollout.vllm.sync is 'nccl': start servers of your own with {how}, or use 'disk'"
            ) from None

    def _of_the_first(self, made: list[Weights | None]) -> Weights:
        weights = made[self._first]
        assert weights is not None
        return weights

    @torch.no_grad()
    def _read_along(self) -> None:
        for _ in full_weights(self._model):
            pass  # under ZeRO-3 the first rank needs this one's part of each

    def _send(self, broadcast: Broadcast) -> int:
        """Give this rank's servers the weights from GPU to GPU, and the rest a folder; how many took them."""
        first = together(lambda: self._folder.next(self.weight_version) if self._is_first else None)
        weights = self._of_the_first(first)
        claimed: list[Replica] = []
        sent: list[Replica] = []

        def claim() -> None:
            up = [replica for replica in self._mine if replica.is_up]
            claimed[:] = self._wait(self._pool.claim(weights, up))

        def work() -> None:
            lost = broadcast.send(claimed)
            if self._is_first:
                self._folder.write_behind(weights, broadcast.stream.take_kept())
            sent[:] = self._wait(self._pool.settle(weights, claimed, lost))

        together(claim)  # by itself: once a rank sends, all of them must read the weights to their end
        together(work)
        together(lambda: self._wait(self._pool.load(weights, ())))
        return len(sent)

    @contextmanager
    def _between_turns(self) -> Iterator[None]:
        try:
            # A turn that meets a fault is asked again, after an outage at the worst.
            together(lambda: self._wait(self._ended_turns()))
            yield
        finally:
            self._loop.wait(self._next_turns(), self._vllm.timeout_s)

    async def _ended_turns(self) -> None:
        await self._turns.close(self._pool.cut if self._cuts else None)
        await self._pool.hold()

    async def _next_turns(self) -> None:
        await self._pool.release()
        await self._turns.open()

    @property
    def _patience(self) -> float:
        return self._servers.outage_s + self._servers.turn_timeout_s + self._vllm.timeout_s

    def _wait(self, work: Any) -> Any:
        return self._loop.wait(work, self._patience)

    async def _join(self, weights: Weights) -> None:
        """Take up servers to which another rank has given the weights, and find the context that all of them hold."""
        await self._pool.start(weights, [replica for replica in self._pool.replicas if replica not in self._mine])
        for replica in self._pool.replicas:
            most = await replica.reach().max_context()
            if most < self.max_context and self._vllm.max_context is not None:
                raise EngineError(
                    f"{replica.name} takes {most} tokens, and rollout.vllm.max_context is {self.max_context}"
                )
            self.max_context = min(self.max_context, most)

    def _check(self) -> dict[str, float]:
        """Ask the canary on every server that is up, shared ones for all ranks; where none lives, on who comes back.

        One forward pass on every rank, so that under ZeRO-3 they stay together; who came up meanwhile is held to its
        result.
        """
        answers = together(lambda: self._wait(self._sampled_for_canary()))
        lives, mine = answers[runtime.rank()]
        sampled = mine if self._is_first else [*answers[self._first][1], *mine]

        def checked() -> float:
            gap = self._canary.check_several(sampled)
            self._wait(self._hold_newcomers(lives))
            return gap

        gap = max(together(checked))
        return {"sync/canary": gap, "sync/replicas": float(len(self._pool.up))}

    async def _sampled_for_canary(self) -> tuple[dict[str, int], list[list[Generation]]]:
        """The life in which each was asked, and what it sampled; who fails leaves the pool until it is back.

        Servers that another rank asks count as asked.
        """
        sampled: list[list[Generation]] = []
        while not sampled:
            replicas = await self._pool.some_up()
            lives = {replica.name: replica.life for replica in replicas}
            asked = [replica for replica in replicas if replica in self._mine]
            if not asked:
                break
            answers = await asyncio.gather(*map(self._canary_on, asked), return_exceptions=True)
            for replica, answer in zip(asked, answers, strict=True):
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
        async def one(request: GenerationRequest) -> Generation:
            return self._generation(await self._pool.sample(request))

        return list(await asyncio.gather(*(in_pieces(request, self._turns, one) for request in requests)))

    def _generation(self, made: Sampled) -> Generation:
        return Generation(made.token_ids, made.logprobs, made.finish_reason, self.weight_version)
