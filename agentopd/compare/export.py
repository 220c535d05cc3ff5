"""A comparison as a table for the terminal, Markdown, LaTeX, JSON, and its learning curves as CSV and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from agentopd.compare.records import ArmResult, Results
from agentopd.console import DASH
from agentopd.evaluation.statistics import Interval, seeds_interval
from agentopd.report import write_curves_page
from agentopd.report.charts import Series
from agentopd.tracking import write_atomic

_DIFFERENCE = "vs baseline"


@dataclass(frozen=True)
class Cells:
    """One arm's row as text, column by column."""

    name: str
    rest: tuple[str, ...]


def headers(results: Results) -> tuple[str, ...]:
    """What the columns are called."""
    return ("arm", *(column.header for column in _columns(results)))


def rows(results: Results) -> list[Cells]:
    """The table: means over seeds with 95 % t intervals, differences with Holm-corrected p-values."""
    columns = _columns(results)
    return [
        Cells(name, tuple(column.cell(results, name, arm) for column in columns)) for name, arm in results.arms.items()
    ]


def comparison_table(results: Results) -> Table:
    """For the terminal: a difference from the baseline stands below what differs."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    first, *others = headers(results)
    table.add_column(first, no_wrap=True)
    for header in others:
        if header != _DIFFERENCE:
            words = header.replace(" ", "\n", 1) if len(header) > 6 else header
            table.add_column(Text(words), justify="right", no_wrap=True)
    for row in rows(results):
        cells: list[str] = []
        for header, cell in zip(others, row.rest, strict=True):
            if header != _DIFFERENCE:
                cells.append(cell)
            elif cell != DASH:
                cells[-1] += f"\n{cell}"
        table.add_row(Text(row.name), *map(Text, cells))
    return table


def markdown(results: Results) -> str:
    """A table in GitHub's Markdown, with what its columns mean."""
    columns = headers(results)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(('`' + row.name + '`', *row.rest))} |" for row in rows(results)]
    return "\n".join(lines) + f"\n\n{caption(results)}\n"


def latex(results: Results) -> str:
    """A booktabs table."""
    body = [" & ".join(map(_escaped, (row.name, *row.rest))) + r" \\" for row in rows(results)]
    columns = headers(results)
    head = " & ".join(map(_escaped, columns)) + r" \\"
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_escaped(caption(results))}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def caption(results: Results) -> str:
    """What the columns mean, and how many runs are behind them."""
    tolerated = f" (at most {100 * results.tolerated_drop:g} points lost)" if results.tolerated_drop is not None else ""
    return (
        f"Means over seeds with 95 % t intervals; retention and forgetting in points. Differences are against "
        f"{results.baseline}, paired over seeds, with p-values corrected over all tests of the table (Holm). "
        f"Kept: seeds in which every old skill stayed within its tolerance{tolerated}. "
        f"{results.finished} of {results.planned} runs finished."
    )


def write_results(results: Results, out: Path) -> list[Path]:
    """Write ``results.json``, ``table.md``, ``table.tex``, ``curves.csv`` and ``compare.html`` into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "results.json": results.model_dump_json(indent=1) + "\n",
        "table.md": markdown(results),
        "table.tex": latex(results),
        "curves.csv": curves_csv(results),
    }
    for name, text in texts.items():
        write_atomic(out / name, text)
    page = write_curves_page(
        results.name, caption(results), headers(results), _plain_rows(results), curves(results), out
    )
    return [*(out / name for name in texts), page]


def curves_csv(results: Results) -> str:
    """Every held-out score: ``arm, seed, step, skill, score``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("arm", "seed", "step", "skill", "score"))
    for name, arm in results.arms.items():
        for seed in arm.seeds:
            for point in seed.curve:
                writer.writerows((name, seed.seed, point.step, skill, score) for skill, score in point.skills.items())
    return buffer.getvalue()


def curves(results: Results) -> dict[str, list[Series]]:
    """Learning curves by skill: one series per arm, the mean over seeds with its interval."""
    skills = dict.fromkeys(
        skill for arm in results.arms.values() for seed in arm.seeds for point in seed.curve for skill in point.skills
    )
    return {skill: [_series(name, arm, skill) for name, arm in results.arms.items() if _has(arm)] for skill in skills}


