"""The objective as data: one section per block of ``docs/algorithms.md``, each the identity at its off setting.

Blocks that come in kinds are discriminated by ``kind``; a key that the chosen kind does not have is an error, so no
knob is silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from agentopd.config.base import Section


class NoDivergence(Section):
    """No teacher term."""

    kind: Literal["none"] = "none"


class SampledPG(Section):
    """Sampled-token policy gradient on ``log p_T - log p_S`` (the k1 estimator of reverse KL)."""

    kind: Literal["sampled_pg"] = "sampled_pg"
    coef: float = Field(1.0, ge=0)


class TopKReverseKL(Section):
    """Reverse KL on the teacher's top-K ids, differentiated exactly."""

    kind: Literal["topk_rkl"] = "topk_rkl"
    coef: float = Field(1.0, ge=0)
    top_k: int = Field(32, ge=2)
    tail: Literal["bucket", "none"] = "bucket"
    """``bucket`` adds one bin for all mass outside the support; ``none`` renormalises inside it."""


Divergence = Annotated[NoDivergence | SampledPG | TopKReverseKL, Field(discriminator="kind")]


class NoAdvantage(Section):
    """The verifier's reward does not enter the policy gradient."""

    kind: Literal["none"] = "none"


class GroupAdvantage(Section):
    """Group-relative advantage, ``(R - mean) / (std + eps)`` inside each prompt group (unbiased std)."""

    kind: Literal["grpo"] = "grpo"
    coef: float = Field(1.0, ge=0)
    normalise_std: bool = True


VerifierAdvantage = Annotated[NoAdvantage | GroupAdvantage, Field(discriminator="kind")]


class UniformRouter(Section):
    """Every token takes the teacher's guidance in full."""

    kind: Literal["uniform"] = "uniform"


class CalibratedRouter(Section):
    """Weights by agreement of verdict and teacher: ``w0 + (w1-w0) max(0,a) + (w2-w0) max(0,-a)``."""

    kind: Literal["calibrated"] = "calibrated"
    w_agree: float = Field(1.0, ge=0)
    w_neutral: float = Field(0.5, ge=0)
    w_conflict: float = Field(0.25, ge=0)
    use_certificates: bool = True
    """Take the sign of a step from the verdict's certificate where it has one."""


Router = Annotated[UniformRouter | CalibratedRouter, Field(discriminator="kind")]


class Stabiliser(Section):
    """Bounds on one token's and one sequence's influence, and the trust region. ``None`` turns a bound off."""

    cap: float | None = Field(5.0, gt=0)
    """Largest teacher pressure of one token, in nats (the divergence's gradient is scaled down to it)."""
    sequence_budget: float | None = Field(1.0, gt=0)
    """Largest mean teacher pressure over one sequence, in nats per token."""
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    dual_clip: float | None = Field(3.0, gt=1)
    tis_cap: float | None = Field(2.0, gt=0)
    """Upper truncation of the learner/engine importance ratio."""
    max_prob_drop: float | None = Field(0.2, gt=0, le=1)
    """Drop policy-gradient tokens whose probability already moved this far in the advantage's direction."""


class Masks(Section):
    """Which sampled tokens take part."""

    special_tokens: bool = True
    """Leave role and end-of-turn markers out of the teacher term, on every turn (the verifier term keeps them)."""
    truncated: Literal["keep", "drop", "mask_tail"] = "keep"
    """Episodes that a budget ended: keep them, drop them from the loss, or hide their last tenth from the teacher."""


class Weights(Section):
    """Per-token weights of the teacher term."""

    step_delta: float | None = Field(None, ge=0)
    """Step-wise weights of SOD, ``min((d_1+eps)/(d_k+eps), 1+delta)``; None is off."""
    outside_span: float = Field(1.0, ge=0)
    """Weight of tokens outside tool-call spans; 1 is off."""


