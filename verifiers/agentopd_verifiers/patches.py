"""Patches as students write them, applied to a program; a patch that does not apply is an error to report.

Three forms, told apart by their marks:

- *search/replace blocks*: ``<<<<<<< SEARCH``, ``=======``, ``>>>>>>> REPLACE``; the text to search for must be whole
  lines that occur exactly once;
- *a unified diff* of one file; hunks are found by their lines, the line numbers only choose between equal places, and
  the counts in a hunk's header are not believed;
- *source*: definitions that replace those of the same name, where that is all there is and the program holds more than
  them; otherwise a whole program.

Text around fenced code blocks is dropped.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

import libcst as cst
from unidiff import PatchSet
from unidiff.errors import UnidiffParseError

from agentopd_verifiers.judge import PatchError

MAX_CHARS = 200_000
MAX_LEVELS = 200
"""Levels of a syntax tree: libcst recurses in native code without a bound, and takes seconds well before it crashes."""

_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_SEARCH = re.compile(r"^<{5,9} ?SEARCH[ \t]*$", re.MULTILINE)
_BLOCK = re.compile(
    r"^<{5,9} ?SEARCH[ \t]*\n(.*?)^={5,9}[ \t]*\n(.*?)^>{5,9} ?REPLACE[ \t]*$", re.DOTALL | re.MULTILINE
)
_HUNK = re.compile(r"^@@(?: -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)?)?.*$", re.MULTILINE)
_HEADER = ("--- ", "diff --git ", "+++ ")
_Definition = cst.FunctionDef | cst.ClassDef


def apply_patch(source: str, patch: str) -> str:
    """The program that ``patch`` makes of ``source``.

    Raises:
        PatchError: if it does not apply, saying why.

    """
    if len(patch) > MAX_CHARS:
        raise PatchError(f"the patch has more than {MAX_CHARS} characters")
    text = _unfenced(patch)
    marked = _lines_ended(text)
    if _SEARCH.search(marked):
        return _apply_blocks(_lines_ended(source), marked)
    if _HUNK.search(marked) or marked.lstrip().startswith(_HEADER):
        return _apply_diff(_lines_ended(source), marked)
    return _apply_source(source, text)


def _unfenced(text: str) -> str:
    """What is inside the fences of an answer that has any; Python that holds fences in a string is left alone."""
    blocks: list[str] = _FENCED.findall(text.replace("\r\n", "\n"))
    return "".join(blocks) if blocks and _parse(text) is None else text


def _lines_ended(text: str) -> str:
    text = text.replace("\r\n", "\n")
    return text if text.endswith("\n") else text + "\n"


def _parse(source: str) -> cst.Module | None:
    try:
        # Python's own parser goes first: where it gives up, libcst would overflow the stack and end the process.
        return None if _is_deep(ast.parse(source)) else cst.parse_module(source)
    except (SyntaxError, cst.ParserSyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_deep(tree: ast.Module) -> bool:
    """Whether the same program has more than ``MAX_LEVELS`` levels in libcst."""
    todo: list[tuple[ast.AST, int]] = [(tree, 0)]
    while todo:
        node, above = todo.pop()
        level = above + _levels(node)
        if level > MAX_LEVELS:
            return True
        todo += ((child, level) for child in ast.iter_child_nodes(node))
    return False


def _levels(node: ast.AST) -> int:
    """Levels of one node: what Python keeps in a row, libcst nests."""
    match node:
        case ast.BoolOp(values=operands):
            return len(operands)
        case ast.alias(name=str(dotted)) | ast.ImportFrom(module=str(dotted)):
            return 1 + dotted.count(".")
    return 1


# --- search/replace blocks -------------------------------------------------------------------------------------------


def _apply_blocks(source: str, text: str) -> str:
    blocks = _BLOCK.findall(text)
    if len(blocks) != len(_SEARCH.findall(text)):
        raise PatchError("a SEARCH block is not finished: it needs ======= and >>>>>>> REPLACE on lines of their own")
    for number, (search, replacement) in enumerate(blocks, start=1):
        if not search.strip():
            raise PatchError(f"SEARCH block {number} is empty")
        places = [found.start() for found in re.finditer("^" + re.escape(search), source, re.MULTILINE)]
        if len(places) != 1:
            times = f"found {len(places)} times, must be unique" if places else "not found"
            raise PatchError(f"SEARCH block {number}: text {times}")
        source = source[: places[0]] + replacement + source[places[0] + len(search) :]
    return source


# --- unified diffs ---------------------------------------------------------------------------------------------------


def _apply_diff(source: str, text: str) -> str:
    try:
        files = PatchSet(_recounted(text))
    except (UnidiffParseError, ValueError) as exc:
        raise PatchError(f"the diff cannot be read: {exc}") from None
    if len(files) != 1:
        names = ", ".join(file.path for file in files) or "no lines"
        raise PatchError(f"the diff must change exactly the program; it changes {names}")
    file = files[0]
    if file.is_added_file or file.is_removed_file or file.is_rename or file.is_binary_file or not len(file):
        raise PatchError("the diff must change lines of the program: it cannot add, remove, rename or be binary")
    lines, shift, done = source.splitlines(), 0, 0
    for number, hunk in enumerate(file, start=1):
        old = [line.value.rstrip() for line in hunk if line.is_context or line.is_removed]
        new = [line.value.rstrip("\r\n") for line in hunk if line.is_context or line.is_added]
        stated = hunk.source_start + shift - (1 if old else 0) if hunk.source_start else -1
        place = _place(lines, old, stated, done)
        if place is None:
            raise PatchError(f"hunk {number} does not apply: its lines are not in the program")
        lines[place : place + len(old)] = new
        shift, done = shift + len(new) - len(old), place + len(new)
    return "\n".join(lines) + "\n"


def _recounted(text: str) -> str:
    """The diff with the line counts of its hunks as they are, file headers if it has none, and no text before them."""
    lines = text.splitlines()
    first = next((index for index, line in enumerate(lines) if line.startswith((*_HEADER, "@@"))), 0)
    head = ["--- a/program", "+++ b/program"] if lines[first].startswith("@@") else []
    return "\n".join([*head, *_recounted_lines(lines[first:])]) + "\n"


def _recounted_lines(lines: Sequence[str]) -> Iterator[str]:
    for index, line in enumerate(lines):
        header = _HUNK.match(line)
        if header is None:
            # An empty line inside a hunk is context whose one space was lost.
            yield line or (" " if index + 1 < len(lines) else "")
            continue
        body = _hunk_body(lines[index + 1 :])
        old, new = (sum(item[:1] in (*mark, "") for item in body) for mark in ((" ", "-"), (" ", "+")))
        yield f"@@ -{header[1] or 0},{old} +{header[2] or 0},{new} @@"


def _hunk_body(lines: Sequence[str]) -> list[str]:
    """The lines of a hunk that starts here, up to the next header or text that is no part of a diff."""
    body: list[str] = []
    for index, line in enumerate(lines):
        next_file = line.startswith("--- ") and "".join(lines[index + 1 : index + 2]).startswith("+++ ")
        if next_file or line[:1] not in (" ", "+", "-", "\\", ""):
            break
        body.append(line)
    while body and not body[-1].strip():
        body.pop()
    return [line for line in body if not line.startswith("\\")]


def _place(lines: Sequence[str], old: Sequence[str], stated: int, done: int) -> int | None:
    """Where a hunk's old lines are, behind the hunk before it; of several places the nearest to the stated one."""
    if not old:
        return stated if done <= stated <= len(lines) else None
    bare = [line.rstrip() for line in lines]
    places = [at for at in range(done, len(lines) - len(old) + 1) if bare[at : at + len(old)] == list(old)]
    if len(places) > 1 and stated < done:
        raise PatchError(f"a hunk fits {len(places)} places; give its line numbers")
    return min(places, key=lambda at: abs(at - stated), default=None)


