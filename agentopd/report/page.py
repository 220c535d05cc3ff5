"""Assemble the page: data in, one HTML file out, nothing loaded from anywhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from agentopd.evaluation.retention import RetentionMatrix
from agentopd.report import inspector
from agentopd.report.charts import Chart, Point, Series, line_chart
from agentopd.report.collect import RunData, collect
from agentopd.report.panels import Bar, counted, make_panels
from agentopd.report.retention import heat_rows, kept_rows
from agentopd.report.story import signed, skill_rows, story, tiles
from agentopd.tracking import KeptEpisode, RunDirectory, write_atomic
from agentopd.types import JSON


def build_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a run, finished or interrupted, and return its path. Raises ``UserError``."""
    run = collect(run_dir)
    path = RunDirectory.open(run_dir).report
    write_atomic(path, render(run))
    return path


def write_retention_page(matrix: RetentionMatrix, path: Path, roles: Mapping[str, str] | None = None) -> Path:
    """Write one matrix as a page of its own, for evaluations that belong to no run; ``roles`` as in a suite."""
    template = template_environment().get_template("retention.html")
    page = template.render(matrix=matrix, heat=heat_rows(matrix), kept=kept_rows(matrix), roles=roles or {})
    write_atomic(path, page)
    return path


def render(run: RunData) -> str:
    """The page as text. Everything from the run is escaped: markup by autoescape, data as JSON without ``<``."""
    matrix = run.retention()
    rows = skill_rows(run, matrix)
    panels = make_panels(run.rows, run.skills)
    held_out, by_skill = _held_out(run)
    shown = inspector.choose(run.episodes)
    charts = [chart for chart in (held_out, *by_skill, *panels.charts) if chart]
    return (
        template_environment()
        .get_template("report.html")
        .render(
            run=run,
            facts=facts(run),
            missing=run.missing(),
            rows=rows,
            after_name=run.latest.name.capitalize() if run.latest else "After",
            story=story(rows),
            tiles=tiles(run),
            matrix=matrix,
            heat=heat_rows(matrix) if matrix else [],
            kept=kept_rows(matrix) if matrix else [],
            roles=run.roles,
            held_out=held_out,
            by_skill=by_skill,
            panels=panels,
            flags=flag_bars(run.episodes),
            episodes=shown,
            sampled=len(shown) < run.num_kept,
            data=page_data(charts, shown),
        )
    )


def page_data(charts: Sequence[Chart], episodes: Sequence[JSON] = ()) -> Markup:
    """What the page's scripts read: the read-outs of its charts, and the episodes of its inspector."""
    return embedded({"charts": {_chart_id(chart): chart.hover for chart in charts}, "episodes": list(episodes)})


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


def flag_bars(episodes: Sequence[KeptEpisode]) -> list[Bar]:
    """How many episodes carry each flag."""
    return counted(Counter(code for kept in episodes for code in {flag.code for flag in kept.verdict.flags}))


def _held_out(run: RunData) -> tuple[Chart | None, list[Chart]]:
    """Success on held-out tasks at each evaluation, with 95 % bands: all skills in one chart, and each in its own."""
    if len(run.stages) < 2:
        return None, []
    series = []
    for colour, skill in enumerate(run.skills):
        scores = [(float(stage.result.step or 0), stage.result.tasks.get(skill)) for stage in run.stages]
        points: list[Point] = [(step, score.avg_at_k if score else None) for step, score in scores]
        bands = [score.ci95 if score else None for _, score in scores]
        series.append(Series(skill, points, bands, colour))
    together = line_chart("Success on held-out tasks", "avg@k with 95 % intervals", series, percent=True)
    own = [line_chart(one.name, "held-out avg@k, 95 % interval", [one], percent=True) for one in series]
    return together, [chart for chart in own if chart is not None]


def _chart_id(chart: Chart) -> str:
    return f"{chart.title}|{chart.caption}"


def _code(text: str) -> Markup:
    """Escaped text with what stands in backticks as code."""
    return Markup(re.sub(r"`(.*?)`", r"<code>\1</code>", str(escape(text))))


def template_environment() -> Environment:
    """Templates that escape what they are given and know each other's names."""
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
    environment.filters.update(chart_id=_chart_id, signed=signed, code=_code)
    return environment
