"""What commands print: tables, one progress bar, one-line errors. ``plain`` output has no colour and no redrawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agentopd.evaluation.metrics import EvalResult, SkillScore
from agentopd.evaluation.retention import RetentionMatrix, gap_closed
from agentopd.evaluation.statistics import Difference, Interval, paired_difference

DASH = "–"
PLAIN_WIDTH = 120
_VERDICT_STYLES = {"kept": "green", "broken": "bold red"}
_PLAIN_LINES = 20  # progress lines a plain log gets, however long the work


def make_console(plain: bool = False, stderr: bool = False, file: TextIO | None = None) -> Console:
    """A console; ``plain`` writes no ANSI codes and wraps at a fixed width, for logs."""
    if plain:
        return Console(file=file, stderr=stderr, color_system=None, force_terminal=False, width=PLAIN_WIDTH)
    return Console(file=file, stderr=stderr)


def print_error(console: Console, error: BaseException) -> None:
    """The error on one line."""
    message = " ".join(str(error).split()) or type(error).__name__
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """``steps`` more are done; ``note`` replaces the text after the bar."""
        ...


@contextmanager
def progress(console: Console, label: str, total: int) -> Iterator[Advance]:
    """A progress bar; on a console that is no terminal, about twenty plain lines instead."""
    if not console.is_terminal:
        yield _plain_progress(console, label, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            """Move the bar."""
            bar.update(task, advance=steps, note=note) if note else bar.update(task, advance=steps)

        yield advance


def _plain_progress(console: Console, label: str, total: int) -> Advance:
    done, printed = 0, -1

    def advance(steps: int = 1, note: str = "") -> None:
        """Print when another twentieth is done."""
        nonlocal done, printed
        done += steps
        bucket = done * _PLAIN_LINES // max(total, 1)
        if bucket > printed:
            printed = bucket
            console.print(f"{label} {done}/{total}{'  ' + note if note else ''}", markup=False, highlight=False)

    return advance


def before_after_table(
    base: EvalResult, after: EvalResult, teacher: EvalResult | None = None, roles: Mapping[str, str] | None = None
) -> Table:
    """Base, after and the paired change with its 95 % interval, per skill; teacher columns where it was evaluated.

    ``roles`` maps a skill to "new" or "old". A skill that lost ground beyond chance is red, one that gained green.
    """
    table = _table("skill", *(["role"] if roles else []), "tasks", "base %", "after %", "change (95 %)")
    for header in ("teacher %", "gap closed") if teacher else ():
        table.add_column(header, justify="right")
    for name in dict.fromkeys([*base.tasks, *after.tasks]):
        old, new = base.tasks.get(name), after.tasks.get(name)
        row = [Text(name), *([Text(roles.get(name, DASH))] if roles else []), Text(str(new.n if new else 0))]
        row += [Text(score(old)), Text(score(new)), _signed(_change(old, new))]
        if teacher is not None:
            goal = teacher.tasks.get(name)
            gap = gap_closed(old, new, goal)
            row += [Text(score(goal)), Text(f"{percent(gap.value, 0)} %" if gap else DASH)]
        table.add_row(*row)
    return table


def eval_table(result: EvalResult) -> Table:
    """One evaluation: avg@k with its interval, pass@k, reward, and attempts that could not be judged."""
    table = _table("skill", "tasks", "k", "avg@k % (95 %)", "pass@k %", "reward", "infra errors")
    for name, skill in result.tasks.items():
        reward = DASH if skill.mean_reward is None else f"{skill.mean_reward:.3f}"
        faults = Text(str(skill.infra_errors), style="yellow" if skill.infra_errors else "")
        cells = (str(skill.n), str(skill.k), score(skill), percent(skill.pass_at_k), reward)
        table.add_row(Text(name), *(Text(cell) for cell in cells), faults)
    return table


def retention_table(matrix: RetentionMatrix) -> Table:
    """R[stage, skill], then what became of each skill since it was learned, with 95 % intervals."""
    table = _table("stage", *(f"{skill} %" for skill in matrix.skills), "mean")
    spans = matrix.average_ci95 or (None,) * len(matrix.stages)
    for index, stage in enumerate(matrix.stages):
        cells = [Text(_span(*pair)) for pair in zip(matrix.values[index], matrix.ci95[index], strict=True)]
        table.add_row(Text(stage), *cells, Text(_span(matrix.average[index], spans[index])))
    table.add_section()
    kept = [matrix.by_skill[skill] for skill in matrix.skills]
    backward = _moved(matrix.backward_transfer, matrix.backward_transfer_ci95)
    table.add_row("change (backward transfer)", *(_signed(item.change) for item in kept), backward)
    forgetting = [_moved(item.forgetting, item.forgetting_ci95, good=-1) for item in kept]
    table.add_row("forgetting", *forgetting, _moved(matrix.mean_forgetting, matrix.mean_forgetting_ci95, good=-1))
    if matrix.forward_transfer is not None:
        forward = _moved(matrix.forward_transfer, matrix.forward_transfer_ci95)
        table.add_row("forward transfer", *(_signed(item.forward) for item in kept), forward)
    if matrix.start_kl and any(value is not None for value in matrix.start_kl[-1]):
        pairs = zip(matrix.start_kl[-1], matrix.start_kl_ci95[-1], strict=True)
        table.add_row("KL to the start, nats/token", *(Text(_nats(*pair)) for pair in pairs), Text(DASH))
    if matrix.tolerated_drop is not None:
        verdicts = (Text(item.verdict or DASH, style=_VERDICT_STYLES.get(item.verdict or "", "")) for item in kept)
        table.add_row(f"verdict (tolerated: {100 * matrix.tolerated_drop:g})", *verdicts, Text(DASH))
    return table


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, without the sign (headers carry it), or a dash."""
    return DASH if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None) -> str:
    """A difference of shares in signed percentage points, or a dash."""
    return DASH if value is None else f"{100 * value:+.1f}"


def score(skill: SkillScore | None) -> str:
    """``61.0 (51–70)`` in percent, or a dash."""
    return _span(skill.avg_at_k, skill.ci95) if skill and skill.ci95 else DASH


def _change(old: SkillScore | None, new: SkillScore | None) -> Difference | None:
    return paired_difference(old.task_means, new.task_means) if old and new else None


def _signed(difference: Difference | None) -> Text:
    return _moved(difference.mean, difference.ci95) if difference else Text(DASH)


def _moved(value: float | None, interval: Interval | None, good: int = 1) -> Text:
    """Points with their interval; coloured where it excludes zero, green for the ``good`` sign."""
    if value is None or interval is None:
        return Text(points(value))
    low, high = interval
    style = ("green" if value * good > 0 else "red") if low > 0 or high < 0 else ""
    return Text(f"{points(value)} ({100 * low:+.0f} to {100 * high:+.0f})", style=style)


def _span(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return percent(value)
    return f"{percent(value)} ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})"


def _nats(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return DASH
    return f"{value:.3f}" + (f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else "")


def _table(first: str, *rest: str) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for header in rest:
        table.add_column(Text(header), justify="right")
    return table
