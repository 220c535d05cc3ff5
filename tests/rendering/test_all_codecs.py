"""What holds for every way of writing tool calls, and what each format declares."""

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopd.registry import tool_codecs
from agentopd.rendering import HermesJSON, OpenAI, Pythonic, Qwen3XML, ToolCodec
from agentopd.types import ToolCall, ToolSchema

CODECS = [HermesJSON(), Qwen3XML(), Pythonic(), OpenAI()]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)

HARD = (
    "</tool_call>", "<tool_call>", "</parameter>", "&lt;/parameter>", "&amp;lt;/parameter>", "</function>", "<think>",
    "</think>", "{", "}", "[", "]", "(", '"', "'", "\\", "\n", "\r", "\t", '"""', "3", "null", "true", "NaN", "#",
    "\u2028", "\x00", "\u200b", "ﬁnd", "ｒead", "\N{CYRILLIC SMALL LETTER A}", "mkdir -p test/{a,b", "f(x)",
)  # fmt: skip
text = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
strings = st.lists(text | st.sampled_from(HARD), max_size=4).map("".join)
names = strings.filter(lambda name: name and not set(name) & set(">\n"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=8,
)
calls = st.builds(ToolCall, name=names, arguments=st.dictionaries(names, values, max_size=3))
TYPED = ToolSchema(
    name="edit",
    parameters={
        "properties": {"old": {"type": "string"}, "new": {"type": "string"}, "line": {"type": "integer"}, "any": {}}
    },
)
typed_calls = st.builds(
    ToolCall,
    name=st.just("edit"),
    arguments=st.fixed_dictionaries(
        {"old": strings}, optional={"new": strings, "line": st.integers(), "any": values, "extra": values}
    ),
)


def exactly(arguments: dict[str, Any]) -> list[str]:
    """A form in which True is not 1, and 1.0 is not 1; the order of arguments is not part of it."""
    return sorted(map(repr, arguments.items()))


def check(codec: ToolCodec, made: list[ToolCall], tools: list[ToolSchema], before: str = "") -> None:
    found, malformed = codec.parse(before + codec.render(*made, tools=tools), tools)
    assert malformed == () and [call.name for call in found] == [call.name for call in made]
    assert [exactly(call.arguments) for call in found] == [exactly(call.arguments) for call in made]


@each_codec
@settings(max_examples=25)
@given(made=st.lists(calls, max_size=3))
def test_parse_inverts_render(codec: ToolCodec, made: list[ToolCall]) -> None:
    check(codec, made, [])


@each_codec
@settings(max_examples=25)
@given(made=st.lists(typed_calls, max_size=3))
def test_parse_inverts_render_with_schemas(codec: ToolCodec, made: list[ToolCall]) -> None:
    check(codec, made, [TYPED], before="<think>first</think>\nSo:\n")


@each_codec
def test_awkward_strings_survive(codec: ToolCodec) -> None:
    for value in HARD:
        check(codec, [ToolCall(name="edit", arguments={"old": value, "new": value * 2, "any": [value]})], [TYPED])
        check(codec, [ToolCall(name="edit", arguments={"old": f"x{value}\n", "any": {value: value}})], [])


@each_codec
def test_a_megabyte_and_many_calls(codec: ToolCodec) -> None:
    program = 'def f(a):\n    return "{" + a["</tool_call>"]\n' * 2**15
    assert len(program) > 2**20
    check(codec, [ToolCall(name="edit", arguments={"old": program})], [TYPED])
    check(codec, [ToolCall(name=f"f{index}", arguments={"n": index}) for index in range(128)], [])


@each_codec
@settings(max_examples=25)
@given(anything=strings, share=st.floats(0, 1))
def test_parse_never_raises_and_spans_lie_in_the_text(codec: ToolCodec, anything: str, share: float) -> None:
    whole = codec.render(ToolCall(name="f", arguments={"a": anything, "n": 3}))
    cut = int(share * len(whole))
    for candidate in (anything, whole[:cut] + anything, whole[:cut] + anything + whole[cut:]):
        found, malformed = codec.parse(candidate)
        assert all(json.dumps(call.arguments, allow_nan=False) for call in found)
        assert all(0 <= start < end <= len(candidate) for start, end in codec.spans(candidate))
        assert bool(codec.spans(candidate)) == bool(found or malformed)


@each_codec
def test_thoughts_are_no_calls(codec: ToolCodec) -> None:
    call = ToolCall(name="f", arguments={"a": 1})
    written = codec.render(call)
    assert codec.parse(f"<think>\n{written}\n</think>\n{written}") == ((call,), ())
    assert codec.parse(f"{written}\n</think>\n{written}") == ((call,), ())
    found, malformed = codec.parse(f"<think>\n{written}")
    assert found == () and "never closed" in malformed[0].reason


@each_codec
def test_a_call_that_was_cut_off_is_data(codec: ToolCodec) -> None:
    written = codec.render(ToolCall(name="say", arguments={"text": codec.render(ToolCall(name="drop"))}))
    for cut in range(len(written)):
        assert codec.parse(written[:cut])[0] == (), written[:cut]
    assert codec.parse(written[:-1])[1]


@each_codec
def test_limits_make_calls_malformed(codec: ToolCodec) -> None:
    small = type(codec)(max_calls=2, max_chars=400, max_depth=3)
    many = small.parse("\n".join(codec.render(ToolCall(name="f")) for _ in range(5)))
    assert len(many[0]) == 2 and many[1][0].reason == "more than 2 calls in one turn"
    (long,) = small.parse(codec.render(ToolCall(name="f", arguments={"a": "x" * 500})))[1]
    assert long.reason == "longer than 400 characters" and len(long.raw) < 3000
    (deep,) = small.parse(codec.render(ToolCall(name="f", arguments={"a": [[[[1]]]]})))[1]
    assert deep.reason == "nested too deeply"


@each_codec
def test_what_cannot_be_written_is_refused(codec: ToolCodec) -> None:
    with pytest.raises(ValueError):
        codec.render(ToolCall(name="f", arguments={"a": float("nan")}))


@each_codec
def test_codecs_are_found_by_name(codec: ToolCodec) -> None:
    assert tool_codecs.get(codec.name) is type(codec) and isinstance(codec, ToolCodec)


# --- qwen3_xml -------------------------------------------------------------------------------------------------------


def xml(*parameters: str, name: str = "edit") -> str:
    return (
        f"<tool_call>\n<function={name}>\n" + "".join(f"{line}\n" for line in parameters) + "</function>\n</tool_call>"
    )


def test_xml_is_written_as_the_models_write_it() -> None:
    call = ToolCall(name="edit", arguments={"old": "a < b", "line": 3, "any": ["x"]})
    assert Qwen3XML().render(call, tools=[TYPED]) == xml(
        "<parameter=old>\na < b\n</parameter>",
        "<parameter=line>\n3\n</parameter>",
        '<parameter=any>\n["x"]\n</parameter>',
    )


def test_xml_text_is_text_where_the_schema_says_so() -> None:
    written = xml("<parameter=old>\n3\n</parameter>", "<parameter=any>3</parameter>")
    assert Qwen3XML().parse(written, [TYPED])[0][0].arguments == {"old": "3", "any": 3}
    assert Qwen3XML().parse(written)[0][0].arguments == {"old": 3, "any": 3}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<tool_call>\nedit\n</tool_call>", "must be followed by <function=NAME>"),
        ("<tool_call>\n<function=edit>\n<parameter=old>\n1\n", "no </parameter>"),
        (xml("<parameter=a>1</parameter>", "<parameter=a>2</parameter>"), "duplicate parameter 'a'"),
        (xml("<parameter=a>1</parameter>", "and then"), "something stands before it"),
        ("<tool_call>\n<function=f>\n</tool_call>", "</function></tool_call> is missing"),
    ],
)
def test_broken_xml_is_data(body: str, reason: str) -> None:
    found, malformed = Qwen3XML().parse(body)
    assert found == () and reason in malformed[0].reason
    if body.endswith("</tool_call>"):
        assert [call.name for call in Qwen3XML().parse(f"{body}\n{xml(name='next')}")[0]] == ["next"]


