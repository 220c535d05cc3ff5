"""The DeepSpeed learner against plain torch, on a tiny model in this process."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from agentopd.config.run import LearnerConfig
from agentopd.errors import ConfigError, InfraError
from agentopd.learner.body import hidden_states
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.learner.head import output_head
from agentopd.objective.compose import compute_loss
from agentopd.objective.streams import Streams
from tests.plain_head import plain_logprobs


@pytest.fixture
def learner(tiny_model, objective):
    """A factory of learners, closed at the end of the test."""
    made = []

    def make(dtype=torch.float32, preset="verifier_calibrated", seed=0, **settings):
        config = LearnerConfig(**{"lr": 1e-2, "warmup_steps": 0, "micro_batch_tokens": 4096, **settings})
        made.append(DeepSpeedLearner(tiny_model(seed, dtype), config, objective(preset), total_steps=10))
        return made[-1]

    yield make
    for one in made:
        one.close()


def weights(learner):
    return {name: p.detach().float().clone() for name, p in learner.module.named_parameters()}


def plain_steps(model, batches, objective, lr=1e-2):
    """The same update in plain torch: one micro-batch, fp32 masters, clipping, AdamW."""
    params = list(model.parameters())
    masters = [p.detach().float().clone() for p in params]
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    for batch in batches:
        hidden = hidden_states(model, batch.input_ids_BT, batch.row_N, batch.position_N)
        scored = plain_logprobs(hidden, output_head(model), batch.target_N, batch.teacher_topk_ids_NK)
        compute_loss(Streams(batch, *scored), objective).loss.backward()
        for master, p in zip(masters, params, strict=True):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, params, strict=True):
                p.copy_(master)
    return model


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_plain_torch(learner, make_batch, tiny_model, objective, dtype, stage):
    batches = [make_batch(seed=seed) for seed in range(3)]
    trained = learner(dtype, zero_stage=stage)
    found = [trained.step(batch) for batch in batches]
    plain = plain_steps(tiny_model(dtype=dtype), batches, objective())
    pairs = zip(trained.module.parameters(), plain.parameters(), strict=True)
    gap = torch.cat([(a.detach().float() - b.detach().float()).abs().flatten() for a, b in pairs])
    if dtype == torch.float32:
        assert gap.max() < 1e-5
    else:  # gradients agree to bf16 rounding, and Adam gives a weight without gradient a step by the rounding's sign
        assert (gap > 2**-7).float().mean() < 1e-3
        assert gap.mean() < 2e-4
    assert all(metrics["learner/grad_norm"] > 0 for metrics in found)


@pytest.mark.parametrize("stage", [0, 2])
def test_micro_batches_give_the_same_update(learner, make_batch, stage):
    batch = make_batch()
    whole, cut = learner(zero_stage=stage), learner(zero_stage=stage, micro_batch_tokens=128)
    small = cut.config.model_copy(update={"micro_batch_tokens": 40})
    cut.config = small
    first, second = whole.step(batch), cut.step(batch)
    assert len(cut._micro_batches(batch)) > 2
    assert second == pytest.approx(first, rel=1e-4, abs=1e-6)
    for name, weight in weights(whole).items():
        assert_close(weights(cut)[name], weight, atol=2e-5, rtol=0)


def test_small_updates_reach_the_fp32_masters(learner, make_batch):
    """At this rate no bf16 weight can move in one step; forty steps must still add up."""
    trained, batch = learner(torch.bfloat16, lr=2e-6), make_batch()
    masters = trained._engine.optimizer.fp32_groups_flat_partition[0]
    before = masters.detach().clone()
    trained.step(batch)
    moved = (masters.detach() - before).abs()
    assert 0 < moved.max() < 1e-5
    assert (moved > 0).float().mean() > 0.5


def test_training_lowers_the_divergence(learner, make_batch):
    trained, batch = learner(preset="topk_opd"), make_batch()
    values = [trained.step(batch)["distill/reverse_kl"] for _ in range(8)]
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(("dtype", "stage"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 2)])
def test_resume_is_exact(learner, make_batch, tmp_path, dtype, stage):
    settings = {"schedule": "cosine", "zero_stage": stage}
    batches = [make_batch(seed=seed) for seed in range(4)]
    straight = learner(dtype, **settings)
    for batch in batches[:2]:
        straight.step(batch)
    straight.save(tmp_path)
    drawn = torch.rand(3)
    for batch in batches[2:]:
        last = straight.step(batch)
    resumed = learner(dtype, seed=1, **settings)
    resumed.load(tmp_path)
    assert torch.equal(torch.rand(3), drawn)
    for batch in batches[2:]:
        again = resumed.step(batch)
    assert again == last
    assert all(torch.equal(weights(resumed)[name], weight) for name, weight in weights(straight).items())


def test_loading_from_nowhere_is_a_user_error(learner, tmp_path):
    with pytest.raises(ConfigError, match="no learner state"):
        learner().load(tmp_path / "absent")


def test_export_is_readable_and_has_the_trained_weights(learner, make_batch, tmp_path):
    trained = learner(torch.bfloat16)
    trained.step(make_batch())
    trained.export(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["model.norm.weight"], trained.module.model.norm.weight)


def test_further_passes_are_off_policy_and_guarded(learner, make_batch):
    batch = make_batch()
    free = learner(epochs=3, max_epoch_kl=100.0).step(batch)
    guarded = learner(epochs=3, max_epoch_kl=1e-9).step(batch)
    assert (free["learner/passes"], guarded["learner/passes"]) == (3, 2)
    assert free["student/drift"] > guarded["student/drift"] > 0


def test_nothing_to_train_on_only_counts_as_a_step(learner, make_batch):
    trained = learner()
    before = weights(trained)
    empty = make_batch().select_rows([])
    assert trained.step(empty)["learner/skipped"] == 1
    assert all(torch.equal(weights(trained)[name], weight) for name, weight in before.items())
    assert trained.steps_done == 1  # schedule and stages go on


@pytest.mark.parametrize("settings", [{}, {"zero_stage": 2, "epochs": 2, "max_epoch_kl": 100.0}])
def test_rows_whose_loss_is_not_finite_are_left_out_of_the_update(learner, make_batch, settings):
    batch = make_batch()
    spoilt = torch.where((batch.row_N == 1) | (batch.row_N == 4), torch.nan, batch.advantage_N)
    one, two = learner(**settings), learner(**settings)
    found = one.step(replace(batch, advantage_N=spoilt, source_B=batch.source_B + 10))
    expected = two.step(batch.select_rows([0, 2, 3, 5]))
    assert one.poisoned == dict.fromkeys((11, 14), "its loss is nan")
    assert two.poisoned == {} and found["batch/quarantined"] == 2
    assert found["loss/total"] == pytest.approx(expected["loss/total"], rel=1e-5)
    for name, weight in weights(two).items():
        assert_close(weights(one)[name], weight, atol=1e-6, rtol=0)


def test_a_loss_that_is_not_finite_is_a_fault_and_leaves_the_weights(learner, make_batch):
    trained, batch = learner(), make_batch()
    before = weights(trained)
    with pytest.raises(InfraError, match="not finite"):
        trained.step(replace(batch, advantage_N=batch.advantage_N * torch.nan))
    assert all(torch.equal(weights(trained)[name], weight) for name, weight in before.items())


def test_what_is_inspected_is_what_the_step_uses_and_changes_nothing(learner, make_batch):
    one, batch = learner(), make_batch()
    before = weights(one)
    found = one.inspect(batch)
    assert_close(weights(one), before)
    metrics = one.step(batch)
    guidance = [teacher_term for _, teacher_term in found]
    weight_N, part_N = (torch.cat([getattr(g, name) for g in guidance]) for name in ("weight_N", "part_N"))
    assert metrics["distill/weight"] == pytest.approx(weight_N[part_N].mean().item(), rel=1e-5)
    logprobs_N = torch.cat([logprobs for logprobs, _ in found])
    assert metrics["student/nll"] == pytest.approx(-logprobs_N.mean().item(), rel=1e-5)


def test_metrics_name_the_skills(learner, make_batch):
    metrics = learner().step(make_batch())
    assert {"a/distill/reverse_kl", "b/distill/reverse_kl", "loss/total", "learner/lr", "batch/rows"} <= set(metrics)
    parts = metrics["loss/teacher"] + metrics["loss/policy_gradient"]
    assert metrics["loss/total"] == pytest.approx(parts)


def test_other_dtypes_are_refused(learner):
    with pytest.raises(ConfigError, match="float16"):
        learner(torch.float16)
