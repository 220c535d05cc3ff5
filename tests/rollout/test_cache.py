"""Judged rollouts on disk, addressed by content."""

import pytest

from agentopd.errors import UserError
from agentopd.rollout.cache import RolloutCache, RolloutKey
from agentopd.types import Episode, StopReason, Turn, Verdict, VerdictStatus

KEY = RolloutKey(
    task_hash="abc",
    skill="math",
    actor="teacher@1",
    judge="math@1/math@1",
    num=1,
    temperature=1.0,
    top_p=1.0,
    codec="HermesJSON",
    max_malformed=3,
    seed=0,
)
JUDGED = (
    Episode(
        id="e",
        task_id="t",
        task_hash="abc",
        env="math",
        split="train",
        prompt_ids=(1, 2),
        turns=(Turn(token_ids=(3, 4), rollout_logprobs=(-0.123456789012345, -1e-9)),),
        stop_reason=StopReason.COMPLETED,
    ),
    Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0),
)


def test_what_is_put_comes_back_to_the_last_digit(tmp_path):
    cache = RolloutCache(tmp_path)
    assert cache.get(KEY) is None
    cache.put(KEY, [JUDGED])
    assert RolloutCache(tmp_path).get(KEY) == [JUDGED]
    assert not list(tmp_path.rglob(".partial-*"))


@pytest.mark.parametrize("text", ["x\u2028y", "x\u2029y", "x\x85y", "x\x0cy", "x\ny\r\nz"])
def test_no_character_of_a_turn_ends_a_line(text, tmp_path):
    episode, verdict = JUDGED
    (turn,) = episode.turns
    judged = (episode.model_copy(update={"turns": (turn.model_copy(update={"text": text}),)}), verdict)
    RolloutCache(tmp_path).put(KEY, [judged, JUDGED])
    assert RolloutCache(tmp_path).get(KEY) == [judged, JUDGED]


@pytest.mark.parametrize("field", list(RolloutKey.model_fields))
def test_every_field_is_part_of_the_address(field, tmp_path):
    value = getattr(KEY, field)
    other = KEY.model_copy(update={field: f"{value}x" if isinstance(value, str) else value + 1})
    cache = RolloutCache(tmp_path)
    cache.put(KEY, [JUDGED])
    assert cache.get(other) is None


def test_a_file_of_another_key_and_a_broken_file_are_refused(tmp_path):
    cache = RolloutCache(tmp_path)
    cache.put(KEY, [JUDGED])
    path = cache.path(KEY)
    path.write_text(path.read_text().replace("teacher@1", "teacher@2", 1))
    with pytest.raises(UserError, match="another key"):
        cache.get(KEY)
    path.write_text("not json\n")
    with pytest.raises(UserError, match="delete it"):
        cache.get(KEY)
