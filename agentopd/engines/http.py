"""One question over HTTP, from a coroutine: cancelling it closes the connection, which tells a server to stop working.

Every question has a connection of its own and a deadline over all of it.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from agentopd.errors import ConfigError

_NOT_NOW = (408, 429)
_NEVER = 501
_MOST_HEADER = 65536


class Away(Exception):
    """The server could not be asked now; later it may: a lost connection, a time-out, 5xx, or too busy."""


class Refused(Exception):
    """The server does not take this question, and never will."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    secure: bool = False
    path: str = ""

    @classmethod
    def parse(cls, url: str, key: str) -> Address:
        """Read ``http://HOST:PORT`` or its ``https`` form; ``key`` names the config's key in the error."""
        try:
            parts = urlsplit(url)
            host, port, secure = parts.hostname, parts.port, parts.scheme == "https"
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise ConfigError(f"{key} is {url!r}: write http://HOST:PORT")
        return cls(host, port or (443 if secure else 80), secure, parts.path.rstrip("/"))

    def __str__(self) -> str:
        return f"http{'s' if self.secure else ''}://{self.host}:{self.port}{self.path}"


async def ask(address: Address, method: str, path: str, body: bytes, timeout_s: float) -> bytes:
    """The body of the reply. Raises ``Away`` or ``Refused``."""
    try:
        async with asyncio.timeout(timeout_s):
            status, data = await _exchange(address, _request(address, method, path, body))
    except TimeoutError:
        raise Away(f"no answer within {timeout_s:g} s") from None
    except (OSError, EOFError, ValueError) as exc:
        raise Away(f"{type(exc).__name__}: {exc}") from exc
    if 200 <= status < 300:
        return data
    reason = data.decode(errors="replace")[:300]
    if status in _NOT_NOW or (status >= 500 and status != _NEVER):
        raise Away(f"{status} {reason}")
    raise Refused(status, reason)


async def ask_json(address: Address, method: str, path: str, question: Any, timeout_s: float) -> Any:
    """``ask`` in JSON both ways; an empty answer is None."""
    body = b"" if question is None else json.dumps(question).encode()
    data = await ask(address, method, path, body, timeout_s)
    try:
        return json.loads(data) if data else None
    except ValueError as exc:
        raise Away(f"an answer that is not JSON: {exc}") from exc


def _request(address: Address, method: str, path: str, body: bytes) -> bytes:
    head = (
        f"{method} {address.path}{path} HTTP/1.1\r\nHost: {address.host}:{address.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _exchange(address: Address, request: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection(
        address.host, address.port, ssl=address.secure or None, limit=_MOST_HEADER
    )
    try:
        writer.write(request)
        await writer.drain()
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines if line)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        return int(status_line.split()[1]), await _body(reader, headers)
    finally:
        # Without waiting for the farewell: a server that hangs would never say it.
        writer.transport.abort()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.read()
    chunks = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        chunks.append(await reader.readexactly(size))
        await reader.readline()
    return b"".join(chunks)
