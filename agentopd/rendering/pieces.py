"""The bytes each token id stands for, so that two tokenizers can be laid over one text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from agentopd.errors import ConfigError

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "▁"
_BYTE_LEVEL = "ByteLevel"
_REPLACEMENT = "\ufffd".encode()
_PROBE = "Größe 3½: naïve → `x_1`\n\tend"


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """Bytes of every id of a fast tokenizer; None for special tokens and for ids without a token.

    Knows byte-level BPE (GPT-2, Qwen, Llama 3) and SentencePiece with byte fallback (Llama 2, Gemma). Raises
    ``ConfigError`` for a tokenizer whose tokens do not spell its text.
    """
    byte_level = _BYTE_LEVEL in _component_types(tokenizer)
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    table: list[bytes | None] = [None] * (max(tokenizer.get_vocab().values()) + 1)
    for piece, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        if index in added:
            table[index] = added[index].encode()
        else:
            table[index] = _byte_level(piece) if byte_level else _sentence_piece(piece)
    _check(tokenizer, table)
    return table


def as_text(pieces: Sequence[bytes]) -> list[bytes]:
    """The pieces as they show in decoded text: bytes that are no UTF-8 become U+FFFD, in the piece that ends them.

    Joined, they are the UTF-8 of ``b"".join(pieces).decode(errors="replace")``.
    """
    invalid = _invalid_ranges(b"".join(pieces))
    if not invalid:
        return list(pieces)
    shown, start = [], 0
    for piece in pieces:
        end, cursor, parts = start + len(piece), start, []
        for low, high in invalid:
            if low < end and high > start:
                parts.append(piece[max(cursor, start) - start : max(low, start) - start])
                parts.append(_REPLACEMENT if high <= end else b"")
                cursor = min(high, end)
        shown.append(b"".join([*parts, piece[cursor - start :]]))
        start = end
    return shown


def _invalid_ranges(data: bytes) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    start = 0
    while True:
        try:
            data[start:].decode()
            return found
        except UnicodeDecodeError as exc:
            found.append((start + exc.start, start + exc.end))
            start += exc.end


def _component_types(tokenizer: Any) -> set[str]:
    """Names of the pre-tokenizer's and decoder's components."""
    backend = tokenizer.backend_tokenizer
    return set(
        re.findall(r"\b(ByteLevel|Metaspace|WordPiece|ByteFallback)\b", f"{backend.pre_tokenizer}{backend.decoder}")
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's reversible map between bytes and printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes | None:
    try:
        return bytes(_ALPHABET[char] for char in piece)
    except KeyError:
        return None


def _sentence_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte.group(1), 16)]) if byte else piece.replace(_WORD_START, " ").encode()


def _check(tokenizer: Any, table: list[bytes | None]) -> None:
    """The pieces of a probe must spell it, but for a space that SentencePiece puts in front."""
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    spelled = b"".join(table[index] or b"" for index in ids)
    if spelled.removeprefix(b" ") != _PROBE.encode():
        name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
        raise ConfigError(
            f"the tokens of {name!r} do not spell the text they stand for (normalisation or an unknown token?); "
            "a teacher across tokenizers needs a byte-level or byte-fallback tokenizer"
        )