def test_xml_names_that_break_the_format_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be a name"):
        Qwen3XML().render(ToolCall(name="f", arguments={"a>b": 1}))


# --- pythonic --------------------------------------------------------------------------------------------------------


def test_python_is_written_as_the_models_write_it() -> None:
    made = [ToolCall(name="math.add", arguments={"a": 1, "b-c": None}), ToolCall(name="stop")]
    assert Pythonic().render(*made) == "[math.add(a=1, **{'b-c': None}), stop()]"


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('[f(a=true, b=null, c={"k": [1, -2.5]})]', {"a": True, "b": None, "c": {"k": [1, -2.5]}}),
        ("[f(\n  a='''x\ny''',\n)]", {"a": "x\ny"}),
        ("Let me see.\n  [f(a='é', b=\"]\")]\n", {"a": "é", "b": "]"}),
        (r"[f(a='\d')]", {"a": r"\d"}),
    ],
)
def test_accepted_python(written: str, arguments: dict[str, Any]) -> None:
    assert Pythonic().parse(written) == ((ToolCall(name="f", arguments=arguments),), ())


@pytest.mark.parametrize(
    "prose",
    ["[f(x)](link)", "see [f(a=1)]", "[1, 2]", "[f]", "f(a=1)", "[f(a=1)] is how", "a[f(1)]"],
)
def test_python_in_prose_is_prose(prose: str) -> None:
    assert Pythonic().parse(prose) == ((), ())


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("[f(1)]", "must be named"),
        ("[f(a=1, a=2)]", "duplicate argument"),
        ("[f(a=1, **{'a': 2})]", "duplicate argument 'a'"),
        ("[f(a=open('x'))]", "must be a literal, not call"),
        ("[f(a=1+1)]", "must be a literal"),
        ("[f(a=(1, 2))]", "must be a literal, not tuple"),
        ("[f(a=b'x')]", "must be a literal"),
        ("[f(a=1e999)]", "too large"),
        ("[f(a={1: 2})]", "keys of a dictionary"),
        ("[f(a={**{}})]", "keys of a dictionary"),
        ("[f(a='\\ud800')]", "surrogate"),
        ("[f(a=1), 3]", "must be a call"),
        ("[f(a=1)(b=2)]", "by its name"),
        ("[f(ﬁ=1)]", "plain letters"),
        ("[ｆ(a=1)]", "plain letters"),
        ("[f(a=1", "never closes"),
        ("[f(a='x", "never closes"),
        ("[f(a=" + "[" * 150 + "]" * 150 + ")]", "nested too deeply"),
        ("[f(a=" + "9" * (sys.get_int_max_str_digits() + 1) + ")]", "invalid syntax"),
        ("[f(a=1, **3)]", "needs a dictionary"),
        ("[f(a=1; b=2)]", "invalid syntax"),
    ],
)
def test_refused_python_is_data(written: str, reason: str) -> None:
    found, malformed = Pythonic().parse(written)
    assert found == () and reason in malformed[0].reason