def _has(arm: ArmResult) -> bool:
    return any(seed.curve for seed in arm.seeds)


def _series(name: str, arm: ArmResult, skill: str) -> Series:
    by_step: dict[int, list[float]] = {}
    for seed in arm.seeds:
        for point in seed.curve:
            if skill in point.skills:
                by_step.setdefault(point.step, []).append(point.skills[skill])
    steps = sorted(by_step)
    bands = [_inside(seeds_interval(by_step[step])) for step in steps]
    return Series(name, [(float(step), sum(by_step[step]) / len(by_step[step])) for step in steps], bands)


def _inside(interval: Interval | None) -> Interval | None:
    return (max(0.0, interval[0]), min(1.0, interval[1])) if interval else None


def _plain_rows(results: Results) -> list[tuple[str, ...]]:
    return [(row.name, *row.rest) for row in rows(results)]


class _Column(NamedTuple):
    header: str
    cell: Callable[[Results, str, ArmResult], str]
    always: bool = True
    """Otherwise only where arms differ in it."""


def _columns(results: Results) -> list[_Column]:
    def differ(column: _Column) -> bool:
        return len({column.cell(results, name, arm) for name, arm in results.arms.items()} - {DASH}) > 1

    return [column for column in _COLUMNS if column.always or differ(column)]


def _kept(results: Results, name: str, arm: ArmResult) -> str:
    trained = any(seed.tokens or seed.cpu_seconds for seed in arm.seeds)
    kept = sum(not seed.broken for seed in arm.seeds)
    return f"{kept}/{len(arm.seeds)}" if trained and results.tolerated_drop is not None else DASH


def _percent(measure: str, signed: bool = False) -> Callable[[Results, str, ArmResult], str]:
    return lambda results, name, arm: _mean(list(arm.by_seed(measure).values()), signed)


def _against(measure: str) -> Callable[[Results, str, ArmResult], str]:
    return lambda results, name, arm: _test(results, name, measure)


def _amount(measure: str, form: str = ",.0f") -> Callable[[Results, str, ArmResult], str]:
    return lambda results, name, arm: _total(arm, measure, form)


_COLUMNS = (
    _Column("seeds", lambda results, name, arm: str(len(arm.seeds))),
    _Column("new skills %", _percent("new_skills")),
    _Column(_DIFFERENCE, _against("new_skills")),
    _Column("retention", _percent("retention", signed=True)),
    _Column(_DIFFERENCE, _against("retention")),
    _Column("forgetting", _percent("forgetting", signed=True)),
    _Column("kept", _kept),
    _Column("patch lines", _amount("patch_cost", ".1f"), always=False),
    _Column("tokens", _amount("tokens")),
    _Column("replayed", _amount("replay_tokens"), always=False),
    _Column("teacher tokens", _amount("teacher_tokens")),
    _Column("CPU s", _amount("cpu_seconds")),
)


def _mean(values: Sequence[float], signed: bool = False) -> str:
    if not values:
        return DASH
    mean, interval = sum(values) / len(values), seeds_interval(values)
    shown = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    return shown + (f" ± {50 * (interval[1] - interval[0]):.1f}" if interval else "")


def _test(results: Results, name: str, measure: str) -> str:
    for test in results.tests:
        if (test.arm, test.measure) == (name, measure):
            p_value = f"p={test.p_holm:.2g}" if test.p_holm >= 0.001 else "p<0.001"
            return f"{100 * test.difference.mean:+.1f} ({p_value})"
    return DASH


def _total(arm: ArmResult, measure: str, form: str) -> str:
    values = list(arm.by_seed(measure).values())
    mean = sum(values) / len(values) if values else 0.0
    return format(mean, form) if mean else DASH


def _escaped(text: str) -> str:
    for char in "&%$#_":
        text = text.replace(char, "\\" + char)
    return text.replace("±", r"$\pm$").replace("–", "--")
