r"""Where the final answer is in a text.

Declared order, first that applies: the last balanced ``\boxed{...}``; the last ``#### n`` line; the last "answer is …"
or "answer: …". With ``anywhere`` (stand-alone equivalence checks, never episodes) also the last math span, the last
"is …", and the whole text. An answer is at the end, so only the last ``WINDOW`` characters are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WINDOW = 20_000
MAX_BOXES = 8

_BOX = re.compile(r"\\f?boxed\s*\{")
_HASHES = re.compile(r"^\s*####[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_PHRASE = re.compile(r"\banswer\b\W{0,4}(?:\bis\b|:|=)[ \t:*]*([^\n]+)", re.IGNORECASE)
_SPAN = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\.|[^$\\])+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_IS = re.compile(r".*\b(?:is|are|equals)\b:?\s+(.+)", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[\w)}\]$%*])\.(?:\s|$)")
_PERCENT = re.compile(r"[\s$]*(?:\\?%|percent\b|pct\b)", re.IGNORECASE)
_HEDGE = re.compile(r"[\s$.,;)\]\\]*\bor\b\s*\S")
_INVISIBLE = re.compile(r"\\[hv]?phantom|\\(?:text)?color\s*\{\s*white")
_NUMERIC_LEFT = re.compile(r"(?:\\[dt]?frac|\\[$,;! ]|[^A-Za-z\\])+")


@dataclass(frozen=True)
class Extracted:
    """An answer and how it was found. ``refused`` says why it cannot count, '' if it can."""

    text: str
    method: str
    refused: str = ""


def extract_answer(text: str, anywhere: bool = False) -> Extracted | None:
    """The final answer in ``text``, or None where there is none."""
    text = text[-WINDOW:]
    found = _boxed(text) or _marked(text)
    if found or not anywhere:
        return found
    return _span(text) or _bare(text)


def balanced_end(text: str, start: int) -> int:
    """Index just past the ``}`` that closes the group opened right before ``start``; -1 if it never closes."""
    depth, position = 1, start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return position + 1
        position += 1
    return -1


def _boxed(text: str) -> Extracted | None:
    last = list(_BOX.finditer(text))[-4 * MAX_BOXES :]
    boxes = [(match.start(), match.end(), balanced_end(text, match.end())) for match in last]
    closed = [box for box in boxes if box[2] > 0]
    if not closed:
        return None
    begin, start, end = closed[-1]
    answer = text[start : end - 1]
    refused = ""
    if len({text[first : last - 1] for _, first, last in closed}) > MAX_BOXES:
        refused = f"more than {MAX_BOXES} different boxed answers"
    elif _INVISIBLE.search(text, text.rfind("\n", 0, begin) + 1, end):
        refused = "the answer is typeset invisibly"
    elif _HEDGE.match(text, end):
        refused = "an alternative follows the boxed answer"
    return Extracted(_with_percent(answer, text, end), "boxed", refused)


def _with_percent(answer: str, text: str, end: int) -> str:
    return f"{answer}\\%" if _PERCENT.match(text, end) else answer


def _marked(text: str) -> Extracted | None:
    hashes = _HASHES.findall(text)
    if hashes:
        return Extracted(hashes[-1], "hashes")
    phrases = _PHRASE.findall(text)
    if not phrases:
        return None
    sentence = _SENTENCE_END.split(phrases[-1])[0].strip(" *")
    inner = _IS.fullmatch(sentence)
    return Extracted(inner[1] if inner else sentence, "phrase") if sentence else None


def _span(text: str) -> Extracted | None:
    """The last math span of a text that has prose around it."""
    spans = list(_SPAN.finditer(text))
    if not spans:
        return None
    last = spans[-1]
    if len(spans) == 1 and not re.search(r"\w", text[: last.start()] + text[last.end() :]):
        return None
    answer = next(group for group in last.groups() if group is not None)
    left, _, right = answer.rpartition("=")
    if right.strip() and _NUMERIC_LEFT.fullmatch(left):
        answer = right
    return Extracted(_with_percent(answer, text, last.end()), "span")


def _bare(text: str) -> Extracted | None:
    text = text.strip()
    inner = _IS.fullmatch(_SENTENCE_END.split(text)[0]) if "\\" not in text else None
    answer = inner[1] if inner else text
    return Extracted(answer, "bare") if answer else None
