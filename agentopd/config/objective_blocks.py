"""The sections of an objective that shape its loss, one per block of ``docs/algorithms.md``, each off by a setting.

Blocks that come in kinds are discriminated by ``kind``; a key that the chosen kind does not have is an error, so no
knob is silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from agentopd.config.base import Section

# --- B1: divergence --------------------------------------------------------------------------------------------------


class NoDivergence(Section):
    """No teacher term."""

    kind: Literal["none"] = "none"


class SampledPG(Section):
    """Sampled-token policy gradient on ``log p_T - log p_S`` (the k1 estimator of reverse KL)."""

    kind: Literal["sampled_pg"] = "sampled_pg"
    coef: float = Field(1.0, ge=0)
    discount: float = Field(0.0, ge=0, le=1)
    """gamma: a token's advantage is the discounted sum of the margins from it on; 0 takes its own alone."""


class K2Direct(Section):
    """``0.5 (log p_S - log p_T)^2`` at the sampled token, differentiated directly: reverse KL in expectation."""

    kind: Literal["k2_direct"] = "k2_direct"
    coef: float = Field(1.0, ge=0)


class _TopK(Section):
    coef: float = Field(1.0, ge=0)
    top_k: int = Field(32, ge=2)
    tail: Literal["bucket", "none", "sampled"] = "bucket"
    """``bucket`` adds one bin for all mass outside the support, ``sampled`` adds the sampled token."""
    renormalise: bool = True
    """Normalise both sides inside the support; False leaves full-vocabulary probabilities in a truncated sum."""
    clip_log_ratio: float | None = Field(None, gt=0)
    """Clamp of ``|log p - log q|`` inside the sum, in nats."""

    @model_validator(mode="after")
    def _bucket_has_no_modes(self) -> _TopK:
        if self.tail == "bucket" and (not self.renormalise or self.clip_log_ratio is not None):
            raise ValueError(
                "tail 'bucket' already holds all mass: renormalise = false and clip_log_ratio need another tail"
            )
        return self


class TopKReverseKL(_TopK):
    """Reverse KL(student || teacher) on the teacher's top-K ids, differentiated exactly."""

    kind: Literal["topk_rkl"] = "topk_rkl"


class TopKForwardKL(_TopK):
    """Forward KL(teacher || student) on the teacher's top-K ids, differentiated exactly."""

    kind: Literal["topk_fkl"] = "topk_fkl"

    @model_validator(mode="after")
    def _no_sampled_correction(self) -> TopKForwardKL:
        if self.tail == "sampled" and not self.renormalise:
            raise ValueError("the sampled correction of a truncated sum is reverse KL's: renormalise, or use topk_rkl")
        return self


class FullReverseKL(Section):
    """Reverse KL(student || teacher) over the whole vocabulary; the teacher must be local."""

    kind: Literal["full_rkl"] = "full_rkl"
    coef: float = Field(1.0, ge=0)


class FullForwardKL(Section):
    """Forward KL(teacher || student) over the whole vocabulary; the teacher must be local."""

    kind: Literal["full_fkl"] = "full_fkl"
    coef: float = Field(1.0, ge=0)


class JensenShannon(Section):
    """Generalised JSD, ``beta KL(T || M) + (1 - beta) KL(S || M)`` with ``M = beta T + (1 - beta) S`` (GKD)."""

    kind: Literal["jsd"] = "jsd"
    coef: float = Field(1.0, ge=0)
    beta: float = Field(0.5, ge=0, le=1)
    """0 is the forward KL and 1 the reverse KL: special cases, not limits."""
    top_k: int | None = Field(None, ge=2)
    """None is the whole vocabulary (a local teacher); K takes the teacher's top-K ids and a tail bucket."""

    @model_validator(mode="after")
    def _away_from_the_limits(self) -> JensenShannon:
        if 0 < min(self.beta, 1 - self.beta) < 1e-3:
            raise ValueError(
                f"beta {self.beta} is too near a limit, where this divergence vanishes: use 0 or 1 exactly"
            )
        return self


class CandidatesPG(Section):
    """Rewards ``weight (log q_v - log p_v)`` on K candidate ids, each with its own clipped ratio (Rethinking OPD)."""

    kind: Literal["candidates_pg"] = "candidates_pg"
    coef: float = Field(1.0, ge=0)
    top_k: int = Field(16, ge=2)
    support: Literal["student", "teacher", "intersection", "union", "symmetric_difference"] = "student"
    """Whose top-K ids are candidates; all but ``teacher`` need a teacher that scores ids the student chose."""
    weight: Literal["student", "teacher", "none"] = "student"
    baseline: bool = False
    """Subtract the support's mean reward and divide by its mass: the renormalised reverse KL's gradient, exactly."""

    @property
    def width(self) -> int:
        """Most candidates of a token; those of two top-K stand one after the other."""
        return 2 * self.top_k if self.support in ("union", "symmetric_difference") else self.top_k


