"""Patches as students write them: what applies, and what is said of the rest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopd_verifiers.patches import PatchError, apply_patch

SOURCE = '''"""Doc."""
import math

LIMIT = 3


def area(w, h):
    # a comment that stays
    return w + h


def twice(x):
    return area(x, x)
'''
FIXED = SOURCE.replace("w + h", "w * h")


def block(search, replacement):
    return f"<<<<<<< SEARCH\n{search}\n=======\n{replacement}\n>>>>>>> REPLACE\n"


def diff(*hunks, head="--- a/area.py\n+++ b/area.py\n"):
    return head + "\n".join(hunks) + "\n"


HUNK = "@@ -7,3 +7,3 @@\n def area(w, h):\n     # a comment that stays\n-    return w + h\n+    return w * h"


@pytest.mark.parametrize(
    "patch",
    [
        FIXED,
        f"Here it is:\n```python\n{FIXED}```\nDone.",
        "def area(w, h):\n    # a comment that stays\n    return w * h\n",
        block("    return w + h", "    return w * h"),
        "I change one line.\n```\n" + block("    return w + h", "    return w * h") + "```\n",
        block("    return w + h", "    return w * h").replace("\n", "\r\n"),
        diff(HUNK),
        diff(HUNK, head="diff --git a/x.py b/x.py\nindex 1..2 100644\n--- a/x.py\n+++ b/x.py\n"),
        diff(HUNK.replace("-7,3 +7,3", "-70,9 +1,1")),
        diff(HUNK.replace("@@ -7,3 +7,3 @@", "@@"), head=""),
        diff(HUNK) + "\nThat is all.\n",
        "```diff\n" + diff(HUNK) + "```",
        diff(
            "@@ -5,5 +5,5 @@\n\n\n def area(w, h):\n     # a comment that stays\n-    return w + h\n+    return w * h"
        ),
    ],
)
def test_the_same_fix_in_many_forms(patch):
    assert apply_patch(SOURCE, patch).strip() == FIXED.strip()


def test_whole_functions_keep_the_rest_and_bring_what_they_need():
    patch = "import math\nimport re\n\ndef helper(w):\n    return w\n\ndef area(w, h):\n    return helper(w) * h\n"
    found = apply_patch(SOURCE, patch)
    assert found.startswith('"""Doc."""\nimport math\nimport re\n')
    assert found.index("def helper") < found.index("def area") < found.index("def twice")
    assert "LIMIT = 3" in found and "w + h" not in found


@pytest.mark.parametrize(
    "program",
    ["def area(:", "def other(x):\n    return x\n", "X = 1\n\ndef area(w, h):\n    return 1\n", "", "print('```')\n"],
)
def test_what_is_no_patch_is_a_whole_program(program):
    assert apply_patch(SOURCE, program) == program


def test_definitions_that_are_all_there_is_are_the_program():
    source = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    assert apply_patch(source, "def g():\n    return 3\n\ndef f():\n    return 1\n").startswith("def g")
    twice = "def f():\n    return 1\n\ndef f():\n    return 2\n"
    assert apply_patch(source, twice) == twice


@pytest.mark.parametrize(
    "body",
    [
        "return " + "(" * 1600,
        "return " + "(" * 60_000 + ")" * 60_000,
        "return " + "-" * 50_000 + "w",
        "return w" + ".h" * 50_000,
        "return " + "w and " * 30_000 + "h",
        "return " + "'' " * 1000,
        "import w" + ".h" * 20_000,
    ],
    ids=["open", "brackets", "signs", "attributes", "operands_in_a_row", "strings_in_a_row", "dotted_name"],
)
def test_what_is_nested_too_deeply_is_a_whole_program_and_ends_no_process(body):
    deep = f"def area(w, h):\n    {body}\n"
    assert apply_patch(SOURCE, deep) == deep


def test_deep_but_bearable_definitions_replace_those_of_the_same_name():
    changed = apply_patch(SOURCE, f"def area(w, h):\n    return {'-' * 150}w and {'(' * 150}h{')' * 150}\n")
    assert changed.startswith('"""Doc."""') and "-w and" in changed


def test_several_blocks_and_hunks_apply_in_order():
    both = block("    return w + h", "    return w * h") + block("LIMIT = 3", "LIMIT = 4")
    assert apply_patch(SOURCE, both) == FIXED.replace("3", "4")
    second = "@@ -12,2 +12,3 @@\n def twice(x):\n+    x = abs(x)\n     return area(x, x)"
    assert "    x = abs(x)\n    return area" in apply_patch(SOURCE, diff(HUNK, second))


def test_line_numbers_choose_between_equal_places():
    source = "a = 1\nb = 1\nx = 0\na = 1\nb = 1\n"
    hunk = "@@ -{} +1,1 @@\n a = 1\n-b = 1\n+b = 2"
    assert apply_patch(source, diff(hunk.format("4,2"))).endswith("a = 1\nb = 2\n")
    assert apply_patch(source, diff(hunk.format("1,2"))).startswith("a = 1\nb = 2\n")
    with pytest.raises(PatchError, match="fits 2 places"):
        apply_patch(source, diff("@@\n a = 1\n-b = 1\n+b = 2"))


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        (block("    return w - h", "x"), "block 1: text not found"),
        (block("", "x"), "block 1 is empty"),
        ("<<<<<<< SEARCH\nLIMIT = 3\n=======\nLIMIT = 4\n", "not finished"),
        (block("    return w", "x"), "not found"),
        (diff(HUNK.replace("w + h", "w - h")), "hunk 1 does not apply"),
        (diff(HUNK) + diff(HUNK).replace("area.py", "tests.py"), "exactly the program; it changes area.py, tests.py"),
        (diff("@@ -0,0 +1,1 @@\n+x = 1", head="--- /dev/null\n+++ b/new.py\n"), "cannot add"),
        (diff("@@ -1,1 +0,0 @@\n-x = 1", head="--- a/area.py\n+++ /dev/null\n"), "cannot add, remove"),
        ("diff --git a/x b/x\nold mode 100644\nnew mode 120000\n", "no lines|must change lines"),
        ("diff --git a/x b/x\nBinary files a/x and b/x differ\n", "no lines|must change lines"),
        ("x" * 200_001, "more than 200000 characters"),
    ],
)
def test_what_does_not_apply_says_why(patch, why):
    with pytest.raises(PatchError, match=why):
        apply_patch(SOURCE, patch)


PIECES = ["<<<<<<< SEARCH\n", "=======\n", ">>>>>>> REPLACE\n", "@@ -1,2 +1,2 @@\n", "--- a/x\n", "+++ b/x\n", "```\n"]


@settings(max_examples=40)
@given(
    st.lists(
        st.sampled_from([*PIECES, "-LIMIT = 3\n", "+LIMIT = 4\n", " \n", "\n", "def area(w, h):\n", "\\x\n"]),
        max_size=9,
    )
)
def test_any_text_applies_or_says_why(pieces):
    try:
        assert isinstance(apply_patch(SOURCE, "".join(pieces)), str)
    except PatchError as exc:
        assert str(exc)
