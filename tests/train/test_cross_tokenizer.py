"""A student moves towards a teacher with another tokenizer: two real BPE tokenizers trained on different text.

A few steps from random weights show the divergence fall on the student's own samples; they do not show a skill.
"""

import asyncio

import numpy as np
import pytest
from transformers import AutoConfig

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train
from tests.tiny import byte_bpe, qwen3

pytestmark = pytest.mark.slow
PROSE = ["It was the best of times, it was the worst of times; there were apples and pears in the store."] * 30
STEPS = 10


@pytest.fixture
def student(tmp_path):
    """A small untrained model with a tokenizer of its own."""
    tokenizer, path = byte_bpe(PROSE, 320), tmp_path / "student"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    qwen3(len(tokenizer), **shape, max_position_embeddings=1024, tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_student_moves_towards_a_teacher_with_another_tokenizer(student, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        f'run_dir = "{tmp_path / "run"}"\nthreads = 1\n[model]\nstudent = "{student}"\ndtype = "float32"\n'
        '[teachers.default]\nmodel = "micro/teacher"\n[objective]\npreset = "simct_opd"\n'
        '[[suite.skills]]\nname = "store"\nenv = "tool_use"\n[suite.skills.limits]\nmax_turns = 1\nmax_tokens = 40\n'
        f"[train]\nsteps = {STEPS}\nprompts_per_step = 4\n[rollout]\ngroup_size = 2\n"
        "[learner]\nlr = 3e-3\nwarmup_steps = 0\n[eval]\ntasks_per_skill = 2\n"
    )
    asyncio.run(train(Run.start(load_run_config(config), allow_uncertified=["store"]), make_console(plain=True)))
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    kl = [row["distill/reverse_kl"] for row in rows]
    assert all(np.isfinite(row["loss/total"]) and row["distill/coverage"] > 0.3 for row in rows)
    assert np.mean(kl[-2:]) < 0.95 * np.mean(kl[:2])
    kept, given = (AutoConfig.from_pretrained(path).vocab_size for path in (tmp_path / "run/model", student))
    assert kept == given
