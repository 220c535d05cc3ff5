"""A teacher behind HTTP, for runs on other machines: ``agentopd serve``.

``GET /about`` says who it is, how many ids a token it gives, and whether it scores ids that it did not choose;
``POST /score`` and ``/score_ids`` answer in the form of ``wire``. More questions at once than ``max_waiting`` are
turned away with 503, which tells the client to slow down. There is no authentication: it belongs on a private network.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from agentopd.contracts import CandidateTeacher, Teacher
from agentopd.engines.background import BackgroundLoop
from agentopd.errors import TeacherError
from agentopd.teachers import wire

_DEADLINE_S = 3600.0


@dataclass(frozen=True)
class Identity:
    """Digests of a teacher's weights, and of what its token ids mean."""

    model: str
    vocabulary: str


class TeacherServer:
    """Serves ``teacher`` until ``close``. ``identity`` says whose weights and whose ids, as ``/about`` shows them.

    Port 0 takes a free one; ``base_url`` tells which.
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
        self._loop = BackgroundLoop("teacher")
        self._room = threading.BoundedSemaphore(max_waiting)
        self._http = ThreadingHTTPServer((host, port), _handler(self))
        self._http.daemon_threads = True
        self.base_url = f"http://{host}:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Block until the server is closed."""
        self._thread.join()

    def close(self) -> None:
        """Stop serving and release the teacher; idempotent."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        if not self._loop.closed:
            self._loop.wait(self.teacher.aclose(), _DEADLINE_S)
            self._loop.close()

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the reply to one question."""
        if not self._room.acquire(blocking=False):
            return 503, b"busy: ask again"
        try:
            episodes, question = wire.unpack_episodes(body)
            if path == "/score":
                found = self._wait(self.teacher.score(episodes, int(question["top_k"])))
                return 200, wire.join([wire.pack_evidence(item) for item in found])
            if not isinstance(self.teacher, CandidateTeacher):
                return 501, b"this teacher cannot score ids that it did not choose"
            ids = [np.array(rows, np.int64).reshape(len(rows), -1) for rows in question["ids"]]
            return 200, wire.join([wire.pack_logprobs(x) for x in self._wait(self.teacher.score_ids(episodes, ids))])
        except TeacherError as exc:
            return 422, str(exc).encode()
        except (ValueError, KeyError, TypeError) as exc:
            return 400, f"not a question: {exc}".encode()
        finally:
            self._room.release()

    def _wait(self, work: Awaitable[Any]) -> Any:
        async def run() -> Any:
            return await work

        return self._loop.wait(run(), _DEADLINE_S)


def _handler(server: TeacherServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = self.path == "/about"
            self._reply(200 if known else 404, json.dumps(server.about).encode() if known else b"")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            known = self.path in ("/score", "/score_ids")
            self._reply(*(server.answer(self.path, body) if known else (404, b"")))

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
