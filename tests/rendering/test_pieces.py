"""The bytes behind token ids."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agentopd.errors import ConfigError
from agentopd.models import load_tokenizer
from agentopd.rendering.pieces import as_text, token_bytes


@pytest.fixture(scope="module")
def micro():
    return load_tokenizer("micro/student")


@given(text=st.text(max_size=40))
def test_pieces_spell_the_text(micro, text):
    ids = micro(text, add_special_tokens=False)["input_ids"]
    table = token_bytes(micro)
    if not any(table[index] is None for index in ids):
        assert b"".join(table[index] for index in ids) == text.encode()


def test_special_tokens_have_no_bytes_and_markers_have_their_own(micro):
    table = token_bytes(micro)
    assert all(table[index] is None for index in micro.all_special_ids)
    assert table[micro.convert_tokens_to_ids("<tool_call>")] == b"<tool_call>"


@given(data=st.binary(max_size=24), cuts=st.lists(st.integers(0, 24), max_size=6))
def test_pieces_of_any_bytes_show_as_their_decoded_text(data, cuts):
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    assert b"".join(as_text(pieces)) == data.decode(errors="replace").encode()


def test_a_character_cut_in_two_stays_with_both_pieces():
    assert as_text([b"a\xc3", b"\xbc"]) == [b"a\xc3", b"\xbc"]
    assert as_text([b"a\xff", b"b", b"\xc3"]) == ["a\ufffd".encode(), b"b", "\ufffd".encode()]


def test_sentence_piece_with_byte_fallback():
    text = "▁abcdefghijklmnopqrstuvwxyz0123456789"
    vocab = {"<unk>": 0, **{f"<0x{value:02X}>": value + 1 for value in range(256)}}
    vocab |= {char: len(vocab) + index for index, char in enumerate(text)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    table = token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert table[vocab["▁"]] == b" " and table[vocab["<0xE2>"]] == b"\xe2"


def test_tokens_that_do_not_spell_their_text_are_refused():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match="do not spell"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))
