"""Checkpoints that are whole or absent: written to a temporary name, forced to disk, then renamed.

``checkpoints/step-000050/`` holds ``learner/`` (weights, optimiser, RNG) and ``state.json`` (step, mixture positions,
replay scores). Saving is collective over ranks; the first rank writes the state and publishes the directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from agentopd.errors import UserError
from agentopd.learner import runtime
from agentopd.mixture import MixtureState
from agentopd.tracking import user_errors, write_atomic

_PROBE = bytes(2**20)
_NAME = re.compile(r"step-(\d{6})")


class Saveable(Protocol):
    """What a checkpoint needs of a learner."""

    def save(self, directory: Path) -> None:
        """Write everything an exact continuation needs."""
        ...

    def load(self, directory: Path) -> None:
        """Read it back."""
        ...


def save_checkpoint(
    root: Path, step: int, learner: Saveable, mixture: MixtureState, keep: int, kept_step: int | None = None
) -> Path:
    """Write the state after ``step`` finished steps; keep the newest ``keep`` checkpoints. Every rank must call it.

    ``kept_step`` names the checkpoint a guard would return to; it is never deleted. Raises ``StorageError`` where the
    disk is full and ``UserError`` where it cannot be written otherwise; earlier checkpoints are then as they were.
    """
    final = root / f"step-{step:06d}"
    partial = root / f".partial-{step:06d}"
    is_main = runtime.rank() == 0
    with user_errors(root.parent), _all_or_nothing(partial):
        known = final.is_dir()  # a guard's, of this very step: the learner has not moved since
        runtime.barrier()
        if is_main and not known:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        runtime.barrier()
        if not known:
            learner.save(partial / "learner")
        runtime.barrier()
        if is_main:
            state = json.dumps({"step": step, "mixture": asdict(mixture), "kept_step": kept_step})
            write_atomic((final if known else partial) / "state.json", state)
            if not known:
                _force_to_disk(partial)
                partial.rename(final)
            for old in list_checkpoints(root)[:-keep]:
                if kept_step is None or old.name != f"step-{kept_step:06d}":
                    shutil.rmtree(old)
        runtime.barrier()
    return final


@contextmanager
def _all_or_nothing(partial: Path) -> Iterator[None]:
    """Leave no half of a checkpoint behind, whatever ends its writing."""
    try:
        yield
    except RuntimeError:
        # torch does not say why it could not write; the file system does.
        (partial / "probe").write_bytes(_PROBE)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _force_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: path.name)


def load_latest(root: Path, learner: Saveable) -> tuple[int, MixtureState]:
    """Restore the newest checkpoint; returns its step and mixture state. Raises ``UserError`` where there is none."""
    found = list_checkpoints(root)
    if not found:
        raise UserError(f"no checkpoint under {str(root)!r}: the run stopped before its first one; start it again")
    state = _state(found[-1])
    learner.load(found[-1] / "learner")
    return int(state["step"]), MixtureState(**state["mixture"])


def load_step(root: Path, step: int, learner: Saveable) -> MixtureState:
    """Restore the learner as it was after ``step`` steps; returns the mixture's state of then."""
    path = root / f"step-{step:06d}"
    learner.load(path / "learner")
    return MixtureState(**_state(path)["mixture"])


def latest_kept_step(root: Path) -> int | None:
    """The step whose checkpoint a guard would return to, as the newest checkpoint knows it."""
    found = list_checkpoints(root)
    return _state(found[-1]).get("kept_step") if found else None


def _state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state
