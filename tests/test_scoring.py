"""Judging: a verifier's own mistake is a fault of the machinery, never a score and never a crash in training."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from agentopd.contracts import Evidence
from agentopd.errors import TeacherError
from agentopd.scoring import gather_evidence, judge
from agentopd.types import Episode, Message, StepCertificate, StopReason, Task, Turn, Verdict, VerdictStatus
from tests.tiny import episode


class Certifying:
    name, version, needs_sandbox = "certifying", "1", False

    def __init__(self, *certificates):
        self.certificates = certificates

    async def verify(self, task, episode, sandbox):
        return Verdict(outcome=1.0, reward=1.0, status=VerdictStatus.OK, certificates=self.certificates)


def verdict(*certificates):
    task = Task(id="t", env="e", prompt=(Message(role="user", content="?"),))
    turn = Turn(token_ids=(1, 2), rollout_logprobs=(0.0, 0.0))
    episode = Episode(
        id="x", task_id="t", task_hash="", env="e", split="train", prompt_ids=(0,), turns=(turn,),
        stop_reason=StopReason.COMPLETED,
    )  # fmt: skip
    return asyncio.run(judge(task, episode, Certifying(*certificates), None))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"turn": 3}, "names turn 3, and the episode has 1"),
        ({"turn": 0, "start": 1, "end": 9}, "covers tokens [1, 9) of turn 0, which has 2"),
    ],
)
def test_a_certificate_of_nothing_is_the_verifiers_fault(fields, why):
    found = verdict(StepCertificate(sign=1, kind="odd", **fields))
    assert (found.outcome, found.reward, found.status) == (None, None, VerdictStatus.INFRA_ERROR)
    assert found.detail == f"verifier 'certifying' on task 't': its 'odd' certificate {why}"


def test_sound_certificates_pass():
    assert verdict(StepCertificate(turn=0, sign=-1, kind="x", start=1)).outcome == 1.0
    assert verdict().outcome == 1.0


class Constant:
    """A teacher that says one number of every token."""

    max_top_k = 0

    def __init__(self, name, value):
        self.name, self.value = name, value

    async def score(self, episodes, top_k):
        return [Evidence(self.name, np.full(e.num_sampled, self.value, np.float32)) for e in episodes]


def gathered(*skills, known=(), **routes):
    teachers = SimpleNamespace(
        routes=routes, by_key={"sums": Constant("sums", -1.0), "tools": Constant("tools", -2.0)}, views={}
    )
    episodes = [episode(seed).model_copy(update={"skill": skill}) for seed, skill in enumerate(skills)]
    return asyncio.run(gather_evidence(episodes, teachers, 0, {}, known))


def test_every_skill_is_scored_by_the_teacher_it_is_routed_to():
    found = gathered("b", "a", "c", "b", a="sums", b="tools")
    assert [None if x is None else x.teacher for x in found] == ["tools", "sums", None, "tools"]
    assert found[0].teacher_logprobs.tolist() == [-2.0] * 7


def test_what_is_known_is_not_asked_again():
    known = [None, Evidence("before", np.zeros(7, np.float32)), None]
    found = gathered("a", "a", "c", known=known, a="sums")
    assert [None if x is None else x.teacher for x in found] == ["sums", "before", None]


def test_a_route_to_nobody_is_an_error_that_names_who_there_is():
    with pytest.raises(TeacherError, match=r"routed to teacher 'toools', .* \(known: sums, tools\)"):
        gathered("a", a="toools")
