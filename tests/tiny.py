"""A tiny random Qwen3, a byte-level tokenizer with a chat template, and episodes of random ids."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from agentopd.batching import build_batch
from agentopd.config import RunConfig, load_run_config
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.presets import PRESETS
from agentopd.contracts import Evidence, ScoredEpisode
from agentopd.objective.streams import Batch
from agentopd.rendering.micro_template import MICRO_CHAT_TEMPLATE
from agentopd.types import Episode, StopReason, Turn, Verdict, VerdictStatus
from tests.token_classes import token_classifier

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def qwen3(vocab_size: int, seed: int = 0, **changes: Any) -> Any:
    """In fp32 and eval mode; ``changes`` are fields of its config."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, **{**shape, **changes})).eval()


def byte_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``texts``, with the micro models' chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=CONTROL[2], pad_token=CONTROL[0])
    tokenizer.chat_template = MICRO_CHAT_TEMPLATE
    return tokenizer


def episode(seed: int, sizes: Iterable[int] = (4, 3), vocab_size: int = 64) -> Episode:
    """Turns of ``sizes`` random ids after a prompt of ``3 + seed``, each followed by two that were not sampled."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(int(x) for x in rng.integers(3, vocab_size, n))

    return Episode(
        id=f"e{seed}",
        task_id="t",
        task_hash="h",
        env="toy",
        split="train",
        prompt_ids=draw(3 + seed),
        turns=tuple(Turn(token_ids=draw(n), rollout_logprobs=(-1.0,) * n, observation_ids=draw(2)) for n in sizes),
        stop_reason=StopReason.COMPLETED,
    )


def opd_batch(rows: int, length: int, vocab_size: int, top_k: int = 64) -> tuple[ObjectiveConfig, Batch]:
    """Plain on-policy distillation, and a batch of ``rows`` of ``length`` tokens, all but eight of them sampled."""
    objective = ObjectiveConfig.model_validate({**PRESETS["opd"], "preset": "opd"})
    rng, scored = np.random.default_rng(0), []
    for row in range(rows):
        ids = tuple(int(x) for x in rng.integers(3, vocab_size, length))
        turn = Turn(token_ids=ids[8:], rollout_logprobs=(-6.0,) * (length - 8))
        played = episode(0).model_copy(update={"id": f"e{row}", "skill": "a", "prompt_ids": ids[:8], "turns": (turn,)})
        shown = np.argsort(rng.random((length - 8, vocab_size)), axis=1)[:, :top_k]
        evidence = Evidence("toy", np.full(length - 8, -6.0, np.float32), shown, np.full(shown.shape, -5.0, np.float32))
        verdict = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)
        scored.append(ScoredEpisode(played, verdict, evidence))
    return objective, build_batch(scored, objective, {"a": 1.0}, token_classifier(()), 0)


def served_run(folder: Path, preset: str, base_url: str) -> RunConfig:
    """A run whose one teacher is served at ``base_url``."""
    file = folder / "served.toml"
    file.write_text(
        f'[objective]\npreset = "{preset}"\n[teachers.default]\nkind = "served"\nbase_url = "{base_url}"\n'
        '[[suite.skills]]\nname = "store"\nenv = "tool_use"\n'
    )
    return load_run_config(file)
