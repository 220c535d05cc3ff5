"""Transfer, verdicts and exports of the retention matrix."""

import csv
import io

import pytest

from agentopd.evaluation.export import retention_csv, write_retention_files
from agentopd.evaluation.metrics import EvalResult, score_skill
from agentopd.evaluation.retention import RetentionMatrix, Tolerance, retention_matrix
from agentopd.types import Verdict, VerdictStatus

OK = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)
WRONG = Verdict(outcome=0.0, status=VerdictStatus.WRONG, reward=0.0)


def evaluation(step, kl=None, n=100, **passed):
    """``passed[skill]`` of n tasks succeed; every task has moved ``kl`` nats per token, give or take."""
    tasks = {}
    for skill, good in passed.items():
        verdicts = {f"{skill}{i}": [OK if i < good else WRONG] for i in range(n)}
        moved = None if kl is None else {f"{skill}{i}": kl + (i % 2 - 0.5) / 100 for i in range(n)}
        tasks[skill] = score_skill(verdicts, k=1, start_kl=moved)
    return EvalResult(tasks=tasks, model="student", step=step)


def three_stages() -> RetentionMatrix:
    stages = [
        evaluation(0, 0.0, old=90, one=10, two=10),
        evaluation(5, 0.1, old=88, one=70, two=25),
        evaluation(9, 0.2, old=80, one=40, two=60),
    ]
    tolerance = Tolerance(0.02)
    return retention_matrix(stages, ["base", "after one", "final"], {"one": 1, "two": 2}, tolerance=tolerance)


def test_forward_transfer_is_what_earlier_stages_did_for_a_later_skill():
    matrix = three_stages()
    forward = matrix.by_skill["two"].forward
    assert forward is not None and forward.mean == pytest.approx(0.15)
    assert matrix.forward_transfer == pytest.approx(0.15) and matrix.forward_transfer_ci95 == pytest.approx(
        forward.ci95
    )
    assert matrix.by_skill["one"].forward is None and matrix.by_skill["old"].forward is None


def test_forward_transfer_ignores_what_the_skills_own_stage_taught():
    stages = [evaluation(0, a=10), evaluation(2, a=30), evaluation(3, a=80), evaluation(4, a=90)]
    forward = retention_matrix(stages, learned_at={"a": 3}, begun_at={"a": 1}).by_skill["a"].forward
    assert forward is not None and forward.mean == pytest.approx(0.2)
    assert retention_matrix(stages, learned_at={"a": 3}, begun_at={"a": 0}).by_skill["a"].forward is None


def test_means_over_skills_have_intervals_around_them():
    matrix = three_stages()
    assert matrix.backward_transfer == pytest.approx((-0.1 - 0.3) / 2)
    low, high = matrix.backward_transfer_ci95
    assert low < matrix.backward_transfer < high < 0
    assert matrix.mean_forgetting == pytest.approx(0.2) and matrix.mean_forgetting_ci95[0] > 0
    assert matrix.average[2] == pytest.approx(0.6) and matrix.average_ci95[2][0] < 0.6 < matrix.average_ci95[2][1]
    own = [matrix.ci95[2][j][1] - matrix.ci95[2][j][0] for j in range(3)]
    assert matrix.average_ci95[2][1] - matrix.average_ci95[2][0] < min(own)  # three skills say more than one


def test_verdicts_against_the_tolerated_drop():
    assert three_stages().broken == ("old", "one")
    assert three_stages().by_skill["two"].verdict is None  # learned last: nothing to forget yet

    def verdict(after, drop, n=100):
        stages = [evaluation(0, n=n, a=n * 9 // 10), evaluation(1, n=n, a=after)]
        return retention_matrix(stages, tolerance=Tolerance(drop)).by_skill["a"].verdict

    assert verdict(87, 0.02) == "broken"
    assert verdict(88, 0.02) == "within"  # exactly two points; the interval reaches further
    assert verdict(90, 0.02) == "within"  # unchanged, but a hundred tasks cannot promise two points
    assert verdict(95, 0.02) == "kept"
    assert verdict(900, 0.02, n=1000) == "kept"


def test_a_tolerance_covers_the_skills_it_names():
    stages = [evaluation(0, a=90, b=90), evaluation(1, a=50, b=50)]
    matrix = retention_matrix(stages, tolerance=Tolerance(0.02, ("b",)))
    assert matrix.broken == ("b",) and matrix.by_skill["a"].verdict is None
    assert retention_matrix(stages).broken == ()


def test_kl_to_the_start_by_stage_and_skill():
    matrix = three_stages()
    assert matrix.start_kl[2] == pytest.approx((0.2, 0.2, 0.2))
    low, high = matrix.start_kl_ci95[2][0]
    assert 0.19 < low < 0.2 < high < 0.21
    assert retention_matrix([evaluation(0, a=5)]).start_kl == ((None,),)


def test_csv_has_a_row_a_number(tmp_path):
    matrix = three_stages()
    rows = list(csv.DictReader(io.StringIO(retention_csv(matrix))))
    found = {(row["measure"], row["stage"], row["skill"]): row for row in rows}
    assert len(found) == len(rows)
    assert float(found["score", "after one", "one"]["value"]) == pytest.approx(0.7)
    assert float(found["forgetting", "final", "one"]["value"]) == pytest.approx(0.3)
    assert found["verdict", "final", "old"]["value"] == "broken"
    assert float(found["start_kl", "final", "two"]["ci_low"]) < 0.2
    as_json, as_csv = write_retention_files(matrix, tmp_path / "new")
    assert RetentionMatrix.model_validate_json(as_json.read_text()) == matrix
    assert as_csv.read_text() == retention_csv(matrix)


def test_a_matrix_without_the_later_fields_still_reads():
    """Stored matrices of an earlier version hold neither transfer nor intervals of means."""
    plain = retention_matrix([evaluation(0, a=10), evaluation(1, a=12)]).to_json()
    for key in ("average_ci95", "forward_transfer", "start_kl", "start_kl_ci95", "tolerated_drop"):
        plain.pop(key)
    assert "score,step 0,a,0.1" in retention_csv(RetentionMatrix.model_validate(plain))
