"""Ranks of one job that share servers: real processes on gloo, and servers that sample by arithmetic."""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agentopd.config.engines import ServersConfig, VLLMConfig
from agentopd.engines import VLLMServersEngine
from agentopd.engines.http import Address, ask_json
from agentopd.engines.server_process import ServerProcess
from agentopd.models import load_model
from tests.engines import rank_worker
from tests.engines.token_server import sampled
from tests.ranks import play

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("ranks")]

Job = Callable[..., list[dict[str, Any]]]


def state(url: str) -> Any:
    return asyncio.run(ask_json(Address.parse(url, "url"), "GET", "/state", None, 10))


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[[int], list[str]]]:
    """Start so many servers, with weights that are nobody's; the first one's process is written down."""
    (tmp_path / "empty").mkdir()
    started: list[ServerProcess] = []

    def start(count: int) -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        urls = []
        for number in range(count):
            log = tmp_path / f"server-{number}.log"
            started.append(ServerProcess("tests.engines.token_server", [], environment, log))
            urls.append(str(started[-1].start(tmp_path / "empty")))
        (tmp_path / "pid").write_text(str(started[0].pid))
        return urls

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Two ranks play a scenario; what each left."""

    def run(scenario: str, ranks: int = 2, **options: Any) -> list[dict[str, Any]]:
        play(rank_worker.run, ranks, tmp_path, scenario, options, limit_s=200)
        left = [tmp_path / f"rank-{i}.json" for i in range(ranks)]
        assert all(file.is_file() for file in left), "a rank ended, or waits, before it was done"
        return [json.loads(file.read_text()) for file in left]

    return run


def all_sampled(ranks: list[dict[str, Any]], versions: list[int]) -> None:
    """Every rank's turns are those of the weights that the first rank wrote last."""
    assert not [rank["error"] for rank in ranks if "error" in rank]
    for number, rank in enumerate(ranks):
        assert [seen["version"] for seen in rank["seen"]] == [[version] for version in versions]
        for seen, first in zip(rank["seen"], ranks[0]["seen"], strict=True):
            seeds = range(number * rank_worker.EPISODES, (number + 1) * rank_worker.EPISODES)
            expected = [sampled(first["weights"], [7], seed, rank_worker.COUNT) for seed in seeds]
            assert seen["tokens"] == expected
    assert len({seen["weights"] for seen in ranks[0]["seen"]}) == len(set(versions))


@pytest.mark.parametrize(("count", "stage"), [(1, 0), (1, 3), (3, 0)])
def test_ranks_share_servers_and_one_writes_the_weights_once_a_sync(servers, job, count, stage):
    urls = servers(count)
    ranks = job("updates", urls=urls, stage=stage)
    all_sampled(ranks, [0, 1, 2, 3])
    counted = [state(url) for url in urls]
    assert [found["loads"] for found in counted] == [4] * count
    assert min(found["asked"] for found in counted) >= 4 * len(ranks) * rank_worker.EPISODES // count
    kept = [seen["folders"] for seen in ranks[0]["seen"]]
    assert kept[0] == ["weights-000000-1"] and kept[-1] == ["weights-000002-3", "weights-000003-4"]


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_share_servers_and_one_sends_the_weights(servers, job, stage):
    urls = servers(2)
    ranks = job("updates", urls=urls, stage=stage, sync="nccl")
    all_sampled(ranks, [0, 1, 2, 3])
    assert [(found["loads"], found["sent"]) for found in map(state, urls)] == [(1, 3)] * 2


def test_a_server_that_comes_back_is_brought_up_to_date_by_who_meets_it(servers, job):
    ranks = job("a_server_restarts", urls=servers(3))
    all_sampled(ranks, [1, 3])
    assert ranks[0]["seen"][-1]["state"]["loads"] in (1, 2)
    assert ranks[0]["seen"][-1]["state"]["weights"] == ranks[0]["seen"][-1]["weights"]


@pytest.mark.parametrize(
    ("scenario", "whose", "sync", "said"),
    [
        ("one_canary_fails", 1, "disk", "bound 1e-09"),
        ("nothing_can_be_written", 0, "disk", "FileNotFoundError"),
        ("nothing_can_be_claimed", 0, "nccl", "403 Forbidden"),
    ],
)
def test_what_fails_on_one_rank_stops_all(servers, job, scenario, whose, sync, said):
    ranks = job(scenario, urls=servers(1), stage=3, sync=sync)
    assert said in ranks[whose]["error"] and said in ranks[1 - whose]["error"]
    assert ranks[1 - whose]["error"].startswith(f"rank {whose} failed: ")


def test_a_canary_out_of_bounds_stops_every_rank_at_the_start(servers, job):
    ranks = job("updates", urls=servers(2), bound=1e-6)
    assert ["it samples from other weights" in rank["error"] for rank in ranks] == [True, True]


@pytest.mark.parametrize("again", ["http://far:1", "http://far:1/", "http://FAR:1"])
def test_a_server_that_is_named_twice_is_refused(again):
    with pytest.raises(ValueError, match="is named twice: name each server once"):
        ServersConfig(urls=("http://far:1", "http://near:1", again))


@pytest.mark.vllm
@pytest.mark.timeout(3000)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")
def test_ranks_share_a_server_of_vllms_and_each_finds_its_weights_there(job):
    """The canary of either rank compares with its own weights."""
    vllm = VLLMConfig(max_context=768, timeout_s=2000.0, max_num_seqs=32, kv_cache_gb=0.25)
    owner = VLLMServersEngine(load_model("micro/student", "float32"), vllm, ServersConfig(replicas=1))
    try:
        ranks = job(
            "updates", urls=[str(owner.replicas[0].reach().address)], stage=3, bound=1e-4, student="micro/student"
        )
    finally:
        owner.close()
    for rank in ranks:
        assert "error" not in rank and [seen["version"] for seen in rank["seen"]] == [[0], [1], [2], [3]]
        said = [seen["logprobs"] for seen in rank["seen"]]
        assert all(one != other for one, other in pairwise(said))
    assert ranks[0]["seen"][-1]["folders"] == ["weights-000002-3", "weights-000003-4"]
