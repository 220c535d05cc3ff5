"""Every number that the reference prints, and the facts about estimators it names, on its own small examples."""

import math
import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from agentopd.config.objective import anchor_coef
from agentopd.config.objective_blocks import CandidatesPG, CertificateGate, Stabiliser, TopKForwardKL, TopKReverseKL
from agentopd.config.objective_data import TeacherNLL
from agentopd.objective.advantages import absolute_advantages, rubric_score
from agentopd.objective.candidates import candidate_loss, candidate_table
from agentopd.objective.discount import discounted
from agentopd.objective.divergences import forward_kl, full_divergence, jensen_shannon, k2_direct, kernel, reverse_kl
from agentopd.objective.gate import gated
from agentopd.objective.masks import most_uncertain
from agentopd.objective.phi import chord
from agentopd.objective.reference import extrapolated, k3, span_factor
from agentopd.objective.repetition import looping_tail, repeats
from agentopd.objective.suffix import bic, change_point, fade_from, margins
from agentopd.objective.support import Sampled, bucketed, overlap, topk_divergence, truncated
from agentopd.objective.trust import accepted, cap_scale
from agentopd.objective.views import Views
from agentopd.objective.weights import position_weights, step_weights

S, T = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
RKL, FKL = 0.2238047, 0.1937942
RKL_GRAD, FKL_GRAD = torch.tensor([[0.3462430, -0.2203891, -0.1258540]]), torch.tensor([[0.3, -0.2, -0.1]])
ONE = torch.zeros(1, dtype=torch.int64)


def value_and_grad(loss):
    logits = S.log().requires_grad_()
    value = loss(logits.log_softmax(-1))
    value.sum().backward()
    return value.sum().item(), logits.grad


@pytest.mark.parametrize(
    ("beta", "value"), [(0.0, FKL), (1.0, RKL), (0.5, 0.0508746), (0.1, 0.0175626), (0.9, 0.0196612)]
)
def test_jsd_of_the_three_token_example(beta, value):
    found, _ = value_and_grad(lambda log_p: jensen_shannon(log_p, T.log(), beta))
    assert found == pytest.approx(value, abs=1e-6)


def test_jsd_is_symmetric_and_bounded_and_zero_at_equality():
    one, other = jensen_shannon(S.log(), T.log(), 0.3).sum(), jensen_shannon(T.log(), S.log(), 0.7).sum()
    assert_close(one, other)
    far = torch.tensor([[1 - 1e-6, 1e-6]]).log(), torch.tensor([[1e-6, 1 - 1e-6]]).log()
    assert jensen_shannon(*far, 0.5).sum() <= math.log(2)
    assert jensen_shannon(S.log(), S.log(), 0.5).sum().abs() < 1e-7


@pytest.mark.parametrize(("chosen", "value", "grad"), [(reverse_kl, RKL, RKL_GRAD), (forward_kl, FKL, FKL_GRAD)])
def test_both_divergences_and_their_gradients(chosen, value, grad):
    found, slope = value_and_grad(lambda log_p: chosen(log_p, T.log()))
    assert found == pytest.approx(value, abs=1e-6)
    assert_close(slope, grad, atol=1e-6, rtol=0)


def test_truncated_sums_are_not_divergences():
    student, teacher = S.log()[:, 1:], T.log()[:, 1:]
    assert truncated(student, teacher, reverse_kl, renormalise=False).item() == pytest.approx(-0.2343407, abs=1e-6)
    assert truncated(student, teacher, forward_kl, renormalise=False).item() == pytest.approx(0.3770524, abs=1e-6)


def test_whole_support_is_the_whole_vocabulary_in_every_mode():
    ids = torch.tensor([[0, 1, 2]])
    sampled = Sampled(torch.tensor([1]), S.log()[:, 1], T.log()[:, 1])
    for config, value in ((TopKReverseKL(top_k=3), RKL), (TopKForwardKL(top_k=3), FKL)):
        for tail, renormalise in (("bucket", True), ("none", True), ("none", False), ("sampled", True)):
            chosen = config.model_copy(update={"tail": tail, "renormalise": renormalise})
            assert topk_divergence(S.log(), T.log(), ids, sampled, chosen).item() == pytest.approx(value, abs=1e-6)


