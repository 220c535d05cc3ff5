import json

import pytest

from agentopd.evaluation.metrics import EvalResult, score_skill
from agentopd.evaluation.retention import RetentionMatrix, retention_matrix
from agentopd.types import Verdict, VerdictStatus

OK = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)
WRONG = Verdict(outcome=0.0, status=VerdictStatus.WRONG, reward=0.0)


def evaluation(step, passed, n=40):
    """``passed[skill]`` of n tasks succeed."""
    tasks = {
        skill: score_skill({f"{skill}{i}": [OK if i < good else WRONG] for i in range(n)}, k=1)
        for skill, good in passed.items()
    }
    return EvalResult(tasks=tasks, model="student", step=step)


def test_matrix_forgetting_and_transfer():
    stages = [
        evaluation(0, {"old": 30, "new": 4}),
        evaluation(5, {"old": 34, "new": 20}),
        evaluation(9, {"old": 20, "new": 36}),
    ]
    matrix = retention_matrix(stages, learned_at={"new": 2})
    assert matrix.stages == ("step 0", "step 5", "step 9")
    assert matrix.values == ((0.75, 0.1), (0.85, 0.5), (0.5, 0.9))
    old = matrix.by_skill["old"]
    assert old.forgetting == pytest.approx(0.35)  # from the best earlier stage
    assert old.change is not None and old.change.mean == pytest.approx(-0.25) and old.change.significant
    assert matrix.backward_transfer == pytest.approx(-0.25)  # the new skill takes no part
    assert matrix.mean_forgetting == pytest.approx(0.35)
    assert matrix.average == pytest.approx((0.425, 0.675, 0.7))
    assert matrix.by_skill["new"].forgetting is None


def test_gap_closed_is_none_without_a_gap():
    base, after = evaluation(0, {"a": 10, "b": 30}), evaluation(9, {"a": 25, "b": 30})
    matrix = retention_matrix([base, after], teacher=evaluation(None, {"a": 40, "b": 20}))
    closed = matrix.by_skill["a"].gap_closed
    assert closed is not None and closed.value == pytest.approx(0.5)
    assert closed.ci95 is not None and closed.ci95[0] < 0.5 < closed.ci95[1]
    assert matrix.by_skill["b"].gap_closed is None


def test_a_teacher_whose_lead_may_be_chance_gives_no_interval():
    matrix = retention_matrix([evaluation(0, {"a": 20}), evaluation(9, {"a": 21})], teacher=evaluation(None, {"a": 21}))
    closed = matrix.by_skill["a"].gap_closed
    assert closed is not None and closed.value == pytest.approx(1.0) and closed.ci95 is None


def test_missing_skills_are_holes_not_zeros():
    matrix = retention_matrix([evaluation(0, {"a": 10}), evaluation(9, {"b": 20})])
    assert matrix.values == ((0.25, None), (None, 0.5))
    assert matrix.by_skill["a"].change is None and matrix.by_skill["b"].forgetting is None
    assert matrix.mean_forgetting is None


def test_one_stage_has_nothing_to_forget():
    matrix = retention_matrix([evaluation(0, {"a": 10})])
    assert matrix.by_skill["a"].change is None and matrix.backward_transfer is None


def test_json_round_trip():
    matrix = retention_matrix([evaluation(0, {"a": 10}), evaluation(9, {"a": 12})])
    assert RetentionMatrix.model_validate(json.loads(json.dumps(matrix.to_json()))) == matrix


@pytest.mark.parametrize("kwargs", [{"stages": ["only"]}, {"learned_at": {"a": 2}}])
def test_names_and_indices_must_fit(kwargs):
    with pytest.raises(ValueError, match="stage"):
        retention_matrix([evaluation(0, {"a": 1}), evaluation(1, {"a": 1})], **kwargs)