class Reference(Section):
    """Pull towards a frozen reference policy."""

    kl_coef: float = Field(0.0, ge=0)
    """Coefficient of the k2 estimator of KL(student, frozen start); 0 is off and loads no reference."""


class NoAnchor(Section):
    """No anchor."""

    kind: Literal["none"] = "none"


class GoldNLL(Section):
    """Negative log-likelihood of gold trajectories."""

    kind: Literal["gold_nll"] = "gold_nll"
    coef: float = Field(1.0, gt=0)


Anchor = Annotated[NoAnchor | GoldNLL, Field(discriminator="kind")]


_POLICY_GRADIENT_KEYS = ("clip_low", "clip_high", "dual_clip", "tis_cap", "max_prob_drop")
_TEACHER_KEYS = ("cap", "sequence_budget")


class ObjectiveConfig(Section):
    """The blocks of one objective. ``preset`` fills them in; any key given beside it overrides the preset's."""

    preset: str = "verifier_calibrated"
    source: Literal["student", "gold"] = "student"
    """Whose trajectories are trained on."""
    divergence: Divergence = TopKReverseKL()
    verifier: VerifierAdvantage = NoAdvantage()
    router: Router = UniformRouter()
    stabiliser: Stabiliser = Stabiliser()
    masks: Masks = Masks()
    weights: Weights = Weights()
    reference: Reference = Reference()
    anchor: Anchor = NoAnchor()

    @model_validator(mode="after")
    def _blocks_have_their_inputs(self) -> ObjectiveConfig:
        """Refuse combinations in which a block lacks its input, so that none is silently without effect."""
        on_policy = self.divergence.kind == "sampled_pg" or self.verifier.kind != "none" or self.reference.kl_coef > 0
        if self.source == "gold" and on_policy:
            raise ValueError("source 'gold' has no samples of the student: sampled_pg, grpo and kl_coef need 'student'")
        if self.anchor.kind == "gold_nll" and self.source != "gold":
            raise ValueError("anchor 'gold_nll' needs gold trajectories: set source = 'gold'")
        if self.router.kind == "calibrated" and self.divergence.kind == "none":
            raise ValueError(
                "router 'calibrated' weighs the teacher term, but divergence is 'none': set router 'uniform'"
            )
        kinds = (self.divergence.kind, self.verifier.kind, self.anchor.kind)
        if all(kind == "none" for kind in kinds) and self.reference.kl_coef == 0:
            raise ValueError("the objective is empty: turn on divergence, verifier, anchor or reference")
        return self

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> ObjectiveConfig:
        """A bound, mask or weight moved off its default must have a term to act on."""
        policy_gradient = self.divergence.kind == "sampled_pg" or self.verifier.kind != "none"
        without_effect: list[tuple[str, str, str]] = []
        if not policy_gradient:
            without_effect += [("stabiliser", key, "policy gradient") for key in _POLICY_GRADIENT_KEYS]
        if not self.needs_teacher:
            without_effect += [("stabiliser", key, "teacher term") for key in _TEACHER_KEYS]
            without_effect += [("weights", key, "teacher term") for key in Weights.model_fields]
            without_effect += [("masks", "special_tokens", "teacher term")]
        for block, key, term in without_effect:
            section = getattr(self, block)
            if getattr(section, key) != type(section).model_fields[key].default:
                raise ValueError(f"{block}.{key} acts on the {term}, and this objective has none: leave it out")
        return self

    @property
    def top_k(self) -> int:
        """The teacher top-K this objective needs (0: sampled tokens only)."""
        return self.divergence.top_k if isinstance(self.divergence, TopKReverseKL) else 0

    @property
    def needs_teacher(self) -> bool:
        """Whether any block reads teacher log-probs."""
        return self.divergence.kind != "none"

    @property
    def needs_reference(self) -> bool:
        """Whether any block reads reference log-probs."""
        return self.reference.kl_coef > 0
