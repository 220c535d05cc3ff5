"""Stored teacher log-probs: the same to the bit, and never another teacher's."""

import asyncio

import numpy as np
import pytest

from agentopd.contracts import Evidence, Teacher
from agentopd.errors import ConfigError, TeacherError
from agentopd.teachers.stored import StoredTeacher, StoreHeader, episode_digest
from agentopd.types import Episode, StopReason, Turn

HEADER = StoreHeader(teacher="T", tokenizer="tok", top_k=3, student="S")


class Live:
    """A teacher that counts how often it is asked."""

    name, max_top_k = "live", None

    def __init__(self):
        self.asked = 0

    async def score(self, episodes, top_k):
        self.asked += len(episodes)
        rng = np.random.default_rng(0)
        return [
            Evidence(
                "live",
                rng.normal(size=n).astype(np.float32),
                rng.integers(0, 9, (n, top_k)),
                rng.normal(size=(n, top_k)).astype(np.float32),
            )
            for n in (episode.num_sampled for episode in episodes)
        ]

    async def aclose(self):
        pass


def episode(*ids):
    turn = Turn(token_ids=ids, rollout_logprobs=(-1.0,) * len(ids))
    return Episode(
        id="e",
        task_id="t",
        task_hash="h",
        env="toy",
        split="train",
        prompt_ids=(1, 2),
        turns=(turn,),
        stop_reason=StopReason.COMPLETED,
    )


def score(teacher, episodes, top_k=3):
    return asyncio.run(teacher.score(episodes, top_k))


def test_scored_once_and_read_back_to_the_bit(tmp_path):
    live = Live()
    first = StoredTeacher("default", tmp_path, HEADER, live)
    assert isinstance(first, Teacher)
    (made,) = score(first, [episode(3, 4, 5)])
    (again,) = score(StoredTeacher("default", tmp_path, HEADER), [episode(3, 4, 5)])
    assert live.asked == 1
    for name in ("teacher_logprobs", "topk_ids", "topk_logprobs"):
        np.testing.assert_array_equal(getattr(made, name), getattr(again, name))
        assert getattr(made, name).dtype == getattr(again, name).dtype
    assert score(first, [episode(3, 4, 5)], top_k=2)[0].topk_ids.shape == (3, 2)
    assert score(first, [episode(3, 4, 5)], top_k=0)[0].topk_ids is None
    assert live.asked == 1


def test_an_episode_that_was_never_scored_is_a_fault(tmp_path):
    score(StoredTeacher("default", tmp_path, HEADER, Live()), [episode(3)])
    with pytest.raises(TeacherError, match="no stored log-probs for episode 'e'"):
        score(StoredTeacher("default", tmp_path, HEADER), [episode(4)])


@pytest.mark.parametrize("field", ["teacher", "tokenizer", "student"])
def test_another_teacher_tokenizer_or_student_is_refused(field, tmp_path):
    score(StoredTeacher("default", tmp_path, HEADER, Live()), [episode(3)])
    other = HEADER.model_copy(update={field: "other"})
    with pytest.raises(ConfigError, match=f"stored with {field}.*'other'.*allow_mismatch"):
        StoredTeacher("default", tmp_path, other)
    StoredTeacher("default", tmp_path, other, allow_mismatch=True)


def test_a_smaller_k_and_a_folder_without_header_are_refused(tmp_path):
    live = StoredTeacher("default", tmp_path, HEADER, Live())
    assert not list(tmp_path.iterdir())  # a run's folder must still be free when the run begins
    score(live, [episode(3)])
    with pytest.raises(ConfigError, match="top-K 3, but the objective reads 5"):
        StoredTeacher("default", tmp_path, HEADER.model_copy(update={"top_k": 5}))
    with pytest.raises(ConfigError, match="no stored teacher log-probs"):
        StoredTeacher("default", tmp_path / "none", HEADER)


def test_the_address_is_the_tokens_and_which_were_sampled():
    assert episode_digest(episode(3, 4)) == episode_digest(episode(3, 4).model_copy(update={"id": "f"}))
    assert episode_digest(episode(3, 4)) != episode_digest(episode(4, 3))
    moved = episode(4).model_copy(update={"prompt_ids": (1, 2, 3)})
    assert moved.token_ids == episode(3, 4).token_ids
    assert episode_digest(moved) != episode_digest(episode(3, 4))
