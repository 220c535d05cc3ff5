import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from agentopd.attention import grouped_attention
from agentopd.contracts import Engine, Generation, GenerationRequest, SamplingParams
from agentopd.engines import HFEngine
from agentopd.errors import EngineError

STOP = (2,)


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=draw).tolist()
    return [torch.randint(3, 40, (length,), generator=draw).tolist() for length in lengths]


def requests(
    rows: Sequence[Sequence[int]],
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 24,
    stop_ids: tuple[int, ...] = STOP,
) -> list[GenerationRequest]:
    params = SamplingParams(temperature, top_p, max_tokens, stop_ids)
    return [GenerationRequest(row, params, 100 + seed) for seed, row in enumerate(rows)]


@torch.no_grad()
def reference_logprobs(model: Any, prompt: Sequence[int], sampled: Sequence[int], temperature: float) -> torch.Tensor:
    """Log-probs (N, V) of a plain, unpadded forward pass."""
    logits = model(input_ids=torch.tensor([[*prompt, *sampled]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)


def test_it_is_an_engine(model: Any) -> None:
    engine = HFEngine(model)
    assert isinstance(engine, Engine) and engine.lockstep and engine.max_context == 96


def test_greedy_equals_transformers_generate(model: Any) -> None:
    rows = prompts(8)
    for row, made in zip(rows, HFEngine(model).generate_now(requests(rows, temperature=0.0)), strict=True):
        whole = model.eval().generate(
            torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=2,
        )
        assert list(made.token_ids) == whole[0, len(row) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_full_forward(model: Any, temperature: float) -> None:
    rows = prompts(12)
    for row, made in zip(rows, HFEngine(model).generate_now(requests(rows, temperature)), strict=True):
        expected = reference_logprobs(model, row, made.token_ids, temperature)
        picked = expected[torch.arange(len(made.token_ids)), torch.tensor(made.token_ids)]
        assert torch.allclose(torch.tensor(made.logprobs), picked, atol=1e-4)


def test_top_p_logprobs_are_renormalised(model: Any) -> None:
    (row,) = prompts(1)
    (made,) = HFEngine(model).generate_now(requests([row], top_p=0.7))
    for token, logprob, full in zip(
        made.token_ids, made.logprobs, reference_logprobs(model, row, made.token_ids, 1.0).exp(), strict=True
    ):
        ordered = full.sort(descending=True).values
        nucleus = ordered[: int((ordered.cumsum(0) - ordered < 0.7).sum())]
        assert logprob == pytest.approx((full[token] / nucleus.sum()).log().item(), abs=1e-4)


def test_a_sample_depends_on_its_request_alone(model: Any) -> None:
    rows = prompts(14)
    rows += rows[:5]
    made = HFEngine(model).generate_now(requests(rows))
    small = HFEngine(model, batch_size=4).generate_now(requests(rows))
    for request, together, chunked in zip(requests(rows), made, small, strict=True):
        (alone,) = HFEngine(model).generate_now([request])
        assert alone.token_ids == together.token_ids == chunked.token_ids
        assert torch.allclose(torch.tensor(alone.logprobs), torch.tensor(together.logprobs), atol=1e-4)
    assert len({generation.token_ids for generation in made}) > 14, "copies of a prompt must differ by their seed"


def test_repeated_calls_are_identical(model: Any) -> None:
    engine = HFEngine(model)
    assert engine.generate_now(requests(prompts(9))) == engine.generate_now(requests(prompts(9)))


def test_rows_end_at_a_stop_id_or_at_their_own_limit(model: Any) -> None:
    rows = prompts(30)
    stop = (2, 5, 7, 11)
    asked = [
        GenerationRequest(row, SamplingParams(1.5, 1.0, 1 + index % 17, stop), index) for index, row in enumerate(rows)
    ]
    made = HFEngine(model).generate_now(asked)
    for request, generation in zip(asked, made, strict=True):
        *body, last = generation.token_ids
        assert not set(body) & set(stop)
        assert generation.finish_reason == ("stop" if last in stop else "length")
        if generation.finish_reason == "length":
            assert len(generation.token_ids) == request.params.max_tokens
    assert {generation.finish_reason for generation in made} == {"stop", "length"}


def test_unlike_parameters_share_a_call(model: Any) -> None:
    rows = prompts(3)
    mixed = [requests(rows, temperature=t, top_p=p)[i] for i, (t, p) in enumerate([(0.0, 1.0), (1.0, 1.0), (1.0, 0.5)])]
    made = HFEngine(model).generate_now(mixed)
    assert made == [HFEngine(model).generate_now([request])[0] for request in mixed]


def test_the_learner_finds_its_model_as_it_left_it(model: Any) -> None:
    attention = model.config._attn_implementation
    HFEngine(model).generate_now(requests(prompts(3)))
    assert model.training and model.config._attn_implementation == attention
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_versions_and_updated_weights(model: Any) -> None:
    engine = HFEngine(model)
    before = engine.generate_now(requests(prompts(2)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine.sync_weights(3)
    after = engine.generate_now(requests(prompts(2)))
    assert [generation.weight_version for generation in before + after] == [0, 0, 3, 3]
    assert [g.token_ids for g in before] != [g.token_ids for g in after]


def test_requests_that_do_not_fit_are_refused(model: Any) -> None:
    engine = HFEngine(model, max_context=30)
    assert engine.generate_now(requests([[5] * 6], max_tokens=24))
    for row, max_tokens in (([5] * 7, 24), ([], 5), ([5], 0)):
        with pytest.raises(EngineError, match="does not fit a context of 30"):
            engine.generate_now(requests([row], max_tokens=max_tokens))


def test_broken_weights_are_an_engine_error(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="non-finite"):
            HFEngine(model).generate_now(requests(prompts(2), temperature))


def test_generate_runs_off_the_event_loop(model: Any) -> None:
    async def scenario() -> tuple[list[Generation], list[Generation]]:
        engine = HFEngine(model)
        try:
            return await engine.generate(requests(prompts(3))), await engine.generate([])
        finally:
            await engine.aclose()
            await engine.aclose()

    made, nothing = asyncio.run(scenario())
    assert made == HFEngine(model).generate_now(requests(prompts(3))) and nothing == []


def test_grouped_attention_equals_repeated_heads() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 1, 4), torch.randn(3, 2, 11, 4), torch.randn(3, 2, 11, 4)
    mask = torch.zeros(3, 1, 1, 11).masked_fill(torch.rand(3, 1, 1, 11) < 0.3, float("-inf"))
    mask[..., -1] = 0
    output, _ = grouped_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.3)
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(4, 1), value.repeat_interleave(4, 1), attn_mask=mask, scale=0.3
    )
    assert torch.allclose(output, plain.transpose(1, 2), atol=1e-6)
