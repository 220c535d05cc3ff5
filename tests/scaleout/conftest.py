"""A Ray cluster of several nodes on this machine, each a process group of its own that can be killed."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from agentopd.build import Skill, load_skills
from agentopd.config.run import SkillConfig, SuiteConfig

ROOT = Path(__file__).resolve().parents[2]
STORE = 80 * 2**20  # the least Ray takes
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
"""Without them a node waits for its agents to say which they took, and gives up where the machine is busy."""
PATHS = ":".join(str(ROOT / name) for name in (".", "envs", "verifiers", "sandboxes"))


@pytest.fixture(scope="session")
def skills() -> dict[str, Skill]:
    """One whose verdicts run programs, and one whose verdicts do not."""
    entries = (SkillConfig(name="repair", env="code_repair"), SkillConfig(name="math", env="math"))
    return load_skills(SuiteConfig(skills=entries))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A head that has room for nobody."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'agentopd[ray]'")
    from ray.cluster_utils import Cluster

    os.environ.update(PYTHONPATH=PATHS, OMP_NUM_THREADS="1", RAY_raylet_start_wait_time_s="120")
    found = Cluster()
    added(found, num_cpus=0, include_dashboard=False)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def added(cluster: Any, **kind: Any) -> Any:
    """A new node. One whose agents are not up within twenty seconds ends itself; on a busy machine another is tried."""
    for tries_left in (2, 1, 0):
        try:
            return cluster.add_node(object_store_memory=STORE, **kind, **free_ports())
        except Exception as exc:
            if not tries_left or "timed out during startup" not in str(exc):
                raise
    raise AssertionError


def free_ports() -> dict[str, int]:
    """One for each agent of a node."""
    with ExitStack() as opened:
        found = [opened.enter_context(socket.socket()) for _ in AGENT_PORTS]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return {name: each.getsockname()[1] for name, each in zip(AGENT_PORTS, found, strict=True)}


@pytest.fixture
def machines(cluster: Any) -> Iterator[Callable[[int], tuple[str, list[Any]]]]:
    """``machines(n)``: the name of a resource that n new nodes have one of each, and the nodes."""
    names, made = count(), []

    def add(number: int) -> tuple[str, list[Any]]:
        resource = f"room{next(names)}of{len(cluster.list_all_nodes())}"
        nodes = [added(cluster, num_cpus=1, resources={resource: 1}) for _ in range(number)]
        made.extend(nodes)
        return resource, nodes

    yield add
    for node in made:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node, allow_graceful=False)
