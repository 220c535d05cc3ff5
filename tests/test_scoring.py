"""Judging: a verifier's own mistake is a fault of the machinery, never a score and never a crash in training."""

import asyncio

import pytest

from agentopd.scoring import judge
from agentopd.types import Episode, Message, StepCertificate, StopReason, Task, Turn, Verdict, VerdictStatus


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