# --- openai ----------------------------------------------------------------------------------------------------------


def test_openai_is_the_field_of_the_api() -> None:
    written = OpenAI().render(ToolCall(name="f", arguments={"a": "é"}))
    assert written == (
        '{"tool_calls": [{"id": "call_0", "type": "function", '
        '"function": {"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}}]}'
    )
    spread = '{ "tool_calls":\n [{"function": {"name": "f", "arguments": {"a": 1}}}]}'
    assert OpenAI().parse(f"Now.\n{spread}") == ((ToolCall(name="f", arguments={"a": 1}),), ())


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ('{"tool_calls": []}', "array of calls"),
        ('{"tool_calls": {}}', "not an object"),
        ('{"tool_calls": [1]}', "object with 'function'"),
        ('{"tool_calls": [], "content": ""}', "unexpected key 'content'"),
        ('{"tool_calls": [{"type": "web", "function": {"name": "f"}}]}', "must be 'function'"),
        ('{"tool_calls": [{"index": 0, "function": {"name": "f"}}]}', "unexpected key 'index'"),
        ('{"tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}', "does not hold a JSON object"),
        ('{"tool_calls": [{"function": {"name": "f"}}]} so', "text after"),
        ('{"tool_calls": [{"function": {"name": "f"}}', "invalid JSON"),
    ],
)
def test_broken_openai_calls_are_data(written: str, reason: str) -> None:
    found, malformed = OpenAI().parse(written)
    assert found == () and reason in malformed[0].reason


def test_other_json_is_prose() -> None:
    assert OpenAI().parse('{"name": "f", "arguments": {}}\nas in {"tool_calls": [1]}') == ((), ())
