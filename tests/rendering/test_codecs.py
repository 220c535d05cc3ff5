import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.rendering.codecs import HermesJSON
from agentopd.types import ToolCall

CODEC = HermesJSON()

text = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
markers = st.sampled_from(["</tool_call>", "<tool_call>", "<think>", "</think>", "{", "}", '"', "\\", "\n"])
strings = st.lists(text | markers, max_size=4).map("".join)


def wrap(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


EDIT = wrap('{"name": "edit", "arguments": {"old": "a"}}')
EDIT_CALL = ToolCall(name="edit", arguments={"old": "a"})


@given(strings)
def test_parse_never_raises_and_spans_lie_in_the_text(anything: str) -> None:
    for candidate in (anything, f"<tool_call>{anything}", wrap('{"name": "f", "arguments": ' + anything + "}")):
        found, malformed = CODEC.parse(candidate)
        spans = CODEC.spans(candidate)
        assert len(spans) == len(found) + len(malformed)
        assert all(0 <= start < end <= len(candidate) for start, end in spans)


def test_render_is_exact() -> None:
    call = ToolCall(name="write", arguments={"item": "dåtes", "count": 3})
    assert CODEC.render(call) == (
        '<tool_call>\n{"name": "write", "arguments": {"item": "dåtes", "count": 3}}\n</tool_call>'
    )


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "f", "arguments": {"s": "</tool_call>"}}', {"s": "</tool_call>"}),
        ('{"name": "f", "arguments": {"cmd": "mkdir -p test/{a,b"}}', {"cmd": "mkdir -p test/{a,b"}),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "f"}', {}),
        ('  {"arguments": {"a": "\\u00e5"}, "name": "f"}  ', {"a": "å"}),
        (
            '{"name": "f", "arguments": {"n": "3", "big": 12345678901234567890123}}',
            {"n": "3", "big": 12345678901234567890123},
        ),
    ],
)
def test_accepted_bodies(body: str, arguments: dict[str, object]) -> None:
    assert CODEC.parse(wrap(body)) == ((ToolCall(name="f", arguments=arguments),), ())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"name": "f", "arguments": {"a": 1}', "invalid JSON"),
        ('{"name": "f", "arguments": {"a": 1}} {"name": "g", "arguments": {}}', "text after the call object"),
        ('{"name": "f", "arguments": {"a": 1, "a": 2}}', "duplicate key 'a'"),
        ('{"name": "f", "name": "g", "arguments": {}}', "duplicate key 'name'"),
        ('{"name": "f", "arguments": {"a": NaN}}', "NaN is not JSON"),
        ('{"name": "f", "arguments": {"a": -Infinity}}', "-Infinity is not JSON"),
        ('{"name": "f", "arguments": {"a": 1e999}}', "too large"),
        ('{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}", "too large"),
        ('{"name": "f", "arguments": {"a": "\\ud800"}}', "surrogate"),
        ('{"name": "f", "arguments": {"a": ' + "[" * 100 + "]" * 100 + "}}", "nested too deeply"),
        ('{"name": "f", "arguments": {"a": ' + "[" * 20000 + "}}", "nested too deeply"),
        ('{"name": "f", "arguments": "not json"}', "does not hold a JSON object"),
        ('{"name": "f", "arguments": [1]}', "not an array"),
        ('{"name": "f", "arguments": null}', "not null"),
        ('{"name": "f", "arguments": {}, "id": 1}', "unexpected key 'id'"),
        ('{"name": "", "arguments": {}}', "non-empty string"),
        ('{"arguments": {}}', "non-empty string"),
        ("[1, 2]", "must be a JSON object"),
        ("", "invalid JSON"),
    ],
)
def test_refused_bodies_are_data_and_what_follows_is_read(body: str, reason: str) -> None:
    found, malformed = CODEC.parse(wrap(body) + "\n" + EDIT)
    assert [item.reason for item in malformed] == [malformed[0].reason] and reason in malformed[0].reason
    assert malformed[0].raw.startswith("<tool_call>")
    assert found == (EDIT_CALL,)


def test_prose_is_not_a_call() -> None:
    assert CODEC.parse('Like so: {"name": "f", "arguments": {}} and </tool_call>') == ((), ())


def test_calls_in_thought_are_not_calls() -> None:
    assert CODEC.parse(f"<think>I could {EDIT}</think>\n{EDIT}") == ((EDIT_CALL,), ())
    assert CODEC.parse(f"I could {EDIT}</think>\n{EDIT}") == ((EDIT_CALL,), ())


def test_unclosed_thought() -> None:
    assert CODEC.parse("<think>hm") == ((), ())
    found, malformed = CODEC.parse(f"<think>hm {EDIT}")
    assert found == () and "never closed" in malformed[0].reason


def test_truncated_call_is_malformed() -> None:
    for cut in range(len("<tool_call>"), len(EDIT)):
        found, malformed = CODEC.parse(EDIT[:cut])
        assert found == () and len(malformed) == 1, EDIT[:cut]


def test_a_broken_call_never_executes_what_it_holds() -> None:
    found, malformed = CODEC.parse('<tool_call>\n{"name": "say", "arguments": {"text": "x' + EDIT)
    assert found == () and len(malformed) == 1


def test_count_and_size_limits() -> None:
    codec = HermesJSON(max_calls=2, max_chars=60)
    found, malformed = codec.parse("\n".join([EDIT] * 5))
    assert len(found) == 2 and [item.reason for item in malformed] == ["more than 2 calls in one turn"]
    long = wrap(json.dumps({"name": "f", "arguments": {"a": "x" * 100}}))
    found, malformed = codec.parse(long + EDIT)
    assert len(found) == 1 and malformed[0].reason == "longer than 60 characters"


def test_raw_text_of_a_huge_failure_is_clipped() -> None:
    (item,) = CODEC.parse("<tool_call>" + "x" * 100_000)[1]
    assert len(item.raw) < 3000
