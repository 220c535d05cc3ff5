"""What `agentopd serve` refuses before it loads anything."""

import pytest
from typer.testing import CliRunner

from agentopd.cli import app
from agentopd.errors import UserError


@pytest.mark.parametrize("option", [("--top-k", "8"), ("--max-context", "4096"), ("--kv-cache-gb", "2.5")])
def test_options_of_vllm_are_refused_with_another_kind(option):
    found = CliRunner().invoke(app, ["serve", "./nowhere", *option])
    assert isinstance(found.exception, UserError)
    assert f"{option[0]} {option[1]} has no effect on --kind hf" in str(found.exception)


def test_a_cache_of_nothing_is_refused():
    found = CliRunner().invoke(app, ["serve", "./nowhere", "--kind", "vllm", "--kv-cache-gb", "0"])
    assert isinstance(found.exception, UserError) and "--kv-cache-gb 0: give more than 0" in str(found.exception)
