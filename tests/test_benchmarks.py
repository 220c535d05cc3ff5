"""Benchmarks run at a small size and end in one JSON object with their keys.

How fast anything is, is not judged here; that a fault changes nothing, is.
"""

import importlib
import json
from importlib.util import find_spec

import pytest
import torch

from agentopd.capacity import Shape
from agentopd.errors import SandboxError
from benchmarks import gpu, page, run_all
from benchmarks.loss_head import Case

SMALL = {
    "loss_head": ["--positions", "256", "--width", "32", "--vocabulary", "2048", "--dtype", "float32", "--rounds", "1"],
    "packing": ["--prompts", "4", "--pairs", "1"],
    "score": ["--prompts", "2", "--pairs", "1"],
    "transport": ["--tokens", "64", "--pairs", "1"],
    "growth": ["--scale", "0.05"],
    "episodes": ["--rounds", "1", "--episodes", "40", "--live", "8"],
    "e2e_step": ["--prompts", "2", "--new", "4", "--rounds", "1"],
    "rollout": ["--prompts", "2", "--pairs", "1", "--dtype", "float32"],
    "report": ["--rounds", "1"],
    "outages": ["--rounds", "1", "--longest", "3"],
    "poison": ["--rounds", "1"],
}
KEYS = {
    "episodes": {"vs_slowest", "vs_apart", "vs_slower_half", "grown_mb"},
    "loss_head": {"time_vs_naive", "time_vs_gemm", "memory_slope_vs_naive", "gradient_error_vs_gemm"},
    "packing": {"time_vs_padded", "time_vs_buckets", "packed_tokens"},
    "score": {"vs_forward", "alone_vs_forward"},
    "transport": {"bytes_per_token", "microseconds_per_token", "speedup_vs_json"},
    "e2e_step": {"tokens_per_cpu_s_whole", "tokens_per_cpu_s_topk"},
    "growth": {f"exponent_{name}" for name in ("tasks", "turns", "positions", "length", "workers")},
    "rollout": {"vs_hf_generate"},
    "report": {"build_s", "megabytes", "first_paint_ms"},
    "outages": {"outages", "outages_noticed", "longest_s", "differing"},
    "poison": {"poisoned", "explained", "differing"},
}
WITH_VLLM = {
    "rollout": {"vs_raw_vllm", "vs_raw_vllm_wall", "vs_raw_vllm_without_logprobs", "tokens_per_cpu_s"},
    "weight_sync": {
        "canary_gap",
        "stale_head_caught",
        "stale_cache_caught",
        "sync_s",
        "cut_vs_waiting",
        "share_of_step",
        "step_s",
    },
    "server_deaths": {"outages", "outages_noticed", "differing"},
}
SMALL_WITH_VLLM = (
    SMALL | {"weight_sync": ["--rounds", "2", "--steps", "2", "--prompts", "4"]} | {"server_deaths": ["--rounds", "1"]}
)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of peers
@pytest.mark.parametrize("name", SMALL)
def test_it_ends_with_its_figures(name, capsys):
    try:
        figures = figures_of(name, SMALL[name], capsys)
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")
    except SystemExit as left:
        if not isinstance(left.code, str):
            raise
        pytest.skip(left.code)
    assert KEYS[name] <= figures.keys()
    assert all(isinstance(figures[key], int | float) for key in KEYS[name])
    assert not figures.get("differing"), "a fault left a trace"


@pytest.mark.slow
def test_the_parts_of_the_gpu_suite_at_toy_size():
    most = gpu.ceiling("cpu", torch.float32, (64, 128), 2)
    found = gpu.head(Case(256, 32, 512, torch.float32), ["naive", "gemm"], most, 1)
    assert found["share_of_ceiling"] > 0 and {"ms_fused", "ms_naive", "ms_gemm", "gib_naive"} <= found.keys()
    assert found["time_vs_naive_low"] <= found["time_vs_naive"] <= found["time_vs_naive_high"] and "failed" not in found
    shape = Shape(2, 32, 64, 2, 1, 16, 64, tied=True)
    assert (
        sum(weight.numel() for weight in gpu.random_model(shape, torch.float32, "cpu").parameters()) == shape.parameters
    )
    found = gpu.step(shape, gpu.StepSize(prompts=2, prompt=5, new=4, steps=1), "cpu", torch.float32, most)
    assert found["s_learner"] > 0 and found["learner_share_of_ceiling"] > 0 and found["sampled_tokens_per_s"] > 0


