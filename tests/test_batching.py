"""Scored episodes into tensors: who takes part, with what weight, and which faults are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from agentopd.batching import build_batch, split_micro_batches
from agentopd.config.load import resolve_objective
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.presets import PRESETS
from agentopd.contracts import Evidence, ScoredEpisode
from agentopd.errors import ConfigError, EnvironmentFault, TeacherError
from agentopd.types import Episode, StepCertificate, StopReason, Turn, Verdict, VerdictStatus
from tests.token_classes import token_classifier

END, OPEN, CLOSE, PAD = 2, 5, 6, 0
CLASSES = token_classifier({END}, OPEN, CLOSE)


def objective(name="verifier_calibrated", **blocks):
    base = {**PRESETS[name], "preset": name}
    return ObjectiveConfig.model_validate({**base, **{k: {**base.get(k, {}), **v} for k, v in blocks.items()}})


def evidence(n, k=3, **fields):
    rng = np.random.default_rng(n)
    values = {
        "teacher_logprobs": rng.uniform(-3, -1, n).astype(np.float32),
        "topk_ids": np.tile(np.arange(10, 10 + k), (n, 1)),
        "topk_logprobs": np.tile(-1.0 - np.arange(k), (n, 1)).astype(np.float32),
        "ref_logprobs": rng.uniform(-3, -1, n).astype(np.float32),
    }
    return Evidence("toy", **{**values, **fields})


def item(outcome=1.0, turns=((11, 12, END), (OPEN, 13, CLOSE, END)), skill="a", group="g", stop="completed", **fields):
    made = tuple(
        Turn(token_ids=t, rollout_logprobs=tuple(-float(i + 1) for i in range(len(t))), observation_ids=(7, 8))
        for t in turns
    )
    episode = Episode(
        id=fields.pop("id", "e"), task_id="t", task_hash=fields.pop("task_hash", "h"), env="toy", split="train",
        skill=skill, group_id=group, prompt_ids=fields.pop("prompt_ids", (3, 4)), turns=made,
        stop_reason=StopReason(stop),
    )  # fmt: skip
    certificates, anchor = fields.pop("certificates", ()), fields.pop("anchor", False)
    if outcome is None:
        verdict = Verdict.unjudged(VerdictStatus.INFRA_ERROR, "gone")
    else:
        status = VerdictStatus.OK if outcome == 1 else VerdictStatus.WRONG
        verdict = Verdict(outcome=outcome, status=status, reward=outcome, certificates=certificates)
    return ScoredEpisode(episode, verdict, fields.pop("evidence", evidence(episode.num_sampled)), anchor=anchor)


def build(items, config=None, shares=None, **kwargs):
    return build_batch(items, config or objective(), shares or {"a": 1.0}, CLASSES, PAD, **kwargs)


def test_sampled_tokens_only_and_each_with_its_own_streams():
    batch = build([item()])
    assert batch.input_ids_BT.tolist() == [[3, 4, 11, 12, END, 7, 8, OPEN, 13, CLOSE, END]]
    assert batch.position_N.tolist() == [2, 3, 4, 7, 8, 9, 10]
    assert batch.target_N.tolist() == [11, 12, END, OPEN, 13, CLOSE, END]
    assert batch.turn_N.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.rollout_logprobs_N.tolist() == [-1, -2, -3, -1, -2, -3, -4]
    assert batch.special_N.tolist() == [False, False, True, False, False, False, True]
    assert batch.span_N.tolist() == [False, False, False, True, True, True, False]


def test_special_tokens_leave_the_teacher_term_on_every_turn_and_stay_in_the_verifiers():
    batch = build([item(), item(0.0)])
    assert torch.equal(batch.teacher_scale_N == 0, batch.special_N)
    assert_close(batch.teacher_scale_N[0], torch.tensor(1 / 10))
    assert_close(batch.verifier_scale_N, torch.full((14,), 1 / 14))
    everything = build([item()], objective(masks={"special_tokens": False}))
    assert_close(everything.teacher_scale_N, torch.full((7,), 1 / 7))


def test_shares_are_mixed_after_each_skill_is_averaged():
    long = item(skill="b", group="h", turns=(tuple(range(11, 51)),))
    batch = build([item(), item(0.0), long], shares={"a": 0.75, "b": 0.25, "absent": 0.5})
    totals = {
        name: float(batch.teacher_scale_N[batch.skill_N == batch.skills.index(name)].sum()) for name in batch.skills
    }
    assert totals == pytest.approx({"a": 0.75, "absent": 0.0, "b": 0.25})


def test_denominators_are_global():
    alone = build([item()])
    doubled = build([item()], all_reduce=lambda x: 2 * x)
    assert_close(doubled.teacher_scale_N, alone.teacher_scale_N / 2)
    assert doubled.metrics["batch/episodes"] == 2


def test_advantages_stay_inside_a_group():
    batch = build([item(1.0), item(0.0), item(1.0, group="h"), item(1.0, group="h")])
    firsts = [float(batch.advantage_N[batch.row_N == row][0]) for row in range(4)]
    half = 0.5 / (0.5**0.5 + 1e-6)
    assert firsts == pytest.approx([half, -half, 0, 0])
    assert firsts[2:] == [0, 0]


def test_episodes_without_a_group_are_not_lumped_together():
    batch = build([item(1.0, group="", id="x"), item(0.0, group="", id="y")])
    assert batch.advantage_N.abs().max() == 0


def test_unknown_verdict_is_neutral_and_not_in_the_verifiers_term():
    batch = build([item(1.0), item(0.0), item(None)])
    unknown = batch.row_N == 2
    assert batch.sigma_N[unknown].abs().max() == 0
    assert batch.verifier_scale_N[unknown].abs().max() == 0
    assert batch.advantage_N[unknown].abs().max() == 0
    assert batch.teacher_scale_N[unknown].max() > 0
    assert_close(batch.verifier_scale_N[~unknown], torch.full((14,), 1 / 14))
    assert batch.metrics["batch/unjudged"] == 1


def test_broken_environments_never_train_and_never_move_the_group():
    with_fault = build([item(1.0), item(0.0), item(0.0, stop="env_error")])
    without = build([item(1.0), item(0.0)])
    assert with_fault.num_rows == 2
    assert torch.equal(with_fault.advantage_N, without.advantage_N)
    assert with_fault.metrics["batch/env_error"] == 1


@pytest.mark.parametrize("preset", ["verifier_calibrated", "grpo"])
def test_a_step_whose_environments_all_broke_names_the_fault(preset):
    broken = item(0.0, stop="env_error")
    broken = replace(broken, episode=broken.episode.model_copy(update={"error": "reset: no such host"}))
    with pytest.raises(EnvironmentFault, match="every environment of this step broke: reset: no such host"):
        build([broken, broken], objective(preset))
    assert build([broken, item()], objective(preset)).num_rows == 1


def test_an_episode_the_teacher_failed_on_is_left_out_only_where_a_teacher_is_needed():
    items = [item(1.0), item(0.0, evidence=None)]
    assert build(items).metrics["batch/no_evidence"] == 1
    assert build(items).num_rows == 1
    assert build(items, objective("grpo")).num_rows == 2


def test_no_evidence_at_all_is_a_fault():
    with pytest.raises(TeacherError, match="no token"):
        build([item(evidence=None)])


def test_nothing_sampled_is_counted_and_left_out():
    assert build([item(), item(turns=())]).metrics["batch/empty"] == 1


@pytest.mark.parametrize("policy", ["keep", "drop", "mask_tail"])
def test_truncated_episodes_follow_their_policy(policy):
    cut = item(0.0, turns=(tuple(range(11, 31)),), stop="max_tokens")
    batch = build([item(), cut], objective(masks={"truncated": policy, "special_tokens": False}))
    assert batch.num_rows == (1 if policy == "drop" else 2)
    assert batch.metrics["batch/truncated_dropped"] == (policy == "drop")
    if policy != "drop":
        hidden = (batch.teacher_scale_N[batch.row_N == 1] == 0).tolist()
        assert hidden == [False] * 18 + [policy == "mask_tail"] * 2
        assert (batch.verifier_scale_N > 0).all()
        assert batch.truncated_B.tolist() == [False, True]


def test_a_batch_that_the_masks_emptied_is_no_fault_of_the_teachers():
    dropping = {"truncated": "drop"}
    cut = [item(1.0, stop="max_tokens"), item(0.0, stop="max_tokens", evidence=None), item(turns=(), evidence=None)]
    batch = build(cut, objective(masks=dropping))
    assert batch.num_rows == 0
    assert [batch.metrics[f"batch/{name}"] for name in ("truncated_dropped", "empty", "no_evidence")] == [2, 1, 0]
    gold = build([*cut, item(anchor=True, evidence=None)], objective("stable_opd", masks=dropping))
    assert gold.num_rows == 1 and (gold.anchor_scale_N > 0).all()
    with pytest.raises(TeacherError, match="no token"):
        build([*cut, item(evidence=None)], objective(masks=dropping))


def test_without_certificates_every_token_has_the_episodes_sign():
    assert build([item(0.25)]).sigma_N.tolist() == [-0.5] * 7


def test_a_certificate_signs_its_span_of_its_turn():
    good = StepCertificate(turn=1, sign=1, kind="case", start=1, end=3)
    batch = build([item(0.0, certificates=(good,))])
    assert batch.sigma_N.tolist() == [-1, -1, -1, -1, 1, 1, -1]


def test_certificates_that_agree_with_the_episode_change_nothing():
    same = tuple(StepCertificate(turn=turn, sign=-1, kind="x") for turn in range(2))
    assert torch.equal(build([item(0.0, certificates=same)]).sigma_N, build([item(0.0)]).sigma_N)


def test_good_steps_of_a_failed_episode_are_those_of_a_passed_one():
    good = StepCertificate(turn=0, sign=1, kind="x")
    failed, passed = build([item(0.0, certificates=(good,))]), build([item(1.0)])
    first = failed.turn_N == 0
    assert torch.equal(failed.sigma_N[first], passed.sigma_N[first])
    assert (failed.sigma_N[~first] == -1).all()


def test_certificates_can_be_turned_off():
    off = objective(router={"use_certificates": False})
    good = StepCertificate(turn=0, sign=1, kind="x")
    assert (build([item(0.0, certificates=(good,))], off).sigma_N == -1).all()


def test_not_finite_on_a_supervised_token_is_a_fault():
    bad = evidence(7)
    bad.teacher_logprobs[3] = -np.inf
    with pytest.raises(TeacherError, match="sampled token 3 of 7"):
        build([item(evidence=bad)])


def test_an_episode_that_cannot_be_trained_on_leaves_the_others_as_they_are():
    bad, unlikely = (
        evidence(7),
        item(0.0).episode.turns[0].model_copy(update={"rollout_logprobs": (-1.0, np.nan, -1.0)}),
    )
    bad.teacher_logprobs[3] = np.inf
    sampled = replace(item(0.0), episode=item(0.0).episode.model_copy(update={"turns": (unlikely,)}))
    batch = build([item(1.0, evidence=bad), item(1.0), sampled, item(0.0, prompt_ids=()), item(0.0)])
    assert batch.source_B.tolist() == [1, 4]
    assert {index: reason.split(":")[-1] for index, reason in batch.quarantined.items()} == {
        0: " log-prob inf at sampled token 3 of 7",
        2: "episode 'e' was sampled with a log-prob that is not finite",
        3: " its first sampled token has no log-prob",
    }
    assert (batch.metrics["batch/quarantined"], batch.metrics["batch/rows"]) == (3, 2)
    assert torch.equal(batch.teacher_scale_N, build([item(1.0), item(0.0)]).teacher_scale_N)


def test_not_finite_on_a_masked_token_is_harmless():
    bad = evidence(7)
    for stream in (bad.teacher_logprobs, bad.topk_logprobs):
        stream[2] = np.nan
        stream[6] = -np.inf
    batch = build([item(evidence=bad)])
    assert torch.isfinite(batch.teacher_logprobs_N).all()
    assert torch.equal(batch.supervised_N, ~batch.special_N)
    assert not batch.teacher_topk_logprobs_NK.isnan().any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_unusable_topk_is_a_fault(value):
    bad = evidence(7)
    bad.topk_logprobs[1, 0] = value
    with pytest.raises(TeacherError, match="top-K"):
        build([item(evidence=bad)])


def test_evidence_of_the_wrong_length_is_a_fault():
    with pytest.raises(TeacherError, match="7 sampled tokens"):
        build([item(evidence=evidence(6))])


def test_missing_topk_or_reference_is_a_fault():
    with pytest.raises(TeacherError, match="top-K evidence is missing"):
        build([item(evidence=evidence(7, topk_ids=None, topk_logprobs=None))])
    with pytest.raises(TeacherError, match="kl_coef"):
        build([item(evidence=evidence(7, ref_logprobs=None))], objective(reference={"kl_coef": 0.1}))


def test_teachers_may_differ_in_k():
    batch = build([item(evidence=evidence(7, k=2)), item(evidence=evidence(7, k=4))])
    assert batch.teacher_topk_ids_NK.shape == (14, 4)
    assert (batch.teacher_topk_logprobs_NK[:7, 2:] == -torch.inf).all()


def test_gold_trajectories_are_anchored():
    batch = build([item(evidence=None)], objective("sft"))
    assert_close(batch.anchor_scale_N, torch.full((7,), 1 / 7))
    assert batch.teacher_scale_N.abs().max() == 0


def test_a_skill_without_a_share_is_named():
    with pytest.raises(ConfigError, match="'a'"):
        build([item()], shares={"b": 1.0})


def test_an_empty_rank_still_takes_part():
    other = []
    build([item()], all_reduce=lambda x: other.append(x) or x)
    batch = build([], all_reduce=lambda x: x + other.pop(0))
    assert batch.metrics["batch/rows"] == 1
    assert (batch.num_rows, batch.num_tokens) == (0, 0)
    assert split_micro_batches(batch, 64) == []


def test_micro_batches_hold_every_row_once_with_its_streams():
    items = [item(turns=(tuple(range(11, 11 + n)),), id=str(n)) for n in (9, 2, 5, 3)]
    batch = build(items)
    cuts = split_micro_batches(batch, 16)
    assert sum(cut.num_rows for cut in cuts) == 4
    assert all(cut.input_ids_BT.numel() <= 16 for cut in cuts)
    assert all(int(cut.lengths_B.max()) == cut.input_ids_BT.shape[1] for cut in cuts)
    for cut in cuts:
        assert torch.equal(cut.input_ids_BT[cut.row_N, cut.position_N], cut.target_N)
    assert_close(sum(cut.teacher_scale_N.sum() for cut in cuts), batch.teacher_scale_N.sum())


def test_a_prompt_is_required():
    with pytest.raises(TeacherError, match="no prompt"):
        build([item(prompt_ids=())])


def test_order_of_episodes_only_permutes_rows():
    items = [item(1.0), item(0.0, turns=((11, 12),)), item(None)]
    straight, turned = build(items), build(items[::-1])
    for row in range(3):
        a, b = straight.select_rows([row]), turned.select_rows([2 - row])
        assert torch.equal(a.advantage_N, b.advantage_N)
        assert torch.equal(a.teacher_scale_N, b.teacher_scale_N)
        assert torch.equal(a.input_ids_BT, b.input_ids_BT)


def test_replay_flag_does_not_change_the_tensors():
    plain, replayed = build([item()]), build([replace(item(), replay=True)])
    assert torch.equal(plain.teacher_scale_N, replayed.teacher_scale_N)


def test_rows_beside_the_students_take_part_in_the_anchor_alone():
    gold = item(evidence=None, anchor=True, id="gold")
    config = objective("stable_opd")
    batch = build([item(1.0), item(0.0), gold], config)
    beside = batch.row_N == 2
    assert torch.equal(beside, ~batch.policy_N)
    for name in ("teacher_scale_N", "verifier_scale_N", "reference_scale_N"):
        assert getattr(batch, name)[beside].abs().max() == 0
    assert_close(batch.anchor_scale_N, torch.where(beside, 1 / 7, 0.0))
    assert batch.metrics["batch/anchors"] == 1
    alone = build([item(1.0), item(0.0)], config)
    assert torch.equal(batch.teacher_scale_N[~beside], alone.teacher_scale_N)


def test_gold_of_one_unsolved_prompt_weighs_as_one_prompt():
    gold = item(evidence=None, anchor=True, task_hash="hard")
    students = [item(1.0, task_hash="easy"), item(0.0, task_hash="hard"), item(0.0, task_hash="hard")]
    students += [item(None, task_hash="nobody knows")]
    batch = build(
        [*students, gold], objective("verifier_calibrated", anchor={"kind": "gold_nll", "prompts": "unsolved"})
    )
    beside = batch.row_N == 4
    assert_close(batch.anchor_scale_N, torch.where(beside, 0.5 / 7, 0.0))
    whole = build([*students, gold], objective("verifier_calibrated", anchor={"kind": "gold_nll"}))
    assert_close(whole.anchor_scale_N, torch.where(beside, 1 / 7, 0.0))
    # A task drawn twice is two prompts, each with its gold.
    again, more = item(0.0, group="second", task_hash="hard"), [gold, gold]
    twice = build(
        [*students, again, *more], objective("verifier_calibrated", anchor={"kind": "gold_nll", "prompts": "unsolved"})
    )
    assert_close(twice.anchor_scale_N, torch.where(twice.row_N >= 5, 2 / 3 / 14, 0.0))


def test_rows_beside_the_students_do_not_move_the_group():
    config = objective("sg_opd")
    with_gold = build([item(1.0), item(0.0), item(1.0, evidence=None, anchor=True)], config)
    assert torch.equal(with_gold.advantage_N[:14], build([item(1.0), item(0.0)], config).advantage_N)
    assert with_gold.advantage_N[14:].abs().max() == 0


def test_a_forward_kl_anchor_reads_the_teachers_top_k():
    warm_up = resolve_objective("sparse_dense").at(0.0)
    batch = build([item(1.0)], warm_up)
    assert torch.isfinite(batch.teacher_topk_logprobs_NK).all()
    assert batch.teacher_scale_N.abs().max() == 0 and batch.anchor_scale_N.min() > 0
    assert build([item(1.0, evidence=None), item(1.0)], warm_up).metrics["batch/no_evidence"] == 1


def test_candidates_replace_the_support_and_are_compared_with_the_teachers():
    chosen = np.tile(np.array([10, 90, 91]), (7, 1))
    given = {"candidate_ids": chosen, "candidate_logprobs": np.full((7, 3), -2.0, np.float32)}
    batch = build([item(evidence=evidence(7, **given))], objective("rethink_opd"))
    assert batch.teacher_topk_ids_NK.tolist() == chosen.tolist()
    assert_close(batch.overlap_N, torch.full((7,), 1 / 3))
    union = objective("rethink_opd", divergence={"support": "union"})
    found = build([item(evidence=evidence(7, **given))], union)
    assert (found.teacher_topk_logprobs_NK > -torch.inf).sum(-1).tolist() == [5] * 7
    with pytest.raises(TeacherError, match="missing"):
        build([item()], objective("rethink_opd"))


def test_the_suffix_is_left_to_the_student_where_the_margin_falls():
    turns = tuple((11, 12, 13) for _ in range(8))
    top = np.repeat([3, 3.1, 2.9, 3, 1, 1.1, 0.9, 1], 3)
    logprobs = np.stack([np.full(24, -1.0), -1.0 - top], 1).astype(np.float32)
    given = {"candidate_ids": np.zeros((24, 2), np.int64), "candidate_logprobs": logprobs}
    batch = build([item(turns=turns, evidence=evidence(24, **given))], objective("prefix_opd"))
    assert (batch.teacher_scale_N > 0).tolist() == [True] * 12 + [False] * 12
    assert batch.metrics["batch/masked_suffix"] == 12


def test_candidates_and_the_suffix_mask_each_read_their_own_k():
    def given(k):
        chosen = np.tile(np.arange(10, 10 + k), (24, 1))
        second = np.repeat([3, 3.1, 2.9, 3, 1, 1.1, 0.9, 1], 3)[:, None]
        logprobs = np.concatenate([np.full((24, 1), -1.0), -1 - second, np.full((24, 2), -1.5)], 1)[:, :k]
        return {"candidate_ids": chosen, "candidate_logprobs": logprobs.astype(np.float32)}

    turns = tuple((11, 12, 13) for _ in range(8))
    wide = objective("rethink_opd", divergence={"top_k": 4}, masks={"suffix": "bic", "suffix_top_k": 2})
    assert wide.student_top_k == 4
    batch = build([item(turns=turns, evidence=evidence(24, k=4, **given(4)))], wide)
    assert batch.metrics["batch/masked_suffix"] == 12
    wide = objective("rethink_opd", divergence={"top_k": 2}, masks={"suffix": "bic", "suffix_top_k": 4})
    batch = build([item(turns=turns, evidence=evidence(24, k=2, **given(4)))], wide)
    assert batch.teacher_topk_ids_NK.shape == (24, 2)


def test_a_looping_tail_can_be_hidden_from_the_teacher():
    looping = item(turns=((9, 8, *[11, 12] * 30),))
    batch = build([looping], objective("opd", masks={"repetition": "mask"}))
    assert (batch.teacher_scale_N > 0).tolist() == [True] * 4 + [False] * 58
    assert batch.metrics["batch/masked_repetition"] == 58
    assert build([looping], objective("opd")).metrics["batch/masked_repetition"] == 0


def test_the_entropy_mask_keeps_the_denominators():
    config = objective("topk_opd", masks={"entropy_top_ratio": 0.5})
    batch = build([item(), item(turns=((11, 12),))], config)
    assert_close(batch.teacher_scale_N, torch.full((9,), 1 / (4 + 1)))


def test_whole_distributions_need_hidden_states():
    with pytest.raises(TeacherError, match="hidden states"):
        build([item()], objective("gkd"))
    batch = build([item(evidence=evidence(7, hidden=np.ones((7, 5), np.float32)))], objective("gkd"))
    assert batch.teacher_hidden_NG.shape == (7, 5) and batch.teachers == ("toy",)


def test_aligned_evidence_is_compared_at_the_first_token_of_a_segment():
    segments = np.array([0, 0, -1, 1, 2, 2, -1])
    batch = build([item(evidence=evidence(7, segments=segments))], objective("simct_opd"))
    assert (batch.teacher_scale_N > 0).tolist() == [True, False, False, True, True, False, False]
    assert batch.segment_N.tolist() == segments.tolist()


def test_an_absolute_advantage_needs_no_group():
    config = ObjectiveConfig.model_validate({**PRESETS["grpo"], "verifier": {"kind": "absolute"}})
    batch = build([item(1.0), item(0.0, group="h"), item(None, group="i")], config)
    assert batch.advantage_N.tolist() == [1.0] * 7 + [-1.0] * 7 + [0.0] * 7
    assert (batch.verifier_scale_N[14:] == 0).all()
