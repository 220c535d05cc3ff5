"""The sections of an objective that say what it trains on: anchor, source of trajectories, tokenizer alignment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from agentopd.config.base import Section

# --- B8: anchor ------------------------------------------------------------------------------------------------------


class NoAnchor(Section):
    """No anchor."""

    kind: Literal["none"] = "none"


class GoldNLL(Section):
    """Negative log-likelihood of gold trajectories: all there is with source 'gold', one per prompt beside others."""

    kind: Literal["gold_nll"] = "gold_nll"
    coef: float = Field(1.0, gt=0)
    prompts: Literal["all", "unsolved"] = "all"
    """Which of the student's prompts get one: ``unsolved`` are those whose judged rollouts all failed; the others count
    with a loss of zero."""


class TeacherAnchor(Section):
    """An anchor on teacher rollouts in three phases: hold, cosine decay, off (SG-OPD's phased teacher sampling)."""

    coef: float = Field(1.0, gt=0)
    """Coefficient while it holds."""
    coef_end: float = Field(1.0, ge=0)
    """Coefficient at the end of the decay."""
    hold_until: float = Field(1.0, ge=0, le=1)
    """End of the constant phase, as a share of the steps."""
    off_from: float = Field(1.0, ge=0, le=1)
    """End of the decay, as a share of the steps; 0 from there on."""
    prompt_share: float = Field(1.0, gt=0, le=1)
    """Share of the step's prompts that the teacher answers (rounded up)."""
    filter_correct: bool = True
    """Keep only rollouts that the verifier passed."""

    @model_validator(mode="after")
    def _phases_in_order(self) -> TeacherAnchor:
        if self.off_from < self.hold_until:
            raise ValueError(f"off_from {self.off_from} comes before hold_until {self.hold_until}")
        return self


class TeacherNLL(TeacherAnchor):
    """Negative log-likelihood of teacher rollouts."""

    kind: Literal["teacher_nll"] = "teacher_nll"


class TeacherForwardKL(TeacherAnchor):
    """Forward KL to the teacher on its own rollouts (the warm-up of sparse-to-dense)."""

    kind: Literal["teacher_fkl"] = "teacher_fkl"
    top_k: int = Field(32, ge=2)


Anchor = Annotated[NoAnchor | GoldNLL | TeacherNLL | TeacherForwardKL, Field(discriminator="kind")]

# --- B9: source ------------------------------------------------------------------------------------------------------


class StudentSource(Section):
    """Trajectories of the current student."""

    kind: Literal["student"] = "student"


class MixedSource(Section):
    """A share of the prompts answered by the student, the others by the teacher or from gold (GKD's lambda)."""

    kind: Literal["mixed"] = "mixed"
    student_share: float = Field(0.5, gt=0, lt=1)
    other: Literal["teacher", "gold"] = "gold"


class TeacherSource(Section):
    """Trajectories of the teacher (sequence-level distillation)."""

    kind: Literal["teacher"] = "teacher"
    filter_correct: bool = False
    """Keep only rollouts that the verifier passed."""


class GoldSource(Section):
    """Gold trajectories of the tasks."""

    kind: Literal["gold"] = "gold"


class OfflineSource(Section):
    """Stored rollouts of the starting student with stored teacher log-probs (Lightning OPD)."""

    kind: Literal["offline"] = "offline"
    path: str | None = None
    """A folder of stored rollouts; None makes them once, with the teacher's evidence, in the run's folder."""
    allow_mismatch: bool = False
    """Accept stored log-probs of another teacher or tokenizer."""


def _bare_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


RolloutSource = Annotated[
    StudentSource | MixedSource | TeacherSource | GoldSource | OfflineSource,
    Field(discriminator="kind"),
    BeforeValidator(_bare_kind),
]

# --- B10: alignment --------------------------------------------------------------------------------------------------


class SameTokenizer(Section):
    """Student and teacher share ids; rows that a checkpoint pads its vocabulary with are cut from the teacher."""

    kind: Literal["same"] = "same"


class SimCT(Section):
    """The teacher has another tokenizer: ids both have, and the smallest spans that both can write, by byte offset."""

    kind: Literal["simct"] = "simct"
    project: bool = True
    """Count a teacher token that the student lacks for the student token it begins with; false drops it, as published,
    and a student that writes just what the teacher writes is then no optimum."""


class GOLD(Section):
    """The teacher has another tokenizer: whole distributions over segments, merged by byte offset (TRL's GOLD)."""

    kind: Literal["gold"] = "gold"
    matched_weight: float | None = Field(None, ge=0, le=1)
    """Weight of the divergence on the ids both have; the sorted rest has what is left of 1. None is the share of the
    teacher's ids that the student has too."""


Alignment = Annotated[SameTokenizer | SimCT | GOLD, Field(discriminator="kind")]
