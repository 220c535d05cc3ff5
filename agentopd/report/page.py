"""Assemble the page: data in, one HTML file out, nothing loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from agentopd.evaluation.retention import RetentionMatrix
from agentopd.report import inspector
from agentopd.report.charts import Chart, Point, Series, line_chart
from agentopd.report.collect import RunData, collect
from agentopd.report.panels import make_panels
from agentopd.report.story import sentences, signed, skill_rows
from agentopd.tracking import RunDirectory, write_atomic


def build_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a run, finished or interrupted, and return its path. Raises ``UserError``."""
    run = collect(run_dir)
    path = RunDirectory.open(run_dir).report
    write_atomic(path, render(run))
    return path


def write_retention_page(matrix: RetentionMatrix, path: Path, roles: Mapping[str, str] | None = None) -> Path:
    """Write one matrix as a page of its own, for evaluations that belong to no run; ``roles`` as in a suite."""
    template = _environment().get_template("retention.html")
    write_atomic(path, template.render(matrix=matrix, heat=heat_rows(matrix), roles=roles or {}))
    return path


def render(run: RunData) -> str:
    """The page as text. Everything from the run is escaped: markup by autoescape, data as JSON without ``<``."""
    matrix = run.retention()
    rows = skill_rows(run, matrix)
    panels = make_panels(run.rows, run.skills)
    held_out = _held_out(run)
    shown = inspector.choose(run.episodes)
    charts = [chart for chart in (held_out, *panels.curves, *panels.signal, *panels.cost) if chart]
    data = {"charts": {_chart_id(chart): chart.hover for chart in charts}, "episodes": shown}
    return (
        _environment()
        .get_template("report.html")
        .render(
            run=run,
            facts=facts(run),
            missing=run.missing(),
            rows=rows,
            sentences=sentences(rows),
            matrix=matrix,
            heat=heat_rows(matrix) if matrix else [],
            roles=run.roles,
            held_out=held_out,
            panels=panels,
            episodes=shown,
            kept=len(run.episodes),
            data=embedded(data),
        )
    )


def embedded(data: Any) -> Markup:
    """JSON that is safe inside a ``<script type="application/json">`` element, whatever strings it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def facts(run: RunData) -> list[tuple[str, str]]:
    """Short facts of the run, from its config and provenance, where they are known."""
    model, objective = run.config.get("model", {}), run.config.get("objective", {})
    steps = f"{run.done_steps} of {run.planned_steps}" if run.planned_steps else str(run.done_steps)
    found = [("Steps", steps), ("Student", model.get("student")), ("Objective", objective.get("preset"))]
    teachers = {str(teacher.get("model")) for teacher in run.config.get("teachers", {}).values()}
    found.append(("Teacher", ", ".join(sorted(teachers))))
    if run.provenance is not None:
        found.append(("Seed", str(run.provenance.seed)))
        found += [(f"Hash of {role}", digest[:12]) for role, digest in run.provenance.models.items()]
        sessions = run.provenance.sessions
        if sessions:
            software = {"Python": sessions[-1].python, **sessions[-1].packages}
            found.append(("Started", sessions[0].started.replace("T", " ")[:16]))
            found.append(("Sessions", str(len(sessions))))
            found.append(("Software", ", ".join(f"{name} {version}" for name, version in software.items())))
    return [(name, str(value)) for name, value in found if value]


@dataclass(frozen=True)
class HeatCell:
    """One cell of R[stage, skill]: texts, and how full its colour is (0 to 100)."""

    text: str
    interval: str
    delta: str
    fill: int


def heat_rows(matrix: RetentionMatrix) -> list[tuple[str, list[HeatCell]]]:
    """The retention matrix as rows of cells; ``delta`` is against the first stage."""
    first = matrix.values[0]
    rows = []
    for index, (stage, values) in enumerate(zip(matrix.stages, matrix.values, strict=True)):
        cells = []
        for value, interval, start in zip(values, matrix.ci95[index], first, strict=True):
            if value is None:
                cells.append(HeatCell("–", "not measured", "", 0))
                continue
            delta = signed(100 * (value - start)) if index and start is not None else ""
            span = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %" if interval else ""
            cells.append(HeatCell(f"{100 * value:.1f}", span, delta, round(100 * value)))
        rows.append((stage, cells))
    return rows


def _held_out(run: RunData) -> Chart | None:
    """Success on held-out tasks at each evaluation, with 95 % bands."""
    if len(run.stages) < 2:
        return None
    series = []
    for skill in run.skills:
        scores = [(float(stage.result.step or 0), stage.result.tasks.get(skill)) for stage in run.stages]
        points: list[Point] = [(step, score.avg_at_k if score else None) for step, score in scores]
        series.append(Series(skill, points, [score.ci95 if score else None for _, score in scores]))
    return line_chart("Success on held-out tasks", "avg@k with 95 % intervals", series, percent=True)


def _chart_id(chart: Chart) -> str:
    return f"{chart.title}|{chart.caption}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("agentopd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loader = environment.loader
    assert loader is not None
    environment.globals["asset"] = lambda name: Markup(loader.get_source(environment, name)[0])
    environment.filters.update(chart_id=_chart_id, signed=signed)
    return environment
