r"""Tidying LaTeX answers, and the static limits that no answer may pass.

``tidy`` changes spelling, never meaning: Unicode forms (NFKC, with superscripts and vulgar fractions spelt out first),
spacing commands, delimiters, synonyms of ``\frac``, thousands separators, and text commands.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 2_000
MAX_DEPTH = 32
MAX_DIGIT_RUN = 256
MAX_EXPONENT = 10_000

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_VULGAR = re.compile(r"(?<=\d)(?=[¼½¾⅐-⅞])")
_IGNORABLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
_SPELLINGS = (
    (re.compile(r"\\(?:left|right|bigg?[lr]?|Bigg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\!\s*"), ""),
    (re.compile(r"\{,\}\s*(?=\d)|\\,(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|hbox)(?=\s*\{)\s*"), r"\\text"),
    (re.compile(r"\\(?:math(?:rm|bf|it|sf)|boldsymbol|operatorname)\s*\{([A-Za-z])\}"), r"\1"),
    (re.compile(r"\\(?:math(?:rm|bf|it|sf)|boldsymbol|operatorname)(?=\s*\{)\s*"), r"\\text"),
    (re.compile(r"\\math(?:rm|bf|it|sf)\s+([A-Za-z])"), r"\1"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\\ge(?:q|qslant)?(?![A-Za-z])"), r"\\geq"),
    (re.compile(r"\\le(?:q|qslant)?(?![A-Za-z])"), r"\\leq"),
    (re.compile(r">="), r"\\geq "),
    (re.compile(r"<="), r"\\leq "),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\\$|(?<!\\)\\[()\[\]]|\$"), ""),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])sqrt\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\*\*"), "^"),
)

_TOWER = re.compile(r"\d\s*\^\s*\{?\s*-?\(?\s*\d+\s*\^")
_EXPONENT = re.compile(r"\^\s*\{?\s*[-+(]?\s*(\d+)")
_FACTORIAL = re.compile(r"(\d+)\s*\)?\s*!")


def tidy(text: str) -> str:
    """One spelling for the many ways of writing the same LaTeX."""
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run[0].translate(_SUPERSCRIPTS) + "}", _VULGAR.sub(" ", text))
    text = unicodedata.normalize("NFKC", _IGNORABLE.sub("", text)).replace("⁄", "/").replace("−", "-")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).strip(" *").removesuffix(".").strip()


def excess(text: str) -> str:
    """Which static limit a text passes, in words; '' if none. Nothing is parsed before this says ''."""
    if len(text) > MAX_CHARS:
        return f"more than {MAX_CHARS} characters"
    if re.search(rf"\d{{{MAX_DIGIT_RUN + 1}}}", text):
        return f"a number of more than {MAX_DIGIT_RUN} digits"
    if _depth(text) > MAX_DEPTH:
        return f"brackets nested more than {MAX_DEPTH} deep"
    if _TOWER.search(text):
        return "a tower of powers"
    if any(int(exponent) > MAX_EXPONENT for exponent in _EXPONENT.findall(text)):
        return f"an exponent above {MAX_EXPONENT}"
    if any(int(argument) > MAX_EXPONENT for argument in _FACTORIAL.findall(text)):
        return f"a factorial above {MAX_EXPONENT}!"
    return ""


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth -= 1
    return deepest


def split_top(text: str, separators: re.Pattern[str]) -> list[str]:
    """Split where ``separators`` matches outside every bracket; an interval's brackets need not pair up."""
    parts, depth, begin, position = [], 0, 0, 0
    while position < len(text):
        char = text[position]
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif depth == 0 and (match := separators.match(text, position)) and match.end() > position:
            parts.append(text[begin:position])
            begin = position = match.end()
            continue
        position += 1
    return [part.strip() for part in [*parts, text[begin:]]]
