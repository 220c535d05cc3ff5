"""The report of a run of 200 steps: seconds to build it, its size, and how soon a browser paints it from disk.

The run is of the micro models: two steps, whose kept episodes and metrics are then repeated up to ``--steps``.

``python -m benchmarks.report [--steps 200] [--rounds 5]``; needs Chromium and Playwright (``make install``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from agentopd.report import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')"
OVERRIDES = ("train.steps=2", "train.prompts_per_step=24", "eval.tasks_per_skill=4")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "agentopd.cli", "train", "configs/quickstart.toml", "--plain"]
        settings = [word for item in (*OVERRIDES, f"run_dir={run}") for word in ("--set", item)]
        subprocess.run([*command, *settings], check=True, capture_output=True)
        lengthen(run, options.steps)
        started = time.monotonic()
        page = build_report(run)
        figures = {"build_s": round(time.monotonic() - started, 2), "megabytes": round(page.stat().st_size / 1e6, 2)}
        paints = first_paints(page, options.rounds)
    print(f"first paint, ms: {', '.join(f'{paint:.0f}' for paint in paints)}")
    figures |= {"first_paint_ms": round(statistics.median(paints)), "first_paint_ms_high": round(max(paints))}
    print(json.dumps({"steps": options.steps, **figures}))


def lengthen(run: Path, steps: int) -> None:
    """Repeat the last step's metrics and kept episodes until there are ``steps``."""
    rows = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    rows += [json.dumps({**last, "step": step}) for step in range(last["step"] + 1, steps + 1)]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    kept = sorted(run.glob("episodes/step_*.jsonl"))[-1]
    for step in range(last["step"] + 1, steps + 1):
        shutil.copy(kept, kept.with_name(f"step_{step:06d}.jsonl"))


def first_paints(page: Path, rounds: int) -> list[float]:
    """Milliseconds to the first contentful paint, each in a context of its own, with the network off."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        raise SystemExit("no Chromium here: apt-get install chromium")
    found = []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(rounds):
            context = browser.new_context(offline=True)
            tab = context.new_page()
            tab.goto(page.as_uri())
            tab.wait_for_function(f"{FIRST_PAINT}.length")
            found.append(float(tab.evaluate(f"{FIRST_PAINT}[0].startTime")))
            context.close()
        browser.close()
    return found


if __name__ == "__main__":
    main()
