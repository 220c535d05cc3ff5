"""The printed values of the three-token example, and what the top-K divergence is at its limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agentopd.config.objective_blocks import FullForwardKL, FullReverseKL, JensenShannon
from agentopd.objective.divergences import kernel, teacher_margin, with_slope
from agentopd.objective.support import bucketed, log_tail, truncated


def topk_reverse_kl(student, teacher, tail):
    return (bucketed if tail == "bucket" else truncated)(student, teacher)


quick = settings(max_examples=25, deadline=None)
S = torch.tensor([[0.5, 0.3, 0.2]])
T = torch.tensor([[0.2, 0.5, 0.3]])
RKL = 0.2238047
RKL_GRAD = torch.tensor([[0.3462430, -0.2203891, -0.1258540]])


def divergence_and_grad(ids, tail):
    logits = S.log().requires_grad_()
    ids = torch.tensor([ids])
    value = topk_reverse_kl(logits.log_softmax(-1).gather(1, ids), T.log().gather(1, ids), tail)
    value.sum().backward()
    return value.item(), logits.grad


@pytest.mark.parametrize("tail", ["bucket", "none"])
def test_whole_vocabulary_is_the_full_reverse_kl(tail):
    value, grad = divergence_and_grad([0, 1, 2], tail)
    assert value == pytest.approx(RKL, abs=1e-6)
    assert_close(grad, RKL_GRAD, atol=1e-6, rtol=0)


def test_renormalised_top_2_leaves_the_outside_alone():
    value, grad = divergence_and_grad([1, 2], "none")
    assert value == pytest.approx(0.00132221, abs=1e-7)
    assert_close(grad, torch.tensor([[0.0, -0.0252865, 0.0252865]]), atol=1e-6, rtol=0)


def test_tail_bucket_of_one_token_is_exact():
    value, grad = divergence_and_grad([1, 2], "bucket")
    assert value == pytest.approx(RKL, abs=1e-6)
    assert_close(grad, RKL_GRAD, atol=1e-6, rtol=0)


def test_sampled_policy_gradient_has_the_gradient_of_reverse_kl_in_expectation():
    expected = torch.zeros(1, 3)
    for token in range(3):
        logits = S.log().requires_grad_()
        logprobs = logits.log_softmax(-1)[:, token]
        advantage = teacher_margin(T.log()[:, token], logprobs.detach())
        (-advantage * logprobs).sum().backward()
        expected += S[0, token] * logits.grad
    assert_close(expected, RKL_GRAD, atol=1e-6, rtol=0)


def test_margin_is_positive_where_the_teacher_likes_the_token_more():
    assert teacher_margin(torch.tensor([-0.5]), torch.tensor([-1.0])).item() == pytest.approx(0.5)


def test_unused_slots_change_nothing():
    ids = torch.tensor([[1, 2]])
    logits = S.log().requires_grad_()
    student, teacher = logits.log_softmax(-1).gather(1, ids), T.log().gather(1, ids)
    padded_student = torch.cat([student, student[:, :1]], 1)
    padded_teacher = torch.cat([teacher, torch.full((1, 1), -torch.inf)], 1)
    for tail in ("bucket", "none"):
        wide = topk_reverse_kl(padded_student, padded_teacher, tail)
        assert wide.item() == topk_reverse_kl(student, teacher, tail).item()
        (grad,) = torch.autograd.grad(wide.sum(), logits, retain_graph=True)
        assert torch.isfinite(grad).all()


def test_no_used_slot_is_zero():
    teacher = torch.full((2, 3), -torch.inf)
    student = torch.zeros(2, 3).log_softmax(-1).requires_grad_()
    for tail in ("bucket", "none"):
        value = topk_reverse_kl(student, teacher, tail)
        assert value.tolist() == [0, 0]
        assert torch.autograd.grad(value.sum(), student)[0].abs().max() == 0


@quick
@given(st.integers(0, 10_000), st.integers(2, 7), st.floats(-30, 30))
def test_bucket_is_bounded_by_the_full_divergence_and_shift_free(seed, k, shift):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(4, 7, generator=g) for _ in range(2))
    full = topk_reverse_kl(student.log_softmax(-1), teacher.log_softmax(-1), "bucket")
    top = teacher.log_softmax(-1).topk(k)
    for tail in ("bucket", "none"):
        value = topk_reverse_kl(student.log_softmax(-1).gather(1, top.indices), top.values, tail)
        shifted = topk_reverse_kl((student + shift).log_softmax(-1).gather(1, top.indices), top.values, tail)
        assert (value >= -1e-5).all()
        assert_close(value, shifted, atol=1e-4, rtol=1e-4)
        if tail == "bucket":
            assert (value <= full + 1e-4).all()


def test_log_tail_is_the_mass_left_out():
    assert log_tail(torch.tensor([[0.5, 0.3]]).log()).exp().item() == pytest.approx(0.2, abs=1e-6)


WHOLE = [FullReverseKL(), FullForwardKL(), *(JensenShannon(beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0))]


@quick
@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.floats(-60, 0), st.floats(-60, 0)), min_size=1, max_size=6),
)
def test_slopes_in_closed_form_are_those_of_autograd(divergence, pairs):
    log_p, log_q = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    leaf = log_p.clone().requires_grad_()
    expected = kernel(divergence)(leaf, log_q)
    expected.sum().backward()
    value, slope = with_slope(divergence)(log_p.clone(), log_q.clone())
    assert_close(value, expected.detach(), atol=1e-12, rtol=1e-9)
    assert_close(slope, leaf.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("divergence", WHOLE)
def test_an_id_without_mass_has_no_share(divergence):
    """Log-probs whose exponential is zero in fp32, on either side and on both."""
    log_p, log_q = torch.tensor([-200.0, -200.0, -1.0]), torch.tensor([-300.0, -1.0, -300.0])
    value, slope = with_slope(divergence)(log_p, log_q)
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    assert value[0] == 0 and slope[:2].abs().max() <= 0.4
