"""Training as it is watched: progress, key curves and the last verdicts in a terminal; plain lines in a log.

The view is drawn once a step and not in between, so it costs a few milliseconds a step and no thread.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agentopd.console import percent, progress
from agentopd.types import Episode, Verdict

BARS = "▁▂▃▄▅▆▇█"
CURVES = {
    "distill/reverse_kl": "reverse KL",
    "distill/agree": "consensus",
    "loss/total": "loss",
    "rollout/tokens": "tokens",
}
NUM_VERDICTS = 5
MIN_WIDTH, MIN_HEIGHT = 48, 14  # below, there is only the bar


@dataclass(frozen=True)
class Seen:
    """What one step leaves to look at: its metrics, and its judged episodes."""

    step: int
    metrics: Mapping[str, float]
    judged: Sequence[tuple[Episode, Verdict]]


@contextmanager
def watching(console: Console, total: int, done: int, skills: Sequence[str]) -> Iterator[Callable[[Seen], None]]:
    """Show steps as they come, from ``done`` to ``total``; on a console that is no terminal, as plain lines."""
    if not console.is_terminal:
        with progress(console, "training", total) as advance:
            advance(done)
            yield lambda seen: advance(1, note=success_note(seen.metrics, skills))
        return
    view = _View(total, done, skills)
    with Live(view.drawn(console), console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def show(seen: Seen) -> None:
            """Add a step and draw."""
            view.add(seen)
            live.update(view.drawn(console), refresh=True)

        yield show


def success_note(metrics: Mapping[str, float], skills: Sequence[str]) -> str:
    """The step's success by skill, on one line."""
    rates = [f"{name} {percent(metrics[f'{name}/success'], 0)} %" for name in skills if f"{name}/success" in metrics]
    return "  ".join(rates)


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """The values as bars, from ``low`` to ``high`` (default: their own range); means where they outnumber ``width``."""
    if not values:
        return ""
    edges = [round(i * len(values) / min(width, len(values))) for i in range(min(width, len(values)) + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    bottom, top = min(means) if low is None else low, max(means) if high is None else high
    scale = (len(BARS) - 1) / (top - bottom) if top > bottom else 0.0
    return "".join(BARS[max(0, min(len(BARS) - 1, round((value - bottom) * scale)))] for value in means)


class _View:
    """The history of the session, and how it is drawn at the console's present size."""

    def __init__(self, total: int, done: int, skills: Sequence[str]) -> None:
        self._total, self._first, self._step = total, done, done
        self._skills = skills
        self._started = time.monotonic()
        self._history: dict[str, list[float]] = defaultdict(list)
        self._verdicts: list[tuple[Episode, Verdict]] = []

    def add(self, seen: Seen) -> None:
        """Remember a step."""
        self._step = seen.step
        for key in (*(f"{skill}/success" for skill in self._skills), *CURVES):
            if key in seen.metrics:
                self._history[key].append(seen.metrics[key])
        self._verdicts = [*_in_turn(seen.judged), *self._verdicts][:NUM_VERDICTS]

    def drawn(self, console: Console) -> RenderableType:
        """The bar, and below it what fits."""
        if console.width < MIN_WIDTH or console.height < MIN_HEIGHT or not self._history:
            return self._bar()
        return Group(self._bar(), Text(), self._curves(console.width), Text(), *self._last())

    def _bar(self) -> Table:
        spent, taken = time.monotonic() - self._started, self._step - self._first
        left = spent / taken * (self._total - self._step) if taken else None
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        count = f"{self._step}/{self._total}  {_clock(spent)}" + (f"  {_clock(left)} left" if left is not None else "")
        bar.add_row("training", ProgressBar(self._total, self._step), count)
        return bar

    def _curves(self, width: int) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(max_width=20, no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        room = min(60, width - 36)
        for skill in self._skills:
            values = self._history.get(f"{skill}/success")
            if values:
                table.add_row(skill, f"{percent(values[-1], 0)} %", Text(sparkline(values, room, 0, 1), style="green"))
        for key, name in CURVES.items():
            values = self._history.get(key)
            if values:
                line = Text(sparkline(values, room), style="cyan")
                table.add_row(Text(name, style="dim"), f"{values[-1]:.3g}", line)
        return table

    def _last(self) -> list[Text]:
        return [_verdict_line(episode, verdict) for episode, verdict in self._verdicts]


def _in_turn(judged: Sequence[tuple[Episode, Verdict]]) -> list[tuple[Episode, Verdict]]:
    """The first of each skill, then the second, and so on."""
    met: Counter[str] = Counter()
    ranks = []
    for episode, _ in judged:
        ranks.append(met[episode.skill])
        met[episode.skill] += 1
    return [item for _, item in sorted(zip(ranks, judged, strict=True), key=lambda pair: pair[0])]


def _verdict_line(episode: Episode, verdict: Verdict) -> Text:
    mark, style = ("?", "yellow") if verdict.outcome is None else ("✓", "green") if verdict.passed else ("✗", "red")
    detail = " ".join(verdict.detail.split())
    parts = (mark, style), f" {episode.skill}  {verdict.status.value}  ", (f"{episode.task_id}  {detail}", "dim")
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