Divergence = Annotated[
    NoDivergence
    | SampledPG
    | K2Direct
    | TopKReverseKL
    | TopKForwardKL
    | FullReverseKL
    | FullForwardKL
    | JensenShannon
    | CandidatesPG,
    Field(discriminator="kind"),
]

# --- B2: reference ---------------------------------------------------------------------------------------------------


class Reference(Section):
    """A frozen reference policy: what the student is pulled towards, and where extrapolation starts from."""

    policy: Literal["start", "teacher_base"] = "start"
    """The frozen starting student, or the teacher's model before its own training (``base`` of the teacher)."""
    extrapolation: float = 1.0
    """lambda of ExOPD: the advantage is ``(log p_T - log p_S) + (lambda - 1)(log p_T - log p_ref)``; 1 is off."""
    span_extrapolation: float | None = None
    """Largest lambda inside tool calls, where over-shooting breaks the format; None is no cap."""
    kl_coef: float = Field(0.0, ge=0)
    """Coefficient of the k2 estimator of KL(student, reference); 0 is off."""


# --- B3: verifier ----------------------------------------------------------------------------------------------------


class NoAdvantage(Section):
    """The verifier's reward does not enter the policy gradient."""

    kind: Literal["none"] = "none"


class GroupAdvantage(Section):
    """Group-relative advantage, ``(R - mean) / (std + eps)`` inside each prompt group (unbiased std)."""

    kind: Literal["grpo"] = "grpo"
    coef: float = Field(1.0, ge=0)
    """0 leaves the advantage to the router alone."""
    normalise_std: bool = True


class AbsoluteAdvantage(Section):
    """``2 s - 1`` of the episode's outcome: no group needed."""

    kind: Literal["absolute"] = "absolute"
    coef: float = Field(1.0, ge=0)


class RubricAdvantage(Section):
    """Group-relative advantage of a rubric score that a text teacher writes and a blind judge applies (ROPD)."""

    kind: Literal["rubric"] = "rubric"
    coef: float = Field(1.0, ge=0)
    normalise_std: bool = False
    teacher_answers: int = Field(4, ge=1)
    """Answers of the teacher that the rubric is drawn from and that are judged among the student's."""


VerifierAdvantage = Annotated[
    NoAdvantage | AbsoluteAdvantage | RubricAdvantage | GroupAdvantage, Field(discriminator="kind")
]

# --- B4: router ------------------------------------------------------------------------------------------------------


class UniformRouter(Section):
    """Every token takes the teacher's guidance in full."""

    kind: Literal["uniform"] = "uniform"


class _Gate(Section):
    extrapolation: float = 1.0
    """lambda on consensus tokens, where verdict and teacher agree; 1 is no boost."""
    fallback: Literal["interp", "mask", "preserve", "grpo"] = "interp"
    """On conflict: ``beta`` x the margin, nothing, the unboosted extrapolation, or the verifier's advantage."""
    beta: float = Field(1.0, ge=0)
    """Factor of ``interp``."""
    gate_zero: Literal["opd", "conflict", "consensus"] = "opd"
    """Tokens on which verdict or teacher says nothing: the plain margin, or one of the two sides."""
    sign_guard: bool = False
    """Fall back to the plain margin where extrapolation would flip its sign."""

    @model_validator(mode="after")
    def _beta_belongs_to_interp(self) -> _Gate:
        if self.fallback != "interp" and self.beta != 1.0:
            raise ValueError(f"beta acts on fallback 'interp', and this one is {self.fallback!r}: leave it out")
        return self


class SignGate(_Gate):
    """Consensus and conflict by the sign of the group advantage times the teacher's margin (SG-OPD)."""

    kind: Literal["sign_gate"] = "sign_gate"


class CertificateGate(_Gate):
    """The same gate, its sign from the step's certificate where the verdict has one and from the outcome elsewhere."""

    kind: Literal["certificate"] = "certificate"


class AsymmetricRouter(Section):
    """Policy gradient where the teacher likes the sampled token more, truncated forward KL elsewhere (AOPD)."""

    kind: Literal["asymmetric"] = "asymmetric"
    eta: float = Field(1.0, ge=0)
    """Coefficient of the forward-KL branch."""
    top_k: int = Field(32, ge=2)
    renormalise: bool = True


