"""How large a patch is, and what that costs: the gated penalty of code repair.

Sizes are measured on canonical Python (``ast`` round trip), so comments, blank lines, layout and ``;`` cost nothing and
gain nothing. Where either side does not parse, lines are compared with comments and spacing removed, and ``parsed`` is
False.

    P_size = min(1, max(0, d - d0) / max(d0, 4))      d: cost of the patch, d0: cost of the gold patch
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
from dataclasses import dataclass
from functools import lru_cache

from rapidfuzz.distance import Indel, Levenshtein

DEFAULT_GOLD_COST = 8.0
TOKENS_PER_LINE = 8
"""A changed line counts once for every so many changed tokens, so a giant one-liner is not one line."""

MODULE = "<module>"
_WORD = re.compile(r"\w+|[^\w\s]")
_COMMENT = re.compile(r"^\s*#.*$")
_IMPORT = re.compile(r"\s*(?:import|from)\s")
PlacedLine = tuple[str, str]
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case, ast.Assert)


@dataclass(frozen=True)
class Patch:
    """The measured difference of two programs. ``lines`` and ``tokens`` are added plus deleted, and edited."""

    lines: int
    tokens: int
    cyclomatic: int
    """Decision points added (negative: removed)."""
    regions: dict[str, int]
    """Changed lines per function (``Class.method``, ``function`` or ``<module>``), imports not counted."""
    parsed: bool

    @property
    def cost(self) -> float:
        """D of the formula, in lines."""
        return float(max(self.lines, -(-self.tokens // TOKENS_PER_LINE)))


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


def patch_penalty(starter: str, program: str, gold: str | None) -> tuple[Penalty, Patch]:
    """What turning ``starter`` into ``program`` costs, measured against turning it into ``gold``.

    Complexity is what the patch adds beyond the gold patch. Without gold nothing is unrelated, and d0 is
    ``DEFAULT_GOLD_COST``.
    """
    patch = measure(starter, program)
    if gold is None:
        return penalty(patch.cost, DEFAULT_GOLD_COST, patch.cyclomatic, 0.0), patch
    reference = measure(starter, gold)
    unrelated = sum(count for region, count in patch.regions.items() if region not in reference.regions)
    fraction = unrelated / patch.lines if patch.lines else 0.0
    added = patch.cyclomatic - max(0, reference.cyclomatic)
    return penalty(patch.cost, reference.cost, added, fraction), patch


@lru_cache(maxsize=1024)
def measure(before: str, after: str) -> Patch:
    """Size and place of the difference between two programs."""
    old, new = _parse(before), _parse(after)
    if old is None or new is None:
        old_lines, new_lines = _bare_lines(before), _bare_lines(after)
        lines = Indel.distance(old_lines, new_lines)
        tokens = Levenshtein.distance(_WORD.findall("\n".join(old_lines)), _WORD.findall("\n".join(new_lines)))
        return Patch(lines, tokens, 0, {MODULE: lines} if lines else {}, parsed=False)
    old_text, new_text = ast.unparse(old), ast.unparse(new)
    old_placed, new_placed = _placed_lines(old, old_text), _placed_lines(new, new_text)
    return Patch(
        lines=Indel.distance([line for line, _ in old_placed], [line for line, _ in new_placed]),
        tokens=Levenshtein.distance(_tokens(old_text), _tokens(new_text)),
        cyclomatic=_cyclomatic(new) - _cyclomatic(old),
        regions=_regions(old_placed, new_placed),
        parsed=True,
    )


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(ast.unparse(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _bare_lines(source: str) -> list[str]:
    """Lines without blank ones, whole-line comments and spacing."""
    kept = (" ".join(line.split()) for line in source.splitlines() if not _COMMENT.match(line))
    return [line for line in kept if line]


def _tokens(source: str) -> list[str]:
    """Python tokens; a change of indentation is a token."""
    stream = tokenize.generate_tokens(io.StringIO(source).readline)
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
    return [
        tokenize.tok_name[token.type] if token.type in (tokenize.INDENT, tokenize.DEDENT) else token.string
        for token in stream
        if token.type not in skipped
    ]


def _cyclomatic(tree: ast.Module) -> int:
    count = 0
    for node in ast.walk(tree):
        count += isinstance(node, _BRANCHES)
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def _regions(old: list[PlacedLine], new: list[PlacedLine]) -> dict[str, int]:
    """Changed lines by the function they are in: deleted lines by the old text, added lines by the new."""
    found: dict[str, int] = {}
    for operation in Indel.opcodes([line for line, _ in old], [line for line, _ in new]):
        changed: list[PlacedLine] = []
        if operation.tag == "delete":
            changed = old[operation.src_start : operation.src_end]
        elif operation.tag == "insert":
            changed = new[operation.dest_start : operation.dest_end]
        for line, place in changed:
            if not _IMPORT.match(line):
                found[place] = found.get(place, 0) + 1
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
