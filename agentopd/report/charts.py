"""Geometry of the report's charts: numbers in, positions out; the templates draw them.

Positions are per mille of the plot's width or height (the SVG is stretched to fit), so labels can be ordinary text that
keeps its size on a phone. Tick labels and the pointer read-out are HTML; only lines and bands are SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

SCALE = 1000
MAX_POINTS = 400
COLOURS = 8
SMOOTH_FROM = 30  # shorter series are drawn as they are
NOISY = 3.0  # so is a curve that travels less than this many times its own range: a schedule is not noise
Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One named curve; a None value is a gap. ``band`` holds an interval (low, high) per point, or is empty.

    ``colour`` is one of eight; by default the curve's place in its chart.
    """

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float] | None] = ()
    colour: int | None = None


@dataclass(frozen=True)
class Line:
    """A curve ready to draw: SVG paths, and dots where there are too few points to see a line."""

    name: str
    colour: int
    path: str
    faint_path: str
    band_path: str
    dots: list[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class Chart:
    """A line chart ready to draw. Ticks are (per mille, label); ``hover`` is what the page's script reads."""

    title: str
    caption: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    hover: dict[str, object] = field(default_factory=dict)


def line_chart(title: str, caption: str, series: Sequence[Series], percent: bool = False) -> Chart | None:
    """Lay out a chart; None where no series holds a finite number."""
    drawn = [thinned(one) for one in series]
    values = [y for one in drawn for _, y in one.points if y is not None]
    values += [bound for one in drawn for pair in one.band if pair for bound in pair]
    if not values:
        return None
    xs = sorted({x for one in drawn for x, _ in one.points})
    y_axis = _Axis.nice(min(values), max(values), percent)
    x_axis = _Axis(xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1)
    lines = [_line(one, index, x_axis, y_axis, percent) for index, one in enumerate(drawn)]
    return Chart(
        title=title,
        caption=caption,
        lines=lines,
        x_ticks=[(x_axis.at(x), number(x)) for x in _x_ticks(xs)],
        y_ticks=[(SCALE - y_axis.at(y), y_axis.label(y, percent)) for y in y_axis.ticks()],
        hover={
            "x": xs,
            "at": [round(x_axis.at(x), 1) for x in xs],
            "series": [
                {**_hover(one, xs, percent), "colour": line.colour} for one, line in zip(drawn, lines, strict=True)
            ],
        },
    )


def thinned(series: Series) -> Series:
    """At most ``MAX_POINTS`` points: means over equal runs of steps. Curves with bands are few-pointed and kept."""
    width = math.ceil(len(series.points) / MAX_POINTS)
    if width <= 1 or series.band:
        return series
    runs = [series.points[start : start + width] for start in range(0, len(series.points), width)]
    points = [(run[-1][0], _mean([y for _, y in run if y is not None])) for run in runs]
    return replace(series, points=points)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a twentieth of the curve, corrected for its start."""
    decay = 1 - 1 / max(2.0, len(points) / 20)
    total = weight = 0.0
    result: list[Point] = []
    for x, y in points:
        if y is not None:
            total, weight = decay * total + y, decay * weight + 1
        result.append((x, total / weight if y is not None else None))
    return result


def _noisy(points: Sequence[Point]) -> bool:
    values = [y for _, y in points if y is not None]
    travel = sum(abs(after - before) for before, after in pairwise(values))
    return bool(values) and travel > NOISY * (max(values) - min(values))


def number(value: float, percent: bool = False) -> str:
    """A short number: three significant digits, ``12.3k``, ``5e-04``; or a percentage."""
    if percent:
        return f"{100 * value:.3g} %"
    size = abs(value)
    if size >= 1e4 or (size >= 1000 and value != int(value)):
        power, suffix = (1e9, "G") if size >= 1e9 else (1e6, "M") if size >= 1e6 else (1e3, "k")
        return f"{value / power:.3g}{suffix}"
    if size and size < 1e-3:
        return f"{value:.3g}"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    step: float = 1.0

    @classmethod
    def nice(cls, low: float, high: float, percent: bool) -> _Axis:
        """Round bounds with about four steps of 1, 2, 2.5 or 5 times a power of ten; shares stay in [0, 1]."""
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = (0.0, high or 1.0) if high >= 0 else (low, 0.0)
        raw = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(max(low, 0.0), min(high, 1.0), step) if percent else cls(low, high, step)

    def at(self, value: float) -> float:
        """Position of a value, in per mille from the low end."""
        return SCALE * (value - self.low) / (self.high - self.low)

    def label(self, value: float, percent: bool) -> str:
        """A tick's number, with as many decimals as tell it from its neighbours."""
        step, unit, shown = (100 * self.step, " %", 100 * value) if percent else (self.step, "", value)
        if not 1e-3 <= step < 1e3:
            return number(value, percent)
        decimals = next(d for d in range(5) if abs(step * 10**d - round(step * 10**d)) < 1e-6)
        return f"{shown + 0.0:.{decimals}f}{unit}"

    def ticks(self) -> list[float]:
        """Multiples of the step inside the bounds."""
        first = math.ceil(self.low / self.step - 1e-9)
        last = math.floor(self.high / self.step + 1e-9)
        return [k * self.step for k in range(first, last + 1)]


def _line(series: Series, index: int, x_axis: _Axis, y_axis: _Axis, percent: bool) -> Line:
    smooth = len(series.points) >= SMOOTH_FROM and not series.band and _noisy(series.points)
    main = smoothed(series.points) if smooth else series.points
    seen = [(x_axis.at(x), SCALE - y_axis.at(y)) for x, y in series.points if y is not None]
    last = next((number(y, percent) for _, y in reversed(main) if y is not None), "")
    return Line(
        name=series.name,
        colour=(index if series.colour is None else series.colour) % COLOURS,
        path=_path(main, x_axis, y_axis),
        faint_path=_path(series.points, x_axis, y_axis) if smooth else "",
        band_path=_band(series, x_axis, y_axis),
        dots=seen if len(seen) <= 12 else [],
        last=last,
    )


def _path(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x_axis.at(x):.1f} {SCALE - y_axis.at(y):.1f}")
        pen = "L"
    return "".join(parts)


def _band(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    known = [(x, pair) for (x, _), pair in zip(series.points, series.band, strict=False) if pair]
    if len(known) < 2:
        return ""
    corners = [(x, high) for x, (_, high) in known] + [(x, low) for x, (low, _) in reversed(known)]
    return "M" + "L".join(f"{x_axis.at(x):.1f} {SCALE - y_axis.at(y):.1f}" for x, y in corners) + "Z"


def _hover(series: Series, xs: Sequence[float], percent: bool) -> dict[str, object]:
    shown = {x: number(y, percent) for x, y in series.points if y is not None}
    for (x, _), pair in zip(series.points, series.band, strict=False):
        if pair and x in shown:
            shown[x] += f" ({number(pair[0], percent)} to {number(pair[1], percent)})"
    return {"name": series.name, "y": [shown.get(x) for x in xs]}


def _x_ticks(xs: Sequence[float]) -> list[float]:
    """Round steps inside the range, about five of them."""
    if len(xs) == 1:
        return [xs[0]]
    axis = _Axis.nice(xs[0], xs[-1], percent=False)
    inside = [tick for tick in axis.ticks() if xs[0] <= tick <= xs[-1]]
    whole = [tick for tick in inside if tick == int(tick)]
    return whole or [xs[0], xs[-1]]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
