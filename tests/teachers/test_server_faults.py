"""A teacher's server under faults: what is asked again, what ends the run or the server, what is not done twice."""

import asyncio
import http.client
import socket
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from agentopd import commands
from agentopd.config.teachers import ServedTeacherConfig
from agentopd.contracts import Evidence
from agentopd.errors import InfraError, TeacherEndedError, TeacherError
from agentopd.teachers import wire
from agentopd.teachers.local import LocalTeacher
from agentopd.teachers.once import Once, Reply
from agentopd.teachers.served import Needs, ServedTeacher
from agentopd.teachers.server import Identity, TeacherServer
from agentopd.types import Episode
from tests.tiny import episode, qwen3

VOCAB = 64


class Scripted:
    """Meets ``faults`` one after the other, then answers -1 everywhere, once it is ``let``."""

    name, max_top_k = "scripted", 0

    def __init__(self, *faults: Exception, let: bool = True) -> None:
        self.faults, self.asked = list(faults), 0
        self.let, self.began = threading.Event(), threading.Event()
        if let:
            self.let.set()

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        self.asked += 1
        self.began.set()
        await asyncio.to_thread(self.let.wait, 60)
        if self.faults:
            raise self.faults.pop(0)
        return [Evidence("", np.full(e.num_sampled, -1.0, np.float32)) for e in episodes]

    async def aclose(self) -> None:
        pass


@pytest.fixture
def serve():
    servers: list[TeacherServer] = []

    def start(teacher, kind=TeacherServer):
        servers.append(kind(teacher, Identity("weights", "ids")))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(server: TeacherServer, shown: Episode, **keys) -> Evidence:
    far = ServedTeacher("far", ServedTeacherConfig(base_url=server.base_url, **keys), Needs("ids", VOCAB))
    (found,) = asyncio.run(far.score([shown], 0))
    return found


def test_a_fault_of_the_machinery_is_asked_again(serve):
    teacher = Scripted(TeacherError("teacher 'toy': OutOfMemoryError: CUDA out of memory"), RuntimeError("other"))
    assert ask(serve(teacher), episode(1)).teacher_logprobs.tolist() == [-1.0] * 7
    assert teacher.asked == 3


def test_a_question_that_no_try_will_answer_ends_at_once(serve):
    teacher = LocalTeacher("toy", qwen3(VOCAB).requires_grad_(False))
    turn = episode(0).turns[0].model_copy(update={"token_ids": (5, VOCAB + 6, 7, 8)})
    with pytest.raises(TeacherError, match=f"422 teacher 'toy' has {VOCAB} token ids, .* has the id {VOCAB + 6}"):
        ask(serve(teacher), episode(0).model_copy(update={"turns": (turn,)}))


def test_ids_that_do_not_fit_the_episode_are_no_question(serve):
    server = serve(LocalTeacher("toy", qwen3(VOCAB).requires_grad_(False)))
    status, told = server.answer("/score_ids", wire.pack_episodes([episode(0)], ids=[[[1]]]))
    assert status == 400 and b"another number of sampled tokens" in told


def test_a_question_asked_again_joins_the_work_under_way(serve):
    teacher, tries = Scripted(let=False), []

    class Counting(TeacherServer):
        def answer(self, path: str, body: bytes) -> Reply:
            tries.append(body)
            if len(tries) == 3:
                teacher.let.set()
            return super().answer(path, body)

    assert ask(serve(teacher, Counting), episode(1), timeout_s=0.3).teacher_logprobs.tolist() == [-1.0] * 7
    assert teacher.asked == 1 and len(tries) >= 3 and len(set(tries)) == 1


def test_the_same_episode_asked_twice_is_scored_twice(serve):
    """Doctor compares the answers."""
    teacher = Scripted()
    server = serve(teacher)
    for _ in range(2):
        ask(server, episode(1))
    assert teacher.asked == 2


def test_an_answer_that_came_too_late_is_kept_for_who_asks_again(serve):
    delivered = threading.Event()

    class Telling(TeacherServer):
        def delivered(self, path: str, body: bytes) -> None:
            super().delivered(path, body)
            delivered.set()

    teacher = Scripted(let=False)
    server = serve(teacher, Telling)
    host, port = server.base_url.removeprefix("http://").split(":")
    body = wire.pack_episodes([episode(1)], top_k=0)
    with socket.create_connection((host, int(port))) as impatient:
        impatient.sendall(b"POST /score HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert teacher.began.wait(60)
    teacher.let.set()

    def again() -> bytes:
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request("POST", "/score", body)
        answer = connection.getresponse().read()
        connection.close()
        return answer

    (found,) = wire.split(again())
    assert wire.unpack_evidence(found, "t").teacher_logprobs.tolist() == [-1.0] * 7
    assert delivered.wait(60) and teacher.asked == 1
    again()
    assert teacher.asked == 2, "an answer that arrived is forgotten"


def test_what_is_kept_is_bounded_and_faults_are_not_kept():
    once, done = Once(most_kept=2), []

    def work(name: bytes, status: int = 200) -> Reply:
        done.append(name)
        return status, name

    for name in (b"a", b"b", b"c", b"c", b"a"):
        assert once.ask(name, lambda name=name: work(name)) == (200, name)
    assert done == [b"a", b"b", b"c", b"a"]
    for _ in range(2):
        once.ask(b"bad", lambda: work(b"bad", 503))
    assert done[-2:] == [b"bad", b"bad"]


def test_a_server_ends_with_its_teacher(serve, monkeypatch):
    server = serve(Scripted(TeacherEndedError("vLLM's process is dead")))
    with pytest.raises(TeacherError, match="503 TeacherEndedError: vLLM's process is dead"):
        ask(server, episode(1), outage_s=0)
    monkeypatch.setattr("agentopd.serving.serve_teacher", lambda *args: server)
    with pytest.raises(InfraError, match="stopped, for a new process to take over: vLLM's process is dead"):
        commands.serve(commands.ServeOptions("toy", "hf", "float32", "127.0.0.1", 0))
