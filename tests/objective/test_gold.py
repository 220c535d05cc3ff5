"""GOLD: distributions merged over segments, matched ids by a divergence, the rest by sorted masses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentopd.config.objective_blocks import JensenShannon
from agentopd.objective.divergences import full_divergence, jensen_shannon, kernel
from agentopd.objective.gold import gold_divergence, rest_logprobs

JSD = JensenShannon()


def logs(*rows):
    return torch.tensor(rows).log()


def test_a_merged_distribution_is_the_first_position_times_the_later_tokens():
    """TRL's own test: [.6, .3, .1] then the token of probability .5 gives [.3, .15, .05]."""
    first, own = logs([0.6, 0.3, 0.1]), torch.tensor([0.6, 0.5]).log()
    rest = rest_logprobs(own, torch.tensor([0, 0]), torch.tensor([0, 0]))
    torch.testing.assert_close((first + rest[0]).exp(), torch.tensor([[0.3, 0.15, 0.05]]))


def test_merging_a_segment_of_one_token_is_the_identity():
    own = torch.tensor([-1.0, -2.0, -3.0])
    assert rest_logprobs(own, torch.tensor([0, 0, 0]), torch.tensor([0, -1, 1])).tolist() == [0.0, 0.0, 0.0]


def test_equal_masses_under_other_ids_are_no_distance():
    student, teacher = logs([0.5, 0.3, 0.2]), logs([0.2, 0.5, 0.3])
    apart = torch.full((3,), -1)
    assert gold_divergence(student, teacher, apart, kernel(JSD), 0.0).item() == pytest.approx(0.0, abs=1e-7)
    assert gold_divergence(student, logs([0.2, 0.4, 0.4]), apart, kernel(JSD), 0.0).item() == pytest.approx(0.2)
    shorter = torch.full((2,), -1)
    assert gold_divergence(student, logs([0.6, 0.4]), shorter, kernel(JSD), 0.0).item() == pytest.approx(0.4)


def test_the_weight_of_the_matched_part_is_the_share_of_the_teachers_ids():
    student, teacher, table = logs([0.5, 0.3, 0.2]), logs([0.2, 0.1, 0.1, 0.6]), torch.tensor([1, -1, -1, 0])
    matched = jensen_shannon(student[:, [1, 0]], teacher[:, [0, 3]], 0.5).sum().item()
    rest = abs(0.2 - 0.1) + abs(0.0 - 0.1)
    assert gold_divergence(student, teacher, table, kernel(JSD)).item() == pytest.approx(0.5 * matched + 0.5 * rest)
    assert gold_divergence(student, teacher, table, kernel(JSD), 1.0).item() == pytest.approx(matched)


@given(st.integers(2, 9), st.integers(0, 10**6))
def test_it_equals_the_full_divergence_when_tokenizers_agree(vocab, seed):
    torch.manual_seed(seed)
    student, teacher = torch.randn(3, vocab, requires_grad=True), torch.randn(3, vocab)
    found = gold_divergence(student.log_softmax(-1), teacher.log_softmax(-1), None, kernel(JSD))
    expected = full_divergence(student, teacher, JSD)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), student)[0] for x in (found, expected)))


@given(st.integers(0, 10**6), st.floats(-5, 0), st.floats(-5, 0))
def test_it_is_never_negative_and_finite_at_the_far_end(seed, ours, theirs):
    torch.manual_seed(seed)
    table = torch.tensor([2, -1, 0, -1])
    student, teacher = (40 * torch.randn(2, width) for width in (3, 4))
    found = gold_divergence(student.log_softmax(-1) + ours, teacher.log_softmax(-1) + theirs, table, kernel(JSD))
    assert (found >= -1e-6).all() and all(map(math.isfinite, found.tolist()))
