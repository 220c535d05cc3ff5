"""What a run leaves behind: its directory and its kept episodes. Every write is atomic or append-only.

RUN/
  config.toml       the resolved config
  provenance.json   seed, model hashes, and one entry per session (first start and every resume)
  metrics.jsonl     one object per step: {"step": 3, "math/success": 0.5, ...}; null is a non-finite number
  events.jsonl      what replay and guards did: {"step": 50, "action": "raise_share", "skill": "math", ...}
  episodes/         step_000003.jsonl, one KeptEpisode a line
  quarantine/       step_000003.jsonl, one QuarantinedEpisode a line; only where there was one
  eval/             <stage>.json, one EvalResult each
  checkpoints/      the checkpoint layer's
  report.html
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from agentopd.errors import AgentOPDError, StorageError, UserError
from agentopd.types import Episode, Record, Task, Verdict, VersionedRecord

PACKAGES = ("agentopd", "torch", "transformers", "deepspeed", "numpy", "tokenizers", "pydantic", "vllm")
RecordT = TypeVar("RecordT", bound=Record)
MEND_TO_RESUME = "bring back the file from a copy, or start the run again"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STEP_FILE = re.compile(r"step_(\d+)\.jsonl$")


class KeptEpisode(VersionedRecord):
    """An episode kept for a reader, with the evidence behind every token.

    ``tokens`` holds one decoded string per entry of ``episode.token_ids``. The other streams have one entry per
    *sampled* token (``loss_mask == 1``), in order, or are empty where they do not apply.
    """

    step: int
    skill: str
    replay: bool = False
    episode: Episode
    verdict: Verdict
    task: Task | None = None
    """The full task, so that the episode can be judged again from this record alone."""
    environment: str = ""
    """The environment as the suite names it (a registered name or ``file.py:Class``); '' is the episode's ``env``."""
    verifier: str = ""
    """The suite's own choice of verifier; '' is the environment's."""
    tokens: tuple[str, ...]
    teacher_logprobs: tuple[float, ...] = ()
    old_logprobs: tuple[float, ...] = ()
    """The learner's, at temperature 1; the inspector falls back to the episode's ``rollout_logprobs``."""
    agreement: tuple[float, ...] = ()
    """Verdict against teacher, in [-1, 1]: above 0 consensus, below 0 conflict, 0 where either says nothing."""
    weights: tuple[float, ...] = ()
    """What the teacher's signal is multiplied by, caps and budgets included; 0 where a token takes no part."""
    mask_reasons: tuple[str, ...] = ()
    """Why a token is out of the teacher term ("special", "suffix", "no_evidence", ...), "" where it is in."""

    @model_validator(mode="after")
    def _aligned(self) -> KeptEpisode:
        total, sampled = len(self.episode.token_ids), self.episode.num_sampled
        if len(self.tokens) != total:
            raise ValueError(f"{len(self.tokens)} token strings for {total} token ids")
        for name in ("teacher_logprobs", "old_logprobs", "agreement", "weights", "mask_reasons"):
            stream = getattr(self, name)
            if stream and len(stream) != sampled:
                raise ValueError(f"{name} has {len(stream)} entries for {sampled} sampled tokens")
            if not all(isinstance(value, str) or math.isfinite(value) for value in stream):
                raise ValueError(f"{name} holds a number that is not finite")
        return self


class QuarantinedEpisode(VersionedRecord):
    """An episode that was left out of an update because it could not be trained on."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    step: int
    reason: str
    episode: Episode
    verdict: Verdict
    teacher_logprobs: tuple[float, ...] = ()
    """As the teacher gave them, one per sampled token; empty where it gave none."""


class Session(Record):
    """One process that worked on the run: when, with what command, on which software."""

    started: str
    command: tuple[str, ...]
    from_step: int
    python: str
    platform: str
    packages: dict[str, str]

    @classmethod
    def now(cls, command: Sequence[str], from_step: int = 0) -> Session:
        """A session of the running interpreter; packages that are not installed are left out."""
        return cls(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            command=tuple(command),
            from_step=from_step,
            python=platform.python_version(),
            platform=platform.platform(),
            packages={name: version for name in PACKAGES if (version := _version(name))},
        )


class Provenance(VersionedRecord):
    """Enough to say where a run's numbers come from. ``models`` maps a role (student, teacher:default) to a hash."""

    seed: int
    models: dict[str, str] = Field(default_factory=dict)
    sessions: tuple[Session, ...] = ()


