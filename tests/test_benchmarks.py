"""Benchmarks run at a small size and end in one JSON object with their keys; what they measure is not judged here."""

import importlib
import json

import pytest

SMALL = {
    "loss_head": ["--positions", "256", "--width", "32", "--vocabulary", "2048", "--dtype", "float32", "--rounds", "1"],
    "packing": ["--prompts", "4", "--pairs", "1"],
    "score": ["--prompts", "2", "--pairs", "1"],
    "transport": ["--tokens", "64", "--pairs", "1"],
    "growth": ["--scale", "0.05"],
}
KEYS = {
    "loss_head": {"time_vs_naive", "time_vs_gemm", "memory_slope_vs_naive", "gradient_error_vs_gemm"},
    "packing": {"time_vs_padded", "time_vs_buckets", "packed_tokens"},
    "score": {"vs_forward", "alone_vs_forward"},
    "transport": {"bytes_per_token", "microseconds_per_token", "speedup_vs_json"},
    "growth": {f"exponent_{name}" for name in ("tasks", "turns", "positions", "length", "workers")},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of peers
@pytest.mark.parametrize("name", SMALL)
def test_it_ends_with_its_figures(name, capsys):
    importlib.import_module(f"benchmarks.{name}").main(SMALL[name])
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert KEYS[name] <= figures.keys()
    assert all(isinstance(figures[key], int | float) for key in KEYS[name])
