from typing import Any

import pytest

from tests.tiny import qwen3


@pytest.fixture
def model() -> Any:
    """A tiny random Qwen3 in fp32 whose next-token distributions are far from uniform."""
    return qwen3(
        40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=96,
        initializer_range=0.4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    ).train()