class _Evaluation(Record):
    """As much of an evaluation as tells when it was made."""

    model_config = ConfigDict(extra="ignore")

    step: int | None = None


class RunDirectory:
    """The files of one run. Make one with ``create`` or ``open``."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.toml"
        self.provenance = path / "provenance.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.episodes = path / "episodes"
        self.quarantined = path / "quarantine"
        self.eval = path / "eval"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.html"

    @classmethod
    def create(cls, path: str | Path, config_toml: str, provenance: Provenance) -> RunDirectory:
        """Start a run in a new or empty directory. Raises ``UserError`` if it holds files or cannot be written."""
        cls.check_free(path)
        run = cls(Path(path))
        with user_errors(run.path):
            for folder in (run.episodes, run.eval, run.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            run.metrics.touch()
            write_atomic(run.provenance, provenance.model_dump_json(indent=2) + "\n")
            write_atomic(run.config, config_toml)  # the last: with it, there is a run to resume
        return run

    @classmethod
    def check_free(cls, path: str | Path) -> None:
        """Raise ``UserError`` if a new run could not be made at ``path``; writes nothing that stays."""
        run = cls(Path(path))
        with user_errors(run.path):
            if run.path.is_dir() and any(run.path.iterdir()):
                raise UserError(
                    f"run directory {str(path)!r} already holds files: {run._way_on()}"
                    "choose another with --set run_dir=DIR, or move it away"
                )
            existing = next(parent for parent in (run.path, *run.path.absolute().parents) if parent.exists())
            with tempfile.TemporaryFile(dir=existing):
                pass

    def _way_on(self) -> str:
        """What else may be done than to begin a run elsewhere; '' where the files are no run's."""
        return f"continue it with `agentopd resume {self.path}`, or " if self.config.is_file() else ""

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Open an existing run. Raises ``UserError`` if there is none at ``path``."""
        run = cls(Path(path))
        if not run.config.is_file():
            what = "has no config.toml" if run.path.is_dir() else "does not exist"
            raise UserError(f"{str(path)!r} {what}: name a run directory that `agentopd train` made")
        return run

    def resume(self, session: Session, restored: bool = True) -> None:
        """Make the files agree with a run that is at ``session.from_step``, and record the session.

        One that was not ``restored`` from a checkpoint begins again: of its logs nothing is kept, of what it evaluated
        before the first step everything.

        Metrics, episodes (kept or quarantined) and evaluations of later steps are dropped, and so is a last metrics
        line torn by a crash: those steps will be written again. Raises ``UserError``, before it changes anything, where
        the provenance or an evaluation cannot be read.
        """
        with user_errors(self.path):
            old = read_record(self.provenance, Provenance, MEND_TO_RESUME)
            later = [file for file in self.eval.glob("*.json") if _step_of(file) > session.from_step]
            for log in filter(Path.is_file, (self.metrics, self.events)):
                kept = [row for row in read_jsonl(log) if restored and row.get("step", 0) <= session.from_step]
                write_atomic(log, "".join(json.dumps(row) + "\n" for row in kept))
            for step, file in [*self.episode_files(), *_step_files(self.quarantined)]:
                if step > session.from_step:
                    file.unlink()
            for file in later:
                file.unlink()
            new = old.model_copy(update={"sessions": (*old.sessions, session)})
            write_atomic(self.provenance, new.model_dump_json(indent=2) + "\n")

    def record(self, event: Record) -> None:
        """Append an event to ``events.jsonl``."""
        with user_errors(self.path), self.events.open("a", encoding="utf-8") as file:
            file.write(event.model_dump_json() + "\n")

    def save_eval(self, stage: str, result: Record) -> Path:
        """Write one evaluation as ``eval/<stage>.json`` ("base", "step_000050", "final", "teacher")."""
        path = self.eval / f"{stage}.json"
        with user_errors(self.path):
            write_atomic(path, result.model_dump_json(indent=1) + "\n")
        return path

    def keep_episodes(self, step: int, episodes: Sequence[KeptEpisode]) -> None:
        """Write the episodes kept of one step, replacing any written before for that step."""
        if episodes:
            lines = "".join(episode.model_dump_json() + "\n" for episode in episodes)
            with user_errors(self.path):
                write_atomic(self.episodes / f"step_{step:06d}.jsonl", lines)

    def quarantine(self, step: int, episodes: Sequence[QuarantinedEpisode]) -> None:
        """Write the episodes that were left out of one step's update."""
        with user_errors(self.path):
            self.quarantined.mkdir(exist_ok=True)
            lines = "".join(episode.model_dump_json() + "\n" for episode in episodes)
            write_atomic(self.quarantined / f"step_{step:06d}.jsonl", lines)

    def kept_episodes(self, at_most: int | None = None) -> Iterator[KeptEpisode]:
        """Every kept episode, by step, or ``at_most`` so many, evenly spaced. Raises ``UserError`` on a bad line."""
        total = self.num_kept_episodes() if at_most is not None else 0
        stride = max(1.0, total / at_most) if at_most else 1.0
        seen, wanted = 0, 0.0
        for _, file in self.episode_files():
            for number, line in _lines(file):
                if seen >= wanted:
                    wanted += stride
                    yield _kept_episode(file, number, line)
                seen += 1

    def num_kept_episodes(self) -> int:
        """How many there are, without reading what they hold."""
        return sum(file.read_bytes().count(b"\n") for _, file in self.episode_files())

    def episode_files(self) -> list[tuple[int, Path]]:
        """The episode files with their steps, in order."""
        return _step_files(self.episodes)


