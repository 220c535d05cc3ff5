"""Which metric is shown where: every numeric key of ``metrics.jsonl`` finds one chart, the telling ones first.

``<skill>/success`` and its like share one chart per suffix, a curve per skill; the phases of ``time`` and ``memory``
and the counts of tokens share one each. A chart belongs to the first group whose pattern its name matches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentopd.report.charts import Chart, Series, line_chart

SHARE = re.compile(
    r"success|accuracy|frac|share|coverage|agree|conflict|neutral|truncated|flagged|repetition|rate$|mass|overlap"
    r"|cap_hit|distill/masked|dropped|sign_flips"
)
PageName = Literal["learning", "signal", "cost"]


@dataclass(frozen=True)
class GroupRule:
    """Charts whose name matches one of ``patterns``, in their order; ``folded`` ones wait behind a click."""

    page: PageName
    title: str
    note: str
    patterns: tuple[str, ...]
    folded: bool = False


RULES = (
    GroupRule(
        "cost", "Step by step", "", ("^time$", "^tokens$", "^memory$", "^(time|seconds|throughput|cost|memory)/")
    ),
    GroupRule(
        "signal",
        "Consensus and conflict",
        "Share of tokens on which the verdict and the teacher point the same way, apart, or one of them says nothing; "
        "inside tool calls and outside them.",
        ("agree · conflict · neutral",),
    ),
    GroupRule(
        "signal",
        "Bounds at work",
        "Weight after every bound; tokens whose signal met its cap, or whose update met the trust region.",
        ("cap_hit", "distill/weight", "sign_flips", "clip_frac", "pg/dropped", "importance_weight"),
    ),
    GroupRule(
        "signal",
        "Coverage and masks",
        "Tokens that the teacher supervised, tokens each mask took, and the probability that the compared ids hold.",
        ("coverage", "masked", "_mass$", "overlap"),
    ),
    GroupRule(
        "signal",
        "Learner against engine",
        "How far the weights that sampled and the weights that learn are apart, and how far training has moved.",
        ("mismatch", "stale", "drift", "kl_to_start"),
    ),
    GroupRule(
        "signal",
        "Faults and oddities",
        "What could not be judged is never a score. Flags are raised by verifiers; loops and cut episodes are counted.",
        (
            *("infra_errors", "flagged", "unjudged", "env_error", "no_evidence", "malformed", "repetition"),
            *("truncated", "batch/empty"),
        ),
    ),
    GroupRule("signal", "Consensus and conflict by skill", "", ("/agree", "/conflict", "/neutral"), folded=True),
    GroupRule(
        "learning",
        "On training prompts",
        "",
        ("^success$", "distill/reverse_kl$", "^reward$", "^tokens/episode$", "^turns$", "lr$"),
    ),
    GroupRule("learning", "Loss and optimiser", "", ("^loss/", "grad_norm", "student/nll", "^anchor/", "^reference/")),
    GroupRule("learning", "Everything else", "", ("",), folded=True),
)
TITLES = {
    "success": "Success",
    "reward": "Mean reward",
    "distill/reverse_kl": "Reverse KL to the teacher",
    "learner/lr": "Learning rate",
    "loss/total": "Loss",
    "loss/teacher": "Teacher term",
    "loss/policy_gradient": "Policy gradient term",
    "loss/anchor": "Anchor term",
    "loss/reference": "Reference term",
    "learner/grad_norm": "Gradient norm",
    "infra_errors": "Attempts without a verdict",
    "flagged": "Episodes with a flag",
    "tokens/episode": "Sampled tokens per episode",
    "turns": "Turns per episode",
    "malformed": "Malformed tool calls per episode",
    "repetition": "Episodes that loop",
    "truncated": "Episodes cut by a budget",
    "student/mismatch_kl": "Learner against engine, KL",
    "student/kl_to_start": "KL to the start",
    "student/drift": "Drift over passes, nats",
    "student/nll": "Negative log-likelihood",
    "distill/weight": "Mean weight of the teacher term",
    "distill/cap_hit": "Tokens at the cap",
    "distill/masked_special": "Special tokens masked",
    "distill/coverage": "Tokens the teacher supervised",
    "distill/teacher_mass": "Teacher's mass on the compared ids",
    "distill/student_mass": "Student's mass on the compared ids",
    "distill/agree · conflict · neutral": "All tokens",
    "distill/agree": "Consensus by skill",
    "distill/conflict": "Conflict by skill",
    "distill/neutral": "Neutral by skill",
    "pg/clip_frac": "Tokens held by the clip",
    "pg/dropped": "Tokens outside the trust region",
    "pg/importance_weight": "Importance weight",
    "time": "Seconds by phase",
    "tokens": "Tokens",
    "memory": "Resident memory by phase, MiB",
}
CLASSES = {"in_call": "in tool calls", "outside": "outside calls"}
ROUTES = ("agree", "conflict", "neutral")


@dataclass(frozen=True)
class Bar:
    """One row of a bar list: ``width`` is a percentage of the longest."""

    label: str
    value: str
    share: str
    width: float


@dataclass(frozen=True)
class Group:
    """Charts that belong together, and the titles of those that are zero at every step and not drawn."""

    title: str
    note: str
    charts: list[Chart]
    zero: list[str]
    folded: bool


@dataclass(frozen=True)
class Panels:
    """The groups of charts by page, and the totals of the cost page."""

    learning: list[Group]
    signal: list[Group]
    cost: list[Group]
    phases: list[Bar]
    tokens: list[Bar]
    memory: list[Bar]

    @property
    def charts(self) -> list[Chart]:
        """Every chart of every page."""
        return [chart for group in (*self.learning, *self.signal, *self.cost) for chart in group.charts]


def make_panels(rows: Sequence[Mapping[str, Any]], skills: Sequence[str]) -> Panels:
    """Lay out every numeric metric of the run."""
    keys = _numeric_keys(rows)
    named: dict[str, dict[str, str]] = {}  # chart name -> {series name: metric key}
    for key in keys:
        chart_name, series_name = _merged(key, skills)
        named.setdefault(chart_name, {})[series_name] = key
    pages: dict[str, list[Group]] = {"learning": [], "signal": [], "cost": []}
    left = dict(named)
    for rule in RULES:
        found = [name for pattern in rule.patterns for name in sorted(left) if re.search(pattern, name)]
        charts, zero = [], []
        for name in dict.fromkeys(found):
            keys_of = left.pop(name)
            if not any(row.get(key) for row in rows for key in keys_of.values()):
                zero.append(_title(name))
            elif chart := _chart(name, keys_of, rows, skills):
                charts.append(chart)
        if charts or zero:
            pages[rule.page].append(Group(rule.title, rule.note, charts, zero, rule.folded))
    return Panels(
        learning=pages["learning"],
        signal=pages["signal"],
        cost=pages["cost"],
        phases=_bars(_sums(rows, named.get("time", {}), without=("total", "step", "cpu")), _duration, shares=True),
        tokens=_bars(_sums(rows, named.get("tokens", {})), lambda value: f"{value:,.0f}"),
        memory=_bars(_peaks(rows, named.get("memory", {})), lambda value: f"{value:,.0f} MiB"),
    )


def _numeric_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    return [key for key in keys if key != "step"]


def _merged(key: str, skills: Sequence[str]) -> tuple[str, str]:
    """(chart, series) of a key: skills share a chart per suffix; so do phases, token counts and the signal's routes."""
    prefix, _, rest = key.partition("/")
    if prefix in ("time", "memory", "tokens") and rest:
        return prefix, rest
    if prefix in skills:
        return ("tokens/episode" if rest == "tokens" else rest), prefix
    if rest == "tokens":
        return "tokens", prefix
    for route in ROUTES:
        if rest == route or rest.startswith(f"{route}/"):
            return f"{prefix}/{' · '.join(ROUTES)}{rest.removeprefix(route)}", route
    tail = rest.rpartition("/")[2]
    return (key.removesuffix("/" + tail), tail) if tail in skills else (key, key)


