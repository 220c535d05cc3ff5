"""Which choices of blocks are refused at load: those that lack an input, and settings without effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from agentopd.config.base import Section
from agentopd.config.objective_blocks import (
    AsymmetricRouter,
    CalibratedRouter,
    CertificateGate,
    JensenShannon,
    Masks,
    OutcomeRouter,
    SampledPG,
    SignGate,
    TopKReverseKL,
    Weights,
)
from agentopd.config.objective_data import GoldNLL, TeacherAnchor, TeacherForwardKL

if TYPE_CHECKING:
    from agentopd.config.objective import Blocks

_DIRECT = ("topk_rkl", "topk_fkl", "full_rkl", "full_fkl", "jsd")
_SURROGATE_KEYS = ("clip_low", "clip_high", "dual_clip", "tis_cap", "rejection", "max_prob_drop")
_TEACHER_KEYS = ("cap", "cap_shape", "sequence_budget")


def complaints(blocks: Blocks) -> Iterator[str]:
    """What is wrong with a choice of blocks, in plain words; nothing where it makes sense."""
    yield from _inputs(blocks)
    yield from _routing(blocks)
    yield from _without_effect(blocks)
    if blocks.divergence.kind == blocks.anchor.kind == blocks.verifier.kind == "none" and not blocks.reference.kl_coef:
        yield "the objective is empty: turn on divergence, verifier, anchor or reference"


def _inputs(blocks: Blocks) -> Iterator[str]:
    source, divergence, anchor = blocks.source.kind, blocks.divergence.kind, blocks.anchor
    if source in ("gold", "teacher") and (
        blocks.has_policy_gradient or divergence == "k2_direct" or blocks.reference.kl_coef > 0
    ):
        yield (
            f"source {source!r} has no samples of the student: {divergence}, {blocks.verifier.kind} and kl_coef "
            "need source 'student'"
        )
    if source == "mixed" and divergence not in _DIRECT:
        yield f"source 'mixed' needs a divergence that is differentiated directly, one of {', '.join(_DIRECT)}"
    elif source == "mixed" and (blocks.has_policy_gradient or blocks.reference.kl_coef > 0):
        yield (
            f"source 'mixed' has trajectories that the student did not sample: verifier {blocks.verifier.kind!r} and "
            f"kl_coef {blocks.reference.kl_coef:g} need source 'student'; set verifier 'none' and kl_coef 0"
        )
    if source in ("gold", "teacher") and divergence == anchor.kind == "none":
        yield f"source {source!r} needs an anchor or a divergence to train with"
    if source == "teacher" and isinstance(anchor, GoldNLL):
        yield "anchor 'gold_nll' needs gold trajectories: set source = 'gold', or anchor 'teacher_nll'"
    if source == "gold" and isinstance(anchor, TeacherAnchor):
        yield f"anchor {anchor.kind!r} needs teacher rollouts, and source is 'gold': set source = 'teacher'"
    if source in ("mixed", "offline") and anchor.kind != "none":
        yield f"source {source!r} takes no anchor: leave it out"
    if source == "offline" and (divergence != "sampled_pg" or blocks.verifier.kind not in ("none", "absolute")):
        yield "source 'offline' stores log-probs of the sampled tokens: it needs divergence 'sampled_pg', and no group"
    if blocks.alignment.kind != "same":
        yield from _across(blocks)
        if blocks.router.kind != "uniform" or blocks.weights != Weights() or blocks.needs_reference:
            yield f"alignment {blocks.alignment.kind!r} has no margin per token for router, weights or reference"


def _across(blocks: Blocks) -> Iterator[str]:
    """What each alignment of two tokenizers can compare."""
    divergence = blocks.divergence
    if blocks.alignment.kind == "simct" and not (
        isinstance(divergence, TopKReverseKL) and divergence.tail != "sampled"
    ):
        yield f"alignment 'simct' compares segments: it needs 'topk_rkl' and no sampled tail, not {divergence.kind!r}"
    if blocks.alignment.kind == "gold" and not (
        isinstance(divergence, JensenShannon) and divergence.top_k is None and 0 < divergence.beta < 1
    ):
        yield (
            "alignment 'gold' compares merged distributions, which are no distributions: it needs 'jsd' over the whole "
            f"vocabulary with beta inside (0, 1), not {divergence.kind!r}"
        )
    if isinstance(blocks.anchor, TeacherForwardKL) or blocks.router.kind == "asymmetric" or blocks.student_top_k:
        yield f"alignment {blocks.alignment.kind!r} reads no teacher top-K for anchor, router or masks"


def foreign_rollouts(stages: Sequence[Blocks]) -> Iterator[str]:
    """A teacher of another tokenizer samples ids of its own, also in a stage that does not compare with it."""
    alignment = next((blocks.alignment.kind for blocks in stages if blocks.alignment.kind != "same"), None)
    for blocks in stages if alignment is not None else ():
        if blocks.trains_on_teacher_rollouts:
            taught = isinstance(blocks.anchor, TeacherAnchor)
            what = f"anchor {blocks.anchor.kind!r}" if taught else f"source {blocks.source.kind!r}"
            yield (
                f"{what} trains on the teacher's own rollouts, and under alignment {alignment!r} they are in the "
                "teacher's token ids, not the student's: train on gold or the student's own instead, or choose a "
                "teacher with the student's tokenizer and alignment 'same'"
            )


def _routing(blocks: Blocks) -> Iterator[str]:
    router, sampled = blocks.router, isinstance(blocks.divergence, SampledPG)
    if router.kind != "uniform" and not blocks.needs_teacher:
        yield f"router {router.kind!r} weighs the teacher term, but divergence is 'none': set router 'uniform'"
    if isinstance(router, SignGate) and blocks.verifier.kind == "none":
        yield "router 'sign_gate' reads the verifier's advantage: set verifier 'grpo' (coef 0 keeps it out of the loss)"
    if isinstance(router, SignGate | CertificateGate):
        if router.fallback == "grpo" and blocks.verifier.kind == "none":
            yield "fallback 'grpo' reads the verifier's advantage: set verifier 'grpo'"
        if not sampled and (router.extrapolation != 1 or router.fallback in ("preserve", "grpo")):
            yield f"extrapolation and fallback {router.fallback!r} replace an advantage: they need 'sampled_pg'"
    if isinstance(router, AsymmetricRouter) and not sampled:
        yield "router 'asymmetric' splits the policy gradient: set divergence 'sampled_pg'"
    if blocks.reference.extrapolation != 1 and not sampled:
        yield "reference.extrapolation moves the sampled advantage: set divergence 'sampled_pg'"
    unread = isinstance(router, SignGate | CertificateGate) and router.fallback != "preserve"
    if blocks.reference.extrapolation != 1 and unread:
        yield (
            f"reference.extrapolation is read by fallback 'preserve' of router {router.kind!r} alone: set "
            "router.extrapolation instead, or that fallback"
        )
    if isinstance(router, AsymmetricRouter) and isinstance(blocks.divergence, SampledPG) and blocks.divergence.discount:
        yield "divergence.discount sums margins, and router 'asymmetric' takes each token alone: leave discount out"
    judged = isinstance(router, CertificateGate | CalibratedRouter | OutcomeRouter)
    if judged and blocks.source.kind in ("gold", "teacher"):
        yield f"router {router.kind!r} reads verdicts on the student's samples: set source 'student'"


def _without_effect(blocks: Blocks) -> Iterator[str]:
    """A bound, mask or weight moved off its default must have a term to act on."""
    idle: list[tuple[str, str, str]] = []
    if not blocks.has_policy_gradient:
        idle += [("stabiliser", key, "policy gradient") for key in _SURROGATE_KEYS]
    if not blocks.needs_teacher:
        idle += [("stabiliser", key, "teacher term") for key in _TEACHER_KEYS]
        idle += [("weights", key, "teacher term") for key in Weights.model_fields]
        idle += [("masks", key, "teacher term") for key in Masks.model_fields if key != "truncated"]
        if blocks.masks.truncated == "mask_tail":
            yield "masks.truncated 'mask_tail' hides tokens from the teacher term, and there is none: keep, or drop"
    for section, key, term in idle:
        found = getattr(blocks, section)
        if getattr(found, key) != type(found).model_fields[key].default:
            yield f"{section}.{key} acts on the {term}, and this objective has none: leave it out"
    stabiliser, masks, weights, reference = blocks.stabiliser, blocks.masks, blocks.weights, blocks.reference
    beside = isinstance(blocks.anchor, TeacherAnchor) and _moved(blocks.anchor, "prompt_share", "filter_correct")
    if blocks.source.kind == "teacher" and beside:
        yield "anchor.prompt_share and filter_correct choose rollouts beside the student's; here source decides"
    if blocks.source.kind == "gold" and isinstance(blocks.anchor, GoldNLL) and _moved(blocks.anchor, "prompts"):
        yield "anchor.prompts chooses among the student's prompts, and source is 'gold': leave it out"
    yield from _phi(blocks)
    if stabiliser.cap is None and stabiliser.cap_shape != "hard":
        yield "stabiliser.cap_shape bends towards the cap, and cap is off: set it, or leave cap_shape out"
    if masks.suffix == "off" and _moved(masks, "suffix_top_k", "suffix_min_keep"):
        yield "masks.suffix_top_k and suffix_min_keep belong to suffix, which is 'off': leave them out"
    if weights.step_delta is None and weights.step_floor:
        yield "weights.step_floor belongs to step_delta, which is off: leave it out"
    if not blocks.needs_reference and _moved(reference, "policy"):
        yield "reference.policy has nothing to act on: set extrapolation or kl_coef"
    if not blocks.extrapolates and _moved(reference, "span_extrapolation"):
        yield "reference.span_extrapolation bounds an extrapolation, and reference and router have none: leave it out"
    if (
        blocks.verifier.kind != "none"
        and blocks.verifier.coef == 0
        and not isinstance(blocks.router, SignGate | CertificateGate)
    ):
        yield "verifier.coef is 0, and no router reads the advantage: set verifier 'none', or a coefficient"


def _phi(blocks: Blocks) -> Iterator[str]:
    """What phi weighs, and what its keys belong to."""
    stabiliser = blocks.stabiliser
    phi, target = stabiliser.phi, stabiliser.phi_target
    if phi == "off" and _moved(stabiliser, "phi_scale", "phi_target"):
        yield "stabiliser.phi_scale and phi_target belong to phi, which is 'off': leave them out"
    elif (phi != "inv_abs" or target == "anchor") and _moved(stabiliser, "phi_scale"):
        yield f"stabiliser.phi_scale is the c of phi 'inv_abs', and phi of {target!r} is another: leave it out"
    if phi != "off" and target != "anchor" and not isinstance(blocks.divergence, SampledPG):
        yield "stabiliser.phi weighs the sampled advantage: set divergence 'sampled_pg', or phi_target 'anchor'"
    on_likelihood = blocks.anchor.kind in ("gold_nll", "teacher_nll")
    if phi != "off" and target != "pg" and not on_likelihood:
        yield f"stabiliser.phi_target is {target!r}: it weighs a likelihood, and anchor is another kind"


def _moved(section: Section, *keys: str) -> bool:
    return any(getattr(section, key) != type(section).model_fields[key].default for key in keys)