def _step_files(folder: Path) -> list[tuple[int, Path]]:
    matches = ((_STEP_FILE.search(file.name), file) for file in folder.glob("step_*.jsonl"))
    return sorted((int(match[1]), file) for match, file in matches if match)


def read_record(path: Path, kind: type[RecordT], remedy: str) -> RecordT:
    """The record a file holds. Raises ``UserError``, which ends in what to do, where it holds none."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (ValidationError, UnicodeDecodeError) as exc:
        reason = exc.errors()[0]["msg"] if isinstance(exc, ValidationError) else str(exc)
        raise UserError(f"{path}: not a {kind.__name__}: {reason}; {remedy}") from None


def _step_of(evaluation: Path) -> int:
    """After how many steps an evaluation was made; 0 for one that is not of the student."""
    return read_record(evaluation, _Evaluation, MEND_TO_RESUME).step or 0


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. A torn last line is left out; any other bad line is a ``UserError``."""
    return [_object(path, number, line) for number, line in _lines(path)] if path.is_file() else []


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The finished lines of a file with their numbers; what follows the last newline was never finished."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return ((number, line) for number, line in enumerate(lines[:-1], start=1) if line.strip())


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as exc:
        raise UserError(f"{path}, line {number}: not JSON ({exc.msg}): mend or delete that line") from None
    return found


def _kept_episode(path: Path, number: int, line: str) -> KeptEpisode:
    try:
        return KeptEpisode.model_validate(_object(path, number, line))
    except ValidationError as exc:
        raise UserError(f"{path}, line {number}: not a kept episode: {exc.errors()[0]['msg']}") from None


def write_atomic(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old text or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into a ``StorageError`` that says how the run at ``path`` goes on."""
    try:
        yield
    except AgentOPDError:
        raise
    except Exception as exc:
        if not _says_full(exc):
            raise
        raise StorageError(
            f"the disk under {str(getattr(exc, 'filename', None) or path)!r} is full: free some of it; what was saved "
            f"goes on with `agentopd resume {path}`"
        ) from exc


def _says_full(exc: Exception) -> bool:
    """Libraries in Rust (safetensors, tokenizers) put the system's message into exceptions of their own."""
    if isinstance(exc, OSError) and exc.errno is not None:
        return exc.errno in _FULL
    return any(os.strerror(number) in str(exc) for number in _FULL)


@contextmanager
def user_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write the run directory at ``path`` into an error that says what to do.

    ``StorageError`` for a full disk, ``UserError`` for anything else.
    """
    try:
        with full_disk(path):
            yield
    except OSError as exc:
        reason = exc.strerror or exc
        raise UserError(
            f"cannot write run directory {str(path)!r}: {reason}; choose another with --set run_dir=DIR"
        ) from exc


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
