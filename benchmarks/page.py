"""The table of ``docs/benchmarks.md``: the figures under ``benchmarks/results/`` beside what they are to reach.

``python -m benchmarks.page`` writes it; ``run_all`` does so after its last benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs/benchmarks.md"
BEGIN, END = "<!-- figures: python -m benchmarks.page -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Figure:
    """One figure of a benchmark, what it says, and its target if it has one."""

    benchmark: str
    key: str
    meaning: str
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "×"
    spread: str = ""
    """The ratio whose inverse this is, where the spread stands with that one."""

    def row(self, figures: dict[str, Any]) -> str:
        """A row of the table; without the figure (a peer was missing), it says so."""
        value = figures.get(self.key)
        if value is None:
            return f"| `{self.benchmark}` | not measured | {self.meaning} | {self.target()} | |"
        verdict = "" if self.at_least is None and self.at_most is None else "yes" if self.met(value) else "**no**"
        return (
            f"| `{self.benchmark}` | {self.shown(value)}{self.range(figures)} | {self.meaning} | {self.target()} "
            f"| {verdict} |"
        )

    def met(self, value: float) -> bool:
        """Whether the target is reached by the figure itself, not by what is shown of it."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def target(self) -> str:
        """The bound, or a dash."""
        if self.at_least is not None:
            return f"≥ {self.shown(self.at_least, digits='.3g')}"
        return "–" if self.at_most is None else f"≤ {self.shown(self.at_most, digits='.3g')}"

    def range(self, figures: dict[str, Any]) -> str:
        """The lowest and highest round, where the benchmark gives them."""
        low, high = (figures.get(f"{self.spread or self.key}_{end}") for end in ("low", "high"))
        if low is None or high is None:
            return ""
        low, high = (1 / high, 1 / low) if self.spread else (low, high)
        return f" ({self.shown(low, unit=False)} to {self.shown(high, unit=False)})"

    def shown(self, value: float, unit: bool = True, digits: str = "#.3g") -> str:
        """Three digits of what was measured; a count, and a target, as they are."""
        if self.unit == "%":
            value *= 100
        digits = ",.0f" if abs(value) >= 100 else ".6g" if isinstance(value, int) else digits
        return f"{value:{digits}}" + (self.unit if self.unit in ("", "×") else f" {self.unit}") * unit


_STRUCK = "of 20 that end like a run left alone, struck once in every phase by"