def test_a_sampled_tail_adds_the_token_once():
    ids, student, teacher = torch.tensor([[1, 2]]), S.log()[:, 1:], T.log()[:, 1:]
    config = TopKReverseKL(top_k=2, tail="sampled")
    inside = Sampled(torch.tensor([1]), S.log()[:, 1], T.log()[:, 1])
    outside = Sampled(torch.tensor([0]), S.log()[:, 0], T.log()[:, 0])
    assert topk_divergence(student, teacher, ids, inside, config).item() == pytest.approx(0.00132221, abs=1e-7)
    assert topk_divergence(student, teacher, ids, outside, config).item() == pytest.approx(RKL, abs=1e-6)
    raw = config.model_copy(update={"renormalise": False})
    found = topk_divergence(student, teacher, ids, outside, raw).item()
    assert found == pytest.approx(-0.2343407 + math.log(0.5 / 0.2), abs=1e-6)


def test_a_clipped_log_ratio_bounds_each_term():
    config = TopKReverseKL(top_k=3, tail="none", clip_log_ratio=0.1)
    expected = (S * (S.log() - T.log()).clamp(-0.1, 0.1)).sum()
    assert_close(kernel(config)(S.log(), T.log()).sum(), expected)


def test_k2_has_the_gradient_of_reverse_kl():
    expected = torch.zeros(1, 3)
    for token in range(3):
        logits = S.log().requires_grad_()
        k2_direct(logits.log_softmax(-1)[:, token], T.log()[:, token]).sum().backward()
        expected += S[0, token] * logits.grad
    assert_close(expected, RKL_GRAD, atol=1e-6, rtol=0)


def test_k1_has_no_gradient_in_expectation_and_k3_has_the_forward_kls():
    """Why neither is offered as a loss that is differentiated directly."""
    estimators = ((lambda p, q: p - q, torch.zeros(1, 3)), (lambda p, q: (q - p).exp() - 1 - (q - p), FKL_GRAD))
    for estimator, expected in estimators:
        found = torch.zeros(1, 3)
        for token in range(3):
            logits = S.log().requires_grad_()
            estimator(logits.log_softmax(-1)[:, token], T.log()[:, token]).sum().backward()
            found += S[0, token] * logits.grad
        assert_close(found, expected, atol=1e-6, rtol=0)


def test_padding_rows_of_either_vocabulary_do_not_change_the_divergence():
    student = torch.cat([S.log(), torch.full((1, 4), 50.0)], 1)
    plain = full_divergence(S.log(), T.log(), TopKReverseKL())
    assert_close(full_divergence(student, T.log(), TopKReverseKL()), plain)
    assert plain.item() == pytest.approx(RKL, abs=1e-6)


def test_extrapolation_of_the_printed_example():
    delta, margin = torch.tensor([0.5]), torch.tensor([0.7])
    assert extrapolated(delta, margin, 1.0) is delta
    assert extrapolated(delta, margin, 1.25).item() == pytest.approx(0.675)
    assert extrapolated(delta, margin, 1.8).item() == pytest.approx(1.06)
    steps = [extrapolated(delta, margin, factor).item() for factor in (0.0, 0.5, 2.0)]
    assert steps[1] - steps[0] == pytest.approx((steps[2] - steps[1]) / 3)


def test_extrapolation_is_capped_inside_tool_calls():
    found = span_factor(1.8, torch.tensor([True, False]), 1.1)
    assert found.tolist() == pytest.approx([1.1, 1.8])
    assert span_factor(1.0, torch.tensor([True]), 1.1) == 1.0


