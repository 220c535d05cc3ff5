"""A model behind an OpenAI-compatible chat endpoint: it answers in text and shows no log-probs.

Connections, time-outs and retries with backoff (409, 429, 5xx, ``Retry-After``) are the ``openai`` client's. Answers
that were accepted are kept on disk by the content of their request, so that a step taken again asks nothing twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agentopd.config.teachers import EndpointConfig
from agentopd.errors import ConfigError, NoAnswerError, TeacherError, boundary
from agentopd.types import Message

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
_FOR_GOOD = (401, 403, 404)
"""What an endpoint says to every question alike, until its config or the key is another."""


@dataclass(frozen=True)
class Question:
    """One request. Equal questions to one model are the same question."""

    messages: tuple[tuple[str, str], ...]
    """Role and content."""
    temperature: float
    max_tokens: int
    seed: int = 0


class ChatEndpoint:
    """Asks one model. ``cache`` is the folder of accepted answers, None keeps none.

    Use it inside one event loop. Raises ``ConfigError`` where the key's environment variable is not set.
    """

    def __init__(self, config: EndpointConfig, cache: Path | None = None) -> None:
        self.model = config.model
        self._config, self._cache = config, cache
        self._key = _api_key(config)
        self._name = f"model {config.model!r} at {config.base_url}"
        self._gate = asyncio.Semaphore(config.concurrency)
        self._client: AsyncOpenAI | None = None

    async def ask(self, question: Question, parse: Callable[[str], T], keep: bool = True) -> T:
        """The parsed answer. ``parse`` raises ``ValueError`` for an answer that cannot be used.

        Raises ``TeacherError`` for a refusal, a cut-off or unusable answer, ``NoAnswerError`` for an endpoint that is
        away or keeps failing, and ``ConfigError`` for one that does not know the key or the model.
        """
        path = self._path(question) if keep else None
        if path is not None and path.is_file():
            return parse(json.loads(path.read_text())["answer"])
        with boundary(NoAnswerError, self._name):
            async with self._gate:
                answer = await self._complete(question)
            try:
                parsed = parse(answer)
            except ValueError as exc:
                raise TeacherError(f"unusable answer of {self.model!r}: {exc} (it begins {answer[:80]!r})") from exc
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
            partial.write_text(json.dumps({"model": self.model, "question": asdict(question), "answer": answer}))
            partial.replace(path)
        return parsed

    async def _complete(self, question: Question) -> str:
        choice = (await self._reply(question)).choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise TeacherError(f"{self.model!r} refused: {choice.message.refusal or 'content filter'}")
        if choice.finish_reason == "length":
            raise TeacherError(f"the answer of {self.model!r} was cut off at {question.max_tokens} tokens")
        if not choice.message.content:
            raise TeacherError(f"{self.model!r} gave an empty answer")
        return str(choice.message.content)

    async def _reply(self, question: Question) -> Any:
        client = self._open()
        from openai import APIStatusError

        try:
            return await client.chat.completions.create(
                model=self.model,
                messages=[{"role": role, "content": text} for role, text in question.messages],  # type: ignore[misc]
                temperature=question.temperature,
                max_tokens=question.max_tokens,
                seed=question.seed,
            )
        except APIStatusError as exc:
            if exc.status_code not in _FOR_GOOD:
                raise
            key = self._config.api_key_env
            sent = f"the key in the environment variable {key!r}" if key else 'api_key_env = "none", which sends no key'
            raise ConfigError(
                f"{self._name}: answers {exc.status_code} ({exc.response.reason_phrase}): "
                f"check the address, the model's name and {sent}"
            ) from None

    def _open(self) -> AsyncOpenAI:
        if self._client is None:
            from openai import AsyncOpenAI

            config = self._config
            self._client = AsyncOpenAI(
                base_url=config.base_url, api_key=self._key, timeout=config.timeout_s, max_retries=config.max_retries
            )
        return self._client

    def _path(self, question: Question) -> Path | None:
        if self._cache is None:
            return None
        body = json.dumps([self._config.base_url, self.model, asdict(question)], sort_keys=True)
        digest = hashlib.sha256(body.encode()).hexdigest()[:32]
        return self._cache / digest[:2] / f"{digest}.json"

    async def aclose(self) -> None:
        """Close connections; idempotent."""
        if self._client is not None:
            await self._client.close()
            self._client = None


def plain_messages(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """A task's opening messages as a question's."""
    return tuple((message.role, message.content) for message in messages)


def any_text(answer: str) -> str:
    """The parser of answers that may be anything."""
    return answer


def _api_key(config: EndpointConfig) -> str:
    if config.api_key_env is None:
        return "none"
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"model {config.model!r} at {config.base_url}: set the environment variable {config.api_key_env!r} to its "
            'key, or api_key_env = "none" for an endpoint that takes none'
        )
    return key