# --- source ----------------------------------------------------------------------------------------------------------


def _apply_source(source: str, text: str) -> str:
    """Definitions put in the place of those of the same name, or a whole program."""
    old, new = _parse(source), _parse(text)
    if old is None or new is None:
        return text
    before, after = _definitions(old), _definitions(new)
    if not before.keys() & after.keys() or _has_statements(new):
        return text
    if before.keys() <= after.keys() and not _has_statements(old):
        return text
    try:
        return old.with_changes(body=_merged(old, before, new, after)).code
    except RecursionError:  # strings in a row are levels that Python's tree does not show
        return text


def _merged(
    old: cst.Module, before: dict[str, _Definition], new: cst.Module, after: dict[str, _Definition]
) -> list[cst.BaseCompoundStatement | cst.SimpleStatementLine]:
    """The old statements with replaced definitions; new imports come first, new definitions before their first use."""
    known = {old.code_for_node(item).strip() for item in old.body}
    imports = [item for item in new.body if _is_import(item) and new.code_for_node(item).strip() not in known]
    added = [item for name, item in after.items() if name not in before]
    replaced = {id(before[name]): after[name] for name in before.keys() & after.keys()}
    body: list[cst.BaseCompoundStatement | cst.SimpleStatementLine] = []
    head = 0
    for item in old.body:
        if id(item) in replaced:
            body += [*added, replaced[id(item)].with_changes(leading_lines=item.leading_lines)]
            added = []
        else:
            body.append(item)
            head = len(body) if _stands_aside(item) and head == len(body) - 1 else head
    return [*body[:head], *imports, *body[head:]]


def _definitions(module: cst.Module) -> dict[str, _Definition]:
    """Top-level functions and classes by name; {} where a name is defined twice: replacing it has no one meaning."""
    found = [item for item in module.body if isinstance(item, cst.FunctionDef | cst.ClassDef)]
    named = {item.name.value: item for item in found}
    return named if len(named) == len(found) else {}


def _has_statements(module: cst.Module) -> bool:
    """Whether there is more at the top level than definitions, imports and a docstring."""
    return not all(isinstance(item, cst.FunctionDef | cst.ClassDef) or _stands_aside(item) for item in module.body)


def _stands_aside(item: cst.CSTNode) -> bool:
    """An import, or a docstring."""
    return _is_import(item) or (
        isinstance(item, cst.SimpleStatementLine)
        and all(
            isinstance(part, cst.Expr) and isinstance(part.value, cst.SimpleString | cst.ConcatenatedString)
            for part in item.body
        )
    )


def _is_import(item: cst.CSTNode) -> bool:
    return isinstance(item, cst.SimpleStatementLine) and all(
        isinstance(part, cst.Import | cst.ImportFrom) for part in item.body
    )
