"""The local teacher scores exactly the tokens the student sampled."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from agentopd.contracts import Teacher
from agentopd.errors import TeacherError
from agentopd.teachers.local import LocalTeacher, with_outputs_swapped
from agentopd.types import Turn
from tests.tiny import episode, qwen3

VOCAB = 64


@pytest.fixture(scope="module")
def model():
    return qwen3(VOCAB, max_position_embeddings=128).requires_grad_(False)


def score(teacher, episodes, top_k):
    return asyncio.run(teacher.score(episodes, top_k))


def full_logprobs(model, one):
    logits = model(input_ids=torch.tensor([one.token_ids])).logits[0].log_softmax(-1)
    at = np.flatnonzero(one.loss_mask)
    return logits[at - 1], torch.tensor(one.token_ids)[at]


def test_evidence_is_the_models_own_distribution_before_each_sampled_token(model):
    teacher = LocalTeacher("toy", model)
    assert isinstance(teacher, Teacher)
    episodes = [episode(seed) for seed in range(4)]
    for one, found in zip(episodes, score(teacher, episodes, 5), strict=True):
        logprobs, targets = full_logprobs(model, one)
        np.testing.assert_allclose(found.teacher_logprobs, logprobs.gather(1, targets[:, None])[:, 0], atol=1e-5)
        top = logprobs.topk(5)
        np.testing.assert_array_equal(found.topk_ids, top.indices)
        np.testing.assert_allclose(found.topk_logprobs, top.values, atol=1e-5)
        assert (found.topk_ids.dtype, found.topk_logprobs.dtype) == (np.int64, np.float32)


def test_outputs_of_two_tokens_are_swapped_and_the_model_is_left_alone(model):
    one = episode(0)
    before, _ = full_logprobs(model, one)
    swapped, _ = full_logprobs(with_outputs_swapped(model, 3, 9), one)
    order = torch.arange(VOCAB)
    order[[3, 9]] = order[[9, 3]]
    torch.testing.assert_close(swapped, before[:, order])
    torch.testing.assert_close(full_logprobs(model, one)[0], before)


def test_batching_changes_nothing_but_rounding(model):
    episodes = [episode(seed, sizes=(seed + 1,)) for seed in range(6)]
    together = score(LocalTeacher("toy", model), episodes, 3)
    apart = score(LocalTeacher("toy", model, batch_tokens=1), episodes, 3)
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a.teacher_logprobs, b.teacher_logprobs, atol=1e-5)
        np.testing.assert_array_equal(a.topk_ids, b.topk_ids)


def test_k_is_capped_to_the_vocabulary_and_zero_leaves_it_out(model):
    teacher = LocalTeacher("toy", model)
    assert teacher.max_top_k == VOCAB
    (whole,) = score(teacher, [episode(0)], 1000)
    assert whole.topk_ids.shape == (7, VOCAB)
    np.testing.assert_allclose(np.exp(whole.topk_logprobs).sum(-1), 1, atol=1e-5)
    (bare,) = score(teacher, [episode(0)], 0)
    assert bare.topk_ids is None
    assert bare.topk_logprobs is None


def test_padding_rows_of_the_vocabulary_take_no_mass(model):
    (found,) = score(LocalTeacher("toy", model, vocab_size=60), [episode(1, vocab_size=60)], 60)
    assert found.topk_ids.max() < 60
    np.testing.assert_allclose(np.exp(found.topk_logprobs).sum(-1), 1, atol=1e-5)


def test_padding_rows_are_impossible_where_the_student_samples_or_proposes_them(model):
    teacher, fine, odd = LocalTeacher("toy", model, vocab_size=60), episode(1, vocab_size=60), episode(0, vocab_size=60)
    first = odd.turns[0].model_copy(update={"token_ids": (61, *odd.turns[0].token_ids[1:])})
    odd = odd.model_copy(update={"turns": (first, *odd.turns[1:])})
    found = score(teacher, [fine, odd], 4)
    assert np.isneginf(found[1].teacher_logprobs).tolist() == [True] + [False] * 6
    (alone,) = score(teacher, [fine], 4)
    np.testing.assert_allclose(found[0].teacher_logprobs, alone.teacher_logprobs, atol=1e-5)
    (candidates,) = asyncio.run(teacher.score_ids([fine], [np.tile([5, 60, 63], (7, 1))]))
    assert np.isneginf(candidates).tolist() == [[False, True, True]] * 7


def test_an_episode_without_samples_has_empty_evidence(model):
    found = score(LocalTeacher("toy", model), [episode(0, sizes=()), episode(1)], 4)
    assert found[0].teacher_logprobs.shape == (0,)
    assert found[0].topk_ids.shape == (0, 4)
    assert found[1].teacher_logprobs.shape == (7,)


def test_a_number_that_is_not_finite_is_handed_on(model):
    broken = Qwen3ForCausalLM(model.config).eval().requires_grad_(False)
    broken.model.norm.weight.fill_(float("nan"))
    (found,) = score(LocalTeacher("toy", broken), [episode(0)], 4)
    assert np.isnan(found.teacher_logprobs).all()


def test_ids_outside_the_teachers_vocabulary_are_a_fault(model):
    turn = Turn(token_ids=(VOCAB + 1, 5), rollout_logprobs=(-1.0, -1.0))
    with pytest.raises(TeacherError, match="toy"):
        score(LocalTeacher("toy", model), [episode(0).model_copy(update={"turns": (turn,)})], 4)
