"""How large a patch is, and what that costs: the gated penalty of code repair.

Sizes are measured on canonical Python (``ast`` round trip), so comments, blank lines, layout and ``;`` cost nothing and
gain nothing. A line counts once for every 8 tokens, and a string by the words in it, so one-liners and code in strings
gain nothing either. Where either side does not parse, lines are compared with comments and spacing removed, and
``parsed`` is False.

    P_size = min(1, max(0, d - d0) / max(d0, 4))      d: cost of the patch, d0: cost of the gold patch or the budget
    P_cx   = min(1, max(0, added cyclomatic) / 5)
    P_unrel = changed lines outside the functions the gold patch touches / changed lines
    P = min(0.5, 0.3 P_size + 0.1 P_cx + 0.3 P_unrel)
    R = pass (1 - P) + (1 - pass) 0.2 p               p: fraction of failing tests fixed, less those broken
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from rapidfuzz.distance import Indel, Levenshtein

DEFAULT_BUDGET = 8.0
"""Cost that is free where there is no gold patch."""
TOKENS_PER_LINE = 8
"""A changed line counts once for every so many changed tokens, so a giant one-liner is not one line."""

MODULE = "<module>"
_WORD = re.compile(r"\w{1,16}|[^\w\s]")
_COMMENT = re.compile(r"^\s*#.*$")
_IMPORT = re.compile(r"\s*(?:import|from)\s")
PlacedLine = tuple[str, str]
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case, ast.Assert)


@dataclass(frozen=True)
class Patch:
    """The measured difference of two programs.

    ``lines`` are added plus deleted and ``weighted_lines`` the same by their tokens; ``tokens`` and ``nodes`` (of the
    syntax tree, in preorder) are edited.
    """

    lines: int
    weighted_lines: int
    tokens: int
    nodes: int
    cyclomatic: int
    """Decision points added (negative: removed)."""
    regions: dict[str, int]
    """Changed lines per function (``Class.method``, ``function`` or ``<module>``), imports not counted."""
    parsed: bool

    @property
    def cost(self) -> float:
        """D of the formula, in lines."""
        return float(max(self.weighted_lines, _in_lines(self.tokens)))


@dataclass(frozen=True)
class Penalty:
    """The three parts, each in [0, 1], and their gated total in [0, 0.5]."""

    size: float
    complexity: float
    unrelated: float

    @property
    def total(self) -> float:
        """P of the formula."""
        return min(0.5, 0.3 * self.size + 0.1 * self.complexity + 0.3 * self.unrelated)


def penalty(d: float, d0: float, added_cyclomatic: float, unrelated: float) -> Penalty:
    """The parts of P from a patch's cost ``d``, the gold patch's ``d0`` and an ``unrelated`` fraction in [0, 1]."""
    return Penalty(
        size=min(1.0, max(0.0, d - d0) / max(d0, 4.0)),
        complexity=min(1.0, max(0.0, added_cyclomatic) / 5),
        unrelated=min(1.0, max(0.0, unrelated)),
    )


def gated_reward(passed: bool, p: float, total: float) -> float:
    """R of the formula: at least 0.5 if it passed, at most 0.2 if not. ``total`` is P, ``p`` in [0, 1]."""
    return 1.0 - total if passed else 0.2 * p


def patch_penalty(
    starter: str, program: str, gold: str | None, budget: float = DEFAULT_BUDGET, other_lines: int = 0
) -> tuple[Penalty, Patch]:
    """What turning ``starter`` into ``program`` costs, measured against turning it into ``gold``.

    Complexity is what the patch adds beyond the gold patch. A patch that costs no more than gold is free, wherever it
    is. Without gold, no line of the program is unrelated and d0 is ``budget``. ``other_lines`` are changed lines of
    other files: all unrelated, and part of the patch.
    """
    patch = measure(starter, program)
    reference = measure(starter, gold) if gold is not None else None
    unrelated, free = other_lines, budget
    if reference is not None:
        free = reference.cost
        unrelated += sum(count for region, count in patch.regions.items() if region not in reference.regions)
    cost, changed = patch.cost + other_lines, patch.lines + other_lines
    if reference is not None and cost <= free:
        return penalty(cost, free, 0, 0.0), patch
    added = patch.cyclomatic - max(0, reference.cyclomatic if reference else 0)
    return penalty(cost, free, added, unrelated / changed if changed else 0.0), patch


@lru_cache(maxsize=1024)
def measure(before: str, after: str) -> Patch:
    """Size and place of the difference between two programs."""
    old, new = _parse(before), _parse(after)
    if old is None or new is None:
        return _measure_text(before, after)
    old_text, new_text = ast.unparse(old), ast.unparse(new)
    changed = _changed_lines(_placed_lines(old, old_text), _placed_lines(new, new_text))
    regions = Counter(place for line, place in changed if not _IMPORT.match(line))
    return Patch(
        lines=len(changed),
        weighted_lines=sum(_in_lines(len(_words(line))) for line, _ in changed),
        tokens=Levenshtein.distance(_tokens(old_text), _tokens(new_text)),
        nodes=Levenshtein.distance(_nodes(old), _nodes(new)),
        cyclomatic=_cyclomatic(new) - _cyclomatic(old),
        regions=dict(regions),
        parsed=True,
    )


def _measure_text(before: str, after: str) -> Patch:
    """What can be said where either side does not parse."""
    old, new = _bare_lines(before), _bare_lines(after)
    changed = _changed_lines([(line, MODULE) for line in old], [(line, MODULE) for line in new])
    return Patch(
        lines=len(changed),
        weighted_lines=sum(_in_lines(len(_words(line))) for line, _ in changed),
        tokens=Levenshtein.distance(_words("\n".join(old)), _words("\n".join(new))),
        nodes=0,
        cyclomatic=0,
        regions={MODULE: len(changed)} if changed else {},
        parsed=False,
    )


def _in_lines(tokens: int) -> int:
    """Lines that so many tokens count for, rounded up."""
    return -(-tokens // TOKENS_PER_LINE)


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(ast.unparse(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _bare_lines(source: str) -> list[str]:
    """Lines without blank ones, whole-line comments and spacing."""
    kept = (" ".join(line.split()) for line in source.splitlines() if not _COMMENT.match(line))
    return [line for line in kept if line]


def _words(text: str) -> list[str]:
    """Words and marks; a long word, such as encoded data, counts by its length."""
    return _WORD.findall(text)


def _tokens(source: str) -> list[str]:
    """Python tokens, a string by its words; a change of indentation is a token."""
    stream = tokenize.generate_tokens(io.StringIO(source).readline)
    found: list[str] = []
    for token in stream:
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            found.append(tokenize.tok_name[token.type])
        elif token.type == tokenize.STRING:
            found += _words(token.string)
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER):
            found.append(token.string)
    return found


def _nodes(tree: ast.Module) -> list[str]:
    """The syntax tree in preorder: each node's type, and the names and constants it holds itself."""
    found: list[str] = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        own = [repr(value) for _, value in ast.iter_fields(node) if not isinstance(value, ast.AST | list)]
        found.append(f"{type(node).__name__} {' '.join(own)}")
        stack += reversed(list(ast.iter_child_nodes(node)))
    return found


def _cyclomatic(tree: ast.Module) -> int:
    count = 0
    for node in ast.walk(tree):
        count += isinstance(node, _BRANCHES)
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def _changed_lines(old: list[PlacedLine], new: list[PlacedLine]) -> list[PlacedLine]:
    """Deleted and added lines, each with the function it is in: deleted lines by the old text, added by the new."""
    found: list[PlacedLine] = []
    for operation in Indel.opcodes([line for line, _ in old], [line for line, _ in new]):
        if operation.tag == "delete":
            found += old[operation.src_start : operation.src_end]
        elif operation.tag == "insert":
            found += new[operation.dest_start : operation.dest_end]
    return found


def _placed_lines(tree: ast.Module, source: str) -> list[PlacedLine]:
    """Every line that is not blank, with the function or method it is in; nested functions belong to the outer one."""
    lines = source.splitlines()
    places = [MODULE] * len(lines)

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
                end = node.end_lineno or node.lineno
                places[first - 1 : end] = [prefix + node.name] * (end - first + 1)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body, "")
    return [(line, place) for line, place in zip(lines, places, strict=True) if line.strip()]
