"""How the learner's weights reach a vLLM engine in another process.

On a CPU through files, with the output head always written out: vLLM keeps a repacked copy of it there, which a tied
embedding no longer reaches after a reload. On a GPU through vLLM's own weight transfer (CUDA IPC), from plain
parameters or from ZeRO-3 shards.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import save_file

from agentopd.engines.vllm_process import BlockingLLM
from agentopd.weights import full_shapes, full_weights

HEAD = "lm_head.weight"
"""What vLLM calls the weights of an output head that is no embedding's."""


def tied_head(model: Any) -> str | None:
    """The name of the parameter that is also the output head, where they are tied."""
    if not model.config.tie_word_embeddings:
        return None
    head = model.get_output_embeddings().weight
    return next(str(name) for name, weight in model.named_parameters() if weight is head)


class WeightSync(Protocol):
    """Carries the weights of one model to one engine."""

    engine_args: dict[str, Any]
    """Arguments that vLLM must be started with."""

    def push(self, llm: BlockingLLM) -> None:
        """Make the model's current weights those of ``llm``. Under ZeRO-3 every rank must call it."""
        ...

    def close(self) -> None:
        """Release what was set up; idempotent."""
        ...


class Checkpoint:
    """A folder with the current weights of ``model``, in a form that vLLM reloads without leftovers."""

    overrides: ClassVar[dict[str, Any]] = {"tie_word_embeddings": False}
    """What vLLM must be told about the model's config, since the head is written out."""

    def __init__(self, model: Any, path: Path | None = None) -> None:
        self._model = model
        self.path = path or Path(tempfile.mkdtemp(prefix="agentopd-weights-"))
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Bring the files up to date. Under ZeRO-3 every rank must call it."""
        # First of all, so that no fault of a disk keeps the other ranks waiting, and on no GPU, which need not hold it.
        weights = {name: weight.cpu() for name, weight in full_weights(self._model)}
        self.path.mkdir(exist_ok=True)
        if shared := tied_head(self._model):
            save_file({HEAD: weights[shared].contiguous()}, self.path / "lm_head.safetensors")
        with redirect_stderr(io.StringIO()):  # a progress bar per shard
            # One shard: vLLM ignores files that an index does not name, and the head is one.
            self._model.save_pretrained(str(self.path), state_dict=weights, max_shard_size="1000TB")

    def remove(self) -> None:
        """Delete the folder; idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)


class DiskSync:
    """Through files, on any device."""

    def __init__(self, model: Any) -> None:
        self._checkpoint = Checkpoint(model)
        self._path = str(self._checkpoint.path)
        self.engine_args: dict[str, Any] = {"model": self._path, "hf_overrides": Checkpoint.overrides}

    def push(self, llm: BlockingLLM) -> None:
        """Write, and let vLLM reload."""
        self._checkpoint.write()
        llm.call("collective_rpc", "reload_weights", kwargs={"weights_path": self._path})

    def close(self) -> None:
        """Delete the files."""
        self._checkpoint.remove()


class TransferSync:
    """Through shared GPU memory, for an engine on the learner's own GPU: vLLM's ``ipc`` backend."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._trainer: Any = None
        self.engine_args: dict[str, Any] = {
            "model": model.name_or_path,
            "weight_transfer_config": {"backend": "ipc"},
        }

    def push(self, llm: BlockingLLM) -> None:
        """Hand over every parameter, in chunks of bounded memory."""
        if self._trainer is None:
            self._trainer = self._connect(llm)
        self._trainer.send_weights()

    def close(self) -> None:
        """The engine's process holds the handles, and ends with it."""

    def _connect(self, llm: BlockingLLM) -> Any:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        model = self._model

        class Parameters(WeightSource):  # type: ignore[misc]  # vLLM is not typed for us
            def metadata(self) -> list[Any]:
                return [ParamMeta(*shape) for shape in full_shapes(model)]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return full_weights(model)

        # Every rank sends to the engine on its own GPU, so each is the first rank of its transfer.
        info = IPCTrainerInitInfo(packed=True, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=_TransferClient(llm), source=Parameters())


@dataclass(frozen=True)
class _TransferClient:
    """The four phases of an update, as vLLM's trainer side calls them."""

    llm: BlockingLLM

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self.llm.call("init_weight_transfer_engine", WeightTransferInitRequest(init_info=init_info))

    def start_weight_update(self) -> None:
        self.llm.call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self.llm.call("update_weights", WeightTransferUpdateRequest(update_info=update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.call("finish_weight_update", weight_version)
