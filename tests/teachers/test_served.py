"""A teacher behind real HTTP against the same teacher in process: equal evidence, small answers, patience."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.config import RunConfig
from agentopd.config.teachers import ServedTeacherConfig
from agentopd.contracts import CandidateTeacher, Evidence, FloatArray, IntArray, Teacher
from agentopd.doctor import Diagnosis, diagnose
from agentopd.errors import ConfigError, TeacherError
from agentopd.models import load_tokenizer, vocabulary_hash
from agentopd.teachers import served, wire
from agentopd.teachers.local import LocalTeacher
from agentopd.teachers.served import Needs, ServedTeacher
from agentopd.teachers.server import Identity, TeacherServer
from agentopd.types import Episode
from tests.tiny import episode, qwen3, served_run

VOCAB = 64


@pytest.fixture(scope="module")
def local() -> LocalTeacher:
    return LocalTeacher("toy", qwen3(VOCAB, initializer_range=0.3).requires_grad_(False))


Serve = Callable[..., TeacherServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[TeacherServer] = []

    def start(teacher: Teacher, **options: Any) -> TeacherServer:
        servers.append(TeacherServer(teacher, Identity("weights", "ids"), **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def client(server: TeacherServer, **keys: Any) -> ServedTeacher:
    return ServedTeacher("far", ServedTeacherConfig(base_url=server.base_url, **keys), Needs("ids", VOCAB))


def score(teacher: Teacher, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
    return asyncio.run(teacher.score(episodes, top_k))


def test_served_evidence_is_the_teachers_own(local, serve):
    far = client(serve(local), batch_tokens=256)
    assert isinstance(far, Teacher) and far.max_top_k == VOCAB and far.model == "weights"
    episodes = [*(episode(seed) for seed in range(30)), episode(40, sizes=())]
    for near, found in zip(score(local, episodes, 8), score(far, episodes, 8), strict=True):
        assert found.teacher == "far"
        np.testing.assert_allclose(found.teacher_logprobs, near.teacher_logprobs, atol=1e-5)
        if len(near.teacher_logprobs):
            np.testing.assert_array_equal(found.topk_ids, near.topk_ids)
            np.testing.assert_allclose(found.topk_logprobs, near.topk_logprobs, atol=0.008)
            assert (found.topk_ids.dtype, found.topk_logprobs.dtype) == (np.int64, np.float32)
    assert score(far, episodes[:1], 0)[0].topk_ids is None
    assert score(far, episodes[:1], 1000)[0].topk_ids.shape == (7, VOCAB)


def test_the_students_own_candidates_are_scored(local, serve):
    far = client(serve(local))
    episodes = [episode(seed) for seed in range(3)]
    ids = [np.random.default_rng(i).integers(0, VOCAB, (7, 5)) for i in range(3)]
    assert isinstance(far, CandidateTeacher)
    near, found = (asyncio.run(teacher.score_ids(episodes, ids)) for teacher in (local, far))
    for a, b in zip(near, found, strict=True):
        np.testing.assert_allclose(a, b, atol=0.008)


class SampledOnly:
    """A teacher that knows nothing of candidates, answers what it is told to, and may take its time."""

    name, max_top_k = "plain", 0

    def __init__(self, value: float = -1.0, extra: int = 0, seconds: float = 0.0) -> None:
        self.value, self.extra, self.seconds = value, extra, seconds

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        await asyncio.sleep(self.seconds)
        return [Evidence(self.name, np.full(e.num_sampled + self.extra, self.value, np.float32)) for e in episodes]

    async def aclose(self) -> None:
        pass


def test_a_teacher_that_cannot_score_candidates_says_so(serve):
    far = client(serve(SampledOnly()))
    with pytest.raises(TeacherError, match="cannot score ids that it did not choose"):
        asyncio.run(far.score_ids([episode(0)], [np.zeros((7, 2), np.int64)]))


class Padded:
    """A teacher that says of every token, and of the ids that are given, that a row of its padding comes first."""

    name, max_top_k = "padded", 3

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        ids, logprobs = [VOCAB, 5, VOCAB - 1][:top_k], [-0.1, -3.0, -4.0][:top_k]
        return [
            Evidence("", np.full(n, -1.0, np.float32), np.tile(ids, (n, 1)), np.tile(np.float32(logprobs), (n, 1)))
            for n in (e.num_sampled for e in episodes)
        ]

    async def score_ids(self, episodes: Sequence[Episode], ids: Sequence[IntArray]) -> list[FloatArray]:
        return [np.full(chosen.shape, -1.0, np.float32) for chosen in ids]

    async def aclose(self) -> None:
        pass


def test_ids_beyond_the_students_vocabulary_never_reach_the_objective(serve):
    far = client(serve(Padded()))
    odd = episode(0)
    first = odd.turns[0].model_copy(update={"token_ids": (VOCAB, *odd.turns[0].token_ids[1:])})
    odd = odd.model_copy(update={"turns": (first, *odd.turns[1:])})
    (found,) = score(far, [odd], 3)
    assert found.topk_ids.tolist() == [[0, 5, VOCAB - 1]] * 7
    assert np.isneginf(found.topk_logprobs).tolist() == [[True, False, False]] * 7
    assert np.isneginf(found.teacher_logprobs).tolist() == [True] + [False] * 6
    (candidates,) = asyncio.run(far.score_ids([odd], [np.tile([5, VOCAB + 2], (7, 1))]))
    assert np.isneginf(candidates).tolist() == [[False, True]] * 7


@pytest.mark.parametrize(
    ("needs", "told"),
    [
        ({"student_top_k": 8}, r"teacher 'far' at http://.* the student's own 8 a token: serve it with --kind hf"),
        ({"top_k": 8}, "teacher 'far' at http://.* at most 0 ids a token, .* needs 8: serve it with --top-k 8"),
    ],
)
def test_a_teacher_that_gives_less_than_the_objective_reads_is_refused_at_once(serve, needs, told):
    config = ServedTeacherConfig(base_url=serve(SampledOnly()).base_url)
    with pytest.raises(ConfigError, match=told):
        ServedTeacher("far", config, Needs("ids", VOCAB, **needs))


def test_a_top_k_beyond_the_vocabulary_is_the_vocabulary(local, serve):
    config = ServedTeacherConfig(base_url=serve(local).base_url)
    assert ServedTeacher("far", config, Needs("ids", VOCAB, top_k=1000, student_top_k=1000)).max_top_k == VOCAB


@pytest.mark.parametrize("preset", ["rethink_opd", "prefix_opd"])
@pytest.mark.parametrize("scores_ids", [True, False])
def test_doctor_tells_whether_a_served_teacher_can_score_the_students_candidates(tmp_path, preset, scores_ids):
    identity = Identity("weights", vocabulary_hash(load_tokenizer("micro/student")))
    model = LocalTeacher("toy", qwen3(512).requires_grad_(False))
    server = TeacherServer(model if scores_ids else SampledOnly(), identity)
    try:
        (found,) = served_or_failed(served_run(tmp_path, preset, server.base_url))
    finally:
        server.close()
    assert found.level == ("ok" if scores_ids else "fail")
    assert ("cannot score ids that it did not choose" in found.detail) != scores_ids


def served_or_failed(config: RunConfig) -> list[Diagnosis]:
    return [item for item in diagnose(config) if item.check.startswith("served teacher")]


def test_an_answer_of_another_length_is_a_fault(serve):
    with pytest.raises(TeacherError, match="8 tokens"):
        score(client(serve(SampledOnly(extra=1))), [episode(0)], 0)


def test_a_number_that_is_not_finite_is_handed_on(serve):
    (found,) = score(client(serve(SampledOnly(float("nan")))), [episode(0)], 0)
    assert np.isnan(found.teacher_logprobs).all()


def test_a_busy_teacher_slows_its_clients_down(serve):
    far = client(serve(SampledOnly(seconds=0.05), max_waiting=2), concurrency=6, batch_tokens=256)
    episodes = [episode(seed, sizes=(120, 100)) for seed in range(6)]
    assert [len(found.teacher_logprobs) for found in score(far, episodes, 0)] == [220] * 6


def test_no_more_questions_are_asked_at_once_than_it_says_from_whatever_loop(serve, monkeypatch):
    far = client(serve(SampledOnly(seconds=0.05)), concurrency=1, batch_tokens=256)
    plain, under_way, seen = served.ask, set[str](), list[int]()

    async def counted(*question: Any) -> bytes:
        under_way.add(name := uuid4().hex)
        seen.append(len(under_way))
        try:
            return await plain(*question)
        finally:
            under_way.remove(name)

    monkeypatch.setattr(served, "ask", counted)
    threads = [threading.Thread(target=score, args=(far, [episode(seed)], 0)) for seed in range(4)]
    for thread in threads:
        thread.start()
    score(far, [episode(4)], 0)
    for thread in threads:
        thread.join()
    assert seen == [1] * 5


def test_a_run_waits_for_a_teacher_that_was_away_and_says_so(local, serve, caplog):
    first = serve(local)
    far = client(first)
    port = int(first.base_url.rpartition(":")[2])
    near = score(local, [episode(1)], 4)
    first.close()

    def later() -> None:
        time.sleep(2.0)
        serve(local, port=port)

    thread = threading.Thread(target=later)
    thread.start()
    with caplog.at_level(logging.WARNING, "agentopd"):
        (found,) = score(far, [episode(1)], 4)
    thread.join()
    np.testing.assert_array_equal(found.topk_ids, near[0].topk_ids)
    assert ["is away" in m or "is back" in m for m in caplog.messages] == [True, True]


def test_an_outage_without_end_is_a_fault(local, serve):
    server = serve(local)
    far = client(server, outage_s=0.5)
    server.close()
    with pytest.raises(TeacherError, match="teacher 'far' was away for"):
        score(far, [episode(1)], 4)


def test_another_vocabulary_is_refused(local, serve):
    config = ServedTeacherConfig(base_url=serve(local).base_url)
    with pytest.raises(ConfigError, match="disagree on token ids"):
        ServedTeacher("far", config, Needs("other ids", VOCAB))
    with pytest.raises(ConfigError, match="write http://HOST:PORT"):
        ServedTeacher("far", ServedTeacherConfig(base_url="far:1"), Needs("ids", VOCAB))


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"\xff", b"[1]", b'{"model": "weights"}'])
def test_what_is_no_teacher_is_told_by_its_address(body):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            with pytest.raises(ConfigError, match=f"teachers.far.base_url '{address}' .*`agentopd serve` prints"):
                ServedTeacher("far", ServedTeacherConfig(base_url=address), Needs("ids", VOCAB))
        finally:
            server.shutdown()
            thread.join()


@given(st.integers(0, 20), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_packing_keeps_ids_exactly_and_log_probs_to_half_precision(n, k, seed):
    rng = np.random.default_rng(seed)
    sent = Evidence(
        "t",
        -rng.exponential(3, n).astype(np.float32),
        rng.integers(0, wire.MAX_ID + 1, (n, k)),
        -rng.exponential(3, (n, k)).astype(np.float32),
    )
    found = wire.unpack_evidence(wire.pack_evidence(sent), "t")
    np.testing.assert_array_equal(found.teacher_logprobs, sent.teacher_logprobs)
    if k:
        np.testing.assert_array_equal(found.topk_ids, sent.topk_ids)
        np.testing.assert_allclose(found.topk_logprobs, sent.topk_logprobs, rtol=1e-3, atol=1e-6)


def test_a_token_with_its_top_64_takes_at_most_320_bytes():
    """Ids at their least compressible: uniform over a vocabulary of 151,936."""
    rng = np.random.default_rng(0)
    logprobs = -np.sort(rng.exponential(5, (2048, 64)), axis=1).astype(np.float32)
    evidence = Evidence("t", logprobs[:, 0], rng.integers(0, 151_936, (2048, 64)), logprobs)
    assert len(wire.join([wire.pack_evidence(evidence)])) <= 320 * 2048


def test_ids_beyond_three_bytes_and_mangled_answers_are_refused():
    whole = wire.pack_evidence(Evidence("t", np.zeros(2, np.float32)))
    for mangled in (b"", whole[:-3], b"x" * 40):
        with pytest.raises(ValueError, match="not a teacher's answer"):
            wire.unpack_evidence(mangled, "t")
    with pytest.raises(ValueError, match="cut off"):
        wire.split(wire.join([whole])[:-1])
    with pytest.raises(ValueError, match="does not fit three bytes"):
        wire.pack_evidence(Evidence("t", np.zeros(1, np.float32), np.full((1, 1), 2**24), np.zeros((1, 1))))
