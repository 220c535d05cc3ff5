"""The fused head gives the loss and the gradients of plain autograd, whatever it is cut into and whatever is asked."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agentopd.config.load import resolve_objective
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.presets import PRESETS
from agentopd.errors import ConfigError
from agentopd.learner import passes, products
from agentopd.learner.fused_head import FusedHead, HeadStreams
from agentopd.learner.head import Head
from agentopd.objective.compose import compute_loss
from agentopd.objective.divergences import full_divergence, kernel
from agentopd.objective.gold import gold_divergence, rest_logprobs
from agentopd.objective.microbatches import select_tokens
from agentopd.objective.streams import PER_TOKEN, Batch, Streams
from tests.plain_head import plain_logprobs

H, G, V, K = 8, 6, 20, 3
SIZES = [2, 3, 1, 5]


def whole(kind, **masks):
    """An objective on whole distributions."""
    base = {"divergence": {"kind": kind}, "stabiliser": {"cap": None, "sequence_budget": None}}
    return ObjectiveConfig.model_validate({**base, "masks": masks})


WHOLE = {"whole forward": whole("full_fkl"), "whole with entropy": whole("jsd", entropy_top_ratio=0.5)}


def rows(seed=0, teachers=("x", "y"), k=K):
    """Four rows whose every stream is random; their teachers alternate."""
    g = torch.Generator().manual_seed(seed)
    row_N = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    segment_N, n = torch.cat([torch.arange(size) // 2 for size in SIZES]), len(row_N)

    def drawn(*shape):
        return torch.rand(*shape, generator=g)

    ids_NK = torch.stack([torch.randperm(V, generator=g)[:k] for _ in range(n)])
    streams = {
        name: drawn(n) for name in ("teacher_scale_N", "verifier_scale_N", "anchor_scale_N", "reference_scale_N")
    } | {name: -1 - 2 * drawn(n) for name in ("rollout_logprobs_N", "teacher_logprobs_N", "ref_logprobs_N")}
    return Batch(
        skills=("a",), input_ids_BT=torch.zeros(len(SIZES), 6, dtype=torch.int64), lengths_B=torch.tensor(SIZES) + 1,
        truncated_B=torch.zeros(len(SIZES), dtype=torch.bool), source_B=torch.arange(len(SIZES)),
        row_N=row_N, position_N=torch.ones(n, dtype=torch.int64),
        target_N=torch.randint(V, (n,), generator=g), turn_N=torch.zeros(n, dtype=torch.int64),
        skill_N=torch.zeros(n, dtype=torch.int64), teacher_topk_ids_NK=ids_NK,
        teacher_topk_logprobs_NK=torch.randn(n, V, generator=g).log_softmax(-1).gather(1, ids_NK),
        teacher_N=row_N % len(teachers), teachers=teachers, teacher_hidden_NG=torch.randn(n, G, generator=g),
        overlap_N=drawn(n), advantage_N=drawn(n) - 0.5, sigma_N=drawn(n) * 2 - 1, segment_N=segment_N,
        teacher_rest_N=-drawn(n),
        policy_N=torch.ones(n, dtype=torch.bool), special_N=drawn(n) < 0.2, span_N=drawn(n) < 0.5, **streams,
    )  # fmt: skip


def parameters(bias=False, dtype=torch.float32):
    """Hidden states, the student's head, and those of two teachers; one teacher's vocabulary is smaller."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(sum(SIZES), H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    offset = torch.randn(V, generator=g).to(dtype).requires_grad_() if bias else None
    teachers = {
        "x": Head(torch.randn(V, G, generator=g), None),
        "y": Head(torch.randn(V - 2, G - 1, generator=g), None),
    }
    return hidden, Head(weight, offset), teachers


def compared(logits, teacher, batch, objective):
    """The plain divergence of every position from one teacher."""
    other = batch.teacher_hidden_NG[:, : teacher.weight.shape[1]] @ teacher.weight.T
    if objective.alignment.kind != "gold":
        return full_divergence(logits, other, objective.divergence)
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    rest = rest_logprobs(log_p.gather(1, batch.target_N[:, None])[:, 0], batch.row_N, batch.segment_N)
    merged = log_p + rest[:, None], log_q + batch.teacher_rest_N[:, None]
    weight = objective.alignment.matched_weight
    return gold_divergence(*merged, teacher.student_ids, kernel(objective.divergence), weight)


