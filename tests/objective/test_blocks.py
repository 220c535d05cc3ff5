"""Each small block alone: values printed in the reference, bounds, and identity at the off setting."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agentopd.config.objective_blocks import CalibratedRouter, Stabiliser, UniformRouter
from agentopd.objective.advantages import group_advantages
from agentopd.objective.anchors import gold_nll
from agentopd.objective.masks import hidden_tail
from agentopd.objective.microbatches import bucket_by_length
from agentopd.objective.reference import k2
from agentopd.objective.routers import agreement, route, three_weights
from agentopd.objective.trust import budget_scale, cap_scale, importance_weight, inside_trust_region, ppo_surrogate
from agentopd.objective.views import Views
from agentopd.objective.weights import span_weights, step_weights

quick = settings(max_examples=25, deadline=None)
floats = st.floats(-5, 5, width=32)


def surrogate_and_grad(advantage, ratio, **settings):
    old = torch.tensor([-3.0])
    logprobs = (old + torch.tensor([ratio]).log()).requires_grad_()
    found = ppo_surrogate(torch.tensor([advantage]), logprobs, old, Stabiliser(**settings))
    found.loss_N.sum().backward()
    return found.loss_N.item(), logprobs.grad.item(), found.clipped_N.item()


def test_group_advantage_uses_the_unbiased_std():
    assert group_advantages([1, 0, 0, 0], ["g"] * 4) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert group_advantages([1, 0, 0, 0], ["g"] * 4, normalise_std=False) == [0.75, -0.25, -0.25, -0.25]


def test_groups_do_not_mix_and_unknown_rewards_take_no_part():
    found = group_advantages([1, 0, None, 10, 20], ["g", "g", "g", "h", "h"])
    half = 0.5 / (0.5**0.5 + 1e-6)
    assert found[:3] == pytest.approx([half, -half, 0])
    assert found[2] == 0
    assert found[3:] == pytest.approx([-half, half], abs=1e-5)


@quick
@given(st.floats(-10, 10), st.integers(1, 8))
def test_constant_groups_are_exactly_zero(reward, size):
    assert group_advantages([reward] * size, ["g"] * size) == [0.0] * size


@quick
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.randoms())
def test_advantages_follow_a_permutation(rewards, rnd):
    order = list(range(len(rewards)))
    rnd.shuffle(order)
    direct = group_advantages(rewards, ["g"] * len(rewards))
    shuffled = group_advantages([rewards[i] for i in order], ["g"] * len(rewards))
    assert [direct[i] for i in order] == pytest.approx(shuffled, abs=1e-6)


def routed_weight(router, sigma_N, delta_N):
    zeros_N = torch.zeros_like(delta_N)
    return route(router, Views(delta_N, zeros_N, sigma_N, zeros_N, zeros_N.bool())).weight_N


@pytest.mark.parametrize(
    ("sigma", "delta", "weight"),
    [(1, 2, 1.0), (1, -2, 0.25), (-1, -2, 1.0), (-1, 2, 0.25), (0, 2, 0.5), (0, -2, 0.5), (1, 0, 0.5), (0.5, 1, 0.75)],
)
def test_quadrants_of_the_calibrated_weight(sigma, delta, weight):
    found = routed_weight(CalibratedRouter(), torch.tensor([float(sigma)]), torch.tensor([float(delta)]))
    assert found.item() == weight


@quick
@given(floats, floats)
def test_calibrated_weight_is_monotone_in_agreement(first, second):
    low, high = sorted((max(-1, min(1, first)), max(-1, min(1, second))))
    weights = three_weights(torch.tensor([low, high]), 1.0, 0.5, 0.25)
    assert weights[0] <= weights[1]


def test_equal_weights_and_uniform_router_are_the_identity():
    a = torch.linspace(-1, 1, 11)
    assert three_weights(a, 1.0, 1.0, 1.0).tolist() == [1.0] * 11
    assert routed_weight(UniformRouter(), a, torch.ones(11)).tolist() == [1.0] * 11
    assert agreement(a, torch.zeros(11)).tolist() == [0.0] * 11


def test_dual_clip_is_flat():
    loss, grad, clipped = surrogate_and_grad(-1.0, 10.0, dual_clip=3.0)
    assert (loss, grad, clipped) == (pytest.approx(3.0), 0.0, True)


def test_upper_clip_has_no_gradient():
    loss, grad, clipped = surrogate_and_grad(1.0, 1.5, clip_high=0.2)
    assert (loss, grad, clipped) == (pytest.approx(-1.2), 0.0, True)


def test_at_ratio_one_the_surrogate_is_the_policy_gradient():
    loss, grad, clipped = surrogate_and_grad(2.0, 1.0)
    assert (loss, grad, clipped) == (pytest.approx(-2.0), pytest.approx(-2.0), False)


@quick
@given(floats, st.floats(0.1, 20), st.floats(0.01, 10))
def test_surrogate_is_homogeneous_in_the_advantage(advantage, ratio, scale):
    plain = surrogate_and_grad(advantage, ratio)
    scaled = surrogate_and_grad(advantage * scale, ratio)
    assert scaled[0] == pytest.approx(scale * plain[0], rel=1e-4, abs=1e-5)


def test_importance_weight_truncates_above_only():
    old, rollout = torch.tensor([3.0, -3.0, 0.0, 900.0]), torch.zeros(4)
    assert_close(importance_weight(old, rollout, 5.0), torch.tensor([5.0, 0.0497871, 1.0, 5.0]))
    assert importance_weight(old, rollout, None).tolist() == [1.0] * 4


def test_probability_drop_only_against_the_direction_of_the_advantage():
    new, rollout = torch.tensor([0.9, 0.1, 0.9, 0.1]).log(), torch.tensor([0.5, 0.5, 0.5, 0.5]).log()
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert inside_trust_region(advantage, new, rollout, 0.2).tolist() == [False, False, True, True]
    assert inside_trust_region(advantage, new, rollout, None).all()


@quick
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6), st.floats(0.5, 10))
def test_cap_bounds_the_signal_and_spares_the_rest(values, cap):
    signal = torch.tensor(values)
    capped = signal * cap_scale(signal, cap)
    assert (capped.abs() <= cap * 1.00001).all()
    inside = signal.abs() <= cap
    assert_close(capped[inside], signal[inside], atol=0, rtol=1e-6)
    assert torch.equal(cap_scale(signal, None), torch.ones_like(signal))


def test_sequence_budget_brings_mean_pressure_down_to_it():
    pressure = torch.tensor([6.0, 2.0, 99.0, 0.5, 0.5])
    row, part = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([True, True, False, True, True])
    scale = budget_scale(pressure, row, part, 1.0)
    assert scale.tolist() == [0.25, 0.25, 0.25, 1.0, 1.0]
    assert budget_scale(pressure, row, part, None).tolist() == [1.0] * 5


@pytest.mark.parametrize(("delta", "last"), [(0.2, 1.2), (0.5, 1.5)])
def test_step_weights_of_the_printed_example(delta, last):
    gap = torch.tensor([0.1, -0.1, 0.2, 0.05])
    row, turn = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 2])
    weights = step_weights(gap, row, turn, torch.ones(4, dtype=torch.bool), delta)
    assert_close(weights, torch.tensor([1.0, 1.0, 0.5000025, last]), atol=1e-6, rtol=0)


@quick
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6))
def test_step_weights_equal_the_product_over_turns(gaps):
    n, eps = len(gaps), 1e-6
    product, expected = 1.0, [1.0]
    for before, after in pairwise(gaps):
        product *= (before + eps) / (after + eps)
        expected.append(min(product, 1.2))
    found = step_weights(
        torch.tensor(gaps), torch.zeros(n, dtype=torch.int64), torch.arange(n), torch.ones(n, dtype=torch.bool), 0.2
    )
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_step_weights_start_at_the_first_turn_that_takes_part():
    gap, row, turn = torch.tensor([9.0, 0.2, 0.4, 7.0]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0])
    part = torch.tensor([False, True, True, True])
    weights = step_weights(gap, row, turn, part, 0.2)
    assert_close(weights, torch.tensor([1.0, 1.0, 0.5, 1.0]), atol=1e-4, rtol=0)
    assert step_weights(gap, row, turn, part, None).tolist() == [1.0] * 4


def test_span_weights_and_their_off_setting():
    span = torch.tensor([True, False])
    assert span_weights(span, 0.5).tolist() == [1.0, 0.5]
    assert span_weights(span, 1.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("sampled", "hidden"), [(1, 1), (10, 1), (11, 2), (100, 10)])
def test_hidden_tail_is_a_tenth_rounded_up(sampled, hidden):
    assert hidden_tail(sampled) == hidden


def test_k2_has_the_gradient_of_reverse_kl_in_expectation():
    s, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    expected = torch.zeros(3)
    for token in range(3):
        logits = s.log().requires_grad_()
        k2(logits.log_softmax(-1)[token], ref.log()[token]).backward()
        expected += s[token] * logits.grad
    assert_close(expected, torch.tensor([0.3462430, -0.2203891, -0.1258540]), atol=1e-6, rtol=0)
    assert k2(torch.tensor(-1.0), torch.tensor(-1.0)) == 0


def test_gold_nll_is_a_weighted_sum():
    assert gold_nll(torch.tensor([-1.0, -3.0]), torch.tensor([0.5, 0.25])).item() == pytest.approx(1.25)


@quick
@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 100))
def test_buckets_hold_every_row_once_within_the_budget(lengths, budget):
    buckets = bucket_by_length(lengths, budget)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        assert len(bucket) == 1 or len(bucket) * max(lengths[i] for i in bucket) <= budget