def test_a_boosted_consensus_may_flip_and_the_guard_stops_it():
    views = Views(
        torch.tensor([-0.5]), torch.tensor([1.5]), torch.tensor([-1.0]), torch.zeros(1), torch.tensor([False])
    )
    agreed = torch.tensor([1.0])
    bold = gated(CertificateGate(extrapolation=1.8), views, agreed)
    assert bold.advantage_N.item() == pytest.approx(0.7)
    assert bold.flipped_N.item()
    assert gated(CertificateGate(extrapolation=1.8, sign_guard=True), views, agreed).advantage_N.item() == -0.5


@pytest.mark.parametrize(("step", "value"), [(0, 0.1), (29, 0.1), (30, 0.1), (32, 0.06891), (34, 0.01859), (35, 0.0)])
def test_the_anchors_three_phases(step, value):
    anchor = TeacherNLL(coef=0.1, coef_end=0.01, hold_until=0.3, off_from=0.35)
    assert anchor_coef(anchor, step / 100) == pytest.approx(value, abs=5e-6)


def test_position_weights_of_the_printed_example():
    gap, row, part = torch.tensor([-1.0, 0.5, -2.0, 0.5]), torch.zeros(4, dtype=torch.int64), torch.ones(4).bool()
    assert position_weights(gap, row, part, 0.5).tolist() == pytest.approx([1.5, 1.375, 1.3125, 1.0625])
    assert position_weights(gap, row, part, 0.0).tolist() == [1.0] * 4
    two = position_weights(torch.cat([gap, gap]), torch.tensor([0] * 4 + [1] * 4), torch.ones(8).bool(), 0.5)
    assert_close(two[4:], two[:4])


def test_discounted_margins_of_the_printed_example():
    delta, row, part = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.int64), torch.ones(3).bool()
    assert discounted(delta, row, part, 1.0).tolist() == [6.0, 5.0, 3.0]
    assert discounted(delta, row, part, 0.0) is delta
    rows = torch.tensor([0, 0, 1])
    assert discounted(delta, rows, torch.tensor([True, False, True]), 0.5).tolist() == [1.0, 0.0, 3.0]


def test_a_templated_first_turn_does_not_silence_the_others():
    gap, turn = torch.tensor([1e-4, 0.2, 0.4]), torch.tensor([0, 1, 2])
    found = step_weights(gap, torch.zeros(3, dtype=torch.int64), turn, torch.ones(3).bool(), 0.2, floor=0.2)
    assert found.tolist() == pytest.approx([1.0, 1.0, 0.5], abs=1e-4)


def test_chord_weights():
    assert chord(torch.tensor([0.5, 1.0, 0.25, 0.75]).log()).tolist() == pytest.approx([0.25, 0.0, 0.1875, 0.1875])
    assert chord(torch.tensor(-1e4)) == 0


