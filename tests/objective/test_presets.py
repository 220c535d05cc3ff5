"""What holds for every preset, how presets reduce to one another, and where a tabular policy ends under them."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from agentopd.config.load import resolve_objective
from agentopd.config.objective import Blocks, ObjectiveConfig
from agentopd.config.presets import PRESETS
from agentopd.objective.compose import compute_loss
from agentopd.objective.guidance import phi_sums, teacher_guidance
from agentopd.objective.phi import mean_of
from agentopd.objective.streams import PER_TOKEN, Streams
from agentopd.objective.support import truncated


def stages() -> dict[str, Blocks]:
    """Every choice of blocks that some preset trains with."""
    return {
        f"{name}/{getattr(blocks, 'name', 'final')}": blocks
        for name in PRESETS
        for blocks in resolve_objective(name).every_stage()
    }


STAGES = stages()
FROM_TEACHER = ("opd", "iw_opd", "topk_opd", "rethink_opd", "aopd", "gkd", "prefix_opd", "simct_opd", "lightning_opd")
every_stage = pytest.mark.parametrize("blocks", STAGES.values(), ids=STAGES)


def subset(streams: Streams, rows: list[int]) -> Streams:
    """The streams of some rows, as the learner would cut them."""
    kept = torch.cat([(streams.batch.row_N == row).nonzero().squeeze(1) for row in rows])
    own = {
        name: getattr(streams, name)[kept]
        for name in streams.__dataclass_fields__
        if name.endswith(PER_TOKEN) and getattr(streams, name) is not None
    }
    return replace(streams, batch=streams.batch.select_rows(rows), **own)


def grad_of(loss: torch.Tensor, data) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, data.logits_NV, retain_graph=True)
    return found


# --- every preset ----------------------------------------------------------------------------------------------------


@every_stage
def test_every_preset_has_a_finite_loss_and_a_gradient(sample, blocks):
    data = sample(1, off_policy=0.2)
    output = data.loss(blocks)
    assert output.parts and torch.isfinite(output.loss)
    assert grad_of(output.loss, data).abs().max() > 0


@every_stage
def test_every_preset_adds_up_over_micro_batches_and_rows_in_any_order(sample, blocks):
    data = sample(2, off_policy=0.2)
    seen = data.seen(blocks)
    if blocks.needs_batch_statistics:
        seen = replace(seen, phi_mean=mean_of(phi_sums(seen, blocks)))
    whole = compute_loss(seen, blocks).loss
    pieces = [compute_loss(subset(seen, rows), blocks).loss for rows in ([2], [1, 0])]
    assert_close(sum(pieces), whole, atol=1e-6, rtol=1e-5)
    assert_close(compute_loss(subset(seen, [2, 0, 1]), blocks).loss, whole, atol=1e-6, rtol=1e-5)


@every_stage
def test_no_preset_reads_constants_in_the_logits(sample, blocks):
    g = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(12, 9, generator=g), torch.randn(12, 9, generator=g)
    shared = {"target_N": torch.randint(9, (12,), generator=g), "ref_logprobs_N": torch.full((12,), -2.0)}
    shared |= {"advantage_N": torch.ones(12), "rollout_logprobs_N": torch.full((12,), -2.0)}
    plain, moved = (
        sample(student_logits_NV=student + c, teacher_logits_NV=teacher, **shared)
        for c in (torch.zeros(12, 1), torch.linspace(-9, 9, 12)[:, None])
    )
    assert_close(moved.loss(blocks).loss, plain.loss(blocks).loss, atol=1e-4, rtol=1e-4)


@every_stage
def test_unused_slots_and_tokens_without_weight_change_no_preset(sample, blocks):
    data = sample(3, off_policy=0.1)
    seen, batch = data.seen(blocks), data.streams.batch
    wide = replace(
        batch,
        teacher_topk_ids_NK=torch.cat([batch.teacher_topk_ids_NK, torch.zeros(12, 2, dtype=torch.int64)], 1),
        teacher_topk_logprobs_NK=torch.cat([batch.teacher_topk_logprobs_NK, torch.full((12, 2), -torch.inf)], 1),
    )
    padded = torch.cat([seen.topk_logprobs_NK, seen.topk_logprobs_NK[:, :2]], 1)
    loss = compute_loss(replace(seen, batch=wide, topk_logprobs_NK=padded), blocks).loss
    assert_close(loss, compute_loss(seen, blocks).loss)
    assert_close(grad_of(loss, data), grad_of(compute_loss(seen, blocks).loss, data))
    out = torch.arange(12) % 3 == 2
    scale = torch.where(out, 0.0, 1 / 8)
    names = ("teacher_scale_N", "verifier_scale_N", "anchor_scale_N", "reference_scale_N")
    silent = sample(3, off_policy=0.1, **dict.fromkeys(names, scale))
    if blocks.alignment.kind == "same":
        assert grad_of(silent.loss(blocks).loss, silent)[out].abs().max() == 0


@every_stage
def test_only_the_student_carries_gradient_in_every_preset(sample, blocks):
    data = sample(4, off_policy=0.1)
    batch = data.streams.batch
    given = ("teacher_logprobs_N", "advantage_N", "rollout_logprobs_N", "ref_logprobs_N", "sigma_N")
    leaves = [getattr(batch, name).requires_grad_() for name in given]
    data.loss(blocks).loss.backward()
    skip = 1 if blocks.alignment.kind != "same" else 0  # a span's score is part of the support
    pulled = {3} if blocks.reference.kl_coef else set()
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i >= skip and i not in pulled)


@pytest.mark.parametrize("name", FROM_TEACHER)
def test_a_teacher_equal_to_the_student_leaves_nothing_to_do(sample, name):
    logits = torch.randn(12, 9, generator=torch.Generator().manual_seed(3))
    data = sample(teacher_logits_NV=logits, student_logits_NV=logits)
    assert grad_of(data.loss(resolve_objective(name)).loss, data).abs().max() < 1e-6


# --- which way it goes -----------------------------------------------------------------------------------------------

SILENT = {"anchor_scale_N": torch.zeros(12), "advantage_N": torch.zeros(12), "sigma_N": torch.zeros(12)}
TAUGHT = {name: blocks for name, blocks in STAGES.items() if blocks.needs_teacher}
JUDGED = {name: b for name, b in STAGES.items() if b.verifier.kind != "none" and b.verifier.coef > 0}
ANCHORED = {name: b for name, b in STAGES.items() if b.anchor.kind != "none"}


def pushed(sample, blocks, liking=0.0, **fields):
    """The gradient on the sampled tokens' logits, where the teacher likes them ``liking`` nats more than the student
    does and agrees with it on all else.
    """
    g = torch.Generator().manual_seed(19)
    logits, target = torch.randn(12, 9, generator=g), torch.randint(9, (12,), generator=g)
    teacher = logits + liking * torch.nn.functional.one_hot(target, 9)
    own = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    given = {"target_N": target, "rollout_logprobs_N": own, "ref_logprobs_N": own, **SILENT, **fields}
    data = sample(student_logits_NV=logits, teacher_logits_NV=teacher, k=9, **given)
    return data.grad(blocks).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("blocks", TAUGHT.values(), ids=TAUGHT)
def test_a_token_the_teacher_likes_more_is_raised_and_one_it_likes_less_is_lowered(sample, blocks):
    assert (pushed(sample, blocks, 1.0) < 0).all()
    assert (pushed(sample, blocks, -1.0) > 0).all()


@pytest.mark.parametrize("blocks", JUDGED.values(), ids=JUDGED)
def test_tokens_of_a_better_episode_are_raised_and_of_a_worse_one_lowered(sample, blocks):
    assert (pushed(sample, blocks, advantage_N=torch.ones(12)) < 0).all()
    assert (pushed(sample, blocks, advantage_N=-torch.ones(12)) > 0).all()


@pytest.mark.parametrize("blocks", ANCHORED.values(), ids=ANCHORED)
def test_tokens_of_an_anchor_are_raised(sample, blocks):
    liking = 1.0 if blocks.anchor.kind == "teacher_fkl" else 0.0
    assert (pushed(sample, blocks, liking, anchor_scale_N=torch.full((12,), 1 / 12)) < 0).all()


# --- reductions ------------------------------------------------------------------------------------------------------

TIS_OFF = {"stabiliser": {"tis_cap": None}}
REDUCTIONS = [
    ("exopd", {"reference": {"extrapolation": 1.0}}, "opd", {}),
    ("iw_opd", {"weights": {"position_gamma": 0.0}}, "opd", {}),
    ("opd_grpo", {"verifier": {"kind": "none"}}, "opd", {}),
    ("stable_opd", {"reference": {"kl_coef": 0.0}, "anchor": {"kind": "none"}}, "opd", {}),
    ("prefix_opd", {"masks": {"suffix": "off"}}, "opd", {}),
    ("lightning_opd", {"source": {"kind": "student"}}, "opd", TIS_OFF),
    ("sod", {"weights": {"step_delta": None}}, "opd_grpo", {"stabiliser": {"tis_cap": None, "clip_high": 0.28}}),
    ("aopd", {"router": {"kind": "uniform"}}, "opd", {}),
    ("gkd", {"divergence": {"beta": 0.0}}, "gkd", {"divergence": {"kind": "full_fkl"}}),
    ("gkd", {"divergence": {"beta": 1.0}}, "gkd", {"divergence": {"kind": "full_rkl"}}),
    ("opd", {"router": {"kind": "outcome", "w_pass": 1, "w_fail": 1, "w_unknown": 1}}, "opd", {}),
    ("opd", {"divergence": {"discount": 0.0}}, "opd", {}),
    ("topk_opd", {"masks": {"entropy_top_ratio": 1.0}}, "topk_opd", {}),
    (
        "sg_opd",
        {"router": {"kind": "uniform"}, "verifier": {"kind": "none"}, "stabiliser": {"phi": "off", "phi_scale": 5.0},
         "anchor": {"kind": "none"}},
        "opd",
        {},
    ),
    ("timesep", {"stages": ()}, "sg_opd", {"anchor": {"kind": "none"}}),
    (
        "opd",
        {"router": {"kind": "certificate", "fallback": "mask"}},
        "opd",
        {"router": {"kind": "certificate", "fallback": "interp", "beta": 0.0}},
    ),
    (
        "opd",
        {"router": {"kind": "calibrated", "w_agree": 1, "w_neutral": 1, "w_conflict": 0.3}},
        "opd",
        {"router": {"kind": "certificate", "beta": 0.3}},
    ),
    (
        "topk_opd",
        {"router": {"kind": "calibrated", "w_agree": 1, "w_neutral": 1, "w_conflict": 0.3}},
        "topk_opd",
        {"router": {"kind": "certificate", "beta": 0.3}},
    ),
]  # fmt: skip


def changed(preset, name, blocks):
    plain = {key: value for key, value in blocks.items() if isinstance(value, dict)}
    found = preset(name, **plain)
    return found if len(plain) == len(blocks) else found.model_copy(update={"stages": ()})


@pytest.mark.parametrize(("name", "neutral", "other", "to"), REDUCTIONS)
def test_neutral_settings_are_the_simpler_preset_bit_for_bit(sample, preset, name, neutral, other, to):
    data = sample(7, off_policy=0.2, sigma_N=torch.tensor([1.0, -1.0, 0.0])[torch.arange(12) // 4])
    one, two = changed(preset, name, neutral), changed(preset, other, to)
    assert torch.equal(data.loss(one).loss, data.loss(two).loss)
    assert torch.equal(data.grad(one), data.grad(two))


def test_plain_distillation_reads_no_reference(preset):
    assert resolve_objective("exopd").needs_reference
    assert not preset("exopd", reference={"extrapolation": 1.0}).needs_reference


@pytest.mark.parametrize("tail", ["bucket", "none", "sampled"])
def test_top_k_at_the_whole_vocabulary_is_the_full_divergence(sample, preset, tail):
    data = sample(k=9)
    whole = preset("topk_opd", divergence={"kind": "full_rkl"})
    topk = preset("topk_opd", divergence={"tail": tail})
    assert_close(data.loss(topk).loss, data.loss(whole).loss, atol=1e-5, rtol=1e-5)
    assert_close(data.grad(topk), data.grad(whole), atol=1e-6, rtol=1e-4)


def test_a_verifier_alone_is_grpo_whatever_the_teacher_says(sample, preset):
    data = sample(off_policy=0.2)
    sod = preset("sod", divergence={"coef": 0.0})
    grpo = preset("grpo", stabiliser={"tis_cap": None})
    assert_close(data.grad(sod), data.grad(grpo))


# --- AOPD ------------------------------------------------------------------------------------------------------------


def with_margin(data, margin):
    logprobs = data.streams.logprobs_N.detach() + margin
    data.streams = replace(data.streams, batch=replace(data.streams.batch, teacher_logprobs_N=logprobs))
    return data


def test_asymmetric_is_plain_where_the_teacher_likes_the_token_more(sample, preset):
    data = with_margin(sample(), 0.7)
    assert torch.equal(data.grad(preset("aopd")), data.grad(preset("opd")))


@pytest.mark.parametrize("margin", [-0.7, 0.0])
def test_asymmetric_is_forward_kl_elsewhere_and_at_zero(sample, preset, margin):
    data = with_margin(sample(k=9), margin)
    grad = data.grad(preset("aopd"))
    expected = (data.logits_NV.softmax(-1) - data.teacher_NV.exp()).detach() / 12
    assert_close(grad, expected, atol=1e-6, rtol=1e-4)
    assert grad.abs().max() > 0


# --- SG-OPD ----------------------------------------------------------------------------------------------------------

NO_PHI = {"phi": "off", "phi_scale": 5.0}


def gate(preset, **router):
    return preset("sg_opd", anchor={"kind": "none"}, stabiliser=NO_PHI, router=router)


def test_masked_conflicts_have_no_gradient_and_boosted_consensus_has_the_extrapolated_one(sample, preset):
    data = sample(11)
    batch = data.streams.batch
    delta = batch.teacher_logprobs_N - data.streams.logprobs_N.detach()
    conflict = batch.advantage_N * delta < 0
    grad = data.grad(gate(preset, fallback="mask"))
    boosted = data.grad(preset("exopd", reference={"extrapolation": 1.8}))
    assert conflict.any() and (~conflict).any()
    assert grad[conflict].abs().max() == 0
    assert_close(grad[~conflict], boosted[~conflict])


@pytest.mark.parametrize("fallback", ["interp", "mask", "preserve", "grpo"])
def test_fallbacks_on_conflict(sample, preset, fallback):
    data = sample(11)
    routed = teacher_guidance(data.streams, gate(preset, fallback=fallback)).routed
    batch = data.streams.batch
    delta = (batch.teacher_logprobs_N - data.streams.logprobs_N).detach()
    expected = {"interp": delta, "mask": 0 * delta, "preserve": delta, "grpo": batch.advantage_N}[fallback]
    conflict = routed.agreement_N < 0
    assert_close(routed.advantage_N[conflict], expected[conflict])


def test_flipping_the_advantage_swaps_consensus_and_conflict(sample, preset):
    data, turned = sample(12), sample(12)
    batch = turned.streams.batch
    turned.streams = replace(turned.streams, batch=replace(batch, advantage_N=-batch.advantage_N))
    one, two = (teacher_guidance(x.streams, preset("sg_opd")).routed.agreement_N for x in (data, turned))
    assert_close(one, -two)


@pytest.mark.parametrize("zero", ["opd", "conflict"])
def test_a_group_of_equal_rewards_is_plain_distillation(sample, preset, zero):
    data = sample(advantage_N=torch.zeros(12))
    assert_close(data.grad(gate(preset, gate_zero=zero)), data.grad(preset("opd")))


def test_zero_can_count_as_consensus(sample, preset):
    data = sample(advantage_N=torch.zeros(12))
    boosted = preset("exopd", reference={"extrapolation": 1.8})
    assert_close(data.grad(gate(preset, gate_zero="consensus")), data.grad(boosted))


@pytest.mark.parametrize("mode", [{"phi": "inv_abs", "phi_scale": 0.5}, {"phi": "chord"}], ids=lambda x: x["phi"])
def test_phi_has_mean_one_and_leaves_the_gate_alone(sample, preset, mode):
    data = sample(13)
    phi = preset("sg_opd", stabiliser=mode)
    found, plain = teacher_guidance(data.streams, phi), teacher_guidance(data.streams, gate(preset))
    assert found.weight_N.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert found.weight_N.std() > 0
    assert torch.equal(found.routed.agreement_N, plain.routed.agreement_N)


def test_certificates_can_sign_where_the_advantage_cannot(sample, preset):
    data = sample(14, advantage_N=torch.zeros(12), sigma_N=torch.where(torch.arange(12) % 2 == 0, 1.0, -1.0))
    by_step = gate(preset, kind="certificate", extrapolation=1.8, fallback="mask")
    agreement = teacher_guidance(data.streams, by_step).routed.agreement_N
    assert (agreement > 0).any() and (agreement < 0).any()
    assert (teacher_guidance(data.streams, gate(preset)).routed.agreement_N == 0).all()


# --- others ----------------------------------------------------------------------------------------------------------


def test_success_gated_guidance_acts_on_passed_episodes_only(sample, preset):
    sigma = torch.tensor([1.0, -1.0, 0.0])[torch.repeat_interleave(torch.arange(3), torch.tensor([4, 3, 5]))]
    data = sample(15, sigma_N=sigma)
    gated = data.grad(preset("opd", router={"kind": "outcome"}))
    assert gated[sigma <= 0].abs().max() == 0
    assert_close(gated[sigma > 0], data.grad(preset("opd"))[sigma > 0])


def test_the_entropy_mask_takes_tokens_out_of_the_teacher_term(sample, preset):
    data = sample(16)
    grad = data.grad(preset("topk_opd", masks={"entropy_top_ratio": 0.4}))
    kept = grad.abs().sum(-1) > 0
    assert [int(kept[data.streams.batch.row_N == row].sum()) for row in range(3)] == [2, 2, 2]


def test_anchors_follow_their_schedule(sample, preset):
    data = sample(17)
    objective = preset("sg_opd")
    early, late = (compute_loss(replace(data.streams, progress=p), objective) for p in (0.0, 0.5))
    assert_close(early.parts["loss/anchor"], -0.1 * data.streams.logprobs_N.detach().mean())
    assert late.parts["loss/anchor"] == 0


def test_the_warm_up_has_the_forward_kls_gradient(sample):
    data = sample(k=9)
    warm_up = resolve_objective("sparse_dense").at(0.0)
    expected = (data.logits_NV.softmax(-1) - data.teacher_NV.exp()).detach() / 12
    assert_close(data.grad(warm_up), expected, atol=1e-6, rtol=1e-4)


def test_stages_take_their_turns():
    objective = resolve_objective("sparse_dense")
    found = [objective.at(p).divergence.kind + "/" + objective.at(p).source.kind for p in (0, 0.19, 0.2, 0.79, 0.8, 1)]
    assert found == ["none/teacher"] * 2 + ["sampled_pg/student"] * 2 + ["none/student"] * 2


def test_signals_by_token_class_and_support(sample, preset):
    found = sample(18).loss(preset("verifier_calibrated")).sums
    assert {"distill/teacher_mass", "distill/student_mass", "distill/agree/in_call", "distill/agree/outside"} <= set(
        found
    )
    inside, outside, both = (found[f"distill/agree{x}"][:, 1].sum() for x in ("/in_call", "/outside", ""))
    assert inside + outside == both
    assert 0 < found["distill/teacher_mass"][0, 0] / 12 <= 1
    assert "student/kl_to_start" in sample(18).loss(preset("exopd")).sums
    assert "distill/sign_flips" in sample(18).loss(preset("sg_opd")).sums


# --- a tabular policy ------------------------------------------------------------------------------------------------

TEACHER, REFERENCE = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.5, 0.3, 0.2])


def converged(sample, objective: ObjectiveConfig, steps: int = 250, rate: float = 1.0, k: int = 3) -> torch.Tensor:
    """The policy over three tokens after exact expected-gradient descent, started at the reference."""
    logits = REFERENCE.log().clone()
    teacher = TEACHER.log().expand(3, 3)
    for _ in range(steps):
        policy = logits.softmax(-1)
        data = sample(
            sizes=(3,), vocab=3, k=k, teacher_logits_NV=teacher, student_logits_NV=logits.expand(3, 3),
            target_N=torch.arange(3), ref_logprobs_N=REFERENCE.log(), rollout_logprobs_N=policy.log(),
            teacher_scale_N=policy,
        )  # fmt: skip
        logits = logits - rate * data.grad(objective).sum(0)
    return logits.softmax(-1)


def test_distillation_ends_at_the_teacher(sample, preset):
    assert_close(converged(sample, preset("opd")), TEACHER, atol=1e-3, rtol=0)


def test_extrapolation_ends_at_its_closed_form(sample, preset):
    optimum = REFERENCE**-0.5 * TEACHER**1.5
    found = converged(sample, preset("exopd", reference={"extrapolation": 1.5}))
    assert_close(found, optimum / optimum.sum(), atol=1e-3, rtol=0)


def test_top_k_ends_at_the_teachers_ratios_inside_the_support(sample, preset):
    found = converged(sample, preset("topk_opd", divergence={"top_k": 2}), k=2)
    assert found[1] / found[2] == pytest.approx(5 / 3, abs=1e-2)
    assert abs(found[0] - REFERENCE[0]) < 0.05
    support = torch.tensor([[1, 2]])
    assert truncated(found.log()[support], TEACHER.log()[support]).item() < 1e-5
