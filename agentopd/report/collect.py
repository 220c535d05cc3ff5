"""Read a run directory into one record, finished or not, and say what is missing."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agentopd.config.retention import RetentionConfig
from agentopd.errors import UserError
from agentopd.evaluation.metrics import EvalResult
from agentopd.evaluation.retention import RetentionMatrix, Tolerance, retention_matrix
from agentopd.mixture import Action
from agentopd.tracking import KeptEpisode, Provenance, RunDirectory, read_jsonl, read_record

MAX_EPISODES = 2000  # read for the report; more are sampled evenly over the run, and the page says so
MEND = "mend the file or delete it"
TEACHER = "teacher"  # eval/teacher*.json is the teacher's own score, not a stage of the run


@dataclass(frozen=True)
class Stage:
    """One evaluation of the student, and the name it goes by."""

    name: str
    result: EvalResult


@dataclass(frozen=True)
class RunData:
    """Everything the report shows. ``rows`` are the lines of ``metrics.jsonl``, by step.

    ``episodes`` are all that were kept, or a sample of the ``num_kept``.
    """

    name: str
    config: dict[str, Any]
    provenance: Provenance | None
    rows: list[dict[str, Any]]
    stages: list[Stage]
    teacher: EvalResult | None
    episodes: list[KeptEpisode]
    num_kept: int
    actions: list[Action]

    @property
    def roles(self) -> dict[str, str]:
        """Role ("new" or "old") by skill, in the order of the suite."""
        skills = _table(self.config, "suite").get("skills", [])
        named = [skill for skill in skills if isinstance(skill, dict) and "name" in skill]
        return {str(skill["name"]): str(skill.get("role", "new")) for skill in named}

    @property
    def skills(self) -> list[str]:
        """Every skill the run knows of: those of the suite first."""
        evaluated = (name for stage in self.stages for name in stage.result.tasks)
        return list(dict.fromkeys([*self.roles, *evaluated, *(kept.skill for kept in self.episodes)]))

    @property
    def planned_steps(self) -> int | None:
        """Steps the config asks for."""
        steps = _table(self.config, "train").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def done_steps(self) -> int:
        """The last step that left metrics."""
        return max((int(row.get("step", 0)) for row in self.rows), default=0)

    @property
    def base(self) -> Stage | None:
        """The evaluation before training."""
        return self.stages[0] if self.stages and not self.stages[0].result.step else None

    @property
    def latest(self) -> Stage | None:
        """The last evaluation after some training."""
        return self.stages[-1] if self.stages and self.stages[-1].result.step else None

    @property
    def finished(self) -> bool:
        """Whether the last planned step was evaluated."""
        return self.latest is not None and (self.latest.result.step or 0) >= (self.planned_steps or 0)

    def retention(self) -> RetentionMatrix | None:
        """R[stage, skill], or None; with a verdict on each skill where the suite declares a tolerance."""
        if not self.stages:
            return None
        results, names = [stage.result for stage in self.stages], [stage.name for stage in self.stages]
        declared = _table(_table(self.config, "suite"), "retention")
        drop, skills = declared.get("tolerated_drop", RetentionConfig().tolerated_drop), declared.get("tasks", ())
        tolerance = Tolerance(float(drop), tuple(skills)) if declared else None
        begun, learned = self._taught()
        return retention_matrix(results, names, learned, self.teacher, tolerance=tolerance, begun_at=begun)

    def _taught(self) -> tuple[dict[str, int], dict[str, int]]:
        """By new skill: the last evaluation before its stage, and that of its stage's end (or the last one so far)."""
        steps = [stage.result.step or 0 for stage in self.stages]
        last = len(steps) - 1
        new = [skill for skill, role in self.roles.items() if role == "new"]
        begun, learned = dict.fromkeys(new, 0), dict.fromkeys(new, last)
        done = 0
        for stage in self.config.get("stages", ()):
            begun |= dict.fromkeys(
                stage["skills"], max(i for i, step in enumerate(steps) if step <= max(done, steps[0]))
            )
            done += int(stage["steps"])
            learned |= dict.fromkeys(stage["skills"], next((i for i, step in enumerate(steps) if step >= done), last))
        return begun, learned

    def missing(self) -> list[str]:
        """What a reader would look for and not find, and why."""
        notes = []
        if not self.rows:
            notes.append("No step was logged: the run stopped before its first update, or is still at it.")
        if self.base is None:
            notes.append("There is no evaluation from before training, so nothing can be called an improvement.")
        if not self.finished:
            planned = f" of {self.planned_steps}" if self.planned_steps else ""
            latest = f"the latest is {self.latest.name}" if self.latest else "there is none after training yet"
            notes.append(
                f"The run is at step {self.done_steps}{planned} and its final evaluation is missing; {latest}. "
                "`agentopd resume` continues it."
            )
        if self.teacher is None and self.stages:
            notes.append("The teacher was not evaluated, so the share of its lead that was closed is unknown.")
        if not self.episodes:
            notes.append("No episode was kept (tracking.episodes_per_step).")
        return notes


def collect(path: Path) -> RunData:
    """Read the run at ``path``. Raises ``UserError`` where there is none, or a file of it cannot be read."""
    run = RunDirectory.open(path)
    stages, teacher = _evaluations(run.eval)
    return RunData(
        name=path.resolve().name,
        config=_config(run.config),
        provenance=read_record(run.provenance, Provenance, MEND) if run.provenance.is_file() else None,
        rows=sorted(read_jsonl(run.metrics), key=lambda row: int(row.get("step", 0))),
        stages=stages,
        teacher=teacher,
        episodes=list(run.kept_episodes(MAX_EPISODES)),
        num_kept=run.num_kept_episodes(),
        actions=[_action(run.events, row) for row in read_jsonl(run.events)],
    )


def _evaluations(folder: Path) -> tuple[list[Stage], EvalResult | None]:
    """Stages by step (one per step: "final" wins over "step_N"), and the teachers' scores merged into one result."""
    stages: dict[int, Stage] = {}
    teachers: list[EvalResult] = []
    for file in sorted(folder.glob("*.json"), key=lambda file: (file.stem == "final", file.stem)):
        result = read_record(file, EvalResult, MEND)
        if file.stem.startswith(TEACHER):
            teachers.append(result)
        else:
            stages[result.step or 0] = Stage(_stage_name(file.stem), result)
    merged = {name: score for teacher in teachers for name, score in teacher.tasks.items()}
    teacher = teachers[0].model_copy(update={"tasks": merged}) if teachers else None
    return [stages[step] for step in sorted(stages)], teacher


def _stage_name(stem: str) -> str:
    if stem.startswith("after_"):
        return stem.replace("_", " ", 1)
    head, _, number = stem.rpartition("_")
    return f"{head} {int(number)}" if head == "step" and number.isdigit() else stem


def _action(file: Path, row: Mapping[str, Any]) -> Action:
    try:
        return Action.model_validate(row)
    except ValidationError as exc:
        raise UserError(f"{file}: not an action: {exc.errors()[0]['msg']}; mend the line or delete it") from None


def _config(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UserError(f"{file}: not valid TOML: {exc}") from None


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}
