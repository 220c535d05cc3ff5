"""A comparison's page: its table and a learning curve per skill, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from agentopd.report.charts import Series, line_chart
from agentopd.report.page import page_data, template_environment
from agentopd.tracking import write_atomic


def write_curves_page(
    name: str,
    note: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    curves: Mapping[str, Sequence[Series]],
    folder: Path,
) -> Path:
    """Write ``compare.html`` into ``folder``; ``curves`` holds the series of each skill, one per arm."""
    found = [line_chart(skill, "held-out success by step", series, percent=True) for skill, series in curves.items()]
    path = folder / "compare.html"
    template = template_environment().get_template("compare.html")
    charts = [chart for chart in found if chart is not None]
    page = template.render(name=name, note=note, headers=headers, rows=rows, charts=charts, data=page_data(charts))
    write_atomic(path, page)
    return path
