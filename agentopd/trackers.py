"""Where the numbers of a run go, once a step: ``metrics.jsonl`` always, and the trackers the config asks for."""

from __future__ import annotations

import io
import json
import math
import os
import tomllib
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from agentopd.config.run import TrackingConfig
from agentopd.errors import UserError
from agentopd.tracking import RunDirectory, user_errors

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""What is imported for each tracker that the config can ask for."""


class Tracker(Protocol):
    """Where numbers go, once per step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one optimiser step."""
        ...

    def close(self) -> None:
        """Flush and release; idempotent."""
        ...


class JsonlTracker:
    """Appends one JSON object per step and closes the file, so a crash costs at most a torn last line."""

    def __init__(self, path: Path):
        self._path = path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the step; numbers that are not finite become null."""
        row = {key: float(value) if math.isfinite(value) else None for key, value in metrics.items()}
        with user_errors(self._path.parent), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")

    def close(self) -> None:
        """Nothing to release."""


class TensorBoardTracker:
    """Scalars for TensorBoard, under ``RUN/tensorboard``. Raises ``UserError`` if it is not installed."""

    def __init__(self, run: RunDirectory, from_step: int = 0):
        package = _package("tensorboard")
        self._writer = package.SummaryWriter(run.path / "tensorboard", purge_step=from_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add every metric as a scalar."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """Metrics and config for Weights & Biases, under ``RUN/wandb``. Raises ``UserError`` if it is not installed.

    Offline unless ``WANDB_MODE`` says otherwise; `wandb sync` uploads. Every session is a run of one group.
    """

    def __init__(self, run: RunDirectory) -> None:
        wandb = _package("wandb")
        name, mode = run.path.resolve().name, os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project="agentopd",
            group=name,
            name=name,
            dir=str(run.path),
            mode=mode,
            config=_config(run),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the step's metrics."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TrackioTracker:
    """Metrics and config for trackio, in its own local folder (``TRACKIO_DIR``); `trackio show` draws them.

    A resumed run continues under its name. Raises ``UserError`` if trackio is not installed.
    """

    def __init__(self, run: RunDirectory) -> None:
        trackio = _package("trackio")
        name = run.path.resolve().name
        with redirect_stdout(io.StringIO()):  # how to open its dashboard
            self._run = trackio.init("agentopd", name=name, resume="allow", config=_config(run), embed=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the step's metrics."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        with redirect_stdout(io.StringIO()):
            self._run.finish()


class Trackers:
    """Several trackers behind one."""

    def __init__(self, *trackers: Tracker):
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log to each."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close()


def open_tracker(run: RunDirectory, config: TrackingConfig, from_step: int = 0) -> Tracker:
    """The run's tracker: ``metrics.jsonl``, and those the config asks for. Raises ``UserError``."""
    more: list[Tracker] = []
    if config.tensorboard:
        more.append(TensorBoardTracker(run, from_step))
    if config.wandb:
        more.append(WandbTracker(run))
    if config.trackio:
        more.append(TrackioTracker(run))
    return Trackers(JsonlTracker(run.metrics), *more)


def require_trackers(config: TrackingConfig) -> list[str]:
    """The trackers that the config asks for. Raises ``UserError`` where the package of one is not installed."""
    asked = [name for name in _MODULES if getattr(config, name)]
    for name in asked:
        _package(name)
    return asked


def _config(run: RunDirectory) -> dict[str, Any]:
    return tomllib.loads(run.config.read_text(encoding="utf-8"))


def _package(name: str) -> Any:
    """The module of a tracker; a missing package becomes an error that says how to go on."""
    try:
        return import_module(_MODULES[name])
    except ImportError:
        raise UserError(
            f"tracking.{name} = true, but {name} is not installed: `pip install {name}`, or set tracking.{name} = false"
        ) from None
