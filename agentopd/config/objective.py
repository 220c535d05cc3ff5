"""The objective as data: the blocks of ``objective_blocks``, what they need, and which combinations make no sense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from agentopd.config.base import Section
from agentopd.config.objective_blocks import (
    AsymmetricRouter,
    CalibratedRouter,
    CandidatesPG,
    CertificateGate,
    Divergence,
    FullForwardKL,
    FullReverseKL,
    JensenShannon,
    Masks,
    NoAdvantage,
    OutcomeRouter,
    Reference,
    Router,
    RubricAdvantage,
    SampledPG,
    SignGate,
    Stabiliser,
    TopKForwardKL,
    TopKReverseKL,
    UniformRouter,
    VerifierAdvantage,
    Weights,
)
from agentopd.config.objective_data import (
    Alignment,
    Anchor,
    GoldNLL,
    MixedSource,
    NoAnchor,
    OfflineSource,
    RolloutSource,
    SameTokenizer,
    StudentSource,
    TeacherAnchor,
    TeacherForwardKL,
    TeacherSource,
)
from agentopd.config.objective_rules import complaints, foreign_rollouts

Access = Literal["none", "text", "sampled", "topk", "full"]
"""What a teacher gives: nothing, text, log-probs of sampled ids, of its top-K ids too, or whole distributions."""
ACCESS: tuple[Access, ...] = ("none", "text", "sampled", "topk", "full")
"""Each includes those before it."""


_TEACHERS: dict[Access, str] = {
    "none": "no teacher",
    "text": "teacher: text",
    "sampled": "teacher: log-probs of sampled ids",
    "topk": "teacher: top-K log-probs",
    "full": "teacher: whole distributions (local)",
}


class Blocks(Section):
    """One choice of blocks: an objective, or one of its stages."""

    source: RolloutSource = StudentSource()
    """Whose trajectories are trained on; a bare word picks the kind."""
    divergence: Divergence = TopKReverseKL()
    verifier: VerifierAdvantage = NoAdvantage()
    router: Router = UniformRouter()
    stabiliser: Stabiliser = Stabiliser()
    masks: Masks = Masks()
    weights: Weights = Weights()
    reference: Reference = Reference()
    anchor: Anchor = NoAnchor()
    alignment: Alignment = SameTokenizer()

    @model_validator(mode="after")
    def _makes_sense(self) -> Blocks:
        """Refuse blocks that lack their input, and settings that would be silently without effect."""
        for complaint in complaints(self):
            raise ValueError(complaint)
        return self

    @property
    def has_policy_gradient(self) -> bool:
        """Whether a clipped surrogate is part of the loss."""
        return isinstance(self.divergence, SampledPG | CandidatesPG) or self.verifier.kind != "none"

    @property
    def top_k(self) -> int:
        """The teacher top-K this objective reads (0: sampled tokens only)."""
        found = [0]
        if isinstance(self.divergence, TopKReverseKL | TopKForwardKL):
            found.append(self.divergence.top_k)
        if isinstance(self.divergence, JensenShannon) and self.divergence.top_k is not None:
            found.append(self.divergence.top_k)
        if isinstance(self.divergence, CandidatesPG):  # the student's own candidates are still compared with them
            found.append(self.divergence.top_k)
        if isinstance(self.router, AsymmetricRouter):
            found.append(self.router.top_k)
        if isinstance(self.anchor, TeacherForwardKL):
            found.append(self.anchor.top_k)
        return max(found)

    @property
    def student_top_k(self) -> int:
        """How many of the student's own most likely ids the teacher has to score (0: none)."""
        found = [0]
        if isinstance(self.divergence, CandidatesPG) and self.divergence.support != "teacher":
            found.append(self.divergence.top_k)
        if self.masks.suffix != "off":
            found.append(self.masks.suffix_top_k)
        return max(found)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher term reads teacher log-probs on the trained trajectories."""
        return self.divergence.kind != "none"

    @property
    def needs_full_vocabulary(self) -> bool:
        """Whether the learner compares whole distributions, which takes a teacher in its process."""
        whole = isinstance(self.divergence, JensenShannon) and self.divergence.top_k is None
        return whole or isinstance(self.divergence, FullReverseKL | FullForwardKL)

    @property
    def needs_reference(self) -> bool:
        """Whether any block reads reference log-probs."""
        return self.reference.kl_coef > 0 or self.extrapolates

    @property
    def extrapolates(self) -> bool:
        """Whether the advantage moves beyond the teacher, away from the reference."""
        boosted = isinstance(self.router, SignGate | CertificateGate) and self.router.extrapolation != 1
        return self.reference.extrapolation != 1 or boosted

    @property
    def needs_teacher_rollouts(self) -> bool:
        """Whether the teacher has to act: answers of its own, to train on or to draw rubrics from."""
        return self.trains_on_teacher_rollouts or self.needs_rubric

    @property
    def trains_on_teacher_rollouts(self) -> bool:
        """Whether tokens that the teacher sampled are part of the loss."""
        from_teacher = isinstance(self.source, TeacherSource) or (
            isinstance(self.source, MixedSource) and self.source.other == "teacher"
        )
        return from_teacher or isinstance(self.anchor, TeacherAnchor)

    @property
    def needs_gold(self) -> bool:
        """Whether the tasks need gold trajectories."""
        mixed = isinstance(self.source, MixedSource) and self.source.other == "gold"
        return mixed or self.source.kind == "gold" or isinstance(self.anchor, GoldNLL)

    @property
    def needs_rubric(self) -> bool:
        """Whether rewards come from a rubric and a judge instead of the verifier."""
        return isinstance(self.verifier, RubricAdvantage)

    @property
    def needs_stored_rollouts(self) -> bool:
        """Whether trajectories and teacher log-probs are read from disk."""
        return isinstance(self.source, OfflineSource)

    @property
    def needs_groups(self) -> bool:
        """Whether a prompt needs two or more episodes."""
        return self.verifier.kind in ("grpo", "rubric")

    @property
    def needs_verdict(self) -> bool:
        """Whether the loss depends on the verifier's outcome."""
        gated = isinstance(self.router, CertificateGate | CalibratedRouter | OutcomeRouter)
        return gated or self.verifier.kind in ("grpo", "absolute")

    @property
    def needs_entropy(self) -> bool:
        """Whether the learner has to measure the student's entropy at every token."""
        return self.masks.entropy_top_ratio is not None

    @property
    def needs_batch_statistics(self) -> bool:
        """Whether the loss of one token depends on a mean over the whole batch (a second look at the batch)."""
        return self.stabiliser.phi != "off" and self.stabiliser.phi_target != "anchor"

    @property
    def uses_certificates(self) -> bool:
        """Whether a step's certificate overrides the episode's sign."""
        reads = isinstance(self.router, CalibratedRouter | OutcomeRouter) and self.router.use_certificates
        return reads or isinstance(self.router, CertificateGate)

    @property
    def teacher_access(self) -> Access:
        """The least that a teacher has to give."""
        if self.needs_full_vocabulary:
            return "full"
        if self.top_k or self.student_top_k:
            return "topk"
        if self.needs_teacher:
            return "sampled"
        return "text" if self.needs_teacher_rollouts else "none"


