"""A pass over the vocabulary gives the same compiled and in blocks, and where nothing compiles it says so."""

import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.exc import InductorError
from torch.testing import assert_close

from agentopd.config.objective_blocks import FullForwardKL, FullReverseKL, JensenShannon
from agentopd.learner import passes, products
from agentopd.learner.comparison import Pointwise, softmax
from agentopd.learner.head import LogSoftmax
from agentopd.objective.divergences import with_slope

C, V, IDS = 4, 50, 6
compiler = pytest.mark.skipif(not passes.can_compile("cpu"), reason="no C++ compiler")


@pytest.fixture
def small(monkeypatch):
    """Small chunks are compiled too; what failed before is forgotten."""
    monkeypatch.setattr(passes, "COMPILED_IDS", 0)
    monkeypatch.setattr(passes, "COMPILED_LOGITS", 0)
    monkeypatch.setattr(passes, "_CANNOT", set())
    monkeypatch.setattr(products, "BLOCK", 7)


def in_blocks(monkeypatch, compute):
    with monkeypatch.context() as patch:
        patch.setattr(passes, "COMPILED_IDS", 2**62)
        return compute()


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_totals_and_entropy_are_those_of_the_blocks(small, monkeypatch, dtype):
    logits = (8 * drawn(C, V)).to(dtype)

    def found():
        student = LogSoftmax(logits)
        return torch.cat([student.log_total_c1[:, 0], student.entropy()])

    expected = torch.distributions.Categorical(logits=logits.double())
    both = torch.cat([logits.double().logsumexp(-1), expected.entropy()])
    limit = sys.getrecursionlimit()
    for ours in (found(), in_blocks(monkeypatch, found)):
        assert_close(ours.double(), both, atol=1e-5, rtol=1e-5)
    assert sys.getrecursionlimit() == limit, "compiling leaves the process as it was"


@compiler
@pytest.mark.slow
@pytest.mark.parametrize(("width", "dtype"), [(V, torch.bfloat16), (V - 9, torch.float32)])
@pytest.mark.parametrize("divergence", [None, FullReverseKL(), FullForwardKL(), JensenShannon(beta=0.3)])
def test_a_gradient_is_the_one_of_the_blocks(small, monkeypatch, divergence, width, dtype):
    """With ids that stand in a row twice, and with a teacher that has fewer of them."""
    logits, other = drawn(C, V).to(dtype), drawn(C, width, seed=1).to(dtype)
    ids = torch.randint(V, (C, IDS), generator=torch.Generator().manual_seed(2))
    ids[:, 1] = ids[:, 0]
    ids[0] = 3
    added, part = drawn(C, IDS, seed=3), torch.tensor([True, True, False, True])

    def found():
        student = LogSoftmax(logits.clone())
        parts, value = [softmax(student, -added.sum(-1))], torch.zeros(C)
        if divergence is not None:
            comparison = Pointwise(student, other, part, with_slope(divergence))
            value, parts = comparison.divergence_c, comparison.gradient(-added.sum(-1), drawn(C, seed=4))
        passes.overwrite(student.logits, parts, ids, added)
        return value, student.logits

    for ours, plain in zip(found(), in_blocks(monkeypatch, found), strict=True):
        assert_close(ours, plain, atol=1e-5, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5)
    assert not passes._CANNOT


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_what_is_added_at_an_id_is_summed_over_the_row(ids):
    row, added = torch.tensor([ids]), drawn(1, len(ids))
    expected = torch.zeros(1, 5).scatter_add_(1, row, added).gather(1, row)
    assert_close(passes._over_repeats(row, added), expected)


def test_a_large_chunk_alone_is_compiled(monkeypatch):
    monkeypatch.setattr(passes, "can_compile", lambda device: True)
    monkeypatch.setattr(passes, "COMPILED_LOGITS", 2**18)
    assert passes.compiles(torch.empty(8, 2**15))
    assert not passes.compiles(torch.empty(7, 2**15))
    assert not passes.compiles(torch.empty(16, 2**14))


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_pytorchs_own_switch_keeps_to_blocks(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not passes._has_compiler.__wrapped__("cpu")


def test_a_machine_without_a_compiler_keeps_to_blocks(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not passes._has_compiler.__wrapped__("cpu")


def test_a_compiler_that_fails_is_named_once_and_costs_nothing_but_speed(small, monkeypatch):
    def broken(run, elements):
        def fails(wide, columns):
            raise InductorError(RuntimeError("g++: not today"), None)

        return fails

    monkeypatch.setattr(passes, "_has_compiler", lambda device: True)
    monkeypatch.setattr(passes, "_loop", broken)
    logits = drawn(C, V)
    with pytest.warns(UserWarning, match="not compiled, which is slower: .*g\\+\\+: not today"):
        found = passes.log_total(logits)
    assert_close(found, logits.logsumexp(-1, keepdim=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(passes.log_total(logits), found)
