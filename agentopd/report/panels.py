"""Which metric is shown where: every numeric key of ``metrics.jsonl`` finds a chart, the telling ones first.

``<skill>/success`` and its like share one chart per suffix, a curve per skill; every other key gets its own. Sections
are chosen by prefix (``COST``, ``SIGNAL``; the rest are learning curves, and reverse KL is one wherever it is logged).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentopd.report.charts import Chart, Series, line_chart

COST = frozenset({"time", "seconds", "tokens", "cost", "throughput", "memory"})
SIGNAL = frozenset({"distill", "signal", "pg", "student", "reference", "mask", "mismatch", "teacher"})
SHARE = re.compile(
    r"success|accuracy|frac|share|coverage|agree|conflict|neutral|truncated|rate$|mass|overlap_ratio|cap_hit|masked|dropped"
)
FIRST = (
    r"/success$",
    r"reverse_kl",
    r"/(sampled_)?tokens$|length",
    r"(^|/)lr$",
    r"infra",
    r"/reward$",
    r"turns",
    r"loss",
)
SIGNAL_FIRST = (r"agree|neutral|conflict", r"coverage", r"cap", r"masked", r"mismatch")

KNOWN_TITLES = {
    "success": "Success on training prompts",
    "reward": "Mean reward",
    "distill/reverse_kl": "Reverse KL to the teacher",
    "lr": "Learning rate",
    "infra_errors": "Infrastructure errors",
    "tokens": "Sampled tokens per episode",
    "rollout/tokens": "Sampled tokens per step",
    "mismatch_kl": "Learner against engine, KL",
    "cap_hit": "Tokens at the cap",
    "masked_special": "Special tokens masked",
    "coverage": "Tokens the teacher supervised",
}


@dataclass(frozen=True)
class Bar:
    """One row of a bar list: ``width`` is a percentage of the longest."""

    label: str
    value: str
    share: str
    width: float


@dataclass(frozen=True)
class Panels:
    """The charts by section, and the totals of the cost panel."""

    curves: list[Chart]
    signal: list[Chart]
    cost: list[Chart]
    phases: list[Bar]
    tokens: list[Bar]


def make_panels(rows: Sequence[Mapping[str, Any]], skills: Sequence[str]) -> Panels:
    """Lay out every numeric metric of the run."""
    groups: dict[str, dict[str, str]] = {}  # chart id -> {series name: metric key}
    keys = _numeric_keys(rows)
    for key in keys:
        prefix, _, rest = key.partition("/")
        merged = _merged(key, prefix, rest, skills)
        groups.setdefault(merged[0], {})[merged[1]] = key
    sections: dict[str, list[Chart]] = {"curves": [], "signal": [], "cost": []}
    for chart_id in _ordered(groups):
        chart = _chart(chart_id, groups[chart_id], rows)
        if chart is not None:
            sections[_section(next(iter(groups[chart_id].values())), skills)].append(chart)
    return Panels(
        **sections,
        phases=_totals(rows, _phases(keys), _duration),
        tokens=_totals(rows, _token_counts(keys, skills), lambda value: f"{value:,.0f}"),
    )


def _numeric_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    return [key for key in keys if key != "step"]


def _merged(key: str, prefix: str, rest: str, skills: Sequence[str]) -> tuple[str, str]:
    """(chart, series) of a key: skills share a chart per suffix, the three routes of the signal share one."""
    if prefix in skills:
        return rest, prefix
    tail = rest.rpartition("/")[2]
    if tail in skills:
        return key.removesuffix("/" + tail), tail
    if rest in ("agree", "neutral", "conflict"):
        return f"{prefix}/agree · neutral · conflict", rest
    return key, key


def _section(key: str, skills: Sequence[str]) -> str:
    prefix, _, rest = key.partition("/")
    if prefix in skills or "reverse_kl" in key:
        return "curves"
    return "cost" if prefix in COST or rest == "tokens" else "signal" if prefix in SIGNAL else "curves"


def _ordered(groups: Mapping[str, Mapping[str, str]]) -> list[str]:
    def rank(chart_id: str) -> tuple[int, str]:
        """Place in the order of interest, then the name."""
        key = next(iter(groups[chart_id].values()))
        patterns = (*FIRST, *SIGNAL_FIRST)
        return next((i for i, pattern in enumerate(patterns) if re.search(pattern, key)), len(patterns)), chart_id

    return sorted(groups, key=rank)


def _chart(chart_id: str, keys: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    series = [
        Series(name, [(row["step"], _value(row, key)) for row in rows if key in row])
        for name, key in _skills_first(keys)
    ]
    values = [y for one in series for _, y in one.points if y is not None]
    percent = bool(SHARE.search(chart_id)) and all(0 <= value <= 1 for value in values)
    tail = chart_id.rpartition("/")[2]
    title = KNOWN_TITLES.get(chart_id) or KNOWN_TITLES.get(tail) or tail.replace("_", " ").capitalize()
    return line_chart(title, chart_id, series, percent)


def _skills_first(keys: Mapping[str, str]) -> list[tuple[str, str]]:
    """Skills before the overall curve, so that a skill has the same colour in every chart."""
    ordered = sorted(keys.items(), key=lambda item: item[0] == item[1])
    return [("all skills" if name == key and len(keys) > 1 else name, key) for name, key in ordered]


def _value(row: Mapping[str, Any], key: str) -> float | None:
    value = row[key]
    return float(value) if isinstance(value, int | float) else None


def _phases(keys: Sequence[str]) -> dict[str, str]:
    """{key: label} of ``time/<phase>``; ``total`` and ``step`` are sums of the others, ``cpu`` is another clock."""
    parts = {key: key.partition("/")[2] for key in keys if key.startswith(("time/", "seconds/"))}
    return {key: part for key, part in parts.items() if part not in ("total", "step", "cpu")}


def _token_counts(keys: Sequence[str], skills: Sequence[str]) -> dict[str, str]:
    """{key: label} of ``tokens/<what>`` and ``<stage>/tokens``; a skill's tokens are a mean, not a count."""
    counts = {key: key.removeprefix("tokens/") for key in keys if key.startswith("tokens/")}
    stages = (key for key in keys if key.endswith("/tokens") and key.partition("/")[0] not in skills)
    return counts | {key: key.removesuffix("/tokens") for key in stages}


def _totals(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], show: Callable[[float], str]) -> list[Bar]:
    """Sums over steps, largest first."""
    sums = {label: sum(_value(row, key) or 0.0 for row in rows if key in row) for key, label in labels.items()}
    total, longest = sum(sums.values()), max(sums.values(), default=0.0)
    if total <= 0:
        return []
    ordered = sorted(sums.items(), key=lambda item: -item[1])
    return [
        Bar(part.replace("_", " "), show(value), f"{100 * value / total:.0f} %", round(100 * value / longest, 1))
        for part, value in ordered
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
