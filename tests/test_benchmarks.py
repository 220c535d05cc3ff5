"""Benchmarks run at a small size and end in one JSON object with their keys; what they measure is not judged here."""

import importlib
import json
from importlib.util import find_spec

import pytest

SMALL = {
    "loss_head": ["--positions", "256", "--width", "32", "--vocabulary", "2048", "--dtype", "float32", "--pairs", "1"],
    "packing": ["--prompts", "4", "--pairs", "1"],
    "score": ["--prompts", "2", "--pairs", "1"],
    "transport": ["--tokens", "64", "--pairs", "1"],
    "growth": ["--scale", "0.05"],
    "rollout": ["--prompts", "2", "--pairs", "1", "--dtype", "float32"],
}
KEYS = {
    "loss_head": {"time_vs_naive", "time_vs_gemm", "memory_slope_vs_naive", "gradient_error_vs_gemm"},
    "packing": {"time_vs_padded", "time_vs_buckets", "packed_tokens"},
    "score": {"vs_forward", "alone_vs_forward"},
    "transport": {"bytes_per_token", "microseconds_per_token", "speedup_vs_json"},
    "growth": {f"exponent_{name}" for name in ("tasks", "turns", "positions", "length", "workers")},
    "rollout": {"vs_hf_generate"},
}
WITH_VLLM = {
    "rollout": {"vs_raw_vllm", "vs_raw_vllm_wall", "vs_raw_vllm_without_logprobs", "tokens_per_cpu_s"},
    "weight_sync": {"canary_gap", "stale_head_caught", "stale_cache_caught", "sync_s", "share_of_step", "step_s"},
}
SMALL_WITH_VLLM = SMALL | {"weight_sync": ["--rounds", "2", "--steps", "2", "--prompts", "4"]}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of peers
@pytest.mark.parametrize("name", SMALL)
def test_it_ends_with_its_figures(name, capsys):
    figures = figures_of(name, SMALL[name], capsys)
    assert KEYS[name] <= figures.keys()
    assert all(isinstance(figures[key], int | float) for key in KEYS[name])


@pytest.mark.vllm
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", WITH_VLLM)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")
def test_it_ends_with_its_figures_of_vllm(name, capsys):
    figures = figures_of(name, SMALL_WITH_VLLM[name], capsys)
    assert all(isinstance(figures[key], int | float) for key in WITH_VLLM[name])


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_benchmark_of_vllm_says_that_it_is_absent(capsys):
    assert "vLLM is not installed" in figures_of("weight_sync", [], capsys)["skipped"]


def figures_of(name, arguments, capsys):
    importlib.import_module(f"benchmarks.{name}").main(arguments)
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])
