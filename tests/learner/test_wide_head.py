"""Whole distributions, chunk by chunk, agree with the plain divergence; padding rows and other teachers do not leak."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from agentopd.config.load import resolve_objective
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.presets import PRESETS
from agentopd.errors import ConfigError
from agentopd.learner.head import Head
from agentopd.learner.wide_head import wide_logprobs
from agentopd.objective.divergences import full_divergence, kernel
from agentopd.objective.gold import gold_divergence, rest_logprobs

N, H, G, V = 11, 8, 6, 20


def whole(kind: str, **masks: float) -> ObjectiveConfig:
    base = {"divergence": {"kind": kind}, "stabiliser": {"cap": None, "sequence_budget": None}}
    return ObjectiveConfig.model_validate({**base, "masks": masks})


def inputs(batch):
    """Hidden states and heads of a student and two teachers, on a batch of N tokens."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.num_tokens, H, generator=g, requires_grad=True)
    head = Head(torch.randn(V, H, generator=g, requires_grad=True), None)
    teachers = {
        "x": Head(torch.randn(V, G, generator=g), None),
        "y": Head(torch.randn(V - 2, G - 1, generator=g), None),
    }
    return hidden, head, teachers


@pytest.fixture
def batch(make_batch, objective):
    made = make_batch(objective("opd"))
    n, g = made.num_tokens, torch.Generator().manual_seed(1)
    return replace(
        made,
        target_N=made.target_N % V,
        teacher_topk_ids_NK=torch.randint(V, (n, 3), generator=g),
        teacher_hidden_NG=torch.randn(n, G, generator=g),
        teacher_N=torch.arange(n) % 2,
        teachers=("x", "y"),
    )


@pytest.mark.parametrize("kind", ["full_rkl", "full_fkl", "jsd"])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_chunks_of_whole_distributions_agree_with_the_plain_divergence(batch, kind, chunk):
    hidden, head, teachers = inputs(batch)
    config = whole(kind, entropy_top_ratio=0.5)
    found = wide_logprobs(hidden, head, batch, config, teachers, chunk)
    logits = hidden @ head.weight.T
    log_p = logits.log_softmax(-1)
    assert_close(found.logprobs_N, log_p.gather(1, batch.target_N[:, None])[:, 0])
    assert_close(found.topk_NK, log_p.gather(1, batch.teacher_topk_ids_NK))
    assert_close(found.entropy_N, -(log_p.exp() * log_p).sum(-1))
    assert not found.entropy_N.requires_grad
    x, y = batch.teacher_hidden_NG @ teachers["x"].weight.T, batch.teacher_hidden_NG[:, :-1] @ teachers["y"].weight.T
    apart = torch.where(
        batch.teacher_N == 0,
        full_divergence(logits, x, config.divergence),
        full_divergence(logits, y, config.divergence),
    )
    expected = torch.where(batch.supervised_N, apart, 0.0)
    assert_close(found.divergence_N, expected)
    grads = [
        torch.autograd.grad(value.square().sum(), [hidden, head.weight]) for value in (found.divergence_N, expected)
    ]
    for ours, plain in zip(*grads, strict=True):
        assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_a_teacher_that_is_not_here_is_named(batch):
    hidden, head, teachers = inputs(batch)
    del teachers["y"]
    with pytest.raises(ConfigError, match="'y'"):
        wide_logprobs(hidden, head, batch, whole("full_rkl"), teachers)


def test_which_presets_ask_for_whole_distributions():
    assert [name for name in PRESETS if resolve_objective(name).needs_full_vocabulary] == ["gkd", "gold_opd"]


@pytest.mark.parametrize("chunk", [4, 1000])
def test_merged_distributions_do_not_depend_on_chunks(batch, chunk):
    hidden, head, teachers = inputs(batch)
    table = torch.arange(V - 2).flip(0)
    teachers["y"] = teachers["y"]._replace(student_ids=table)
    n = batch.num_tokens
    batch = replace(batch, segment_N=torch.arange(n) // 2, teacher_rest_N=-torch.rand(n))
    config = ObjectiveConfig.model_validate(PRESETS["gold_opd"])
    found = wide_logprobs(hidden, head, batch, config, teachers, chunk)
    log_p = (hidden @ head.weight.T).log_softmax(-1)
    own = log_p.gather(1, batch.target_N[:, None])[:, 0]
    rest = rest_logprobs(own, batch.row_N, batch.segment_N)
    assert (rest < 0).any()
    for index, (name, ids) in enumerate((("x", None), ("y", table))):
        width = teachers[name].weight.shape[1]
        log_q = (batch.teacher_hidden_NG[:, :width] @ teachers[name].weight.T).log_softmax(-1)
        merged = (log_p + rest[:, None], log_q + batch.teacher_rest_N[:, None])
        mine = batch.teacher_N == index
        assert_close(found.divergence_N[mine], gold_divergence(*merged, ids, kernel(config.divergence))[mine])
    expected = torch.autograd.grad(found.divergence_N.sum(), head.weight)[0]
    assert expected.abs().sum() > 0
