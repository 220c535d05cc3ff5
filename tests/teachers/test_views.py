"""What a teacher sees, and how its evidence comes back onto the student's tokens."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from agentopd.contracts import Evidence
from agentopd.errors import TaskError
from agentopd.objective.alignment import align_bytes
from agentopd.rendering import ChatRenderer, HermesJSON
from agentopd.rendering.pieces import token_bytes
from agentopd.teachers.local import LocalTeacher
from agentopd.teachers.views import CrossTokenizerView, Misreading, Opening, PrivilegedView
from agentopd.types import Episode, Message, Privileged, StopReason, Task, ToolSchema, Turn
from tests.tiny import CONTROL, byte_bpe, qwen3

MATHS = ["What is 3 + 4? 3 + 4 = 7. The answer is 7."] * 20
PROSE = ["The answer to the question is that we answer it: the answer is what it is."] * 20
CANARY = "canary-5f1e"
TOOLS = (ToolSchema(name="add"),)


@pytest.fixture(scope="module")
def renderers():
    return [ChatRenderer(byte_bpe(texts, size), HermesJSON()) for texts, size in ((MATHS, 300), (PROSE, 340))]


@pytest.fixture
def task():
    return Task(
        id="t",
        env="toy",
        prompt=(Message(role="system", content="Be brief."), Message(role="user", content="What is 3 + 4?")),
        privileged=Privileged(hint=f"It is {CANARY}.", trajectory=(Message(role="assistant", content="7"),)),
    )


def episode(renderer, task, texts=("The answer is 7.", "Größe: the answer → it is.")):
    turns = []
    for index, text in enumerate(texts):
        ids = tuple(renderer.encode_turn(text))
        results = (Message(role="tool", content=f"result {index}"),) if index + 1 < len(texts) else ()
        observed = tuple(renderer.observe(results)) if results else ()
        turns.append(Turn(token_ids=ids, rollout_logprobs=(-1.0,) * len(ids), observation_ids=observed,
                          text=text, results=results))  # fmt: skip
    return Episode(
        id="e",
        task_id=task.id,
        task_hash=task.hash,
        env="toy",
        split="train",
        prompt_ids=tuple(renderer.open(task.prompt, TOOLS)),
        turns=tuple(turns),
        stop_reason=StopReason.COMPLETED,
    )


def opening(renderer, privilege=None):
    return Opening(renderer, lambda skill, task: TOOLS, privilege)


def score(teacher, shown, top_k):
    return asyncio.run(teacher.score([shown], top_k))[0]


def test_a_privileged_prompt_changes_the_prompt_alone(renderers, task):
    student, _ = renderers
    mine = episode(student, task)
    shown = PrivilegedView(opening(student, "hint")).show(task, mine)
    assert shown.turns == mine.turns
    text = student.tokenizer.decode(list(shown.prompt_ids))
    assert CANARY in text and text.index(CANARY) < text.index("What is 3 + 4?")
    assert CANARY not in student.tokenizer.decode(mine.token_ids)
    assert np.count_nonzero(shown.loss_mask) == mine.num_sampled


def test_privileged_evidence_lies_on_the_students_tokens(renderers, task):
    student, _ = renderers
    net, mine = qwen3(len(student.tokenizer)).requires_grad_(False), episode(student, task)
    view = PrivilegedView(opening(student, "hint"))
    shown = view.show(task, mine)
    found = view.read(mine, shown, score(LocalTeacher("t", net), shown, 0))
    assert found.teacher_logprobs.shape == (mine.num_sampled,)
    ids = torch.tensor([shown.token_ids])
    at = np.flatnonzero(shown.loss_mask)
    assert ids[0, at].tolist() == [token for turn in mine.turns for token in turn.token_ids]
    expected = net(input_ids=ids).logits[0].log_softmax(-1)[at - 1, ids[0, at]]
    np.testing.assert_allclose(found.teacher_logprobs, expected, atol=1e-5)


def test_a_task_without_the_privileged_text_is_refused(renderers, task):
    student, _ = renderers
    with pytest.raises(TaskError, match="no privileged solution"):
        PrivilegedView(opening(student, "solution")).show(task, episode(student, task))


def test_an_environment_that_opens_differently_is_refused(renderers, task):
    student, _ = renderers
    other = episode(student, task).model_copy(update={"prompt_ids": (1, 2, 3)})
    with pytest.raises(TaskError, match="messages other than its prompt"):
        PrivilegedView(opening(student, "hint")).show(task, other)


def test_the_teacher_reads_the_same_conversation_in_its_own_tokens(renderers, task):
    student, teacher = renderers
    mine = episode(student, task)
    shown = CrossTokenizerView(opening(student), teacher).show(task, mine)
    assert shown.turns[0].token_ids != mine.turns[0].token_ids
    assert teacher.tokenizer.decode(shown.token_ids) == student.tokenizer.decode(mine.token_ids)


def test_segments_carry_the_teachers_probability_of_their_text(renderers, task):
    student, teacher = renderers
    mine = episode(student, task)
    view = CrossTokenizerView(opening(student), teacher)
    shown = view.show(task, mine)
    answer = score(LocalTeacher("t", qwen3(len(teacher.tokenizer))), shown, 10_000)
    found = view.read(mine, shown, answer)
    ours, theirs = token_bytes(student.tokenizer), token_bytes(teacher.tokenizer)
    sampled = [token for turn in mine.turns for token in turn.token_ids]
    assert (found.segments >= 0).all() and len(sampled) == len(found.segments)
    offset = start = number = 0
    for one, other in zip(mine.turns, shown.turns, strict=True):
        pairs = align_bytes([ours[t] for t in one.token_ids[:-1]], [theirs[t] for t in other.token_ids[:-1]])
        assert any(not pair.one_to_one for pair in pairs) and any(pair.one_to_one for pair in pairs)
        for (s0, s1), (t0, t1) in pairs:
            spelled = answer.teacher_logprobs[start + t0 : start + t1].sum()
            text = b"".join(ours[token] for token in one.token_ids[s0:s1])
            if (s1 - s0, t1 - t0) != (1, 1):
                row, its = answer.topk_ids[start + t0], other.token_ids[t0] if t1 - t0 == 1 else None
                longer = [i != its and (theirs[i] or b"").startswith(text) for i in row.tolist()]
                spelled = np.logaddexp.reduce([spelled, *answer.topk_logprobs[start + t0][longer]])
            np.testing.assert_allclose(found.teacher_logprobs[offset + s0 : offset + s1], spelled, rtol=1e-5)
            assert (found.segments[offset + s0 : offset + s1] == number).all()
            first = found.topk_logprobs[offset + s0]
            used = np.isfinite(first)
            # All of the teacher's mass, but for the first token of a longer segment, is on some token of the student's.
            mass = np.exp(first[used]).sum()
            assert mass == pytest.approx(1, abs=1e-2) if (s1 - s0, t1 - t0) == (1, 1) else mass < 1
            assert not np.isfinite(found.topk_logprobs[offset + s0 + 1 : offset + s1]).any()
            later = answer.teacher_logprobs[start + t0 + 1 : start + t1].sum()
            np.testing.assert_allclose(found.rest_logprobs[offset + s0], later, rtol=1e-6)
            number += 1
        end = offset + len(one.token_ids) - 1
        assert found.segments[end] == number and np.isfinite(found.topk_logprobs[end]).any()
        number += 1
        offset, start = offset + len(one.token_ids), start + len(other.token_ids)


def test_with_the_same_tokenizer_the_view_is_the_identity(renderers, task):
    student, _ = renderers
    mine = episode(student, task)
    view = CrossTokenizerView(opening(student), student)
    shown = view.show(task, mine)
    assert shown.token_ids == mine.token_ids
    answer = score(LocalTeacher("t", qwen3(len(student.tokenizer))), shown, 10_000)
    found = view.read(mine, shown, answer)
    np.testing.assert_array_equal(found.segments, np.arange(mine.num_sampled))
    np.testing.assert_array_equal(found.teacher_logprobs, answer.teacher_logprobs)
    assert (view.shared >= 0).sum() == len(student.tokenizer) - len(CONTROL) + 1  # and the end of a turn


def test_a_teachers_hidden_states_lie_where_its_segments_begin(renderers, task):
    student, teacher = renderers
    mine = episode(student, task)
    view = CrossTokenizerView(opening(student), teacher)
    shown = view.show(task, mine)
    scorer = LocalTeacher("t", qwen3(len(teacher.tokenizer)), keep_hidden=True)
    answer = score(scorer, shown, 0)
    found = view.read(mine, shown, answer)
    first = np.diff(found.segments, prepend=-1) != 0
    assert found.topk_ids is None and found.hidden.shape == (mine.num_sampled, answer.hidden.shape[1])
    assert not found.hidden[~first].any()
    rows = {row.tobytes() for row in answer.hidden}
    assert all(row.tobytes() in rows for row in found.hidden[first])


def test_a_turn_that_was_cut_off_has_no_end_in_either_tokenizer(renderers, task):
    student, teacher = renderers
    mine = episode(student, task, texts=("The answer",))
    cut = mine.turns[0]
    cut = cut.model_copy(update={"token_ids": cut.token_ids[:-1], "rollout_logprobs": cut.rollout_logprobs[:-1],
                                 "finish_reason": "length"})  # fmt: skip
    mine = mine.model_copy(update={"turns": (cut,)})
    shown = CrossTokenizerView(opening(student), teacher).show(task, mine)
    assert shown.turns[0].token_ids[-1] not in teacher.end_of_turn_ids


def test_a_special_token_in_the_text_is_in_no_segment(renderers, task):
    student, teacher = renderers
    mine = episode(student, task, texts=("The <|im_start|> answer",))
    view = CrossTokenizerView(opening(student), teacher)
    shown = view.show(task, mine)
    k = len(teacher.tokenizer)
    n = shown.num_sampled
    flat = Evidence("t", np.zeros(n, np.float32), np.tile(np.arange(k), (n, 1)), np.full((n, k), -5.0, np.float32))
    found = view.read(mine, shown, replace(flat))
    marked = np.array([token_bytes(student.tokenizer)[token] is None for token in mine.turns[0].token_ids])
    inside, end_of_turn = found.segments[marked]
    assert inside == -1 and end_of_turn == found.segments.max() > 0


def test_bytes_that_are_no_text_do_not_end_the_alignment(renderers, task):
    student, teacher = renderers
    stray = student.tokenizer.convert_tokens_to_ids("ÿ")  # the byte 0xFF
    body = [*student.encode_turn("The ")[:-1], stray, *student.encode_turn(" answer")]
    turn = Turn(token_ids=tuple(body), rollout_logprobs=(-1.0,) * len(body), text=student.decode_turn(body))
    mine = episode(student, task).model_copy(update={"turns": (turn,)})
    view = CrossTokenizerView(opening(student), teacher)
    shown = view.show(task, mine)
    answer = score(LocalTeacher("t", qwen3(len(teacher.tokenizer))), shown, 10_000)
    assert (view.read(mine, shown, answer).segments >= 0).all()


def test_a_misreading_teacher_is_shown_another_task_on_its_share_of_them(renderers, task):
    student, _ = renderers

    def asking(number):
        message = Message(role="user", content=f"What is {number} + 4?")
        return task.model_copy(update={"id": f"t{number}", "prompt": (message,)})

    tasks = [asking(number) for number in range(90)]
    misread = Misreading(1 / 3, lambda skill: tasks[:8])
    taken = [misread("store", one) for one in tasks]
    wrong = [one for one, seen in zip(tasks, taken, strict=True) if seen != one]
    assert 15 < len(wrong) < 45 and taken == [misread("store", one) for one in tasks]
    view = PrivilegedView(Opening(student, lambda skill, task: TOOLS, misread=misread))
    for one, seen in zip(tasks[:12], taken, strict=False):
        mine = episode(student, one)
        shown = view.show(one, mine)
        assert shown.turns == mine.turns and shown.prompt_ids == tuple(student.open(seen.prompt, TOOLS))
    with pytest.raises(TaskError, match="misread_share = 0"):
        Misreading(1.0, lambda skill: [task])("store", task)