def plain_streams(hidden, head, batch, objective, teachers) -> HeadStreams:
    """All logits at once, with autograd."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    entropy = torch.distributions.Categorical(logits=logits).entropy().detach()
    divergence = None
    if objective.needs_full_vocabulary:
        apart = [compared(logits, teachers[name], batch, objective) for name in batch.teachers]
        divergence = torch.where(batch.supervised_N, torch.stack(apart)[batch.teacher_N, torch.arange(len(logits))], 0)
    return HeadStreams(
        *plain_logprobs(hidden, head, batch.target_N, batch.teacher_topk_ids_NK),
        divergence,
        entropy if objective.needs_entropy else None,
    )


@pytest.mark.parametrize(("chunk", "block"), [(2, 7), (6, 4096), (1000, 7)])
@pytest.mark.parametrize("name", [*PRESETS, *WHOLE])
def test_every_preset_has_the_loss_and_gradients_of_plain_autograd(name, chunk, block, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", block)
    check_against_autograd(name, chunk)


@pytest.mark.slow
@pytest.mark.skipif(not passes.can_compile("cpu"), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["topk_opd", "gold_opd", *WHOLE])
def test_compiled_passes_have_the_loss_and_gradients_of_plain_autograd(name, monkeypatch):
    monkeypatch.setattr(passes, "COMPILED_IDS", 0)
    monkeypatch.setattr(passes, "COMPILED_LOGITS", 0)
    check_against_autograd(name, 6)
    assert passes.can_compile("cpu")


def check_against_autograd(name, chunk):
    objective = WHOLE[name] if name in WHOLE else resolve_objective(name)
    batch, (hidden, head, teachers) = rows(), parameters(bias=chunk == 6)
    batch = replace(batch, teacher_scale_N=torch.where(batch.special_N, 0.0, batch.teacher_scale_N))
    known = {"old_logprobs_N": batch.rollout_logprobs_N, "phi_mean": torch.tensor(0.3), "progress": 0.1}
    known["old_topk_logprobs_NK"] = batch.teacher_topk_logprobs_NK - 0.1

    def loss_of(start, stop, found):
        given = {key: x[start:stop] if key.endswith(PER_TOKEN) else x for key, x in known.items()}
        return compute_loss(Streams(select_tokens(batch, start, stop), **found._asdict(), **given), objective).loss

    fused = FusedHead(head, batch, objective, teachers, chunk)
    expected_streams = plain_streams(hidden, head, batch, objective, teachers)
    for ours, plain in zip(fused.streams(hidden), expected_streams, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            assert_close(ours, plain.detach())
    found, expected = fused.loss(hidden, loss_of), loss_of(0, batch.num_tokens, expected_streams)
    assert_close(found, expected)
    leaves = [x for x in (hidden, *head) if x is not None]
    for ours, plain in zip(*(torch.autograd.grad(3 * x, leaves) for x in (found, expected)), strict=True):
        assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["topk_rkl", "full_rkl", "full_fkl", "jsd"])
def test_gradients_in_fp64(kind, monkeypatch):
    """Against finite differences."""
    monkeypatch.setattr(products, "BLOCK", 7)
    objective = whole(kind) if kind != "topk_rkl" else resolve_objective("topk_opd")
    batch, (hidden, head, teachers) = rows(), parameters(bias=True, dtype=torch.float64)

    def loss(hidden, weight, bias):
        def loss_of(start, stop, found):
            weight_c = torch.arange(start, stop, dtype=torch.float64) + 1
            tops = (found.topk_logprobs_NK.exp().sum(-1) * weight_c).sum()
            rest = 0 if found.divergence_N is None else (found.divergence_N.square() * weight_c).sum()
            return (found.logprobs_N.square() * weight_c).sum() + tops + rest

        return FusedHead(Head(weight, bias), batch, objective, teachers, 4).loss(hidden, loss_of)

    teachers = {name: Head(t.weight.double(), None) for name, t in teachers.items()}
    batch = replace(batch, teacher_hidden_NG=batch.teacher_hidden_NG.double())
    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias), fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**16), st.integers(1, 25), st.integers(0, V))
def test_cutting_changes_nothing(chunk, seed, block, k):
    """Any chunk, any block, any K; the sampled token may be among the K or not."""
    objective, batch, (hidden, head, teachers) = resolve_objective("topk_opd"), rows(seed, k=k), parameters()
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch.num_tokens, 1 + k, generator=g)

    def loss_of(start, stop, found):
        return (torch.cat([found.logprobs_N[:, None], found.topk_logprobs_NK], 1) * weights[start:stop]).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "BLOCK", block)
        found = FusedHead(head, batch, objective, teachers, chunk).loss(hidden, loss_of)
    expected = loss_of(0, batch.num_tokens, plain_streams(hidden, head, batch, objective, teachers))
    for ours, plain in zip(*(torch.autograd.grad(x, [hidden, head.weight]) for x in (found, expected)), strict=True):
        assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_a_frozen_head_has_no_gradient_and_costs_none():
    objective, batch, (hidden, head, _) = resolve_objective("topk_opd"), rows(), parameters()
    frozen = Head(head.weight.detach(), None)
    loss = FusedHead(frozen, batch, objective, {}).loss(hidden, lambda start, stop, found: found.logprobs_N.sum())
    assert [x for x in loss.grad_fn.saved_tensors if x is not None and x.shape == frozen.weight.shape] == []
    loss.backward()
    assert hidden.grad is not None


def test_bf16_sums_the_gradient_of_many_chunks_in_fp32():
    """One bf16 product per chunk, summed in fp32, is as good as one bf16 product over everything."""
    torch.manual_seed(0)
    n, objective = 512, resolve_objective("topk_opd")
    hidden, weight = torch.randn(n, 16), torch.randn(300, 16)
    row = select_tokens(rows(k=0), 0, 1)
    batch = replace(row, **{
        name: getattr(row, name).repeat(n, *[1] * (getattr(row, name).dim() - 1))
        for name in Batch.__dataclass_fields__ if name.endswith(PER_TOKEN)
    } | {"row_N": torch.arange(n), "target_N": torch.randint(300, (n,))})  # fmt: skip

    def gradient(dtype, chunk):
        head = Head(weight.to(dtype).requires_grad_(), None)
        fused = FusedHead(head, batch, objective, {}, chunk)
        fused.loss(hidden.to(dtype), lambda start, stop, found: found.logprobs_N.sum()).backward()
        return head.weight.grad.double()

    exact = gradient(torch.float64, n)
    many, one = ((gradient(torch.bfloat16, chunk) - exact).norm() / exact.norm() for chunk in (16, n))
    assert many < 1.2 * one


def test_a_teacher_that_is_not_here_is_named():
    batch, (hidden, head, teachers) = rows(), parameters()
    del teachers["y"]
    with pytest.raises(ConfigError, match="'y'"):
        FusedHead(head, batch, whole("full_rkl"), teachers).streams(hidden)


@pytest.mark.parametrize("name", ["gkd", "gold_opd"])
@pytest.mark.parametrize("named", [("x", ""), ()])
def test_rows_that_no_teacher_supervises_need_none(name, named):
    """Those beside the student's own, and the filler of a rank without episodes."""
    objective, (hidden, head, teachers) = resolve_objective(name), parameters()
    batch = rows(teachers=named or ("x",))
    taught = (batch.row_N % 2 == 0) & bool(named)
    batch = replace(batch, teachers=named, teacher_scale_N=torch.where(taught, batch.teacher_scale_N, 0.0))
    fused = FusedHead(head, batch, objective, {"x": teachers["x"]}, 2)
    assert torch.equal(fused.streams(hidden).divergence_N > 0, taught)
    loss = fused.loss(hidden, lambda start, stop, found: found.divergence_N.sum())
    (slope,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(slope.abs().sum(-1) > 0, taught)


def test_which_presets_ask_for_whole_distributions():
    assert [name for name in PRESETS if resolve_objective(name).needs_full_vocabulary] == ["gkd", "gold_opd"]


@pytest.mark.parametrize("bias", [False, True])
def test_products_in_fp32_differ_by_rounding_alone(monkeypatch, bias):
    """On a CPU that emulates bfloat16 as on one that has it."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 64, generator=g).bfloat16()
    weight, slope = torch.randn(11, 64, generator=g).bfloat16(), torch.randn(5, 11, generator=g).bfloat16()
    offset = torch.randn(11, generator=g).bfloat16() if bias else None
    found = {}
    monkeypatch.setattr(products, "BLOCK", 4)
    for emulates in (False, True):
        monkeypatch.setattr(products, "_emulates_bfloat16", lambda emulates=emulates: emulates)
        assert products.emulated(weight) == emulates
        into, total = torch.empty_like(hidden), torch.ones(11, 64)
        products.into_hidden(slope, weight, into)
        products.add_to_weight(total, slope, hidden)
        found[emulates] = products.logits(hidden, weight, offset), into, total
    for plain, fine in zip(found[False], found[True], strict=True):
        assert plain.dtype == fine.dtype
        assert_close(plain.float(), fine.float(), atol=2e-2, rtol=2**-7)
    exact = 1 + slope.double().t() @ hidden.double()
    assert (found[True][2] - exact).abs().max() <= (found[False][2] - exact).abs().max()
