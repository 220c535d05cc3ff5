"""Two tokenizers over one text: segments, shared ids, and the divergence on them."""

import math
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentopd.objective.alignment import (
    Segment,
    align_bytes,
    first_ids,
    segment_logprobs,
    shared_ids,
    translate,
    with_span_slot,
)
from agentopd.objective.support import truncated

cut_points = st.lists(st.integers(1, 29), max_size=12).map(lambda found: sorted(set(found)))
TEXT = bytes(range(65, 95))


def pieces(cuts):
    edges = [0, *cuts, len(TEXT)]
    return [TEXT[a:b] for a, b in pairwise(edges)]


def test_new_york_is_one_segment_of_one_and_two():
    found = align_bytes([b"New York", b" is", b"!"], [b"New", b" York", b" is", b"!"])
    assert found == [Segment((0, 1), (0, 2)), Segment((1, 2), (2, 3)), Segment((2, 3), (3, 4))]
    assert [segment.one_to_one for segment in found] == [False, True, True]


@given(cut_points, cut_points)
def test_segments_cover_everything_and_spell_the_same(ours, theirs):
    student, teacher = pieces(ours), pieces(theirs)
    found = align_bytes(student, teacher)
    assert found[0].student[0] == found[0].teacher[0] == 0
    assert found[-1].student[1] == len(student) and found[-1].teacher[1] == len(teacher)
    for a, b in pairwise(found):
        assert a.student[1] == b.student[0] and a.teacher[1] == b.teacher[0]
    for (s0, s1), (t0, t1) in found:
        assert b"".join(student[s0:s1]) == b"".join(teacher[t0:t1])
    # Finest: exactly one more segment than common inner boundaries.
    assert len(found) == 1 + len(set(ours) & set(theirs))


@given(cut_points)
def test_the_same_tokenizer_is_one_to_one(cuts):
    assert all(segment.one_to_one for segment in align_bytes(pieces(cuts), pieces(cuts)))


def test_nothing_is_aligned_after_a_difference_or_a_dangling_tail():
    assert align_bytes([b"a", b"b\xff"], [b"a", b"b\xef\xbf\xbd"]) == [Segment((0, 1), (0, 1))]
    assert align_bytes([b"a", b"bc"], [b"a", b"b"]) == [Segment((0, 1), (0, 1))]
    assert align_bytes([], []) == []
    assert align_bytes([b"x"], []) == []


def test_an_empty_piece_belongs_to_the_token_before_it():
    assert align_bytes([b"a", b"", b"b"], [b"a", b"b"]) == [Segment((0, 2), (0, 1)), Segment((2, 3), (1, 2))]


def test_shared_ids_skip_special_tokens_and_are_one_to_one():
    student = [b"a", None, b"b", b"a", b"c"]
    teacher = [b"c", b"a", None, b"zz", b"a"]
    assert shared_ids(student, teacher).tolist() == [4, 0, -1, -1, -1]


def test_translated_slots_without_a_shared_id_are_unused():
    table = np.array([4, -1, 2])
    ids, logprobs = translate(np.array([0, 1]), np.array([-1.0, -2.0], np.float32), table)
    assert ids.tolist() == [4, 0] and logprobs.tolist() == [-1.0, -math.inf]
    ids, logprobs = translate(np.array([2, 0]), np.array([-0.5, -math.inf], np.float32), table)
    assert ids.tolist() == [2, 0] and logprobs.tolist() == [-0.5, -math.inf]


def test_translated_masses_of_one_id_add_up():
    table = np.array([3, 3, 1])
    ids, logprobs = translate(np.array([0, 2, 1]), np.log(np.array([0.5, 0.2, 0.25], np.float32)), table)
    assert ids.tolist() == [1, 3, 0]
    np.testing.assert_allclose(np.exp(logprobs), [0.2, 0.75, 0.0], rtol=1e-6)


def test_a_token_the_student_lacks_counts_for_the_one_it_begins_with():
    student = [b"a", b"b", b"ab", None, b"\xc3"]
    teacher = [b"ab", b"abb", b"ba", None, b"\xc3\xb6", b"z"]

    def encode(text):
        return {"abb": [0, 1, 1], "ba": [1, 0]}.get(text, [])  # a BPE need not begin with the longest piece

    assert first_ids(student, teacher, encode).tolist() == [2, 0, 1, -1, 4, -1]


def test_a_student_that_writes_what_the_teacher_writes_is_an_optimum_only_if_projected():
    """Half the texts are "ab", one token for the teacher and two for the student, half are "c"."""
    student = torch.tensor([0.5, 0.0, 0.5]).log().clamp(min=-40)  # a, b, c
    teacher_ids, teacher = np.arange(4), np.log(np.array([1e-9, 1e-9, 0.5, 0.5], np.float32))  # a, b, c, ab
    pieces = [b"a", b"b", b"c"]

    def divergence_where_c_was_sampled(table):
        ids, logprobs = translate(teacher_ids, teacher, table)
        return truncated(student[ids][None], torch.from_numpy(logprobs)[None]).item()

    assert divergence_where_c_was_sampled(first_ids(pieces, [*pieces, b"ab"], lambda text: [0, 1])) < 1e-5
    assert divergence_where_c_was_sampled(shared_ids(pieces, [*pieces, b"ab"])) > 5


def test_segment_logprobs_add_up_inside_a_segment_only():
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], requires_grad=True)
    row, segment = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, -1, 0, 1])
    total, several = segment_logprobs(logprobs, row, segment)
    assert total.tolist() == [-3.0, -3.0, -3.0, -4.0, -5.0]
    assert several.tolist() == [True, True, False, False, False]
    total[0].backward()
    assert logprobs.grad.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 10**6))
def test_simct_equals_full_reverse_kl_when_tokenizers_agree(vocab, tokens, seed):
    torch.manual_seed(seed)
    student, teacher = (torch.randn(tokens, vocab).log_softmax(-1) for _ in range(2))
    own = torch.randn(tokens)
    row, segment = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)
    score, several = segment_logprobs(own, row, segment)
    rows = with_span_slot(student, teacher, torch.stack([score, score], -1), several)
    full = (student.exp() * (student - teacher)).sum(-1)
    torch.testing.assert_close(truncated(*rows), full, atol=1e-5, rtol=1e-4)


def test_a_span_row_has_one_more_slot_and_is_zero_for_identical_models():
    student = torch.tensor([[0.5, 0.3, 0.2]]).log()
    spans, several = torch.tensor([[-1.2, -1.2]]), torch.tensor([True])
    ours, theirs = with_span_slot(student, student, spans, several)
    assert ours.shape == theirs.shape == (1, 4)
    assert truncated(ours, theirs).abs().item() < 1e-6
    _, other = with_span_slot(student, student, torch.tensor([[-1.2, -3.0]]), several)
    assert truncated(ours, other).item() > 0.01
