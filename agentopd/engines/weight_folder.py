"""Folders with the learner's weights, one for each sync, that servers read when they start, come back, or are told to.

A folder that is written behind appears under its name only when it is complete.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from agentopd.engines.http import Away
from agentopd.engines.weight_sync import Checkpoint
from agentopd.errors import EngineError

_KEPT = 2
"""The newest, and the one that a server may still be reading."""
_LOOK_S = 0.1


@dataclass(frozen=True)
class Weights:
    """A folder of weights, and the label of those who have them."""

    path: Path
    version: str

    async def at_hand(self, timeout_s: float) -> None:
        """Wait until the folder is complete. Raises ``Away`` past the deadline."""
        deadline = time.monotonic() + timeout_s
        while not self.path.exists():
            if time.monotonic() > deadline:
                raise Away(f"its weights were not written to {self.path} within {timeout_s:g} s")
            await asyncio.sleep(_LOOK_S)


class WeightFolder:
    """Keeps the newest weights of ``model`` under ``parent``, or in a temporary folder of this machine."""

    def __init__(self, model: Any, parent: str | None) -> None:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="agentopd-servers-", dir=parent))
        self.path.chmod(0o755)
        self._model = model
        self._label, self._count = uuid.uuid4().hex[:8], 0
        self._written: deque[Path] = deque()
        self._behind: threading.Thread | None = None
        self._fault: Exception | None = None

    def next(self, version: int) -> Weights:
        """Where the weights of a sync will be, and their label."""
        self._count += 1
        # The version alone would not do: after a roll-back it has other weights.
        label = f"{self._label}:{version}/{self._count}"
        return Weights(self.path / f"weights-{version:06d}-{self._count}", label)

    def write(self, weights: Weights) -> None:
        """Leave the model's current weights there. Under ZeRO-3 every rank must read them along."""
        Checkpoint(self._model, weights.path)
        _open_to_all(weights.path)
        self._keep(weights.path)

    def write_behind(self, weights: Weights, tensors: Mapping[str, Tensor]) -> None:
        """Leave ``tensors`` there, while the caller goes on; what fails is raised by ``settle``."""

        def work() -> None:
            try:
                self._save(weights.path, tensors)
            except Exception as exc:
                self._fault = exc

        self.settle()
        self._behind = threading.Thread(target=work, name="weights", daemon=True)
        self._behind.start()

    def settle(self) -> None:
        """Wait for what is being written behind. Raises ``EngineError`` where that failed."""
        if self._behind is not None:
            self._behind.join()
            self._behind = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise EngineError(f"writing the weights for servers that come back failed: {fault}") from fault

    def remove(self) -> None:
        """Delete all of it; idempotent."""
        if self._behind is not None:
            self._behind.join()
        shutil.rmtree(self.path, ignore_errors=True)

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        unfinished = path.with_name(f"unfinished-{path.name}")
        unfinished.mkdir()
        save_file(dict(tensors), unfinished / "model.safetensors", {"format": "pt"})
        self._model.config.save_pretrained(unfinished)
        _open_to_all(unfinished)
        unfinished.rename(path)
        self._keep(path)

    def _keep(self, path: Path) -> None:
        self._written.append(path)
        while len(self._written) > _KEPT:
            shutil.rmtree(self._written.popleft(), ignore_errors=True)


def _open_to_all(folder: Path) -> None:
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)  # servers may run as another user
