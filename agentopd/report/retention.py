"""The retention matrix as rows of texts."""

from __future__ import annotations

from dataclasses import dataclass

from agentopd.evaluation.retention import RetentionMatrix
from agentopd.evaluation.statistics import Interval
from agentopd.report.story import signed

_UNKNOWN = ("–", "")


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


def kept_rows(matrix: RetentionMatrix) -> list[tuple[str, list[tuple[str, str]]]]:
    """What became of each skill since it was learned: rows of (text, tone), those with anything to say."""
    kept = [matrix.by_skill[skill] for skill in matrix.skills]
    rows: list[tuple[str, list[tuple[str, str]]]] = [
        (
            "change since learned",
            [_moved(x.change.mean, x.change.ci95) if x.change else _UNKNOWN for x in kept],
        ),
        ("forgetting", [_moved(x.forgetting, x.forgetting_ci95, good=-1) for x in kept]),
        ("verdict", [(x.verdict or "–", {"kept": "up", "broken": "down"}.get(x.verdict or "", "")) for x in kept]),
    ]
    return [(name, cells) for name, cells in rows if any(text != "–" for text, _ in cells)]


def _moved(value: float | None, interval: Interval | None, good: int = 1) -> tuple[str, str]:
    if value is None:
        return _UNKNOWN
    if interval is None:
        return signed(100 * value), ""
    low, high = interval
    tone = ("up" if value * good > 0 else "down") if low > 0 or high < 0 else ""
    return f"{signed(100 * value)} ({signed(100 * low)} to {signed(100 * high)})", tone
