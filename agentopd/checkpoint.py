"""Checkpoints that are whole or absent: written to a temporary name, forced to disk, then renamed.

``checkpoints/step-000050/`` holds ``learner/`` (weights, optimiser, RNG) and ``state.json`` (step, mixture positions,
replay scores, a checksum of every other file). Saving is collective over ranks; the first rank writes the state and
publishes the directory. Loading is collective too, and refuses a checkpoint that is not what was written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from agentopd.config.run import TrainConfig
from agentopd.errors import AgentOPDError, UserError
from agentopd.learner import runtime
from agentopd.mixture import MixtureState
from agentopd.tracking import RunDirectory, read_jsonl, user_errors, write_atomic

_PROBE = bytes(2**20)
_CHUNK = 2**22
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
        known = (final / "state.json").is_file()  # a guard's, of this very step: the learner has not moved since
        runtime.barrier()
        if is_main and not known:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        runtime.barrier()
        if not known:
            learner.save(partial / "learner")
        runtime.barrier()
        if is_main:
            files = _state(final).get("files") if known else _checksums(partial)
            state = {"step": step, "mixture": asdict(mixture), "kept_step": kept_step, "files": files}
            write_atomic((final if known else partial) / "state.json", json.dumps(state))
            if not known:
                _force_to_disk(partial)
                shutil.rmtree(final, ignore_errors=True)  # remains of one, which is none without its state
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


def has_checkpoint(run: RunDirectory, schedule: TrainConfig) -> bool:
    """Whether a run goes on from a checkpoint; if not, it stopped before its first one, and has to begin again.

    Raises ``UserError`` where the first one was written and is gone since: beginning again would throw away its steps.
    """
    if list_checkpoints(run.checkpoints):
        return True
    mend = f"bring it back from a copy, or start again after `rm -r {run.path}`"
    for torn in sorted(run.checkpoints.glob("step-*")):
        raise _unreadable(torn, "it has no state.json", mend)
    first_due = min(schedule.checkpoint_every or schedule.steps, schedule.steps)
    done = max((row.get("step", 0) for row in read_jsonl(run.metrics)), default=0)
    if done > first_due or (run.path / "model").exists():
        raise UserError(f"no checkpoint under {str(run.checkpoints)!r}, where one was after step {first_due}: {mend}")
    return False


def load_latest(root: Path, learner: Saveable) -> tuple[int, MixtureState]:
    """Restore the newest checkpoint; returns its step and mixture state. Every rank must call it.

    Raises ``UserError`` where there is none, or where the newest is damaged: which to go on from is the user's choice.
    """
    found = list_checkpoints(root)
    if not found:
        raise UserError(f"no checkpoint under {str(root)!r}: name a run that has one")
    *older, newest = found
    after = f"the same command continues from {older[-1].name}" if older else "start again"
    mixture = _restored(newest, learner, f"delete it, and {after}")
    return int(_state(newest)["step"]), mixture


def load_step(root: Path, step: int, learner: Saveable) -> MixtureState:
    """Restore the learner as it was after ``step`` steps; returns the mixture's state of then.

    Every rank must call it. Raises ``UserError`` where the checkpoint is damaged.
    """
    path = root / f"step-{step:06d}"
    remedy = f"to go on without returning to it, set guard.roll_back = 1 in {str(root.parent / 'config.toml')!r}"
    return _restored(path, learner, f"{remedy} and resume")


def latest_kept_step(root: Path) -> int | None:
    """The step whose checkpoint a guard would return to, as the newest checkpoint knows it."""
    found = list_checkpoints(root)
    return _state(found[-1]).get("kept_step") if found else None


def _restored(path: Path, learner: Saveable, remedy: str) -> MixtureState:
    try:
        state = _state(path)
        mixture, files = MixtureState(**state["mixture"]), state.get("files")
        int(state["step"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise _unreadable(path, f"state.json: {_reason(exc)}", remedy) from exc
    damage = _damage(path, files or {})
    if damage:
        raise _unreadable(path, damage, remedy)
    try:
        learner.load(path / "learner")
    except (AgentOPDError, MemoryError):
        raise
    except Exception as exc:
        # What was verified is whole, so the fault lies elsewhere. Earlier versions wrote no checksums.
        if files:
            raise
        raise _unreadable(path, _reason(exc), remedy) from exc
    return mixture


def _unreadable(path: Path, reason: str, remedy: str) -> UserError:
    return UserError(f"checkpoint {str(path)!r} cannot be read ({reason}): {remedy}")


def _reason(exc: Exception) -> str:
    first = (str(exc).strip().splitlines() or [""])[0][:200]
    return f"{type(exc).__name__}: {first}" if first else type(exc).__name__


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file below, by its path from ``folder``: it finds damage, not malice."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:  # zlib lets go of the interpreter
        return {str(path.relative_to(folder)): crc for path, crc in zip(paths, pool.map(_crc, paths), strict=True)}


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _damage(path: Path, files: dict[str, int]) -> str | None:
    """What is wrong with the first file that is not as it was written; the ranks share the reading, and all know."""
    mine = sorted(files.items())[runtime.rank() :: runtime.world_size()]
    with ThreadPoolExecutor(4) as pool:
        found = [item for item in pool.map(lambda item: _wrong(path, *item), mine) if item]
    return next((item for part in runtime.gather_objects(found) for item in part), None)


def _wrong(path: Path, name: str, crc: int) -> str | None:
    try:
        return None if _crc(path / name) == crc else f"{name} is not as it was written"
    except OSError as exc:
        return f"{name}: {exc.strerror}"


def _state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state
