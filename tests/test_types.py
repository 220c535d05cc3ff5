"""Records: aligned, immutable, and honest about what they do not know."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agentopd.types import Episode, Message, Privileged, StepCertificate, StopReason, Task, Turn, Verdict, VerdictStatus

ids = st.lists(st.integers(0, 500), max_size=6)


def turns(draw_ids, observations):
    return tuple(
        Turn(token_ids=tuple(a), rollout_logprobs=tuple(-0.5 for _ in a), observation_ids=tuple(b))
        for a, b in zip(draw_ids, observations, strict=True)
    )


def episode(prompt, turns_):
    return Episode(
        id="e", task_id="t", task_hash="h", env="math", split="train", prompt_ids=tuple(prompt), turns=turns_,
        stop_reason=StopReason.COMPLETED,
    )  # fmt: skip


@given(ids, st.lists(st.tuples(ids, ids), max_size=4))
def test_streams_stay_aligned_and_the_mask_is_one_only_on_sampled_ids(prompt, pairs):
    built = episode(prompt, turns([a for a, _ in pairs], [b for _, b in pairs]))
    n = len(built.token_ids)
    assert len(built.loss_mask) == len(built.rollout_logprobs) == len(built.turn_ids) == n
    sampled = [token for token, keep in zip(built.token_ids, built.loss_mask, strict=True) if keep]
    assert sampled == [token for a, _ in pairs for token in a]
    assert sum(built.loss_mask) == built.num_sampled
    assert all((turn >= 0) == bool(keep) for turn, keep in zip(built.turn_ids, built.loss_mask, strict=True))


@given(ids, st.lists(st.tuples(ids, ids), max_size=3))
def test_an_episode_survives_disk(prompt, pairs):
    built = episode(prompt, turns([a for a, _ in pairs], [b for _, b in pairs]))
    assert Episode.model_validate_json(built.model_dump_json()) == built


def test_records_are_frozen_and_strict():
    message = Message(role="user", content="hi")
    with pytest.raises(ValidationError):
        message.content = "changed"
    with pytest.raises(ValidationError):
        Message(role="user", content="hi", colour="red")


def test_a_turn_refuses_misaligned_logprobs():
    with pytest.raises(ValidationError, match="2 token_ids but 1 rollout_logprobs"):
        Turn(token_ids=(1, 2), rollout_logprobs=(0.0,))


def test_a_turn_refuses_misaligned_evidence():
    with pytest.raises(ValidationError, match="2 token_ids but 1 token_ends"):
        Turn(token_ids=(1, 2), rollout_logprobs=(0.0, 0.0), token_ends=(3,))
    with pytest.raises(ValidationError, match="0 calls but 1 call_spans"):
        Turn(token_ids=(), rollout_logprobs=(), call_spans=((0, 1),))


@pytest.mark.parametrize("fields", [{"turn": -1}, {"start": -1}, {"end": 0}, {"sign": 0}])
def test_a_certificate_refuses_what_it_cannot_mean(fields):
    with pytest.raises(ValidationError):
        StepCertificate(**{"turn": 0, "sign": 1, "kind": "x", **fields})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"turn": 1}, ""),
        ({"turn": 0, "start": 1, "end": 2}, ""),
        ({"turn": 2}, "names turn 2, and the episode has 2"),
        ({"turn": 0, "start": 2, "end": 2}, "covers tokens [2, 2) of turn 0, which has 2"),
        ({"turn": 0, "end": 3}, "covers tokens [0, 3) of turn 0, which has 2"),
        ({"turn": 0, "start": 7}, "covers tokens [7, 2) of turn 0, which has 2"),
    ],
)
def test_a_certificate_knows_whether_it_covers_anything(fields, problem):
    built = episode([0], turns([(1, 2), ()], [(), ()]))
    assert StepCertificate(sign=1, kind="x", **fields).problem(built) == problem


def test_the_student_view_holds_no_secret():
    task = Task(
        id="t", env="math", prompt=(Message(role="user", content="q"),), hidden={"answer": "CANARY"},
        privileged=Privileged(hint="CANARY", solution="CANARY"),
    )  # fmt: skip
    assert "CANARY" not in task.student_view().model_dump_json()
    assert task.student_view().id == "t"


def test_the_hash_follows_content_not_origin():
    task = Task(id="t", env="math", prompt=(), hidden={"answer": "1"})
    assert task.hash == task.model_copy().hash
    assert task.hash != task.model_copy(update={"hidden": {"answer": "2"}}).hash


@pytest.mark.parametrize("status", [VerdictStatus.INFRA_ERROR, VerdictStatus.AMBIGUOUS, VerdictStatus.TASK_ERROR])
def test_what_could_not_be_judged_is_never_a_score(status):
    verdict = Verdict.unjudged(status, "sandbox died")
    assert verdict.outcome is None and verdict.reward is None and not verdict.passed
    with pytest.raises(ValidationError):
        Verdict(outcome=0.0, status=status, reward=0.0)


@pytest.mark.parametrize(
    "numbers", [{"outcome": math.nan}, {"reward": math.nan}, {"reward": math.inf}, {"components": {"size": math.nan}}]
)
def test_what_is_not_a_number_is_no_verdict(numbers):
    with pytest.raises(ValidationError):
        Verdict(**{"outcome": 1.0, "status": VerdictStatus.OK, "reward": 1.0, **numbers})


def test_a_judged_status_needs_an_outcome():
    with pytest.raises(ValidationError):
        Verdict(outcome=None, status=VerdictStatus.WRONG)
    with pytest.raises(ValidationError):
        Verdict(outcome=1.0, status=VerdictStatus.OK, reward=None)