def _chart(
    name: str, keys: Mapping[str, str], rows: Sequence[Mapping[str, Any]], skills: Sequence[str]
) -> Chart | None:
    """A skill has the same colour in every chart."""
    colours = {skill: index for index, skill in enumerate([*skills, "all skills"])}
    series = [
        Series(label, [(row["step"], _value(row, key)) for row in rows if key in row], colour=colours.get(label))
        for label, key in _skills_first(keys)
    ]
    values = [y for one in series for _, y in one.points if y is not None]
    percent = bool(SHARE.search(name)) and all(0 <= value <= 1 for value in values)
    return line_chart(_title(name), name, series, percent)


def _title(name: str) -> str:
    if name in TITLES:
        return TITLES[name]
    parent, _, tail = name.rpartition("/")
    if tail in CLASSES:
        return f"{_title(parent)}, {CLASSES[tail]}"
    return tail.replace("_", " ").capitalize()


def _skills_first(keys: Mapping[str, str]) -> list[tuple[str, str]]:
    """Skills before the overall curve."""
    ordered = sorted(keys.items(), key=lambda item: item[0] == item[1])
    return [("all skills" if name == key and len(keys) > 1 else name, key) for name, key in ordered]


def _value(row: Mapping[str, Any], key: str) -> float | None:
    value = row[key]
    return float(value) if isinstance(value, int | float) else None


def _sums(rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str], without: Sequence[str] = ()) -> dict[str, float]:
    """By series, the sum over steps; ``without`` names sums of the others, and other clocks."""
    named = {label: key for label, key in keys.items() if label not in without}
    return {label: sum(_value(row, key) or 0.0 for row in rows if key in row) for label, key in named.items()}


def _peaks(rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, float]:
    return {label: max(_value(row, key) or 0.0 for row in rows if key in row) for label, key in keys.items()}


def _bars(sums: Mapping[str, float], show: Callable[[float], str], shares: bool = False) -> list[Bar]:
    """The values, largest first; with the share of each where they add up to a whole."""
    total, longest = sum(sums.values()), max(sums.values(), default=0.0)
    if longest <= 0:
        return []
    return [
        Bar(
            label.replace("_", " "),
            show(value),
            f"{100 * value / total:.0f} %" if shares else "",
            round(100 * value / longest, 1),
        )
        for label, value in sorted(sums.items(), key=lambda item: -item[1])
    ]


def counted(counts: Mapping[str, int]) -> list[Bar]:
    """Counts as bars."""
    return _bars({name: float(count) for name, count in counts.items()}, lambda value: f"{value:.0f}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