FIGURES = (
    Figure("loss_head", "time_vs_naive", "the time of autograd's top-K loss", at_most=0.65, spread="speedup_vs_naive"),
    Figure("loss_head", "time_vs_gemm", "the time of its three bare matrix products", spread="speedup_vs_gemm"),
    Figure("loss_head", "memory_slope_vs_naive", "the memory that autograd's takes a position", at_most=0.01, unit="%"),
    Figure("loss_head", "gradient_error_vs_gemm", "the error of one product, against fp64", at_most=1.5),
    Figure("loss_head", "speedup_vs_trl", "the speed of TRL's chunked top-K loss", at_least=3),
    Figure("loss_head", "speedup_vs_liger", "the speed of Liger's chunked JSD", at_least=1.8),
    Figure("e2e_step", "vs_trl_hf", "TRL's tokens a CPU second, Hugging Face `generate`", at_least=2.5),
    Figure("e2e_step", "vs_trl_hf_fp32", "TRL's with `generate`, both in float32"),
    Figure("e2e_step", "vs_trl_vllm", "TRL's tokens a CPU second, vLLM"),
    Figure("learner_step", "vs_sdpa", "the speed of `sdpa`, by our attention"),
    Figure("learner_step", "vs_eager", "the speed of `eager`, by our attention"),
    Figure("packing", "time_vs_padded", "the time of padded rows", at_most=0.5, spread="speedup_vs_padded"),
    Figure("packing", "time_vs_buckets", "the time of rows in length buckets", spread="speedup_vs_buckets"),
    Figure(
        "packing",
        "unshared_time_vs_padded",
        "the time of padded rows, where rows share no beginnings",
        spread="unshared_speedup_vs_padded",
    ),
    Figure("rollout", "vs_raw_vllm", "raw vLLM's tokens a CPU second", at_least=0.9),
    Figure("rollout", "vs_raw_vllm_wall", "raw vLLM's tokens a second by the clock"),
    Figure("rollout", "vs_hf_generate", "`generate`'s tokens a CPU second, in process"),
    Figure("score", "vs_forward", "the speed of a plain forward pass", at_least=0.95),
    Figure("transport", "bytes_per_token", "a token on the wire, K = 64", at_most=320, unit="B"),
    Figure("transport", "speedup_vs_json", "the speed of JSON"),
    Figure("weight_sync", "share_of_step", "of a step", at_most=0.03, unit="%"),
    Figure("weight_sync", "sync_s", "a sync, canary included", unit="s"),
    Figure("weight_sync", "cut_vs_waiting", "the time of a sync that waits for long turns, by cutting them"),
    Figure("weight_sync", "turns_vs_waiting", "the time until those turns have ended"),
    Figure("growth", "exponent_tasks", "exponent over the prompts of a step", at_most=1.05, unit=""),
    Figure("growth", "exponent_positions", "exponent over trained tokens", at_most=1.05, unit=""),
    Figure("growth", "exponent_turns", "exponent over turns (attention reads all before)", unit=""),
    Figure("growth", "exponent_length", "exponent over the length of rows, tokens alike", unit=""),
    Figure("growth", "exponent_workers", "exponent over jails at once, programs alike", unit=""),
    Figure("sandbox", "jail_vs_docker_exec", "a warm `docker exec`'s verdicts a second", at_least=20),
    Figure("sandbox", "jail_vs_docker_run", "`docker run`'s verdicts a second"),
    Figure("sandbox", "jail_median_ms", "a verdict in the jail, median", unit="ms"),
    Figure("episodes", "vs_slowest", "the slowest environment's episodes a second"),
    Figure("episodes", "vs_apart", "the episodes a second of one environment after another"),
    Figure("report", "build_s", "to build the report of a run of 200 steps", unit="s"),
    Figure("report", "megabytes", "its size on disk", at_most=5, unit="MB"),
    Figure("report", "first_paint_ms", "to its first paint", at_most=1000, unit="ms"),
    Figure("faults", "kill_equal_runs", f"{_STRUCK} a SIGKILL", at_least=20, unit="runs"),
    Figure("faults", "term_equal_runs", f"{_STRUCK} a SIGTERM", at_least=20, unit="runs"),
    Figure("faults", "disk_equal_runs", f"{_STRUCK} a full disk", at_least=20, unit="runs"),
    Figure("outages", "outages", "a teacher's outages in one run, 20 in each phase", at_least=80, unit=""),
    Figure("outages", "outages_noticed", "of them that the run met and waited for", unit=""),
    Figure("outages", "longest_s", "the longest of them", at_least=120, unit="s"),
    Figure("outages", "differing", "files of that run that differ from one without outages", at_most=0, unit=""),
    Figure("server_deaths", "outages", "vLLM servers killed in one run, 20 in each phase", at_least=100, unit=""),
    Figure("server_deaths", "differing", "files of it that differ from a run whose servers live", at_most=0, unit=""),
    Figure("poison", "poisoned", "episodes poisoned in one run, 20 in each phase", at_least=80, unit=""),
    Figure("poison", "explained", "of them on disk with the reason", at_least=80, unit=""),
    Figure("poison", "differing", "files that differ, but for them, from a run without them", at_most=0, unit=""),
)


def table() -> str:
    """All rows, and the machines they were measured on."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    rows = [figure.row(found.get(figure.benchmark, {"figures": {}})["figures"]) for figure in FIGURES]
    head = "| benchmark | measured | of what | target | met |\n|---|---|---|---|---|"
    return "\n".join([head, *rows, "", *_machines(found)])


def _machines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for every machine and set of versions, with the benchmarks that it ran."""
    ran: dict[str, list[str]] = {}
    for name, result in found.items():
        machine = result["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in machine.get("versions", {}).items())
        where = f"{machine['processor']}, {machine['cores']} hardware threads, Python {machine['python']}"
        ran.setdefault(where + f"; {versions}" * bool(versions), []).append(f"`{name}`")
    for where, names in ran.items():
        yield f"- {', '.join(names)}: {where}."


def write() -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    write()
