import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.report.charts import MAX_POINTS, Series, line_chart, number, smoothed, thinned

finite = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


@given(st.lists(st.one_of(st.none(), finite), min_size=1, max_size=60), st.integers(0, 1000))
def test_everything_lands_inside_the_plot(values, start):
    points = [(float(start + i), value) for i, value in enumerate(values)]
    chart = line_chart("t", "k", [Series("a", points)])
    if all(value is None for value in values):
        assert chart is None
        return
    assert chart is not None
    ys = [y for line in chart.lines for _, y in line.dots] + [at for at, _ in chart.y_ticks]
    xs = [x for line in chart.lines for x, _ in line.dots] + [at for at, _ in chart.x_ticks]
    assert all(-1 <= at <= 1001 for at in xs + ys)
    assert len(chart.y_ticks) >= 2


def test_gaps_break_the_line():
    chart = line_chart("t", "k", [Series("a", [(0, 1.0), (1, None), (2, 3.0), (3, 4.0)])])
    assert chart is not None
    assert chart.lines[0].path.count("M") == 2
    assert chart.hover["series"] == [{"name": "a", "y": ["1", None, "3", "4"], "colour": 0}]


def test_a_schedule_is_drawn_as_it_is_and_noise_is_smoothed():
    ramp = Series("lr", [(float(i), min(i, 10) / 10) for i in range(100)])
    noise = Series("x", [(float(i), math.sin(i * 7)) for i in range(100)])
    chart = line_chart("t", "k", [ramp, noise])
    assert chart is not None
    assert [bool(line.faint_path) for line in chart.lines] == [False, True]


def test_long_curves_are_thinned_by_means():
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    few = thinned(Series("a", points)).points
    assert len(few) <= MAX_POINTS and few[-1][0] == 9999.0
    assert all(y == pytest.approx(0.5, abs=0.05) for _, y in few)


@given(st.lists(finite, min_size=1, max_size=50))
def test_smoothing_stays_between_the_extremes(values):
    points = smoothed([(float(i), value) for i, value in enumerate(values)])
    slack = 1e-6 * max(1.0, *map(abs, values))
    assert all(min(values) - slack <= y <= max(values) + slack for _, y in points if y is not None)


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (0.5, True, "50 %"),
        (0.0005, False, "0.0005"),
        (12345.0, False, "12.3k"),
        (3.2e6, False, "3.2M"),
        (100.0, False, "100"),
        (0.1234, False, "0.123"),
        (6.7e-5, False, "6.7e-05"),
    ],
)
def test_numbers_are_short(value, percent, text):
    assert number(value, percent) == text
