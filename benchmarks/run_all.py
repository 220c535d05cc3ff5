"""Run benchmarks in fresh processes; write ``benchmarks/results/<name>.json`` with the machine and its load.

``python -m benchmarks.run_all [NAME ...]``: all without a name.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from agentopd.tracking import processor

NAMES = (
    *("rollout", "learner_step", "loss_head", "e2e_step", "packing", "score", "transport", "growth", "sandbox"),
    *("episodes", "weight_sync", "report", "faults"),
)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    machine: dict[str, object] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for name in sys.argv[1:] or NAMES:
        print(f"== {name}")
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], capture_output=True, text=True)
        print(done.stdout, end="")
        if done.returncode:
            sys.exit(done.stderr)
        machine["load"] = os.getloadavg()[0]
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
