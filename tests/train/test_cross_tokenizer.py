"""A student learns a skill from a teacher with another tokenizer: two real BPE tokenizers trained on different text.

Both are trained here from nothing, on gold: the teacher to about half of the tasks, the student to next to none.
"""

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.evaluation.metrics import EvalResult
from agentopd.rendering.pieces import token_bytes
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train
from agentopd.types import Limits
from agentopd_envs import SingleTurnEnvironment, register_environment
from tests.tiny import byte_bpe, qwen3

pytestmark = pytest.mark.slow

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty"]
SHAPE = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


def spell(number: int) -> str:
    """English, without the hyphen."""
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")


@register_environment("counting")
class Counting(SingleTurnEnvironment):
    """Count on in words: ``cab 2 after nineteen`` wants ``twenty, twenty one``."""

    limits = Limits(max_turns=1, max_tokens=40)

    @classmethod
    def generate(cls, rng):
        start, length, name = rng.randrange(60), rng.randrange(1, 4), "".join(rng.choices("abcdefgh", k=3))
        answer = ", ".join(spell(start + i) for i in range(1, length + 1))
        return cls.new_task(f"{name} {length} after {spell(start)}", hidden={"answer": answer}, gold=[answer])

    @staticmethod
    def score(task, episode):
        return float(episode.final_text.strip() == task.hidden["answer"])


def untrained(path: Path, tokenizer, seed: int) -> Path:
    """A small model of random weights with its tokenizer."""
    qwen3(len(tokenizer), seed, **SHAPE, tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def trained(path: Path, student: Path, rate: float, *lines: str) -> tuple[EvalResult, EvalResult, list[dict]]:
    """Base and final evaluation and the metrics of a run in ``path``; its student is in ``path/model``."""
    config = path.with_suffix(".toml")
    config.write_text(
        f'run_dir = "{path}"\nthreads = 1\n[model]\nstudent = "{student}"\ndtype = "float32"\n'
        f'[rollout]\ngroup_size = 2\n[learner]\nlr = {rate}\nschedule = "cosine"\nwarmup_steps = 5\n'
        f'[eval]\ntasks_per_skill = 100\n[[suite.skills]]\nname = "counting"\nenv = "{__file__}:Counting"\n'
        + "\n".join(lines)
    )
    run = Run.start(load_run_config(config), allow_uncertified=["counting"])
    outcome = asyncio.run(train(run, make_console(plain=True)))
    assert outcome is not None
    return outcome.base, outcome.after, list(read_jsonl(path / "metrics.jsonl"))


@pytest.fixture
def tokenizers():
    """The teacher's is made of commands and answers, the student's of sentences and fewer merges."""
    words, rng = [spell(number) for number in range(64)], random.Random(0)

    def one() -> str:
        return rng.choice(words)

    def some(num: int) -> str:
        return ", ".join(rng.choices(words, k=num))

    def asked() -> str:
        return f"{rng.choice('abcdefgh') * 3} {rng.randrange(1, 4)} after"

    commands = [f"{asked()} {one()}, {some(4)}" for _ in range(300)]
    sentences = [f"from {one()} to {one()}: {some(3)} and {asked()}" for _ in range(200)]
    return SimpleNamespace(teacher=byte_bpe(commands, 330), student=byte_bpe(sentences, 315))


def test_a_student_learns_from_a_teacher_with_another_tokenizer(tokenizers, tmp_path):
    ours, theirs = (
        [[table[token] for token in tokenizer(spell(number))["input_ids"]] for number in range(64)]
        for tokenizer, table in ((x, token_bytes(x)) for x in (tokenizers.student, tokenizers.teacher))
    )
    assert 5 < sum(one != other for one, other in zip(ours, theirs, strict=True)) < 50
    sft = '[objective]\npreset = "sft"\n[train]\nprompts_per_step = 32\nsteps = '
    _, taught, _ = trained(tmp_path / "teacher", untrained(tmp_path / "t", tokenizers.teacher, 1), 4e-3, sft + "130")
    _, start, _ = trained(tmp_path / "start", untrained(tmp_path / "s", tokenizers.student, 2), 4e-3, sft + "80")
    teacher = f'[teachers.default]\nmodel = "{tmp_path}/teacher/model"\n[objective]\npreset = "simct_opd"'
    base, after, rows = trained(
        tmp_path / "run", tmp_path / "start/model", 2e-3, teacher, "[train]\nprompts_per_step = 32\nsteps = 100"
    )
    success = [result.tasks["counting"].avg_at_k for result in (taught, start, base, after)]
    print("teacher, start, base, after:", success, "KL", [round(row["distill/reverse_kl"], 2) for row in rows[::20]])
    assert success[0] > 0.3 and success[2] == success[1] < 0.15
    assert after.tasks["counting"].ci95[0] > base.tasks["counting"].ci95[1]
    coverage = [row["distill/coverage"] for row in rows]
    print("coverage", min(coverage), sum(coverage) / len(coverage))
    assert sum(coverage) / len(coverage) > 0.95
    assert sum(row["distill/reverse_kl"] for row in rows[-10:]) < 0.5 * sum(
        row["distill/reverse_kl"] for row in rows[:10]
    )
