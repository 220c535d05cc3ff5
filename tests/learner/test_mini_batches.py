"""Several optimiser steps per batch: who is dealt where, and that nothing else changes."""

import pytest
import torch
from torch.testing import assert_close

from agentopd.config.run import LearnerConfig
from agentopd.learner.body import hidden_states
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.learner.head import output_head
from agentopd.objective.compose import compute_loss
from agentopd.objective.microbatches import deal_rows
from agentopd.objective.streams import Streams
from tests.plain_head import plain_logprobs


@pytest.fixture
def learner(tiny_model, objective):
    """A factory of learners, closed at the end of the test."""
    made = []

    def make(**settings):
        config = LearnerConfig(**{"lr": 1e-2, "warmup_steps": 0, "micro_batch_tokens": 4096, **settings})
        made.append(DeepSpeedLearner(tiny_model(), config, objective(), total_steps=10))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_every_row_is_dealt_once_and_every_skill_evenly(make_batch, parts):
    batch = make_batch(count=12)
    dealt = deal_rows(batch, parts)
    assert len(dealt) == parts
    ids = sorted(
        row[:length].tolist() for part in dealt for row, length in zip(part.input_ids_BT, part.lengths_B, strict=True)
    )
    assert ids == sorted(row[:length].tolist() for row, length in zip(batch.input_ids_BT, batch.lengths_B, strict=True))
    for skill in range(len(batch.skills)):
        rows = [int(part.row_N[part.skill_N == skill].unique().numel()) for part in dealt]
        assert max(rows) - min(rows) <= 1
    assert_close(sum(part.teacher_scale_N.sum() for part in dealt), batch.teacher_scale_N.sum())


def test_mini_batches_are_plain_steps_one_after_the_other(learner, make_batch, tiny_model, objective):
    batch = make_batch()
    trained = learner(mini_batches=2)
    trained.step(batch)
    assert trained.steps_done == 1, "the schedule counts batches"
    plain = tiny_model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    first, second = deal_rows(batch, 2)
    with torch.no_grad():
        before = _score(plain, second)
    for part, old in ((first, {}), (second, {"old_logprobs_N": before[0], "old_topk_logprobs_NK": before[1]})):
        loss = 2 * compute_loss(Streams(part, *_score(plain, part), **old), objective()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for ours, theirs in zip(trained.module.parameters(), plain.parameters(), strict=True):
        assert_close(ours.detach(), theirs.detach(), atol=1e-5, rtol=0)


def test_metrics_are_those_of_the_whole_batch(learner, make_batch):
    batch = make_batch()
    whole = learner(lr=1e-12).step(batch)
    dealt = learner(lr=1e-12, mini_batches=3).step(batch)
    assert whole.keys() == dealt.keys()
    for name in whole.keys() - {"learner/grad_norm"}:
        assert dealt[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_more_mini_batches_than_rows_are_as_many_steps_as_rows(learner, make_batch):
    trained = learner(mini_batches=50)
    trained.step(make_batch(count=2))
    steps = {int(state["step"]) for state in trained._engine.optimizer.state.values()}
    assert steps == {2}


def _score(model, batch):
    hidden = hidden_states(model, batch.input_ids_BT, batch.row_N, batch.position_N)
    return plain_logprobs(hidden, output_head(model), batch.target_N, batch.teacher_topk_ids_NK)
