"""The one-file twin and the framework give the same loss and gradient on the same fixed batch."""

import importlib.util
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from agentopd.batching import build_batch
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.presets import PRESETS
from agentopd.contracts import Evidence, ScoredEpisode
from agentopd.learner.body import hidden_states
from agentopd.learner.head import output_head
from agentopd.objective.compose import compute_loss
from agentopd.objective.streams import Streams
from agentopd.teachers.local import LocalTeacher
from agentopd.types import Episode, StopReason, Turn, Verdict, VerdictStatus
from tests.plain_head import plain_logprobs
from tests.tiny import qwen3
from tests.token_classes import token_classifier

VOCAB, END = 64, 2
PATH = Path(__file__).parents[1] / "examples" / "minimal.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal_example", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def tiny_model(seed, scale=1.0):
    model = qwen3(VOCAB, seed, max_position_embeddings=128, eos_token_id=END)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def episodes(model, count=8):
    """Episodes in groups of four, of two skills, whose rollout log-probs are near the model's own."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        ids = [*rng.integers(3, VOCAB, rng.integers(2, 12)).tolist(), END]
        prompt = rng.integers(3, VOCAB, rng.integers(2, 6)).tolist()
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        own = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        turn = Turn(token_ids=tuple(ids), rollout_logprobs=tuple(np.array(own) + 0.4 * rng.normal(size=len(ids))))
        episode = Episode(
            id=f"e{index}",
            task_id="t",
            task_hash="h",
            env="toy",
            split="train",
            skill=("new", "old")[index // 4 % 2],
            group_id=f"g{index // 4}",
            prompt_ids=tuple(prompt),
            turns=(turn,),
            stop_reason=StopReason.COMPLETED,
        )
        found.append(episode)
    return found


def verdicts():
    outcomes = [1.0, 0.0, 0.5, None, 1.0, 1.0, 0.0, 0.0]
    known = {1.0: VerdictStatus.OK}
    return [
        Verdict.unjudged(VerdictStatus.INFRA_ERROR, "gone")
        if outcome is None
        else Verdict(outcome=outcome, reward=outcome, status=known.get(outcome, VerdictStatus.WRONG))
        for outcome in outcomes
    ]


def as_rollouts(minimal, scored):
    """The same episodes in the twin's own layout."""
    width = max(len(item.episode.token_ids) for item in scored)

    def padded(rows, fill=0.0):
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    tokens = padded([item.episode.token_ids for item in scored], 0).long()
    sampled = padded([item.episode.loss_mask for item in scored]).bool()
    k = scored[0].evidence.topk_ids.shape[1]
    teacher, topk = torch.zeros(tokens.shape), torch.zeros(*tokens.shape, k)
    ids = torch.zeros(*tokens.shape, k, dtype=torch.int64)
    for row, item in enumerate(scored):
        teacher[row, sampled[row]] = torch.from_numpy(item.evidence.teacher_logprobs)
        ids[row, sampled[row]] = torch.from_numpy(item.evidence.topk_ids)
        topk[row, sampled[row]] = torch.from_numpy(item.evidence.topk_logprobs)
    outcomes = [item.verdict.outcome for item in scored]
    return minimal.Rollouts(
        tokens=tokens,
        sampled=sampled,
        special=tokens == END,
        rollout_logprobs=padded([item.episode.rollout_logprobs for item in scored]),
        teacher_logprobs=teacher,
        topk_ids=ids,
        topk_logprobs=topk,
        success=torch.tensor([float("nan") if x is None else x for x in outcomes]),
        group=torch.tensor([int(item.episode.group_id[1:]) for item in scored]),
        skill=torch.tensor([["new", "old"].index(item.episode.skill) for item in scored]),
    )


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_same_loss_and_gradient_as_the_framework(minimal, scale):
    """At scale 1 no bound is reached; at scale 30 the cap and the sequence budget are."""
    student, teacher = tiny_model(0, scale), LocalTeacher("toy", tiny_model(1, scale))
    drawn = episodes(student)
    logprobs = [teacher_evidence(teacher, episode) for episode in drawn]
    scored = [ScoredEpisode(*parts) for parts in zip(drawn, verdicts(), logprobs, strict=True)]
    objective = ObjectiveConfig.model_validate({**PRESETS["verifier_calibrated"]})
    batch = build_batch(scored, objective, {"new": 0.75, "old": 0.25}, token_classifier({END}), 0)

    hidden = hidden_states(student, batch.input_ids_BT, batch.row_N, batch.position_N)
    own = plain_logprobs(hidden, output_head(student), batch.target_N, batch.teacher_topk_ids_NK)
    output = compute_loss(Streams(batch, *own), objective)
    rollouts = as_rollouts(minimal, scored)
    twin = minimal.loss(student(input_ids=rollouts.tokens).logits, rollouts, {0: 0.75, 1: 0.25})

    assert twin.item() == pytest.approx(output.loss.item(), abs=1e-6)
    assert bool(output.sums["distill/cap_hit"][:, 0].any()) == (scale > 1)
    for ours, theirs in zip(*(torch.autograd.grad(x, student.parameters()) for x in (output.loss, twin)), strict=True):
        assert_close(ours, theirs, atol=1e-6 * scale, rtol=1e-4)


def teacher_evidence(teacher, episode) -> Evidence:
    coroutine = teacher.score([episode], 32)
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value[0]
    raise AssertionError("scoring in process does not wait for anything")


class DigitTokenizer:
    """Characters as ids, enough for the twin's own tasks."""

    eos_token_id = END

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=torch.tensor([[3 + ord(c) % (VOCAB - 3) for c in text]]))

    def decode(self, ids, **_):
        return " ".join(str(int(i)) for i in ids)


@pytest.mark.slow
def test_one_whole_step_of_the_twin_runs(minimal):
    random.seed(0)
    torch.manual_seed(0)
    student = tiny_model(0)
    rollouts = minimal.rollout(student, DigitTokenizer(), {0: tiny_model(1), 1: student})
    value = minimal.loss(student(rollouts.tokens).logits, rollouts, minimal.SHARES)
    value.backward()
    assert torch.isfinite(value)
    assert rollouts.tokens.shape[0] == minimal.PROMPTS * minimal.GROUP_SIZE
    drawn = student(rollouts.tokens).logits[:, :-1].log_softmax(-1).gather(2, rollouts.tokens[:, 1:, None])[..., 0]
    here = rollouts.sampled[:, 1:]
    assert_close(drawn.detach()[here], rollouts.rollout_logprobs[:, 1:][here], atol=1e-4, rtol=0)


def test_the_twin_stays_short_and_self_contained():
    text = PATH.read_text()
    assert len(text.splitlines()) <= 200
    assert not [line for line in text.splitlines() if line.strip().startswith(("import agentopd", "from agentopd"))]


@pytest.mark.parametrize(("text", "right"), [("so 12", 1.0), ("12 or 13", 0.0), ("none", 0.0)])
def test_the_twins_verifier_reads_the_last_number(minimal, text, right):
    assert minimal.verify("12", text) == right
