"""reasoning-gym: all generators, strict scores, and answers that would run code."""

import warnings
from itertools import islice

import pytest

from agentopd.errors import TaskError
from agentopd.types import Episode, StopReason, Turn, VerdictStatus
from agentopd_envs.adapters.reasoning_gym import ReasoningGym, generators, harmless

FEW = ("basic_arithmetic", "countdown", "spiral_matrix", "leg_counting")


@pytest.fixture(scope="module", autouse=True)
def installed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("reasoning_gym", reason="the extra `reasoning-gym` is not installed")


def judged(task, text):
    turns = (Turn(token_ids=(), rollout_logprobs=(), text=text),)
    episode = Episode(id="e", task_id=task.id, task_hash=task.hash, env=task.env, split=task.split, prompt_ids=(),
                      turns=turns, stop_reason=StopReason.COMPLETED)  # fmt: skip
    return ReasoningGym.score(task, episode)


@pytest.mark.parametrize("name", FEW)
def test_only_full_marks_count(name):
    (task,) = ReasoningGym.load_tasks("train", name, 1, 0)
    (gold,) = task.privileged.trajectory
    assert judged(task, f"First <answer>no</answer>, then {gold.content}").outcome == 1.0
    padded = judged(task, f"<answer>It is {task.privileged.solution}, I think</answer>")
    assert padded.outcome == 0.0 and padded.reward == 0.0
    assert judged(task, "").status is VerdictStatus.NO_ANSWER


def test_tasks_depend_on_seed_and_index_and_splits_never_meet():
    questions = {split: {task.hidden["question"] for task in ReasoningGym.load_tasks(split, "leg_counting", 9, 0)}
                 for split in ("train", "eval", "retention")}  # fmt: skip
    assert sum(map(len, questions.values())) == len(set.union(*questions.values())) > 20
    one, again = (list(ReasoningGym.load_tasks("eval", "leg_counting", 3, 5)) for _ in range(2))
    assert one == again and "question" not in str(one[0].student_view().hidden)


def test_another_version_of_the_package_is_the_tasks_fault():
    (task,) = ReasoningGym.load_tasks("train", "leg_counting", 1, 0)
    with pytest.raises(TaskError, match="pin its version"):
        judged(task.model_copy(update={"hidden": {**task.hidden, "question": "?"}}), "<answer>1</answer>")


@pytest.mark.parametrize(
    "answer",
    ["__import__('os').system('x')", "().__class__", "open('x')", "[].append(1)", "[x for x in y]", "lambda: 1",
     "9**9**9", "2**999", "1 << 99", "a[0]", "S('x')", "eval(x)", "5! + open('x')", "f'{1}'", "print(1)"],
)  # fmt: skip
def test_code_is_never_evaluated(answer):
    assert not harmless(answer)
    (task,) = ReasoningGym.load_tasks("train", "countdown", 1, 0)
    assert judged(task, f"<answer>{answer}</answer>").status is VerdictStatus.FORMAT


@pytest.mark.parametrize(
    "answer", ["3*(4 - 1)", "[[1, 2], [3, 4]]", "x**2 + sin(x)/2 + C", "1 2 3", "-x**(-2)", "ABCD"]
)
def test_arithmetic_and_data_are(answer):
    assert harmless(answer)


@pytest.mark.slow
@pytest.mark.long
def test_every_generator_gives_full_marks_to_its_own_answer_alone():
    names = generators()
    assert len(names) >= 100
    without_gold, wrong = [], []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for task in islice(ReasoningGym.load_tasks("train", name, 2, 0), 2):
                if not task.privileged.trajectory:
                    without_gold.append(name)
                elif judged(task, task.privileged.trajectory[0].content).outcome != 1.0:
                    wrong.append(name)
                if judged(task, "<answer></answer>").outcome != 0.0:
                    wrong.append(f"{name}: nothing")
    assert set(without_gold) <= {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
    assert not wrong
