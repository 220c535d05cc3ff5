"""Presets reduce to one another, and no batch layout, padding or mask changes the loss."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agentopd.config.objective import ObjectiveConfig
from agentopd.errors import ConfigError
from agentopd.objective import compose
from agentopd.objective.candidates import candidate_rewards
from agentopd.objective.guidance import teacher_guidance
from agentopd.objective.metrics import add_sums, means
from agentopd.objective.microbatches import split_micro_batches
from agentopd.objective.streams import Streams
from agentopd.objective.support import bucketed

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)
ONES = {"kind": "calibrated", "w_agree": 1.0, "w_neutral": 1.0, "w_conflict": 1.0}
SAMPLED = {"kind": "sampled_pg"}
TOPK = {"kind": "topk_rkl", "top_k": 4}
BUCKET = {"tail": "bucket"}
UNBOUNDED = {"cap": None, "sequence_budget": None}
VC_STABILISER = {"cap": None, "sequence_budget": None, "max_prob_drop": None, "tis_cap": 5.0, "clip_high": 0.2}


def subset(streams, rows):
    """The streams of some rows, as the learner would cut them."""
    batch = streams.batch
    kept = torch.cat([(batch.row_N == row).nonzero().squeeze(1) for row in rows])
    old = None if streams.old_logprobs_N is None else streams.old_logprobs_N[kept]
    return Streams(batch.select_rows(rows), streams.logprobs_N[kept], streams.topk_logprobs_NK[kept], old)


@quick
@given(seeds, st.sampled_from([0.0, 0.3]))
def test_open_settings_are_plain_opd_bit_for_bit(sample, preset, seed, off_policy):
    data = sample(seed, off_policy=off_policy)
    vc = preset(
        "verifier_calibrated", divergence=SAMPLED, verifier={"kind": "none"}, router=ONES, stabiliser=VC_STABILISER
    )
    assert torch.equal(data.loss(vc).loss, data.loss(preset("opd")).loss)
    assert torch.equal(data.grad(vc), data.grad(preset("opd")))


@quick
@given(seeds)
def test_open_settings_are_topk_opd_bit_for_bit(sample, preset, seed):
    data = sample(seed)
    vc = preset("verifier_calibrated", verifier={"kind": "none"}, router=ONES, stabiliser=UNBOUNDED)
    assert torch.equal(data.loss(vc).loss, data.loss(preset("topk_opd", divergence=BUCKET)).loss)
    assert torch.equal(data.grad(vc), data.grad(preset("topk_opd", divergence=BUCKET)))


@quick
@given(seeds, st.sampled_from([SAMPLED, TOPK]))
def test_no_teacher_weight_is_grpo(sample, preset, seed, divergence):
    data = sample(seed, off_policy=0.3)
    stabiliser = {**VC_STABILISER, "tis_cap": 2.0, "clip_high": 0.28}
    vc = preset(
        "verifier_calibrated", divergence={**divergence, "coef": 0.0}, verifier={"coef": 1.0}, stabiliser=stabiliser
    )
    assert torch.equal(data.grad(vc), data.grad(preset("grpo")))


def test_opd_is_the_surrogate_on_the_teacher_margin(sample, preset):
    data = sample()
    batch = data.streams.batch
    margin = batch.teacher_logprobs_N - data.streams.logprobs_N.detach()
    (expected,) = torch.autograd.grad(-(margin * data.streams.logprobs_N).mean(), data.logits_NV, retain_graph=True)
    objective = preset("opd", stabiliser={"tis_cap": None})
    assert_close(data.grad(objective), expected)


def test_teacher_equal_to_student_leaves_nothing_to_do(sample, preset):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 9, generator=g)
    data = sample(teacher_logits_NV=logits, student_logits_NV=logits)
    for name in ("opd", "topk_opd"):
        assert data.grad(preset(name)).abs().max() < 1e-7


def test_whole_vocabulary_equals_full_reverse_kl(sample, preset):
    data = sample(k=9)
    student, teacher = data.logits_NV.log_softmax(-1), data.streams.batch.teacher_topk_logprobs_NK
    student = student.gather(1, data.streams.batch.teacher_topk_ids_NK)
    full = (student.exp() * (student - teacher)).sum(-1).mean()
    assert_close(data.loss(preset("topk_opd", divergence=BUCKET)).loss, full, atol=1e-6, rtol=1e-5)


@quick
@given(seeds)
def test_passed_episode_in_conflict_has_exactly_the_conflict_share_of_the_gradient(sample, preset, seed):
    data = sample(seed)
    n = len(data.streams.logprobs_N)
    batch = replace(
        data.streams.batch, sigma_N=torch.ones(n), teacher_logprobs_N=data.streams.logprobs_N.detach() - 1.0
    )
    data.streams = replace(data.streams, batch=batch)
    vc = preset("verifier_calibrated", verifier={"kind": "none"}, stabiliser=UNBOUNDED)
    assert_close(data.grad(vc), 0.25 * data.grad(preset("topk_opd", divergence=BUCKET)), atol=1e-9, rtol=1e-6)


@quick
@given(seeds, st.floats(0.5, 20))
def test_teacher_pressure_on_a_token_is_bounded_by_the_cap(sample, preset, seed, cap):
    data = sample(seed, advantage_N=torch.zeros(12))
    objective = preset("opd", stabiliser={"cap": cap, "tis_cap": None})
    (grad,) = torch.autograd.grad(data.loss(objective).loss, data.streams.logprobs_N, retain_graph=True)
    assert (grad.abs() * 12 <= cap * 1.0001).all()


def test_a_huge_margin_moves_no_more_than_the_cap(sample, preset):
    data, grads = sample(), []
    for margin in (-5.0, -50.0):
        batch = replace(data.streams.batch, teacher_logprobs_N=data.streams.logprobs_N.detach() + margin)
        data.streams = replace(data.streams, batch=batch)
        grads.append(data.grad(preset("opd", stabiliser={"cap": 5.0})))
    assert_close(grads[0], grads[1])


@quick
@given(seeds, st.sampled_from([SAMPLED, TOPK]), st.floats(0.05, 2))
def test_mean_pressure_of_every_sequence_is_within_the_budget(sample, preset, seed, divergence, budget):
    data = sample(seed)
    objective = preset("verifier_calibrated", divergence=divergence, stabiliser={"sequence_budget": budget})
    term = teacher_guidance(data.streams, objective)
    pressure = (term.weight_N * term.signal_N).abs()
    for row in range(3):
        assert pressure[data.streams.batch.row_N == row].mean() <= budget * 1.0001


def test_cap_scales_the_gradient_of_a_divergence_instead_of_losing_it(sample, preset):
    data = sample()
    plain = bucketed(data.streams.topk_logprobs_NK, data.streams.batch.teacher_topk_logprobs_NK)
    cap = plain.max().item() / 4
    top = int(plain.argmax())
    capped, free = (data.grad(preset("topk_opd", divergence=BUCKET, stabiliser={"cap": c})) for c in (cap, None))
    assert_close(capped[top], free[top] / 4)
    assert data.loss(preset("topk_opd", divergence=BUCKET, stabiliser={"cap": cap})).sums["distill/cap_hit"][0, 0] >= 1


def test_unknown_verdict_keeps_the_teacher_at_neutral_weight(sample, preset):
    data = sample(sigma_N=torch.zeros(12), advantage_N=torch.zeros(12), verifier_scale_N=torch.zeros(12))
    vc = preset("verifier_calibrated", stabiliser=VC_STABILISER)
    assert_close(data.grad(vc), 0.5 * data.grad(preset("topk_opd", divergence=BUCKET)), atol=1e-9, rtol=1e-6)


def test_constant_group_keeps_the_teacher_term(sample, preset):
    data = sample(advantage_N=torch.zeros(12))
    vc = preset("verifier_calibrated")
    without = preset("verifier_calibrated", verifier={"kind": "none"})
    assert torch.equal(data.grad(vc), data.grad(without))
    assert data.grad(vc).abs().max() > 0


@pytest.mark.parametrize("name", ["verifier_calibrated", "opd", "topk_opd", "grpo"])
def test_tokens_without_scale_have_no_gradient(sample, preset, name):
    out = torch.arange(12) % 3 == 0
    scale = torch.where(out, 0.0, 1 / 8)
    data = sample(teacher_scale_N=scale, verifier_scale_N=scale)
    grad = data.grad(preset(name))
    assert grad[out].abs().max() == 0
    assert grad[~out].abs().max() > 0


@quick
@given(seeds, st.sampled_from(["verifier_calibrated", "opd", "topk_opd", "grpo"]), st.integers(1, 16))
def test_micro_batches_add_up_to_the_batch(sample, preset, seed, name, budget):
    weights = {} if name == "grpo" else {"step_delta": 0.2, "outside_span": 0.5}
    objective = preset(name, weights=weights, reference={"kl_coef": 0.1})
    data = sample(seed, off_policy=0.2)
    whole = data.loss(objective)
    cuts = split_micro_batches(data.streams.batch, budget)
    order = sorted(range(3), key=data.streams.batch.lengths_B.tolist().__getitem__)
    loss, sums, start = torch.zeros(()), {}, 0
    for cut in cuts:
        rows = order[start : start + cut.num_rows]
        start += cut.num_rows
        part = compose.compute_loss(subset(data.streams, rows), objective)
        assert torch.equal(part.loss.new_tensor(cut.lengths_B.tolist()), subset(data.streams, rows).batch.lengths_B)
        loss, sums = loss + part.loss, add_sums(sums, part.sums)
    assert_close(loss, whole.loss, atol=1e-6, rtol=1e-5)
    assert means(sums, ("a",)) == pytest.approx(means(whole.sums, ("a",)), rel=1e-4, abs=1e-6)


@quick
@given(seeds, st.permutations([0, 1, 2]))
def test_row_order_does_not_matter(sample, preset, seed, order):
    objective = preset("verifier_calibrated", weights={"step_delta": 0.2})
    data = sample(seed, off_policy=0.2)
    permuted = compose.compute_loss(subset(data.streams, order), objective)
    assert_close(permuted.loss, data.loss(objective).loss, atol=1e-6, rtol=1e-5)


@quick
@given(seeds, st.floats(-20, 20))
def test_constants_added_to_a_tokens_logits_do_not_matter(sample, preset, seed, shift):
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(12, 9, generator=g), torch.randn(12, 9, generator=g)
    target = torch.randint(9, (12,), generator=g)
    objective = preset("verifier_calibrated")
    advantage = torch.ones(12)
    plain, moved = (
        sample(student_logits_NV=student + d, teacher_logits_NV=teacher, target_N=target, advantage_N=advantage)
        for d in (0.0, shift)
    )
    assert_close(moved.loss(objective).loss, plain.loss(objective).loss, atol=1e-4, rtol=1e-4)


def test_only_the_students_logprobs_carry_gradient(sample, preset):
    data = sample(off_policy=0.1)
    batch = data.streams.batch
    leaves = [x.requires_grad_() for x in (batch.teacher_logprobs_N, batch.advantage_N, batch.rollout_logprobs_N)]
    objective = preset("verifier_calibrated", divergence=SAMPLED)
    data.loss(objective).loss.backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_skills_have_metrics_of_their_own(sample, preset):
    skill = torch.tensor([0] * 4 + [1] * 8)
    found = sample(skills=("a", "b", "c"), skill_N=skill).loss(preset("verifier_calibrated"))
    values = means(found.sums, ("a", "b", "c"))
    assert values["distill/agree"] == pytest.approx(
        (4 * values["a/distill/agree"] + 8 * values["b/distill/agree"]) / 12
    )
    assert "c/distill/agree" not in values
    assert values["distill/coverage"] == 1.0
    quadrants = [values[f"distill/{name}"] for name in ("agree", "conflict", "neutral")]
    assert sum(quadrants) == pytest.approx(1)


def test_matching_engine_and_learner_have_no_mismatch(sample, preset):
    data = sample()
    data.streams = replace(
        data.streams, batch=replace(data.streams.batch, rollout_logprobs_N=data.streams.logprobs_N.detach())
    )
    found = means(data.loss(preset("opd")).sums, ("a",))
    assert found["student/mismatch_kl"] == 0
    assert found["pg/importance_weight"] == 1


def test_gold_loss_is_the_negative_log_likelihood(sample, preset):
    data = sample()
    assert_close(data.loss(preset("sft")).loss, -data.streams.logprobs_N.mean())


def test_reference_pull_is_added(sample, preset):
    data = sample()
    pulled = data.loss(preset("opd", reference={"kl_coef": 0.5}))
    gap = data.streams.logprobs_N - data.streams.batch.ref_logprobs_N
    assert_close(pulled.parts["loss/reference"], (0.25 * gap.square().mean()).detach())
    assert_close(pulled.loss - data.loss(preset("opd")).loss, (0.25 * gap.square()).mean())


def test_candidates_beyond_the_divergences_own_k_are_not_rewarded(sample, preset):
    config = preset("rethink_opd", divergence={"top_k": 4, "support": "teacher"})
    assert_close(sample(k=8).loss(config).loss, sample(k=4).loss(config).loss)


@pytest.mark.parametrize(("bound", "most"), [("cap", 0.05), ("sequence_budget", 0.05)])
def test_bounds_hold_candidates_whose_rewards_sum_to_nothing(sample, preset, bound, most):
    def config(**settings):
        return preset(
            "rethink_opd", divergence={"top_k": 4, "support": "teacher", "baseline": True}, stabiliser=settings
        )

    data = sample()
    streams = data.streams
    reward_NK = candidate_rewards(streams.old_topk_NK, streams.batch.teacher_topk_logprobs_NK, config().divergence)
    assert data.loss(config()).loss.abs() < 1e-6
    pressed_N = teacher_guidance(streams, config(**{bound: most})).weight_N * reward_NK.abs().sum(-1)
    if bound == "sequence_budget":
        pressed_N = torch.stack([pressed_N[streams.batch.row_N == row].mean() for row in range(3)])
    assert_close(pressed_N, torch.full_like(pressed_N, most))
    assert data.grad(config(**{bound: most})).norm() < 0.2 * data.grad(config()).norm()


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [
        ({"source": "gold"}, "student"),
        ({"source": "teacher", "anchor": {"kind": "gold_nll"}}, "source = 'gold'"),
        ({"source": "gold", "anchor": {"kind": "gold_nll", "prompts": "unsolved"}}, "anchor.prompts chooses"),
        ({"divergence": {"kind": "none"}, "router": {"kind": "calibrated"}}, "router"),
        ({"divergence": {"kind": "none"}}, "empty"),
    ],
)
def test_blocks_without_their_input_are_refused(blocks, complaint):
    if blocks == {"source": "gold"}:
        blocks = {**blocks, "verifier": {"kind": "grpo"}}
    with pytest.raises(ValueError, match=complaint):
        ObjectiveConfig.model_validate(blocks)


def test_every_preset_is_valid(preset):
    from agentopd.config.presets import PRESETS, SUMMARIES

    assert set(PRESETS) == set(SUMMARIES)
    for name in PRESETS:
        assert preset(name).preset == name
    assert issubclass(ConfigError, ValueError)
