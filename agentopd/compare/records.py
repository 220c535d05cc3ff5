"""What a comparison leaves: figures of each run, of each arm, and the tests between arms."""

from __future__ import annotations

from typing import Any

from agentopd.evaluation.comparison import SeedDifference
from agentopd.types import Record, VersionedRecord


class CurvePoint(Record):
    """Held-out scores at one evaluation."""

    step: int
    skills: dict[str, float]


class SeedResult(Record):
    """One run. Scores are success in [0, 1]; None where there is nothing to average."""

    seed: int
    skills: dict[str, float]
    """Final score of every skill."""
    new_skills: float | None
    """Mean final score of the new skills."""
    retention: float | None
    """Mean change of the skills known before the last stage, since each was learned; 0 is all kept."""
    forgetting: float | None
    """Mean over the same skills of best earlier score minus the last."""
    tokens: float = 0.0
    """Sampled by the student in training."""
    replay_tokens: float = 0.0
    """Of those, on replayed prompts."""
    teacher_tokens: float = 0.0
    """Read by teachers."""
    patch_cost: float | None = None
    """Size in lines of the patches that passed in the last tenth of the steps, the mean over skills that have any."""
    cpu_seconds: float = 0.0
    """Of training and the evaluations before its last step."""
    broken: tuple[str, ...] = ()
    """Skills that lost more than the suite tolerates."""
    curve: tuple[CurvePoint, ...] = ()
    config: str = ""
    """Fingerprint of what was run: the resolved config, and what the starting student was made from."""
    machine: str = ""
    """Where it ran; CPU seconds of different machines are not comparable."""


class ArmResult(Record):
    """All finished runs of one arm."""

    seeds: tuple[SeedResult, ...]
    preset: str | None = None

    def by_seed(self, measure: str) -> dict[int, float]:
        """A measure of ``SeedResult`` by seed, where there is one."""
        values = {result.seed: getattr(result, measure) for result in self.seeds}
        return {seed: value for seed, value in values.items() if value is not None}


class ArmTest(Record):
    """An arm against the baseline on one measure, paired over seeds; corrected over all tests of the comparison."""

    arm: str
    measure: str
    difference: SeedDifference
    p_holm: float
    p_bh: float


class Results(VersionedRecord):
    """A comparison as far as it got."""

    name: str
    baseline: str
    arms: dict[str, ArmResult]
    tests: tuple[ArmTest, ...]
    tolerated_drop: float | None
    planned: int
    finished: int
    machine: dict[str, Any]
    versions: dict[str, str]
