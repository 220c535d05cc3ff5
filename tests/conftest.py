"""Shared fixtures: where the benchmark slices are."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Timings belong to benchmarks/: a busy machine must not fail a property.
settings.register_profile("agentopd", deadline=None, derandomize=True)
settings.load_profile("agentopd")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The directory of benchmark slices, from ``AGENTOPD_DATA``."""
    where = os.environ.get("AGENTOPD_DATA")
    if not where:
        pytest.skip("AGENTOPD_DATA is not set: point it at the folder of benchmark slices (gsm8k_dev.jsonl, ...)")
    path = Path(where)
    if not (path / "gsm8k_dev.jsonl").is_file():
        pytest.fail(f"AGENTOPD_DATA={where!r} has no gsm8k_dev.jsonl")
    return path
