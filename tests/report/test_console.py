"""Tables and progress as text."""

import io

import pytest

from agentopd.console import before_after_table, eval_table, make_console, print_error, progress, retention_table
from agentopd.evaluation.metrics import EvalResult
from agentopd.report.collect import collect


@pytest.fixture
def out():
    return io.StringIO()


def shown(out, renderable):
    make_console(plain=True, file=out).print(renderable)
    return out.getvalue()


def row(text, skill):
    return " ".join(next(line for line in text.splitlines() if f" {skill} " in line.replace("│", " ")).split())


def test_before_after_shows_change_interval_and_teacher(finished, out):
    run = collect(finished.path)
    assert run.base and run.latest
    text = shown(out, before_after_table(run.base.result, run.latest.result, run.teacher, run.roles))
    assert "\x1b" not in text
    line = row(text, "repair")
    for part in ("new", "30.0 (20–43)", "81.7 (70–89)", "+51.7 (+35 to +63)", "95.0", "79 %"):
        assert part in line


def test_before_after_works_without_roles_teacher_or_base(finished, out):
    after = collect(finished.path).stages[-1].result
    text = shown(out, before_after_table(EvalResult(tasks={}, model="m"), after))
    assert "teacher" not in text and "–" in row(text, "math")


def test_eval_and_retention_tables_hold_the_numbers(finished, out):
    run = collect(finished.path)
    matrix = run.retention()
    assert matrix is not None
    text = shown(out, eval_table(run.stages[0].result)) + shown(out, retention_table(matrix))
    assert "86.7 (76–93)" in row(text, "math") and "forgetting" in text and "step 30" in text


def test_plain_progress_is_a_few_lines_whatever_the_work(out):
    with progress(make_console(plain=True, file=out), "rollout", 1000) as advance:
        for _ in range(1000):
            advance(note="loss 1 [x]")
    lines = out.getvalue().splitlines()
    assert len(lines) <= 22 and lines[-1] == "rollout 1000/1000  loss 1 [x]"


def test_an_error_is_one_line_and_its_brackets_survive(out):
    print_error(make_console(plain=True, file=out), ValueError("no [table]\n  named 'x' " + "long " * 60))
    (line,) = out.getvalue().splitlines()
    assert line.startswith("error: no [table] named 'x' long")