class Stage(Blocks):
    """Blocks that train before the objective's own, until a share of the steps is done."""

    name: str = "stage"
    until: float = Field(gt=0, lt=1)


class ObjectiveConfig(Blocks):
    """The blocks of one objective. ``preset`` fills them in; any key given beside it overrides the preset's."""

    preset: str = "verifier_calibrated"
    stages: tuple[Stage, ...] = ()
    """Other blocks to start with, in order; after the last one the objective's own blocks train to the end."""

    @model_validator(mode="after")
    def _stages_in_order(self) -> ObjectiveConfig:
        ends = [stage.until for stage in self.stages]
        if ends != sorted(set(ends)):
            raise ValueError(f"stages must end one after the other; their 'until' are {ends}")
        if len({blocks.alignment for blocks in self.every_stage() if blocks.needs_teacher}) > 1:
            raise ValueError("stages that read a teacher must have one alignment: they share the teacher")
        for complaint in foreign_rollouts(list(self.every_stage())):
            raise ValueError(complaint)
        return self

    def at(self, progress: float) -> Blocks:
        """The blocks in force when this share of the steps is done, in [0, 1)."""
        return next((stage for stage in self.stages if progress < stage.until), self)

    def every_stage(self) -> Iterator[Blocks]:
        """All blocks that will be in force at some time, in order: what a run has to provide for."""
        yield from self.stages
        yield self

    def inputs(self) -> list[str]:
        """What a run has to provide for these blocks, in words: the row of this objective in the input matrix."""
        stages = list(self.every_stage())
        access = max((blocks.teacher_access for blocks in stages), key=ACCESS.index)
        found = {
            _TEACHERS[access]: access != "none",
            "the student's candidates scored": any(blocks.student_top_k for blocks in stages),
            "reference": any(blocks.needs_reference for blocks in stages),
            "verdicts": any(blocks.needs_verdict for blocks in stages),
            "groups of 2 or more": any(blocks.needs_groups for blocks in stages),
            "teacher rollouts": any(blocks.needs_teacher_rollouts for blocks in stages),
            "gold trajectories": any(blocks.needs_gold for blocks in stages),
            "stored rollouts": any(blocks.needs_stored_rollouts for blocks in stages),
            "judge": any(blocks.needs_rubric for blocks in stages),
        }
        return [name for name, needed in found.items() if needed]


def anchor_coef(anchor: Anchor, progress: float) -> float:
    """The anchor's coefficient when ``progress`` of the steps is done: hold, cosine decay, 0 (SG-OPD, eq. 3)."""
    if isinstance(anchor, NoAnchor):
        return 0.0
    if isinstance(anchor, GoldNLL) or progress < anchor.hold_until:
        return anchor.coef
    if progress >= anchor.off_from:
        return 0.0 if anchor.off_from < 1 else anchor.coef_end
    phase = (progress - anchor.hold_until) / (anchor.off_from - anchor.hold_until)
    return anchor.coef_end + 0.5 * (anchor.coef - anchor.coef_end) * (1 + math.cos(math.pi * phase))
