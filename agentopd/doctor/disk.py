"""Whether what a run writes fits the disks that it writes to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from agentopd.capacity import BYTES, checkpoint_bytes
from agentopd.config import RunConfig
from agentopd.doctor.diagnosis import Diagnosis, Student, fit, gib

_FOLDERS = 3
"""Of weights for vLLM's servers: two are kept while the next is written."""


class _Written(NamedTuple):
    folder: Path
    what: str
    size: int


def disk(config: RunConfig) -> Iterable[Diagnosis]:
    """What a run keeps at most of what is large, against what its file systems have left."""
    by_device: dict[int, list[_Written]] = defaultdict(list)
    for item in _written(config):
        by_device[_standing(item.folder).stat().st_dev].append(item)
    levels, told = [], []
    for items in by_device.values():
        needed, free = sum(item.size for item in items), shutil.disk_usage(_standing(items[0].folder)).free
        levels.append(fit(needed, free))
        close = {"ok": "", "warn": " (tight)", "fail": ", which cannot fit"}[levels[-1]]
        parts = ", ".join(item.what for item in items)
        told.append(f"{items[0].folder} takes up to {gib(needed)} GiB ({parts}) of {gib(free)} free{close}")
    worst = max(levels, key=("ok", "warn", "fail").index)
    yield Diagnosis("disk", worst, f"{'; '.join(told)}; episodes, metrics and what teachers answered come on top")


def _written(config: RunConfig) -> list[_Written]:
    """What is large: checkpoints with the one being written, the exported student, weights left for vLLM."""
    student, train, root = Student.of(config), config.train, Path(config.run_dir)
    whole = student.shape.parameters * BYTES[student.dtype]
    each = checkpoint_bytes(student.trained, student.zero_stage, student.dtype)
    made = -(-train.steps // train.checkpoint_every) if train.checkpoint_every else 1
    kept = min(made, train.keep_checkpoints + 1) + (config.guard.enabled and config.guard.roll_back is not None)
    found = [
        _Written(root, f"{kept} {'checkpoint' if kept == 1 else 'checkpoints'} of {gib(each)}", kept * each),
        _Written(root, f"the trained model {gib(whole)}", whole),
    ]
    # The head is written out beside an embedding that it is tied to.
    copy = whole + student.shape.tied * student.shape.vocabulary * student.shape.width * BYTES[student.dtype]
    engine, servers = config.rollout.engine, config.rollout.servers
    through_files = config.rollout.vllm.sync == "disk" or not torch.cuda.is_available()
    num = {"hf": 0, "vllm": int(through_files), "vllm_servers": _FOLDERS}[engine]
    num *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num:
        folder = Path((servers.folder if engine == "vllm_servers" else None) or tempfile.gettempdir())
        found.append(_Written(folder, f"{num} of the student's weights for vLLM, {gib(copy)} each", num * copy))
    return found


def _standing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there already."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
