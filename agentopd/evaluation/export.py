"""A retention matrix as files: JSON with everything, and one long CSV for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from agentopd.evaluation.retention import RetentionMatrix
from agentopd.evaluation.statistics import Interval

COLUMNS = ("measure", "stage", "skill", "value", "ci_low", "ci_high")
Row = tuple[str, str, str, float | str | None, Interval | None]


def write_retention_files(matrix: RetentionMatrix, folder: Path) -> tuple[Path, Path]:
    """Write ``retention.json`` and ``retention.csv`` into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = folder / "retention.json", folder / "retention.csv"
    as_json.write_text(json.dumps(matrix.to_json(), indent=1) + "\n", encoding="utf-8")
    as_csv.write_text(retention_csv(matrix), encoding="utf-8")
    return as_json, as_csv


def retention_csv(matrix: RetentionMatrix) -> str:
    """One row a number: ``measure, stage, skill, value, ci_low, ci_high``; empty where it was not measured."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for measure, stage, skill, value, interval in _rows(matrix):
        low, high = interval or ("", "")
        writer.writerow([measure, stage, skill, "" if value is None else value, low, high])
    return buffer.getvalue()


def _rows(matrix: RetentionMatrix) -> Iterator[Row]:
    last = matrix.stages[-1]
    for i, stage in enumerate(matrix.stages):
        for j, skill in enumerate(matrix.skills):
            yield "score", stage, skill, matrix.values[i][j], matrix.ci95[i][j]
            if matrix.start_kl:
                yield "start_kl", stage, skill, matrix.start_kl[i][j], matrix.start_kl_ci95[i][j]
        yield "average", stage, "", matrix.average[i], matrix.average_ci95[i] if matrix.average_ci95 else None
    for skill in matrix.skills:
        kept = matrix.by_skill[skill]
        for measure, difference in (("change", kept.change), ("forward_transfer", kept.forward)):
            if difference is not None:
                yield measure, last, skill, difference.mean, difference.ci95
        yield "forgetting", last, skill, kept.forgetting, kept.forgetting_ci95
        if kept.verdict is not None:
            yield "verdict", last, skill, kept.verdict, None
    yield "mean_forgetting", last, "", matrix.mean_forgetting, matrix.mean_forgetting_ci95
    yield "backward_transfer", last, "", matrix.backward_transfer, matrix.backward_transfer_ci95
    yield "forward_transfer", last, "", matrix.forward_transfer, matrix.forward_transfer_ci95