def test_candidate_rewards_with_a_baseline_have_the_renormalised_gradient():
    config = CandidatesPG(top_k=2, support="teacher", baseline=True)

    def loss(log_p):
        return candidate_loss(log_p[:, 1:], log_p[:, 1:].detach(), T.log()[:, 1:], config, Stabiliser())

    _, grad = value_and_grad(loss)
    assert_close(grad, torch.tensor([[0.0, -0.0252865, 0.0252865]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("baseline", [True, False])
def test_candidate_rewards_on_the_whole_vocabulary_have_the_reverse_kls_gradient(baseline):
    config = CandidatesPG(top_k=3, support="teacher", baseline=baseline)

    def loss(log_p):
        return candidate_loss(log_p, log_p.detach(), T.log(), config, Stabiliser())

    _, grad = value_and_grad(loss)
    assert_close(grad, RKL_GRAD, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("support", "used"),
    [
        ("student", {1, 2}),
        ("teacher", {2, 3}),
        ("intersection", {2}),
        ("union", {1, 2, 3}),
        ("symmetric_difference", {1, 3}),
    ],
)
def test_supports_of_candidates(support, used):
    teacher = np.array([[2, 3]]), np.array([[-1.0, -2.0]], np.float32)
    chosen = np.array([[1, 2]]), np.array([[-5.0, -1.0]], np.float32)
    ids, logprobs = candidate_table(teacher, chosen, support)
    table = {1: -5.0, 2: -1.0, 3: -2.0}
    found = {int(i): float(x) for i, x in zip(ids[0], logprobs[0], strict=True) if np.isfinite(x)}
    assert found == {i: table[i] for i in used}


def test_overlap_is_the_share_of_shared_ids():
    assert overlap(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[4, 9, 2, 8]])).item() == 0.5


STEP = [3, 3.1, 2.9, 3, 1, 1.1, 0.9, 1]
FLAT = [1, 1.1, 0.9, 1, 1, 1.05, 0.95, 1]


def test_change_points_of_the_printed_series():
    assert (bic(STEP, 1), bic(STEP, 3, 4)) == (pytest.approx(2.119, abs=1e-3), pytest.approx(-36.148, abs=1e-3))
    assert bic(FLAT, 1) == pytest.approx(-44.07, abs=1e-2)
    assert change_point(STEP) == 4
    assert change_point(FLAT) is None
    assert change_point(STEP[::-1]) is None
    assert change_point([1.0]) is change_point([]) is None


def test_the_teacher_fades_from_the_first_token_of_the_step():
    margin, segment = np.repeat(STEP, 3), np.repeat(np.arange(8), 3)
    assert fade_from(margin, segment, 0.25) == 12
    assert fade_from(margin, segment, 0.75) == 18
    assert fade_from(np.repeat(FLAT, 3), segment, 0.25) == 24
    found = margins(np.log(np.array([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])))
    assert found.tolist() == pytest.approx([math.log(2), math.log(3)])


def test_repetition_by_compression_and_by_period():
    letters = random.Random(0)
    noise = "".join(letters.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(20_000))
    assert repeats("abc " * 5000)
    assert not repeats(noise) and not repeats("abc " * 2000)
    assert looping_tail([9, 8, 7, *[1, 2, 3] * 20]) == 57
    assert looping_tail(list(range(100))) == looping_tail([5] * 10) == looping_tail([]) == 0


def test_rubric_scores_and_absolute_advantages():
    assert rubric_score([5, 1, 1], [1, 0, 1]) == pytest.approx(6 / 7)
    with pytest.raises(ValueError, match="positive total"):
        rubric_score([0], [1])
    assert absolute_advantages([1.0, 0.0, None, 0.75]) == [1.0, -1.0, 0.0, 0.5]


def test_rejection_is_two_sided_and_tanh_bends_below_the_cap():
    old = torch.tensor([1.0, -1.0, 0.3])
    assert accepted(old, torch.zeros(3), 2.0).tolist() == [False, False, True]
    assert accepted(old, torch.zeros(3), None).all()
    signal = torch.tensor([0.0, 0.1, 5.0, -50.0])
    bent = signal * cap_scale(signal, 5.0, "tanh")
    assert_close(bent, 5 * (signal / 5).tanh())


def test_the_entropy_mask_keeps_a_share_of_each_episode():
    entropy, row = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2]), torch.tensor([0, 0, 0, 1, 1])
    part = torch.tensor([True, False, True, True, True])
    assert most_uncertain(entropy, row, part, 0.5).tolist() == [False, False, True, True, False]
    assert most_uncertain(entropy, row, part, None) is part
    assert most_uncertain(entropy, row, part, 1.0).tolist() == part.tolist()


def test_kl_to_the_start_is_never_negative_and_zero_there():
    assert k3(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -3.0])).tolist() == pytest.approx([0.0, math.exp(-1)])


def test_bucket_of_a_top_k_jsd_at_k_equal_v():
    found = bucketed(S.log(), T.log(), lambda p, q: jensen_shannon(p, q, 0.5))
    assert found.item() == pytest.approx(0.0508746, abs=1e-5)
