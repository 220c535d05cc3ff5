"""A teacher behind HTTP, for runs on other machines: ``agentopd serve``.

``GET /about`` says who it is, how many ids a token it gives, and whether it scores ids that it did not choose;
``POST /score`` and ``/score_ids`` answer in the form of ``wire``. 503 tells the client to ask again: more questions at
once than ``max_waiting``, and every fault that is not the question's own. There is no authentication: it belongs on a
private network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import threading
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from agentopd.contracts import CandidateTeacher, IntArray, Teacher
from agentopd.engines.background import BackgroundLoop
from agentopd.errors import QuestionError, TeacherEndedError
from agentopd.teachers import wire
from agentopd.teachers.once import OK, Once, Reply
from agentopd.types import Episode

_LOG = logging.getLogger(__name__)
_DEADLINE_S = 3600.0


@dataclass(frozen=True)
class Identity:
    """Digests of a teacher's weights, and of what its token ids mean."""

    model: str
    vocabulary: str


class TeacherServer:
    """Serves ``teacher`` until ``close``, or until it is dead.

    ``identity`` says whose weights and whose ids, as ``/about`` shows them. Port 0 takes a free one; ``base_url`` tells
    which.
    """

    def __init__(
        self, teacher: Teacher, identity: Identity, host: str = "127.0.0.1", port: int = 0, max_waiting: int = 64
    ) -> None:
        self.teacher = teacher
        self.about = {
            "max_top_k": teacher.max_top_k,
            "candidates": isinstance(teacher, CandidateTeacher),
            **asdict(identity),
        }
        self.ended = ""
        """Why it stopped serving by itself."""
        self._once = Once()
        self._loop = BackgroundLoop("teacher")
        self._room = threading.BoundedSemaphore(max_waiting)
        self._http = ThreadingHTTPServer((host, port), _handler(self))
        self._http.daemon_threads = True
        self.base_url = f"http://{host}:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Block until the server is closed, or has ``ended``."""
        self._thread.join()

    def close(self) -> None:
        """Stop serving and release the teacher; idempotent."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        if not self._loop.closed:
            self._loop.wait(self.teacher.aclose(), _DEADLINE_S)
            self._loop.close()

    def answer(self, path: str, body: bytes) -> Reply:
        """Status and body of the reply to one question; see ``Once`` for one that is asked again."""
        return self._once.ask(_key(path, body), lambda: self._answer(path, body))

    def delivered(self, path: str, body: bytes) -> None:
        """Whoever asked has the answer."""
        self._once.delivered(_key(path, body))

    def _answer(self, path: str, body: bytes) -> Reply:
        if not self._room.acquire(blocking=False):
            return 503, b"busy: ask again"
        try:
            return self._work(path, body)
        except QuestionError as exc:
            return 422, str(exc).encode()
        except Exception as exc:  # whatever it is, the question may be asked again
            _LOG.warning("a question met a fault: %s: %s", type(exc).__name__, exc)
            if isinstance(exc, TeacherEndedError):
                self._end(str(exc))
            return 503, f"{type(exc).__name__}: {exc}".encode()
        finally:
            self._room.release()

    def _work(self, path: str, body: bytes) -> Reply:
        teacher = self.teacher
        work: Coroutine[Any, Any, list[bytes]]
        try:
            episodes, question = wire.unpack_episodes(body)
            if path == "/score":
                work = _score(teacher, episodes, int(question["top_k"]))
            elif isinstance(teacher, CandidateTeacher):
                work = _score_ids(teacher, episodes, _ids(question["ids"], episodes))
            else:
                return 501, b"this teacher cannot score ids that it did not choose"
        except (ValueError, KeyError, TypeError) as exc:
            return 400, f"not a question: {exc}".encode()
        return 200, wire.join(self._loop.wait(work, _DEADLINE_S))

    def _end(self, why: str) -> None:
        self.ended = why
        threading.Thread(target=self._http.shutdown, daemon=True).start()  # it waits for the thread that serves


async def _score(teacher: Teacher, episodes: list[Episode], top_k: int) -> list[bytes]:
    return [wire.pack_evidence(found) for found in await teacher.score(episodes, top_k)]


async def _score_ids(teacher: CandidateTeacher, episodes: list[Episode], ids: list[IntArray]) -> list[bytes]:
    return [wire.pack_logprobs(found) for found in await teacher.score_ids(episodes, ids)]


def _ids(rows: list[list[list[int]]], episodes: list[Episode]) -> list[IntArray]:
    """The ids (N, K) of each episode. Raises ``ValueError`` where they do not fit its N sampled tokens."""
    ids = [np.array(chosen, np.int64).reshape(len(chosen), -1 if chosen else 0) for chosen in rows]
    if [len(chosen) for chosen in ids] != [episode.num_sampled for episode in episodes]:
        raise ValueError("ids for another number of sampled tokens")
    return ids


def _key(path: str, body: bytes) -> bytes:
    return hashlib.sha256(path.encode() + b" " + body).digest()


def _handler(server: TeacherServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = self.path == "/about"
            self._reply(200 if known else 404, json.dumps(server.about).encode() if known else b"")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path not in ("/score", "/score_ids"):
                self._reply(404, b"")
                return
            status, answer = server.answer(self.path, body)
            awaited = self._awaited()
            self._reply(status, answer)
            if awaited and status == OK and not self.close_connection:
                server.delivered(self.path, body)

        def _awaited(self) -> bool:
            """Whether the client still holds the connection: one that ran out of patience has closed it."""
            try:
                return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
            except BlockingIOError:
                return True
            except OSError:
                return False

        def _reply(self, status: int, body: bytes) -> None:
            try:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up waiting

        def log_message(self, *args: object) -> None:
            pass

    return Handler