class CalibratedRouter(Section):
    """Weights by agreement of verdict and teacher: ``w0 + (w1-w0) max(0,a) + (w2-w0) max(0,-a)``."""

    kind: Literal["calibrated"] = "calibrated"
    w_agree: float = Field(1.0, ge=0)
    w_neutral: float = Field(0.5, ge=0)
    w_conflict: float = Field(0.25, ge=0)
    use_certificates: bool = True
    """Take the sign of a step from the verdict's certificate where it has one."""


class OutcomeRouter(Section):
    """Weights by the verdict alone, whatever the teacher says: success-gated and failure-gated mixes."""

    kind: Literal["outcome"] = "outcome"
    w_pass: float = Field(1.0, ge=0)
    w_fail: float = Field(0.0, ge=0)
    w_unknown: float = Field(0.0, ge=0)
    use_certificates: bool = False
    """Take the verdict on a step from its certificate where it has one."""


Router = Annotated[
    UniformRouter | SignGate | CertificateGate | AsymmetricRouter | OutcomeRouter | CalibratedRouter,
    Field(discriminator="kind"),
]

# --- B5: stabiliser, B6: masks, B7: weights --------------------------------------------------------------------------


class Stabiliser(Section):
    """Bounds on one token's and one sequence's influence, and the trust region. ``None`` turns a bound off."""

    cap: float | None = Field(5.0, gt=0)
    """Largest teacher pressure of one token, in nats (the divergence's gradient is scaled down to it)."""
    cap_shape: Literal["hard", "tanh"] = "hard"
    """``hard`` leaves what is below the cap alone; ``tanh`` bends smoothly towards it."""
    sequence_budget: float | None = Field(1.0, gt=0)
    """Largest mean teacher pressure over one sequence, in nats per token."""
    phi: Literal["off", "inv_abs", "chord"] = "off"
    """Detached token weight of mean 1: ``min(1, c/|A|)``, or CHORD's ``p (1 - p)``."""
    phi_scale: float = Field(5.0, gt=0)
    """c of ``inv_abs``, in nats."""
    phi_target: Literal["pg", "anchor", "both"] = "pg"
    """Which terms take phi; the anchor's is always CHORD's."""
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    dual_clip: float | None = Field(3.0, gt=1)
    tis_cap: float | None = Field(2.0, gt=0)
    """Upper truncation of the learner/engine importance ratio."""
    rejection: float | None = Field(None, gt=1)
    """Drop tokens whose learner/engine ratio lies outside [1/C, C]."""
    max_prob_drop: float | None = Field(0.2, gt=0, le=1)
    """Drop policy-gradient tokens whose probability already moved this far in the advantage's direction."""


class Masks(Section):
    """Which sampled tokens take part."""

    special_tokens: bool = True
    """Leave role and end-of-turn markers out of the teacher term, on every turn (the verifier term keeps them)."""
    truncated: Literal["keep", "drop", "mask_tail"] = "keep"
    """Episodes that a budget ended: keep them, drop them from the loss, or hide their last tenth from the teacher."""
    repetition: Literal["keep", "mask"] = "keep"
    """``mask`` hides a looping tail, after its first period, from the teacher."""
    entropy_top_ratio: float | None = Field(None, gt=0, le=1)
    """Keep only this share of each episode's tokens, those of the highest student entropy, in the teacher term."""
    suffix: Literal["off", "bic"] = "off"
    """``bic`` ends the teacher term where its margin on the student's candidates falls (Prefix Teach)."""
    suffix_top_k: int = Field(16, ge=2)
    """Candidates of the student that the margin is read on."""
    suffix_min_keep: float = Field(0.25, ge=0, lt=1)
    """Least share of an episode's tokens that stays."""


class Weights(Section):
    """Per-token weights of the teacher term."""

    position_gamma: float = Field(0.0, ge=0)
    """Position importance of IW-OPD, ``1 + gamma (1 - C_t / C_T)``; 0 is off."""
    step_delta: float | None = Field(None, ge=0)
    """Step-wise weights of SOD, ``min((d_1+eps)/(d_k+eps), 1+delta)``; None is off."""
    step_floor: float = Field(0.0, ge=0)
    """Least d_1, so that a templated first turn does not silence all later ones."""
    outside_span: float = Field(1.0, ge=0)
    """Weight of tokens outside tool-call spans; 1 is off."""
