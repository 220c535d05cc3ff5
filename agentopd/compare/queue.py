"""Work through the runs of a comparison, some at once, each in a process of its own; a second start continues.

A run's lock is held by the process that trains it, so a run that outlived a killed comparison is waited for, never
trained twice.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agentopd.build import load_skills
from agentopd.certify.certificate import how_to_validate, is_certified
from agentopd.compare.plan import Plan, PlannedRun
from agentopd.compare.recorded import recorded
from agentopd.config import dump_toml, load_run_config
from agentopd.console import Advance, progress
from agentopd.errors import UserError
from agentopd.tracking import write_atomic

_POLL_S = 0.2


@dataclass
class _Job:
    run: PlannedRun
    process: subprocess.Popen[bytes]


def work(
    plan: Plan, console: Console, jobs: int | None = None, after_each: Callable[[], None] = lambda: None
) -> list[str]:
    """Train what is not finished yet; returns one line on each run that failed. Raises ``UserError``.

    ``after_each`` is called whenever runs of an arm have ended: what is kept then outlives this process.
    """
    for run in (*([plan.start] if plan.start else []), *plan.runs):
        check_made_as_planned(plan, run)
    at_once = jobs or plan.comparison.jobs or _default_jobs(plan)
    known, failures = recorded(plan), list[str]()
    missing = [run for run in plan.runs if (run.arm, run.seed) not in known]
    _check_certified(missing)
    if missing and plan.start is not None and not finished(plan.start):
        failures = _work(plan, [plan.start], console, 1, lambda: None)
    return failures or _work(plan, missing, console, at_once, after_each)


def finished(run: PlannedRun) -> bool:
    """Whether a run has its final evaluation and its model."""
    return (run.path / "eval/final.json").is_file() and (run.path / "model/config.json").is_file()


def _work(
    plan: Plan, runs: Sequence[PlannedRun], console: Console, at_once: int, after_each: Callable[[], None]
) -> list[str]:
    waiting = [run for run in runs if not finished(run)]
    active: list[_Job] = []
    failures: list[str] = []
    with progress(console, "runs", len(runs)) as advance:
        advance(len(runs) - len(waiting))
        try:
            while waiting or active:
                while waiting and len(active) < at_once:
                    job = _start(plan, waiting)
                    if job is None:
                        break
                    active.append(job)
                time.sleep(_POLL_S)
                running = [job for job in active if not _ended(plan, job, advance, failures)]
                if len(running) < len(active):
                    after_each()
                active = running
                done_elsewhere = [run for run in waiting if finished(run)]
                for run in done_elsewhere:
                    waiting.remove(run)
                    advance(1, note=run.name)
        except BaseException:
            for job in active:
                job.process.terminate()
            for job in active:
                job.process.wait()
            raise
    return failures


def _start(plan: Plan, waiting: list[PlannedRun]) -> _Job | None:
    """Start the first waiting run that no other process works on; it is taken off the list."""
    for run in waiting:
        lock = _lock(plan, run)
        if lock is None:
            continue
        try:
            if finished(run):  # by the process that held the lock until a moment ago
                continue
            process = _spawn(plan, run, lock)
        finally:
            os.close(lock)  # the child holds it from here on
        waiting.remove(run)
        return _Job(run, process)
    return None


def _spawn(plan: Plan, run: PlannedRun, lock: int) -> subprocess.Popen[bytes]:
    """Train, or resume what was begun."""
    if (run.path / "config.toml").is_file():
        arguments = ["resume", str(run.path)]
    else:
        shutil.rmtree(run.path, ignore_errors=True)
        config = _asked(plan, run)
        config.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(config, dump_toml(run.config))
        write_atomic(_made_from(plan, run), plan.fingerprint(run))
        arguments = ["train", str(config)]
    with _log(plan, run).open("ab") as log:
        command = [sys.executable, "-m", "agentopd.cli", *arguments, "--plain"]
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=(lock,))


def _ended(plan: Plan, job: _Job, advance: Advance, failures: list[str]) -> bool:
    code = job.process.poll()
    if code is None:
        return False
    if code or not finished(job.run):
        lines = _log(plan, job.run).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        failures.append(f"{job.run.name} ended with {code}: {lines[-1] if lines else 'no output'}")
    advance(1, note=job.run.name)
    return True


def _lock(plan: Plan, run: PlannedRun) -> int | None:
    """The run's lock as a file descriptor, or None while another process holds it."""
    folder = plan.out / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{run.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _log(plan: Plan, run: PlannedRun) -> Path:
    folder = plan.out / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{run.name}.log"


def _asked(plan: Plan, run: PlannedRun) -> Path:
    return plan.out / "configs" / f"{run.name}.toml"


def _made_from(plan: Plan, run: PlannedRun) -> Path:
    """The fingerprint that a run was started with: of its config, and of the models and the start it came from."""
    return plan.out / "configs" / f"{run.name}.fingerprint"


def _check_certified(runs: Sequence[PlannedRun]) -> None:
    """Each run would refuse an uncertified environment by itself, but only after the others had been trained."""
    seen = set[str]()
    for run in runs:
        for skill in load_skills(run.config.suite).values():
            used = repr((skill.config.env, skill.config.source, skill.config.verifier, skill.config.limits))
            if used not in seen and not is_certified(skill):
                raise UserError(
                    f"{run.name}: skill {skill.name!r}: environment {skill.config.env!r} is not certified as it is "
                    f"used there; run `agentopd envs validate {how_to_validate(skill)}`"
                )
            seen.add(used)


def check_made_as_planned(plan: Plan, run: PlannedRun) -> None:
    """Raise ``UserError`` for a directory that another config or another start made: it would pass for this arm's."""
    made, digest, asked = run.path / "config.toml", _made_from(plan, run), _asked(plan, run)
    if not made.is_file():
        return
    if digest.is_file():
        same = digest.read_text(encoding="utf-8") == plan.fingerprint(run)
    else:  # What was asked for, where it is known: the run's own file has "auto" settings decided.
        same = load_run_config(asked if asked.is_file() else made) == run.config
    if not same:
        raise UserError(
            f"{str(run.path)!r} was made with another config, model or start than {run.name} has now: "
            "move it away, or choose another out"
        )


def _default_jobs(plan: Plan) -> int:
    threads = max((run.config.threads or 0 for run in plan.runs), default=0)
    return max(1, (os.cpu_count() or 1) // threads) if threads else 1
