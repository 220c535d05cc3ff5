import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopd.evaluation.metrics import EvalResult, pass_at_k, score_skill
from agentopd.evaluation.statistics import wilson
from agentopd.types import Verdict, VerdictStatus

OK = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=0.9)
WRONG = Verdict(outcome=0.0, status=VerdictStatus.WRONG, reward=0.0)
HALF = Verdict(outcome=0.5, status=VerdictStatus.WRONG, reward=0.5)
FAULT = Verdict.unjudged(VerdictStatus.INFRA_ERROR, "the sandbox died")


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(2, 1, 3), (2, 3, 1), (2, -1, 1), (2, 1, 0)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_single_attempts_give_wilson():
    score = score_skill({f"t{i}": [OK if i < 7 else WRONG] for i in range(10)}, k=1)
    assert (score.avg_at_k, score.pass_at_k, score.n, score.infra_errors) == (0.7, 0.7, 10, 0)
    assert score.ci95 == wilson(7, 10)
    assert score.mean_reward == pytest.approx(0.63)


def test_faults_are_counted_and_never_scored():
    clean = score_skill({"a": [OK, OK], "b": [OK, WRONG]}, k=2)
    faulty = score_skill({"a": [OK, OK], "b": [OK, WRONG], "c": [FAULT, FAULT]}, k=2)
    assert (faulty.avg_at_k, faulty.pass_at_k, faulty.n, faulty.ci95) == (0.75, 1.0, 2, clean.ci95)
    assert faulty.infra_errors == 2


def test_a_partly_judged_task_counts_for_avg_but_not_for_pass():
    score = score_skill({"a": [OK, FAULT], "b": [WRONG, WRONG]}, k=2)
    assert (score.avg_at_k, score.pass_at_k, score.n, score.infra_errors) == (0.5, 0.0, 2, 1)


def test_tasks_weigh_the_same_whatever_their_faults():
    score = score_skill({"a": [OK, FAULT, FAULT], "b": [WRONG, WRONG, WRONG]}, k=3)
    assert score.avg_at_k == 0.5


def test_partial_credit_is_not_a_pass():
    score = score_skill({"a": [HALF, HALF]}, k=2)
    assert (score.avg_at_k, score.pass_at_k) == (0.5, 0.0)


@pytest.mark.parametrize("verdicts", [{}, {"a": [FAULT]}])
def test_nothing_judged_is_no_score(verdicts):
    score = score_skill(verdicts, k=1)
    assert (score.avg_at_k, score.pass_at_k, score.ci95, score.mean_reward, score.n) == (None, None, None, None, 0)


def test_json_shape_and_round_trip():
    result = EvalResult(tasks={"math": score_skill({"a": [OK], "b": [WRONG]}, k=1)}, model="m", step=3, seed=1)
    assert EvalResult.model_validate_json(result.model_dump_json()) == result
    shown = result.to_json()["tasks"]["math"]
    assert set(shown) == {"avg_at_k", "pass_at_k", "n", "ci95", "infra_errors"}
    assert all(math.isfinite(bound) for bound in shown["ci95"])


def test_the_error_of_a_change_is_that_of_the_paired_differences():
    """Of four tasks in both evaluations one was lost: differences 0, 0, 0, -1."""
    before = score_skill({"a": [OK], "b": [WRONG], "c": [OK], "d": [OK], "e": [OK]}, k=1)
    after = score_skill({"a": [OK], "b": [WRONG], "c": [OK], "d": [WRONG], "e": [FAULT]}, k=1)
    assert after.change_error(before) == pytest.approx(0.5 / math.sqrt(4))
    assert after.change_error(after) == 0.0
    assert score_skill({"a": [OK]}, k=1).change_error(before) == 0.0
