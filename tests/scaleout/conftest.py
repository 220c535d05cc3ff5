"""A Ray cluster of several nodes on this machine, each a process group of its own that can be killed."""

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from agentopd.build import Skill, load_skills
from agentopd.config.run import SkillConfig, SuiteConfig

ROOT = Path(__file__).resolve().parents[2]
STORE = 80 * 2**20  # the least Ray takes
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
    found.add_node(num_cpus=0, object_store_memory=STORE, include_dashboard=False)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def machines(cluster: Any) -> Iterator[Callable[[int], tuple[str, list[Any]]]]:
    """``machines(n)``: the name of a resource that n new nodes have one of each, and the nodes."""
    names, made = count(), []

    def add(number: int) -> tuple[str, list[Any]]:
        resource = f"room{next(names)}of{len(cluster.list_all_nodes())}"
        nodes = [
            cluster.add_node(num_cpus=1, resources={resource: 1}, object_store_memory=STORE) for _ in range(number)
        ]
        made.extend(nodes)
        return resource, nodes

    yield add
    for node in made:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node, allow_graceful=False)
