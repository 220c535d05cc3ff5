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
from agentopd.evaluation.statistics import Difference, paired_difference

DASH = "–"
PLAIN_WIDTH = 120
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
    """R[stage, skill], then the change and the forgetting of each skill."""
    table = _table("stage", *(f"{skill} %" for skill in matrix.skills), "mean")
    for stage, row, mean in zip(matrix.stages, matrix.values, matrix.average, strict=True):
        table.add_row(Text(stage), *(Text(percent(value)) for value in row), Text(percent(mean)))
    table.add_section()
    kept = [matrix.by_skill[skill] for skill in matrix.skills]
    table.add_row("change", *(_signed(item.change) for item in kept), Text(points(matrix.backward_transfer)))
    table.add_row("forgetting", *(Text(points(item.forgetting)) for item in kept), Text(points(matrix.mean_forgetting)))
    return table


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, without the sign (headers carry it), or a dash."""
    return DASH if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None) -> str:
    """A difference of shares in signed percentage points, or a dash."""
    return DASH if value is None else f"{100 * value:+.1f}"


def score(skill: SkillScore | None) -> str:
    """``61.0 (51–70)`` in percent, or a dash."""
    if skill is None or skill.avg_at_k is None or skill.ci95 is None:
        return DASH
    low, high = skill.ci95
    return f"{percent(skill.avg_at_k)} ({100 * low:.0f}–{100 * high:.0f})"


def _change(old: SkillScore | None, new: SkillScore | None) -> Difference | None:
    return paired_difference(old.task_means, new.task_means) if old and new else None


def _signed(difference: Difference | None) -> Text:
    if difference is None:
        return Text(DASH)
    style = ("green" if difference.mean > 0 else "red") if difference.significant else ""
    low, high = difference.ci95
    return Text(f"{points(difference.mean)} ({100 * low:+.0f} to {100 * high:+.0f})", style=style)


def _table(first: str, *rest: str) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for header in rest:
        table.add_column(Text(header), justify="right")
    return table
