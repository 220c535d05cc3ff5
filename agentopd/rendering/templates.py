"""Chat templates, used append-only: an opening prompt once, then only what comes after each sampled turn.

Token in, token out: ids that were sampled are never decoded and encoded again. ``observe`` finds what a template puts
after an assistant turn by rendering a conversation with a stand-in assistant turn and keeping what follows it. That is
sound for every template whose continuation does not depend on the history; the others are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import accumulate, count
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError

from agentopd.errors import ConfigError
from agentopd.rendering.codecs import ToolCodec
from agentopd.types import Message, Role, ToolSchema

_STAND_IN = "a stand-in turn"
_USER = Message(role="user", content="hello")
_SHORT: tuple[Message, ...] = (_USER,)
_LONG = (_USER, Message(role="assistant", content="answer"), Message(role="user", content="and then?"))
_SYSTEM = Message(role="system", content="be brief")
_PROBE_TOOL = ToolSchema(name="probe", description="probe")
_ANSWERS = (Message(role="tool", content="12", name="probe"), _USER)
"""What may answer an assistant turn."""


_CALL_ID = "call00000"

_History = tuple[tuple[Message, ...], tuple[ToolSchema, ...]]


class TokenClass(IntEnum):
    """What a token id is, wherever it stands."""

    TEXT = 0
    SPECIAL = 1
    """An added token: a role marker, the end of a turn, a think or tool marker."""


class ChatRenderer:
    """Messages to ids for one tokenizer and codec.

    ``tokenizer`` is a Hugging Face fast tokenizer that carries a chat template. Raises ``ConfigError`` if it carries
    none, or if what the template writes after an assistant turn depends on the history (no prefix property), be the
    answer tool results or a user message. Where only one of the two can be appended, the other is in ``refusals``,
    and ``observe`` raises for it.
    """

    def __init__(self, tokenizer: Any, codec: ToolCodec) -> None:
        self.tokenizer = tokenizer
        self.codec = codec
        self.name = str(getattr(tokenizer, "name_or_path", "") or "tokenizer")
        if not tokenizer.chat_template:
            raise ConfigError(f"tokenizer {self.name!r} has no chat template; add a chat_template.jinja beside it")
        added = tokenizer.get_added_vocab()
        self.special_ids: frozenset[int] = frozenset(added.values())
        """Ids of every added token of the tokenizer."""
        self._control = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._encode = lru_cache(maxsize=4096)(self._encode_text)
        self._piece = lru_cache(maxsize=None)(self._decode_one)
        self._observe = lru_cache(maxsize=4096)(self._observe_ids)
        # A continuation that differs between two unlike histories depends on the history.
        self._histories: tuple[_History, ...] = ((_SHORT, ()), self._long_history())
        self._end_text, self.end_of_turn_id = self._find_end_of_turn(added)
        eos = tokenizer.eos_token_id
        self.end_of_turn_ids: tuple[int, ...] = tuple(dict.fromkeys([self.end_of_turn_id] + [eos] * (eos is not None)))
        """Ids that stop generation: the template's end of turn first, then the tokenizer's own end of text."""
        self.refusals = self._refusals()
        """Why turns cannot be continued with messages of a role, for each role for which that is so."""
        if len(self.refusals) == len(_ANSWERS):
            raise next(iter(self.refusals.values()))

    def open(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> list[int]:
        """Prompt ids of a new episode, ending in the generation prompt."""
        return list(self._encode(self._render(messages, tools, prompt=True)))

    def observe(self, messages: Sequence[Message]) -> list[int]:
        """Ids to append after sampled ids that end in the end-of-turn token.

        They are the rest of the template's turn ending, the tool or user messages, and the next generation prompt.
        Control tokens spelled out in tool results are broken up, so that a result cannot forge a turn.
        """
        return list(self._observe(tuple((item.role, item.content, item.name) for item in messages)))

    def encode_turn(self, text: str) -> list[int]:
        """The ids a student would have had to sample to write ``text`` and end its turn."""
        return [*self._encode(text), self.end_of_turn_id]

    def decode_turn(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, markers verbatim, without the end-of-turn token."""
        body = ids[:-1] if ids and ids[-1] in self.end_of_turn_ids else ids
        return self._decode(list(body))

    def token_ends(self, ids: Sequence[int], text: str) -> tuple[int, ...]:
        """Characters of ``text`` (their ``decode_turn``) written once each id is read; () if they cannot be told.

        A character that several tokens spell counts with the last of them.
        """
        body = list(ids[:-1] if ids and ids[-1] in self.end_of_turn_ids else ids)
        pieces = [self._piece(token) for token in body]
        ends = list(accumulate(map(len, pieces))) if "".join(pieces) == text else self._incremental_ends(body, text)
        if (ends[-1] if ends else 0) != len(text):
            return ()
        return (*ends, *[len(text)] * (len(ids) - len(body)))

    def _incremental_ends(self, body: list[int], text: str) -> list[int]:
        """Where tokens do not decode alone: each is read with the last whole piece before it, as in streaming."""
        ends: list[int] = []
        before = read = done = 0
        for index in range(len(body)):
            seen, found = (self._decode(body[before:stop]) for stop in (read, index + 1))
            if not found.endswith("\ufffd") or index + 1 == len(body):
                done += len(found) - len(seen)
                before, read = read, index + 1
            ends.append(done)
        return ends

    def token_classes(self, ids: Sequence[int]) -> npt.NDArray[np.int8]:
        """``TokenClass`` of each id; shape (T,). Depends on the id alone, so it may span a whole episode."""
        special = np.fromiter((token in self.special_ids for token in ids), dtype=np.int8, count=len(ids))
        return special * np.int8(TokenClass.SPECIAL)

    def call_mask(self, ids: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Whether each id of *one* sampled turn lies in a tool call (markers included, malformed calls too); (T,)."""
        # The end of the turn is no part of its text, and some formats look at what follows a call.
        pieces = ["" if token in self.end_of_turn_ids else self._piece(token) for token in ids]
        # Decoding token by token can split a character into U+FFFDs; the markers are ASCII, so spans stay right.
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        starts = ends - np.array([len(piece) for piece in pieces], dtype=np.int64)
        mask = np.zeros(len(pieces), dtype=np.bool_)
        for start, end in self.codec.spans("".join(pieces)):
            mask |= (starts < end) & (ends > start)
        return mask

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _decode_one(self, token: int) -> str:
        return self._decode([token])

    def _observe_ids(self, key: tuple[tuple[Any, str, str | None], ...]) -> tuple[int, ...]:
        messages = [Message(role=role, content=content, name=name) for role, content, name in key]
        return self._encode(self._continuation(messages))

    def _continuation(self, messages: Sequence[Message]) -> str:
        """What the template writes after the end-of-turn token of a turn that ``messages`` answer."""
        texts = {self._after_stand_in(history, tools, messages) for history, tools in self._histories}
        if len(texts) > 1:
            raise self._no_prefix_property("what it writes after an assistant turn depends on earlier messages")
        text = texts.pop()
        if not text.startswith(self._end_text):
            raise self._no_prefix_property(f"an assistant turn does not always end in {self._end_text!r}")
        return text.removeprefix(self._end_text)

    def _refusals(self) -> dict[Role, ConfigError]:
        refusals: dict[Role, ConfigError] = {}
        for answer in _ANSWERS:
            try:
                self._continuation((answer,))
            except ConfigError as exc:
                refusals[answer.role] = exc
        return refusals

    def _long_history(self) -> _History:
        """A history as unlike the short one as the template allows: some refuse system messages."""
        history = ((_SYSTEM, *_LONG), (_PROBE_TOOL,))
        try:
            self._render(*history, prompt=True)
        except ConfigError:
            return (_LONG, (_PROBE_TOOL,))
        return history

    def _after_stand_in(
        self, history: Sequence[Message], tools: Sequence[ToolSchema], messages: Sequence[Message]
    ) -> str:
        stand_in = _stand_in(messages)
        turn = Message(role="assistant", content=stand_in)
        text = self._render([*history, turn, *messages], tools, prompt=bool(messages))
        before, found, after = text.rpartition(stand_in)
        if not found or stand_in in before:
            raise self._no_prefix_property("it does not write assistant messages verbatim")
        return after

    def _find_end_of_turn(self, added: dict[str, int]) -> tuple[str, int]:
        """The added token that follows an assistant message."""
        after = self._after_stand_in(_SHORT, (), ())
        ends = [text for text in added if after.startswith(text)]
        if not ends:
            raise ConfigError(
                f"the chat template of tokenizer {self.name!r} ends an assistant turn with {after[:40]!r}, which is "
                "not one of its special tokens; generation would not know when to stop"
            )
        end = max(ends, key=len)
        return end, added[end]

    def _render(self, messages: Sequence[Message], tools: Sequence[ToolSchema], prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [self._plain(message) for message in messages],
                tools=[{"type": "function", "function": tool.model_dump()} for tool in tools] or None,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except TemplateError as exc:
            roles = ", ".join(message.role for message in messages)
            raise ConfigError(
                f"the chat template of tokenizer {self.name!r} refuses the messages ({roles}): {exc}"
            ) from exc
        return str(text)

    def _plain(self, message: Message) -> dict[str, Any]:
        """A message as chat templates expect it."""
        plain: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool":
            # Some templates insist on an id of nine letters and digits, and none lets a student choose one.
            plain["tool_call_id"] = _CALL_ID
            for control in self._control:
                plain["content"] = plain["content"].replace(control, f"{control[0]} {control[1:]}")
        if message.name is not None:
            plain["name"] = message.name
        if message.tool_calls:
            plain["tool_calls"] = [
                {"id": _CALL_ID, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        return plain

    def _no_prefix_property(self, why: str) -> ConfigError:
        return ConfigError(
            f"the chat template of tokenizer {self.name!r} lacks the prefix property: {why}. Sampled turns could not "
            "be continued without re-rendering them; use a template that only appends"
        )


def _stand_in(messages: Sequence[Message]) -> str:
    """An assistant turn that none of ``messages`` quotes, whatever a student made a tool say."""
    said = "".join(f"{message.name or ''}{message.content}" for message in messages)
    return next(text for num in count() if (text := _STAND_IN + " again" * num) not in said)


def assistant_text(message: Message, codec: ToolCodec, tools: Sequence[ToolSchema] = ()) -> str:
    """An assistant message as the student has to write it: content, newline, calls; no end token."""
    calls = [codec.render(*message.tool_calls, tools=tools)] if message.tool_calls else []
    return "\n".join(([message.content] if message.content else []) + calls)
