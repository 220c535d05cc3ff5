"""Shared fixtures: where the benchmark slices are, and tokenizers with the chat templates of well-known families."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Timings belong to benchmarks/: a busy machine must not fail a property.
settings.register_profile("agentopd", deadline=None, derandomize=True)
settings.load_profile("agentopd")

FAMILIES = {
    "qwen3": ("<|im_end|>", "<|endoftext|>", ["<|im_start|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]),
    "llama3": ("<|eot_id|>", "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": ("</s>", "<s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
}
"""End of turn, beginning of text, further markers."""


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The directory of benchmark slices, from ``AGENTOPD_DATA``."""
    where = os.environ.get("AGENTOPD_DATA")
    if not where:
        pytest.skip("AGENTOPD_DATA is not set: point it at the folder of benchmark slices (gsm8k_dev.jsonl, ...)")
    path = Path(where)
    if not (path / "gsm8k_dev.jsonl").is_file():
        pytest.fail(f"AGENTOPD_DATA={where!r} has no gsm8k_dev.jsonl")
    return path


@pytest.fixture(scope="session")
def chat_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``chat_tokenizer(family, kind=PreTrainedTokenizerFast)``: byte-level, with the family's template and markers."""

    def make(family: str, kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        eos, bos, markers = FAMILIES[family]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=[bos, eos, *markers],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["the assistant adds the number to the total"] * 4, trainer)
        fast = kind(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, name_or_path=f"{family}-style")
        fast.chat_template = (Path(__file__).parent / "templates" / f"{family}.jinja").read_text()
        return fast

    return make
