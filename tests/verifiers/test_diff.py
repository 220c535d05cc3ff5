"""The gated penalty of code repair."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopd_verifiers.diff import gated_reward, measure, patch_penalty, penalty

STARTER = '''
def area(w, h):
    """Area of a rectangle."""
    return w + h


def perimeter(w, h):
    total = 0
    for side in (w, h):
        total += 2 * side
    return total
'''
GOLD = STARTER.replace("w + h", "w * h")
SIZES = st.floats(0, 1e6)
UNIT = st.floats(0, 1)


def test_the_formula_by_hand():
    parts = penalty(d=8, d0=4, added_cyclomatic=0, unrelated=0.25)
    assert (parts.size, parts.complexity, parts.unrelated) == (1.0, 0.0, 0.25)
    assert parts.total == pytest.approx(0.375)
    assert gated_reward(True, 1.0, parts.total) == pytest.approx(0.625)
    assert penalty(d=6, d0=4, added_cyclomatic=5, unrelated=0).total == pytest.approx(0.25)
    assert penalty(d=3, d0=1, added_cyclomatic=0, unrelated=0).size == pytest.approx(0.5)


@given(SIZES, SIZES, st.floats(-50, 50), UNIT, UNIT, UNIT)
def test_no_failing_patch_outscores_a_passing_one(d, d0, added, unrelated, p, q):
    total = penalty(d, d0, added, unrelated).total
    assert 0.0 <= gated_reward(False, p, total) <= 0.2 < 0.5 <= gated_reward(True, q, total) <= 1.0


@given(SIZES, SIZES, SIZES, st.floats(-50, 50), UNIT)
def test_a_larger_patch_never_earns_more(d, more, d0, added, unrelated):
    small, large = penalty(d, d0, added, unrelated), penalty(d + more, d0, added, unrelated)
    assert gated_reward(True, 1.0, large.total) <= gated_reward(True, 1.0, small.total)


@given(SIZES, UNIT)
def test_a_patch_no_larger_than_gold_has_no_size_penalty(d0, fraction):
    assert penalty(d0 * fraction, d0, 0, 0).total == 0.0


def test_the_gold_patch_is_free():
    parts, patch = patch_penalty(STARTER, GOLD, GOLD)
    assert parts.total == 0.0
    assert (patch.lines, patch.tokens, patch.parsed) == (2, 1, True)


def test_an_empty_patch_has_no_size():
    assert measure(STARTER, STARTER).cost == 0


@pytest.mark.parametrize(
    "same",
    [
        GOLD.replace("\n\n\n", "\n" * 500),
        GOLD.replace("total = 0", "total = 0  # start\n    # and go on"),
        GOLD.replace("w * h", "(w   *   h)"),
        GOLD.replace("    total = 0\n", "    total = 0;\n"),
        GOLD.replace(
            "    for side in (w, h):\n        total += 2 * side\n", "    for side in (w, h): total += 2 * side\n"
        ),
        GOLD.replace("\n", "\r\n"),
        GOLD.replace('"""Area of a rectangle."""', "'''Area of a rectangle.'''"),
    ],
    ids=["blank lines", "comments", "brackets", "semicolon", "joined", "crlf", "quotes"],
)
def test_layout_costs_nothing_and_gains_nothing(same):
    assert same != GOLD
    assert measure(STARTER, same) == measure(STARTER, GOLD)


def test_changing_another_function_is_unrelated():
    parts, patch = patch_penalty(STARTER, GOLD.replace("2 * side", "side + side"), GOLD)
    assert patch.regions == {"area": 2, "perimeter": 2}
    assert parts.unrelated == 0.5
    assert parts.size == 0.5


def test_an_import_is_not_unrelated_but_counts():
    parts, patch = patch_penalty(STARTER, "import math\n" + GOLD, GOLD)
    assert parts.unrelated == 0.0
    assert patch.lines == 3


def test_methods_are_regions_of_their_own():
    before = "class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return 2\n"
    assert measure(before, before.replace("2", "3")).regions == {"A.g": 2}


def test_added_branches_beyond_golds_are_priced():
    guarded = STARTER.replace("return w + h", "if w and h:\n        return w * h\n    return 0")
    parts, patch = patch_penalty(STARTER, guarded, GOLD)
    assert patch.cyclomatic == 2
    assert parts.complexity == pytest.approx(0.4)
    assert patch_penalty(STARTER, guarded, guarded)[0].total == 0.0


def test_a_giant_one_liner_is_not_one_line():
    giant = STARTER.replace("w + h", " + ".join(["w * h"] * 60) + " - w * h * 59")
    patch = measure(STARTER, giant)
    assert patch.lines == 2
    assert patch.cost > 20


@pytest.mark.parametrize(
    "squeezed",
    [
        "a = w; b = h; c = a * b; return c",
        "return (a := w, b := h, c := a * b)[-1]",
        "return eval('(lambda a, b, c: c)(w, h, w * h)')",
        "return [c for a in [w] for b in [h] for c in [a * b]][0]",
    ],
)
def test_squeezing_lines_together_gains_nothing(squeezed):
    plain = STARTER.replace("return w + h", "a = w\n    b = h\n    c = a * b\n    return c")
    long, short = (patch_penalty(STARTER, text, GOLD) for text in (plain, STARTER.replace("return w + h", squeezed)))
    assert short[1].cost >= min(long[1].cost, 4)
    assert short[0].total >= min(long[0].total, 0.15)


def test_code_hidden_in_a_string_counts_by_its_words():
    hidden = STARTER.replace("return w + h", f"exec({'x = 1;' * 200!r})\n    return w * h")
    encoded = STARTER.replace("return w + h", f"exec(decode({'QUJD' * 400!r}))\n    return w * h")
    for text in (hidden, encoded):
        assert measure(STARTER, text).cost > 10
        assert patch_penalty(STARTER, text, GOLD)[0].size == 1.0


def test_the_edited_nodes_of_the_tree_are_reported():
    assert measure(STARTER, GOLD).nodes == 1
    assert measure(STARTER, STARTER).nodes == 0
    assert measure(STARTER, STARTER.replace("total = 0", "total: int = 0")).nodes > 1


def test_lines_of_other_files_are_all_unrelated():
    alone, beside = patch_penalty(STARTER, GOLD, GOLD), patch_penalty(STARTER, GOLD, GOLD, other_lines=6)
    assert alone[0].total == 0.0
    assert (beside[0].unrelated, beside[0].size) == (0.75, 1.0)
    assert patch_penalty(STARTER, GOLD, None, other_lines=2)[0].unrelated == 0.5


def test_moving_a_line_out_of_a_loop_is_a_change():
    before = "def f(xs):\n    for x in xs:\n        y = x\n        return y\n"
    assert measure(before, before.replace("        return", "    return")).cost > 0


def test_a_program_that_does_not_parse_is_measured_by_lines():
    parts, patch = patch_penalty(STARTER, STARTER + "\n# note\n\ndef broken(:\n", GOLD)
    assert not patch.parsed
    assert patch.lines == 1
    assert 0.0 <= parts.total <= 0.5


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_two_texts_have_a_size(before, after):
    assert measure(before, after).cost >= 0
    assert measure(before, before).cost == 0


VARIANTS = st.sampled_from(["w * h", "h * w", "w + h", "w * h + 0", "(w * h)", "w * h if w else 0", "sum([w] * h)"])
EXTRAS = st.lists(
    st.sampled_from(["    pass\n", "    x = 1\n", "    # why\n", "\n", "    assert w\n", "    y = [1, 2]; z = y\n"]),
    max_size=6,
)


@settings(max_examples=30)
@given(VARIANTS, EXTRAS, VARIANTS, EXTRAS, UNIT)
def test_random_patches_keep_the_order(first, before, second, after, p):
    """No failing patch outscores a passing one, whatever either costs."""
    ours, theirs = (
        STARTER.replace("    return w + h\n", "".join(extra) + f"    return {value}\n")
        for value, extra in ((first, before), (second, after))
    )
    passing, failing = (patch_penalty(STARTER, text, GOLD)[0].total for text in (ours, theirs))
    assert gated_reward(True, 1.0, passing) >= 0.5 > 0.2 >= gated_reward(False, p, failing)


@settings(max_examples=30)
@given(VARIANTS, EXTRAS, VARIANTS, EXTRAS)
def test_a_patch_smaller_than_gold_is_never_punished(value, extra, best, more):
    mine, gold = (
        STARTER.replace("total = 0", "".join(lines).strip() + f"\n    total = 0 * ({text})")
        if place
        else STARTER.replace("    return w + h\n", "".join(lines) + f"    return {text}\n")
        for text, lines, place in ((value, extra, len(more) % 2), (best, more, 0))
    )
    parts, patch = patch_penalty(STARTER, mine, gold)
    if patch.cost <= measure(STARTER, gold).cost:
        assert parts.total == 0.0


@settings(max_examples=30)
@given(EXTRAS, st.integers(0, 3), st.booleans())
def test_layout_of_any_patch_gains_nothing(extra, blank, crlf):
    text = STARTER.replace("    return w + h\n", "".join(extra) + "    return w * h\n")
    shuffled = text.replace("\n", "\n" * (blank + 1)).replace("total = 0", "total = (0);  # note")
    assert measure(STARTER, shuffled.replace("\n", "\r\n") if crlf else shuffled) == measure(STARTER, text)