@pytest.mark.slow
def test_a_peer_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    def out_of_memory(self: Case) -> None:
        raise torch.OutOfMemoryError("no 9 GiB left\nand more")

    monkeypatch.setattr(Case, "naive", out_of_memory)
    found = gpu.head(Case(256, 32, 512, torch.float32), ["naive", "gemm"], 1e9, 1)
    assert found["failed"] == {"naive": "OutOfMemoryError: no 9 GiB left"}
    assert "time_vs_gemm" in found and "time_vs_naive" not in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_refuses_a_machine_without_one(capsys):
    with pytest.raises(SystemExit) as left:
        gpu.main([])
    assert left.value.code == 2 and "needs a GPU" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", WITH_VLLM)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")
def test_it_ends_with_its_figures_of_vllm(name, capsys):
    figures = figures_of(name, SMALL_WITH_VLLM[name], capsys)
    assert all(isinstance(figures[key], int | float) for key in WITH_VLLM[name])
    assert not figures.get("differing"), "a fault left a trace"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_benchmark_of_vllm_says_that_it_is_absent(capsys):
    assert "vLLM is not installed" in figures_of("weight_sync", [], capsys)["skipped"]


def test_the_page_shows_the_results_that_are_kept():
    assert f"{page.BEGIN}\n\n{page.table()}\n\n{page.END}" in page.PAGE.read_text()
    assert {figure.benchmark for figure in page.FIGURES} == set(run_all.NAMES)


def test_every_figure_of_the_page_is_one_that_its_benchmark_gives():
    for figure in page.FIGURES:
        path = page.RESULTS / f"{figure.benchmark}.json"
        assert figure.key in json.loads(path.read_text())["figures"], f"{figure.benchmark}: {figure.key}"


def test_a_row_says_whether_the_target_was_met():
    time = page.Figure("b", "time", "a time", at_most=0.5, spread="speed")
    spread = {"speed_low": 1.6, "speed_high": 2.5}
    assert time.row({"time": 0.4, **spread}) == "| `b` | 0.400× (0.400 to 0.625) | a time | ≤ 0.5× | yes |"
    assert time.row({"time": 0.5004, **spread}).endswith("| **no** |")
    share = page.Figure("b", "share", "a share", at_least=0.03, unit="%")
    assert share.row({"share": 0.0299}) == "| `b` | 2.99 % | a share | ≥ 3 % | **no** |"
    assert share.row({"skipped": "no engine"}) == "| `b` | not measured | a share | ≥ 3 % | |"
    assert page.Figure("b", "n", "bytes", unit="B").row({"n": 12345.0}) == "| `b` | 12,345 B | bytes | – |  |"


def test_a_benchmark_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch, capfd):
    page_copy = tmp_path / "benchmarks.md"
    page_copy.write_text(f"before {page.BEGIN} old {page.END} after")
    monkeypatch.setattr(page, "PAGE", page_copy)
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(run_all, "RESULTS", tmp_path)
    monkeypatch.setattr(run_all, "NAMES", ("gone", "transport"))
    monkeypatch.setattr("sys.argv", ["run_all"])
    with pytest.raises(SystemExit) as left:
        run_all.main()
    assert left.value.code == "failed, and kept as it was: gone"
    kept = json.loads((tmp_path / "transport.json").read_text())
    assert kept["machine"]["versions"]["torch"] == torch.__version__ and kept["figures"]["bytes_per_token"] < 320
    assert not (tmp_path / "gone.json").exists()
    text = page_copy.read_text()
    assert text.startswith("before ") and text.endswith(" after") and " old " not in text
    assert "a token on the wire" in text and "not measured" in text


def test_an_unknown_benchmark_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_all", "los_head"])
    with pytest.raises(SystemExit) as left:
        run_all.main()
    assert left.value.code == 2
    assert "los_head" in capsys.readouterr().err


def figures_of(name, arguments, capsys):
    importlib.import_module(f"benchmarks.{name}").main(arguments)
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])
