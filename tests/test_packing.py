"""Packed rows get the hidden states and gradients of rows alone, and no prefix is computed twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agentopd import attention, packing
from agentopd.attention import ATTENTION
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd.engines.cache import caching, empty_cache, joined, read_row
from agentopd.engines.hf import HFEngine
from agentopd.engines.requests import context_limit
from agentopd.errors import ConfigError
from agentopd.learner.body import hidden_states, packed_states, packs
from agentopd.packing import pack

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # the model's norms are in float32
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6)


def padded(rows):
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row)] = torch.tensor(row)
    return ids_BT


def request(ids, room):
    return GenerationRequest(ids, SamplingParams(max_tokens=room), 0)


def qwen(implementation=ATTENTION, dtype=torch.float64):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation=implementation,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype).eval()


@given(ROWS)
def test_each_distinct_prefix_is_one_packed_token(rows):
    packed = pack(padded(rows), [len(row) for row in rows])
    prefixes = {}
    for index, row in enumerate(rows):
        for position, token in enumerate(row):
            place = int(packed.index_BT[index, position])
            assert prefixes.setdefault(tuple(row[: position + 1]), place) == place
            assert (int(packed.token_ids_M[place]), int(packed.positions_M[place])) == (token, position)
    assert sorted(prefixes.values()) == list(range(len(packed.token_ids_M)))


@settings(max_examples=10, deadline=None)
@given(ROWS, st.integers(1, 4), st.integers(4, 20), st.booleans())
def test_packed_rows_get_the_states_and_gradients_of_rows_alone(rows, queries, keys, plain):
    model = qwen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "QUERIES", queries)
        patch.setattr(packing, "KEYS", keys)
        patch.setattr(attention, "PLAIN_BELOW", 512 if plain else 0)
        row_N = torch.tensor([index for index, row in enumerate(rows) for _ in row])
        position_N = torch.tensor([p + 1 for row in rows for p in range(len(row))])
        found = hidden_states(model, padded([[*row, 7] for row in rows]), row_N, position_N)
        alone = [model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows]
        expected = torch.cat(alone)
        assert_close(found, expected, **CLOSE)
        weight, leaves = torch.randn(found.shape, dtype=found.dtype), list(model.base_model.parameters())
        grads = [torch.autograd.grad((x * weight).sum(), leaves) for x in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, **CLOSE)


@settings(max_examples=20, deadline=None)
@given(ROWS, st.data(), st.integers(1, 4), st.integers(4, 20))
def test_rows_go_on_from_what_a_cache_holds(rows, data, queries, keys):
    model, known = qwen(), [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    expected, kept = [], []
    for row, past in zip(rows, known, strict=True):
        alone = empty_cache()
        states = model.base_model(input_ids=torch.tensor([row]), **caching(model, alone)).last_hidden_state[0]
        expected.append(states[past:])
        kept.append(read_row(alone, 0, [(0, past)], tuple(row[:past])) if past else None)
    cache, new = joined(kept), [row[past:] for row, past in zip(rows, known, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "QUERIES", queries)
        patch.setattr(packing, "KEYS", keys)
        packed = pack(padded(new), [len(row) for row in new], known)
    states_MH = packed_states(model, packed, **caching(model, cache))
    for index, states in enumerate(expected):
        assert_close(states_MH[packed.index_BT[index, : len(states)]], states, **CLOSE)


def test_which_models_pack_is_found_by_trying():
    small = {"vocab_size": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    assert packs(qwen(dtype=torch.bfloat16))
    assert packs(GPT2LMHeadModel(GPT2Config(**small, attn_implementation=ATTENTION)).eval())
    assert not packs(qwen("sdpa"))
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, state_size=4))
    recurrent.config._attn_implementation = ATTENTION
    assert not packs(recurrent.eval())


SMALL = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1), "sinks"),
        (Gemma2Config(**SMALL), "capped scores"),
    ],
)
def test_attention_that_is_more_than_causal_is_refused(config, what):
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    with pytest.raises(ConfigError, match=what):
        hidden_states(model, torch.tensor([[1, 2, 3]]), torch.tensor([0]), torch.tensor([2]))


@pytest.mark.parametrize("packing", [True, False])
def test_a_row_longer_than_the_window_is_refused_and_a_shorter_one_is_exact(packing, monkeypatch):
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, sliding_window=6)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    monkeypatch.setattr("agentopd.learner.body.packs", lambda model: packing)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    fits = hidden_states(model, ids[:, :6], torch.zeros(5, dtype=torch.int64), torch.arange(1, 6))
    with pytest.raises(ConfigError, match="7 tokens is longer than the model's attention window of 6"):
        hidden_states(model, ids.expand(2, -1).clone(), torch.tensor([1]), torch.tensor([7]))
    model.set_attn_implementation("eager")
    assert_close(fits, model.base_model(input_ids=ids[:, :6]).last_hidden_state[0, :5], **CLOSE)


def test_rollouts_stay_inside_the_window():
    config = MistralConfig(**SMALL, sliding_window=6)
    assert [context_limit(config, asked) for asked in (None, 4, 9)] == [6, 4, 6]
    assert context_limit(MistralConfig(**SMALL, sliding_window=None, max_position_embeddings=32), None) == 32
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    engine = HFEngine(model)
    assert engine.max_context == 6
    # Together the two rows take more columns of the cache than the window has.
    asked = [request([1, 2, 3, 4, 5], 1), request([1], 5)]
    assert [len(made.token_ids) for made in engine.generate_now(asked)] == [1, 5]
