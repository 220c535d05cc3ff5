"""Training as it is watched: in a terminal of any size, and in a log."""

import io
import re
import time

import pytest
from rich.console import Console

from agentopd.console import make_console
from agentopd.dashboard import NUM_VERDICTS, Seen, sparkline, watching

SKILLS = ("math", "repair")


def seen(finished, step):
    kept = list(finished.kept_episodes())
    metrics = {
        "math/success": 0.5,
        "repair/success": step / 20,
        "distill/reverse_kl": 1 / step,
        "rollout/tokens": 900.0,
    }
    return Seen(step, metrics, [(item.episode, item.verdict) for item in kept])


def watched(console, finished, steps=12):
    with watching(console, 20, 0, SKILLS) as show:
        for step in range(1, steps + 1):
            show(seen(finished, step))


def terminal(width, height):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)


def last_frame(console):
    return console.file.getvalue().rpartition("training")[2]


def test_a_terminal_shows_progress_curves_and_verdicts(finished):
    console = terminal(100, 40)
    watched(console, finished)
    frame = last_frame(console)
    assert "12/20" in frame and "left" in frame
    assert "60 %" in frame and "▁" in frame and "reverse KL" in frame
    assert len(re.findall("^[✓✗?] ", frame, re.MULTILINE)) == NUM_VERDICTS


@pytest.mark.parametrize(("width", "height"), [(1, 1), (10, 3), (30, 60), (47, 8), (48, 14), (300, 9)])
def test_a_small_terminal_breaks_nothing(finished, width, height):
    console = terminal(width, height)
    watched(console, finished)
    assert all(
        len(line) <= width for line in console.file.getvalue().replace("\r", "\n").split("\n") if "\x1b" not in line
    )


def test_a_log_has_one_plain_line_for_each_twentieth(finished):
    file = io.StringIO()
    watched(make_console(plain=True, file=file), finished)
    lines = file.getvalue().splitlines()
    assert lines[-1] == "training 12/20  math 50 %  repair 60 %" and "\x1b" not in file.getvalue()


def test_drawing_takes_milliseconds(finished):
    console, step = terminal(120, 50), seen(finished, 3)
    with watching(console, 20_000, 0, SKILLS) as show:
        started = time.process_time()
        for _ in range(20):
            show(step)
        assert (time.process_time() - started) / 20 < 0.03


def test_sparklines_keep_the_shape():
    assert sparkline([0, 0.5, 1], 10, 0, 1) == "▁▅█"
    assert sparkline([3, 3], 10) == "▁▁" and sparkline([], 10) == ""
    assert sparkline(list(range(80)), 8) == "▁▂▃▄▅▆▇█"
