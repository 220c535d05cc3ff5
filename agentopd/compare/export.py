"""A comparison as a table for the terminal, Markdown, LaTeX, JSON, and its learning curves as CSV and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from agentopd.compare.records import ArmResult, Results
from agentopd.console import DASH
from agentopd.evaluation.statistics import Interval, seeds_interval
from agentopd.report import write_curves_page
from agentopd.report.charts import Series
from agentopd.tracking import write_atomic

_HEADERS = (
    "arm",
    "seeds",
    "new skills %",
    "vs baseline",
    "retention",
    "vs baseline",
    "forgetting",
    "kept",
    "tokens",
    "teacher tokens",
    "CPU s",
)


@dataclass(frozen=True)
class Cells:
    """One arm's row as text, column by column."""

    name: str
    rest: tuple[str, ...]


def rows(results: Results) -> list[Cells]:
    """The table: means over seeds with 95 % t intervals, differences with Holm-corrected p-values."""
    return [Cells(name, _cells(results, name, arm)) for name, arm in results.arms.items()]


def comparison_table(results: Results) -> Table:
    """For the terminal."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(_HEADERS[0])
    for header in _HEADERS[1:]:
        table.add_column(Text(header), justify="right")
    for row in rows(results):
        table.add_row(Text(row.name), *(Text(cell) for cell in row.rest))
    return table


def markdown(results: Results) -> str:
    """A table in GitHub's Markdown, with what its columns mean."""
    lines = [f"| {' | '.join(_HEADERS)} |", f"|{'---|' * len(_HEADERS)}"]
    lines += [f"| {' | '.join(('`' + row.name + '`', *row.rest))} |" for row in rows(results)]
    return "\n".join(lines) + f"\n\n{caption(results)}\n"


def latex(results: Results) -> str:
    """A booktabs table."""
    body = [" & ".join(map(_escaped, (row.name, *row.rest))) + r" \\" for row in rows(results)]
    head = " & ".join(map(_escaped, _HEADERS)) + r" \\"
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (len(_HEADERS) - 1)}}}",
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
    page = write_curves_page(results.name, caption(results), _HEADERS, _plain_rows(results), curves(results), out)
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


def _cells(results: Results, name: str, arm: ArmResult) -> tuple[str, ...]:
    trained = any(seed.tokens or seed.cpu_seconds for seed in arm.seeds)
    kept = sum(not seed.broken for seed in arm.seeds)
    return (
        str(len(arm.seeds)),
        _mean(list(arm.by_seed("new_skills").values())),
        _test(results, name, "new_skills"),
        _mean(list(arm.by_seed("retention").values()), signed=True),
        _test(results, name, "retention"),
        _mean(list(arm.by_seed("forgetting").values()), signed=True),
        f"{kept}/{len(arm.seeds)}" if trained and results.tolerated_drop is not None else DASH,
        _total(arm, "tokens"),
        _total(arm, "teacher_tokens"),
        _total(arm, "cpu_seconds"),
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
            return f"{100 * test.difference.mean:+.1f} (p={test.p_holm:.2g})"
    return DASH


def _total(arm: ArmResult, measure: str) -> str:
    values = list(arm.by_seed(measure).values())
    mean = sum(values) / len(values) if values else 0.0
    return f"{mean:,.0f}" if mean else DASH


def _escaped(text: str) -> str:
    for char in "&%$#_":
        text = text.replace(char, "\\" + char)
    return text.replace("±", r"$\pm$").replace("–", "--")
