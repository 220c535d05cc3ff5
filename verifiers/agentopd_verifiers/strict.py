"""Stage one of the math verdict: exact values for the answers most tasks have, in microseconds and without SymPy.

Declared behaviour:

- integers, decimals, fractions, mixed numbers, scientific notation; ``1,000`` and ``1 000`` are thousands, ``32, 349``
  is two numbers;
- a percentage is its value (28% = 0.28, never 28); a missing unit is forgiven, a different unit is wrong;
- a decimal stands for another value if it agrees to its own last place and shows at least ``significant`` digits;
- bare lists and sets have no order and no repeats; tuples and intervals are ordered, and not lists;
- words compare without case; a single letter only where the gold answer is a choice A-J.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from agentopd_verifiers.latex import split_top, tidy

_NUM = r"[-+]?\s*(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)?(?:\.\d*)?"
_PLAIN = re.compile(_NUM)
_RATIO = re.compile(rf"([-+]?)\s*(?:\\frac\s*\{{({_NUM})\}}\s*\{{({_NUM})\}}|({_NUM})\s*/\s*({_NUM}))")
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s*(?: (\d+)/(\d+)|\\frac\s*\{(\d+)\}\s*\{(\d+)\})")
_SCIENTIFIC = re.compile(rf"({_NUM})\s*(?:(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?\s*([-+]?\d+)\s*\}}?|[eE]([-+]?\d+))")
_UNIT = re.compile(
    r"(.*?[\d.}])\s*"
    r"(?:\\text\s*\{\s*([^{}]*?)\s*\}|(?<=[\d.}])\s*([A-Za-z]+(?:[ ./]+[A-Za-z]+){0,2}\.?))\s*"
    r"(?:\^\s*\{?(\d)\}?)?"
)
_NO_UNIT = re.compile(r"(?<![A-Za-z]\^)\d|\b(?:or|and)\b", re.IGNORECASE)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_LABEL = re.compile(r"\\text\s*\{[^{}]*(?:\b(?:is|are|equals)\b|[:=])\s*\}\s*")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_COMMA = re.compile(r"[,;]|\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*")
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_PLUS_MINUS = re.compile(r"\\pm\s*(.+)")
_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?|\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)")
_MAX_SCALE = 400
_MAX_NUMBER = 300
_MAX_ITEMS = 64
_SHORT_UNITS = frozenset(
    (
        "mm",
        "cm",
        "km",
        "in",
        "ft",
        "yd",
        "mi",
        "kg",
        "mg",
        "lb",
        "oz",
        "hr",
        "min",
        "sec",
        "ml",
        "mph",
        "deg",
        "am",
        "pm",
    )
)
_MATH_WORDS = frozenset(
    ("sin", "cos", "tan", "sec", "csc", "cot", "log", "exp", "sqrt", "mod", "alpha", "beta", "gamma", "delta", "theta")
)


@dataclass(frozen=True)
class Number:
    """An exact value. ``places`` and ``digits`` describe a decimal as shown; ``places`` is None for exact forms."""

    value: Fraction
    places: int | None = None
    digits: int = 0
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.unit}".rstrip()


@dataclass(frozen=True)
class Word:
    """A word or letter; ``explicit`` if it was typeset as text, so that it cannot be a product of symbols."""

    text: str
    explicit: bool

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Group:
    """Several values. ``brackets`` is '' for a bare list, '{}' for a set, else the two brackets of a tuple/interval."""

    brackets: str
    items: tuple[Value, ...]

    @property
    def ordered(self) -> bool:
        """Whether order and repeats matter."""
        return self.brackets not in ("", "{}")

    def __str__(self) -> str:
        inside = ", ".join(map(str, self.items))
        return f"{self.brackets[:1]}{inside}{self.brackets[1:]}"


@dataclass(frozen=True)
class Opaque:
    """Something only the symbolic stage can read."""

    text: str

    def __str__(self) -> str:
        return self.text


Value = Number | Word | Group | Opaque


@lru_cache(maxsize=4096)
def parse(text: str) -> Value:
    """The value of an answer. Total: what it cannot read is ``Opaque``."""
    if text.isascii() and text.isdecimal() and len(text) < 19:
        return Number(Fraction(int(text)))
    return _value(tidy(text).replace("\\{", "⟨").replace("\\}", "⟩"))


def same(gold: Value, answer: Value, significant: int = 6) -> bool | None:
    """Whether two values agree; None where this stage cannot say."""
    if isinstance(gold, Number) and isinstance(answer, Number):
        return _same_number(gold, answer, significant)
    if isinstance(gold, Group) and isinstance(answer, Group):
        return _same_group(gold, answer, significant)
    if isinstance(gold, Word) and isinstance(answer, Word):
        return _same_word(gold, answer)
    if isinstance(gold, Opaque) and isinstance(answer, Opaque):
        return True if gold.text == answer.text else None
    if isinstance(gold, Opaque) or isinstance(answer, Opaque):
        return None
    explicit = isinstance(gold, Word) and gold.explicit
    return False if explicit or isinstance(gold, Group) != isinstance(answer, Group) else None


def obligations(gold: str, answer: str) -> list[tuple[str, str]] | None:
    """The pairs that must all agree for ``answer`` to be ``gold``; None if the two cannot agree.

    ``x = 3`` answers 3, and 3 answers ``x = 3``. Each member of a chain ``x = a = b`` must agree, so a false chain that
    ends in the right number is wrong. An equation is answered by an equation only.
    """
    if "=" not in gold and "=" not in answer:
        return [(gold, answer)]
    left, right = _members(gold), _members(answer)
    if len(left) > 2 or any("," in part for part in right[:-1] if not _NAME.fullmatch(part)):
        return [(gold, answer)]
    if len(left) == 2 and len(right) == 2:
        same_name = _NAME.fullmatch(left[0]) and left[0].replace(" ", "") == right[0].replace(" ", "")
        return [(left[1], right[1])] if same_name else [(gold, answer)]
    if len(left) == 2 and not _NAME.fullmatch(left[0]):
        return None
    claims = right[1:] if len(right) > 1 and _NAME.fullmatch(right[0]) else right
    return [(left[-1], claim) for claim in claims]


def _members(text: str) -> list[str]:
    """The sides of an equation or chain, a lone name first; approximations after an equality are dropped."""
    text = tidy(text)
    if "=" in text:
        text = text.split("\\approx")[0]
    parts = [part for part in split_top(text, _EQUALS) if part]
    if len(parts) == 2 and _NAME.fullmatch(parts[1]) and not _NAME.fullmatch(parts[0]):
        parts.reverse()
    return parts or [text]


def _value(text: str) -> Value:
    text = _ungroup(_LABEL.sub("", text, count=1) if text.startswith("\\text") else text)
    number = _number(text)
    if number:
        return number
    if words := _TEXT.fullmatch(text):
        return Word(" ".join(words[1].strip(" .()").split()), explicit=True)
    if plus_minus := _PLUS_MINUS.fullmatch(text):
        size = _number(plus_minus[1])
        return Group("", (size, Number(-size.value, size.places, size.digits, size.unit))) if size else Opaque(text)
    if group := _group(text):
        return group
    if _WORDS.fullmatch(text):
        return Word(" ".join(text.split()), explicit=False)
    return Opaque("".join(text.split()))


def _ungroup(text: str) -> str:
    """Drop TeX braces around the whole text."""
    while text.startswith("{") and text.endswith("}") and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _closes_at_end(text: str) -> bool:
    depth = 0
    for position, char in enumerate(text):
        depth += (char in "([{⟨") - (char in ")]}⟩")
        if depth == 0:
            return position == len(text) - 1
    return False


def _group(text: str) -> Value | None:
    if text[:1] in ("(", "[", "⟨") and text[-1:] in (")", "]", "⟩") and _closes_at_end(text):
        parts = split_top(text[1:-1].replace("⟨", "{").replace("⟩", "}"), _COMMA)
        if len(parts) == 1 and text[0] == "(" and text[-1] == ")":
            return _value(parts[0])
        if len(parts) > _MAX_ITEMS:
            return None
        brackets = (text[0] + text[-1]).replace("⟨", "{").replace("⟩", "}")
        return Group(brackets, tuple(map(_value, parts)))
    parts = [part for part in split_top(text.replace("⟨", "{").replace("⟩", "}"), _COMMA) if part]
    return Group("", tuple(map(_value, parts))) if 1 < len(parts) <= _MAX_ITEMS else None


def _number(text: str) -> Number | None:
    if len(text) > _MAX_NUMBER:
        return None
    percent = text.endswith("%") or re.search(r"\d\s*(?:percent|pct|\\text\s*\{\s*(?:percent|pct)\s*\})$", text)
    if percent:
        inner = _number(re.sub(r"\s*(?:%|percent|pct|\\text\s*\{[^{}]*\})$", "", text))
        places = None if inner is None or inner.places is None else inner.places + 2
        return Number(inner.value / 100, places, inner.digits) if inner and not inner.unit else None
    if text.endswith("°"):
        inner = _number(text[:-1].rstrip())
        return Number(inner.value, inner.places, inner.digits, "degree") if inner and not inner.unit else None
    return _decimal(text) or _scientific(text) or _ratio(text) or _with_unit(text)


def _decimal(text: str) -> Number | None:
    if not _PLAIN.fullmatch(text) or not any(char.isdigit() for char in text):
        return None
    shown = re.sub(r"[,\s]", "", text)
    _, point, fraction = shown.partition(".")
    digits = len(re.sub(r"\D", "", shown).lstrip("0"))
    return Number(Fraction(shown.rstrip(".")), len(fraction) if point else None, digits)


def _scientific(text: str) -> Number | None:
    match = _SCIENTIFIC.fullmatch(text)
    base = _decimal(match[1]) if match else None
    if not match or not base:
        return None
    scale = int(match[2] or match[3])
    if abs(scale) > _MAX_SCALE:
        return None
    places = None if base.places is None else base.places - scale
    return Number(base.value * Fraction(10) ** scale, places, base.digits)


def _ratio(text: str) -> Number | None:
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = int(match[2]), int(match[3] or match[5]), int(match[4] or match[6])
        return Number((whole + Fraction(top, bottom)) * (-1 if match[1] == "-" else 1)) if bottom else None
    match = _RATIO.fullmatch(text)
    if not match:
        return None
    over, under = _decimal(match[2] or match[4] or ""), _decimal(match[3] or match[5] or "")
    if not over or not under or not under.value:
        return None
    return Number(over.value / under.value * (-1 if match[1] == "-" else 1))


def _with_unit(text: str) -> Number | None:
    match = _UNIT.fullmatch(text)
    if not match:
        return None
    typeset, bare, power = match[2], match[3], match[4] or ""
    if _NO_UNIT.search(typeset or bare or ""):
        return None  # a second answer, as in "5 or 6"
    if bare is not None and not _is_unit(bare.strip(), spaced=text[len(match[1]) :].startswith(" ")):
        return None
    inner = _decimal(match[1].strip()) or _ratio(match[1].strip())
    unit = " ".join(_singular(word) for word in re.split(r"[\s.]+", (typeset or bare or "").strip()) if word)
    return Number(inner.value, inner.places, inner.digits, unit + power) if inner else None


def _is_unit(text: str, spaced: bool) -> bool:
    """Whether bare letters after a number are a unit and not a product: ``5 m``, ``5cm``, ``5 apples``, not ``5x``."""
    words = re.split(r"[\s/.]+", text.strip(" ."))
    if all(word.lower() in _SHORT_UNITS for word in words) or text == "m":
        return True
    return spaced and all(len(word) > 2 and word.lower() not in _MATH_WORDS for word in words)


def _singular(word: str) -> str:
    word = word.lower() if len(word) > 1 else word
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _same_number(gold: Number, answer: Number, significant: int) -> bool | None:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.unit != answer.unit and "m" in (gold.unit, answer.unit):
        return None  # "5m" may be metres or a product with m
    if gold.value == answer.value:
        return True
    decimals = [number for number in (gold, answer) if number.places is not None]
    if not decimals:
        return False
    coarsest = min(decimals, key=lambda number: number.places or 0)
    last_place = Fraction(10) ** -(coarsest.places or 0)
    return coarsest.digits >= significant and abs(gold.value - answer.value) < last_place


def _same_word(gold: Word, answer: Word) -> bool | None:
    if gold.text == answer.text:
        return True
    choice = len(gold.text) > 1 or gold.text in "ABCDEFGHIJ"
    if choice and gold.text.casefold() == answer.text.casefold():
        return True
    return False if gold.explicit else None


def _same_group(gold: Group, answer: Group, significant: int) -> bool | None:
    if gold.ordered != answer.ordered:
        return False
    if gold.ordered:
        if gold.brackets != answer.brackets or len(gold.items) != len(answer.items):
            return False
        return _all(same(a, b, significant) for a, b in zip(gold.items, answer.items, strict=True))
    return _all(_member(item, answer, significant) for item in gold.items) and _all(
        _member(item, gold, significant) for item in answer.items
    )


def _member(item: Value, group: Group, significant: int) -> bool | None:
    verdicts = {same(other, item, significant) for other in group.items}
    return True if True in verdicts else None if None in verdicts else False


def _all(verdicts: Iterator[bool | None]) -> bool | None:
    found = set(verdicts)
    return False if False in found else None if None in found else True
