"""The chunked head agrees with plain log-softmax, and never sees what it does not need."""

import pytest
import torch
from torch.testing import assert_close

from agentopd.errors import ConfigError
from agentopd.learner.body import hidden_states
from agentopd.learner.head import Head, head_logprobs, head_topk, output_head


def inputs(bias, n=11):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 8, generator=g)
    weight = torch.randn(20, 8, generator=g)
    offset = torch.randn(20, generator=g) if bias else None
    return hidden, Head(weight, offset), torch.randint(20, (n,), generator=g), torch.randint(20, (n, 5), generator=g)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [4, 11, 100])
def test_chunks_agree_with_plain_log_softmax(bias, chunk):
    hidden, head, target, ids = inputs(bias)
    full = torch.nn.functional.linear(hidden, head.weight, head.bias).log_softmax(-1)
    expected = full.gather(1, target[:, None])[:, 0], full.gather(1, ids)
    for a, b in zip(head_logprobs(hidden, head, target, ids, chunk), expected, strict=True):
        assert_close(a, b)
    logprobs, top_ids, top = head_topk(hidden, head, target, 3, chunk)
    assert_close(logprobs, expected[0])
    assert_close(top, full.topk(3).values)
    assert torch.equal(top_ids, full.topk(3).indices)


def test_bf16_arithmetic_ends_in_fp32():
    hidden, head, target, ids = inputs(False)
    low = Head(head.weight.bfloat16(), None)
    logprobs, topk = head_logprobs(hidden.bfloat16(), low, target, ids)
    assert logprobs.dtype == topk.dtype == torch.float32


def test_right_padding_does_not_reach_earlier_tokens(tiny_model):
    model = tiny_model()
    row = torch.randint(3, 64, (1, 7))
    padded = torch.cat([row, torch.full((1, 5), 9)], 1)
    at = torch.zeros(3, dtype=torch.int64), torch.tensor([1, 4, 6])
    assert_close(hidden_states(model, row, *at), hidden_states(model, padded, *at))


def test_position_is_scored_by_the_logits_before_it(tiny_model):
    model = tiny_model()
    row = torch.randint(3, 64, (1, 7))
    full = model(input_ids=row).logits.log_softmax(-1)
    hidden = hidden_states(model, row, torch.zeros(6, dtype=torch.int64), torch.arange(1, 7))
    found, _ = head_logprobs(hidden, output_head(model), row[0, 1:], torch.zeros(6, 0, dtype=torch.int64))
    assert_close(found, full[0, :-1].gather(1, row[0, 1:, None])[:, 0])


def test_vocabulary_padding_is_left_out_before_the_softmax(tiny_model):
    assert output_head(tiny_model(), vocab_size=60).weight.shape[0] == 60


def test_models_that_transform_logits_are_refused(tiny_model):
    model = tiny_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        output_head(model)
