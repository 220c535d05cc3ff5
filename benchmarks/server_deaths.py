"""vLLM servers that are killed in every phase of a run, against a run whose servers live.

Two servers sample for a run of the shipped models, real environments, jail and DeepSpeed, in float32. In every step one
that is up is killed, with all its processes, a random moment after a phase began; the other may still be on its way
back. Turns under way are sampled again, by whoever is up, and who comes back is given the weights of then.

The run must end with the metrics, evaluations, kept episodes and weights of the undisturbed one. ``outages`` are the
deaths; ``outages_noticed`` those that the run told of.

``python -m benchmarks.server_deaths [--rounds 20]``: so many deaths in each phase. It takes a start of vLLM each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from agentopd.runs import Run
from benchmarks import outages

PHASES = ("rollout", "verify", "teacher", "update", "sync")
SERVERS = (
    "rollout.engine=vllm_servers", "rollout.servers.replicas=2", "model.dtype=float32", "rollout.vllm.max_context=768",
    "rollout.vllm.max_num_seqs=32", "rollout.vllm.kv_cache_gb=0.25", "rollout.vllm.timeout_s=3000",
)  # fmt: skip


def armed(run: Run, rng: random.Random) -> outages.Outages:
    """The run, one of whose servers is killed in every step."""
    engine: Any = run.policy.engine

    def strike() -> None:
        while not (up := [replica for replica in engine.replicas if replica.is_up]):
            time.sleep(0.05)
        os.killpg(rng.choice(up).process.pid, signal.SIGKILL)

    return outages.Outages(run, PHASES, strike, "its requests are asked again", rng)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="Deaths in each phase.")
    options = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if find_spec("vllm") is None:
        print(json.dumps({"skipped": "vLLM is not installed: make test-vllm builds .venv-vllm, which has it"}))
        return
    rng = random.Random(0)
    print(json.dumps(outages.compared(options.rounds * len(PHASES), SERVERS, lambda run: armed(run, rng))))


if __name__ == "__main__":
    main()
