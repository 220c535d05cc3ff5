"""The preset table: a named objective is a choice of blocks and nothing else.

Settings left out take the block's default. The published estimators are given without AgentOPD's bounds; a bound that
a preset has no term for stays at its default, where it does nothing. What is published and what had to be
reconstructed is said by ``ORIGINS``.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Origin(NamedTuple):
    """Where a preset comes from: its source, what of it is published, and what is ours."""

    source: str
    published: str
    ours: str


_PLAIN: dict[str, Any] = {"cap": None, "sequence_budget": None, "max_prob_drop": None}
_OPD: dict[str, Any] = {
    "divergence": {"kind": "sampled_pg"},
    "stabiliser": {**_PLAIN, "clip_high": 0.2, "tis_cap": 5.0},
    "masks": {"special_tokens": False},
}
_DIRECT: dict[str, Any] = {
    "stabiliser": {"cap": None, "sequence_budget": None},
    "masks": {"special_tokens": False},
}
_GRPO: dict[str, Any] = {
    "divergence": {"kind": "none"},
    "verifier": {"kind": "grpo"},
    "stabiliser": {"max_prob_drop": None},
}
_GATE: dict[str, Any] = {
    "divergence": {"kind": "sampled_pg"},
    "verifier": {"kind": "grpo", "coef": 0.0},
    "router": {"kind": "sign_gate", "extrapolation": 1.8, "fallback": "interp", "beta": 1.0},
    "stabiliser": {**_OPD["stabiliser"], "phi": "inv_abs", "phi_scale": 5.0},
    "masks": {"special_tokens": False},
}

PRESETS: dict[str, dict[str, Any]] = {
    "verifier_calibrated": {
        "divergence": {"kind": "topk_rkl", "top_k": 32, "tail": "bucket"},
        "verifier": {"kind": "grpo", "coef": 0.2},
        "router": {"kind": "calibrated"},
        "reference": {"kl_coef": 0.0},
    },
    "sft": {
        "source": {"kind": "gold"},
        "divergence": {"kind": "none"},
        "anchor": {"kind": "gold_nll"},
    },
    "seqkd": {
        "source": {"kind": "teacher"},
        "divergence": {"kind": "none"},
        "anchor": {"kind": "teacher_nll"},
    },
    "grpo": _GRPO,
    "gkd": {
        **_DIRECT,
        "source": {"kind": "mixed", "student_share": 0.5, "other": "gold"},
        "divergence": {"kind": "jsd", "beta": 0.5},
    },
    "opd": _OPD,
    "opd_grpo": {**_OPD, "verifier": {"kind": "grpo"}},
    "exopd": {**_OPD, "reference": {"extrapolation": 1.25}},
    "iw_opd": {**_OPD, "weights": {"position_gamma": 0.5}},
    "topk_opd": {**_DIRECT, "divergence": {"kind": "topk_rkl", "top_k": 32, "tail": "none"}},
    "rethink_opd": {
        **_OPD,
        "divergence": {"kind": "candidates_pg", "top_k": 16, "support": "student", "weight": "student"},
        "stabiliser": {**_OPD["stabiliser"], "tis_cap": None},
    },
    "sg_opd": {
        **_GATE,
        "anchor": {
            "kind": "teacher_nll",
            "coef": 0.1,
            "coef_end": 0.01,
            "hold_until": 0.30,
            "off_from": 0.35,
            "prompt_share": 0.1,
        },
    },
    "aopd": {**_OPD, "router": {"kind": "asymmetric", "eta": 1.0, "top_k": 32}},
    "stable_opd": {**_OPD, "reference": {"kl_coef": 0.01}, "anchor": {"kind": "gold_nll", "coef": 0.1}},
    "prefix_opd": {**_OPD, "masks": {"special_tokens": False, "suffix": "bic"}},
    "sod": {
        **_OPD,
        "verifier": {"kind": "grpo"},
        "stabiliser": {**_PLAIN, "tis_cap": None},
        "weights": {"step_delta": 0.2},
    },
    "simct_opd": {
        **_DIRECT,
        "divergence": {"kind": "topk_rkl", "top_k": 64, "tail": "bucket"},
        "alignment": {"kind": "simct"},
    },
    "gold_opd": {**_DIRECT, "divergence": {"kind": "jsd", "beta": 0.5}, "alignment": {"kind": "gold"}},
    "lightning_opd": {
        **_OPD,
        "source": {"kind": "offline"},
        "stabiliser": {**_OPD["stabiliser"], "tis_cap": None},
    },
    "ropd": {
        "divergence": {"kind": "none"},
        "verifier": {"kind": "rubric"},
        "stabiliser": {"max_prob_drop": None},
    },
    "sparse_dense": {
        **_GRPO,
        "stages": (
            {
                "name": "warm_up",
                "until": 0.2,
                "source": {"kind": "teacher"},
                "divergence": {"kind": "none"},
                "anchor": {"kind": "teacher_fkl"},
            },
            {"name": "dense", "until": 0.8, **_OPD},
        ),
    },
    "timesep": {
        **_GATE,
        "stages": (
            {
                "name": "imitate",
                "until": 0.35,
                "source": {"kind": "teacher", "filter_correct": True},
                "divergence": {"kind": "none"},
                "anchor": {"kind": "teacher_nll"},
            },
        ),
    },
}

SUMMARIES: dict[str, str] = {
    "verifier_calibrated": "dense teacher divergence, weighted by the verdict, bounded, plus the group advantage",
    "sft": "supervised learning on gold trajectories",
    "seqkd": "supervised learning on the teacher's own trajectories",
    "grpo": "group-relative policy gradient on the verifier's reward, no teacher",
    "gkd": "generalised JSD to the teacher, on student and gold trajectories mixed",
    "opd": "plain on-policy distillation: sampled-token reverse KL",
    "opd_grpo": "on-policy distillation plus the group advantage",
    "exopd": "on-policy distillation extrapolated beyond the teacher, away from a reference",
    "iw_opd": "on-policy distillation, early positions weighing more",
    "topk_opd": "on-policy distillation by the exact reverse KL inside the teacher's top-K ids",
    "rethink_opd": "on-policy distillation with a reward for each of the student's top-K ids",
    "sg_opd": "extrapolated where verdict and teacher agree, plain where not; teacher rollouts at first",
    "aopd": "policy gradient where the teacher likes the token more, truncated forward KL elsewhere",
    "stable_opd": "on-policy distillation with a pull to the start and gold trajectories beside it",
    "prefix_opd": "on-policy distillation until the teacher stops telling the student's candidates apart",
    "sod": "group advantage plus distillation that fades on turns where student and teacher drift apart",
    "simct_opd": "on-policy distillation from a teacher with another tokenizer, over shared units",
    "gold_opd": "on-policy distillation from a teacher with another tokenizer, over merged distributions",
    "lightning_opd": "on-policy distillation on stored rollouts with stored teacher log-probs",
    "ropd": "group-relative policy gradient on a rubric score from a text-only teacher",
    "sparse_dense": "warm-up on teacher rollouts, then dense distillation, then the sparse reward",
    "timesep": "supervised learning on verified teacher rollouts first, then the sign gate",
}

_TM = "Thinking Machines Lab 2025; G-OPD"
ORIGINS: dict[str, Origin] = {
    "verifier_calibrated": Origin(
        "AIML Labs note, 16 June 2026",
        "seven steps in prose, no formula",
        "DESIGN: every formula and number",
    ),
    "sft": Origin("textbook", "the whole", "denominators per skill"),
    "seqkd": Origin("Kim & Rush, arXiv 1606.07947", "the whole", "denominators per skill"),
    "grpo": Origin("GRPO, arXiv 2402.03300", "advantage and clip", "clip_high 0.28, TIS 2; denominators per skill"),
    "gkd": Origin("GKD, arXiv 2306.13649; TRL", "divergence, beta 0.5, student share 0.5", "denominators per skill"),
    "opd": Origin(f"{_TM}, arXiv 2602.12125", "estimator, clip 0.2 / 3, TIS 5", "margin from the learner's log-prob"),
    "opd_grpo": Origin("slime; tinker cookbook", "the sum of both advantages", "equal coefficients"),
    "exopd": Origin("G-OPD, arXiv 2602.12125", "advantage, lambda 1.25, reference = start", "nothing"),
    "iw_opd": Origin(
        "IW-OPD, arXiv 2606.22600; TRL", "weights, gamma 0.5", "sampled token instead of top-1 with a tail"
    ),
    "topk_opd": Origin("Revisiting OPD, arXiv 2603.25562", "divergence, K 32, renormalised", "per-skill denominators"),
    "rethink_opd": Origin("Rethinking OPD, arXiv 2604.13016", "rewards, support, weight, K 16", "no TIS"),
    "sg_opd": Origin(
        "SG-OPD, arXiv 2606.09304",
        "gate, lambda 1.8, interp fallback, phases 30/35 with correctness filter",
        "RECONSTRUCTED: beta, phi's form and scale, the anchor's coefficients and share, what 30/35 count",
    ),
    "aopd": Origin("AOPD, arXiv 2605.06387", "the split at margin <= 0", "RECONSTRUCTED: eta, K, renormalisation"),
    "stable_opd": Origin(
        "Stable-OPD, arXiv 2604.08527", "both terms, one gold per prompt", "RECONSTRUCTED: coefficients 0.1 and 0.01"
    ),
    "prefix_opd": Origin(
        "Prefix Teach, arXiv 2605.13643",
        "margin, BIC change point",
        "RECONSTRUCTED: K, margin in log-probs; DESIGN: segments are turns, least share kept",
    ),
    "sod": Origin("SOD, arXiv 2605.07725", "weights, delta 0.2, coefficients, clip 0.2 / 0.28", "dual clip 3"),
    "simct_opd": Origin(
        "SimCT, arXiv 2605.07711",
        "alignment, units, reverse KL",
        "units by joint log-prob; K 64 and a bucket; projection",
    ),
    "gold_opd": Origin(
        "GOLD, TRL", "byte offsets, observed merge, JSD and sorted L1, adaptive weight", "JSD of unnormalised masses"
    ),
    "lightning_opd": Origin("Lightning OPD, arXiv 2604.13010", "stored evidence, no importance weight", "clip"),
    "ropd": Origin("Rubric-based OPD, arXiv 2605.07396", "rubric score, no std, 4 teacher answers", "clip, TIS 2"),
    "sparse_dense": Origin(
        "Sparse-to-dense, arXiv 2605.12483",
        "the order of the stages",
        "RECONSTRUCTED: shares and coefficients; the teacher's own stage is a run of its own",
    ),
    "timesep": Origin(
        "SG-OPD, arXiv 2606.09304 (its SFT-then-gate baseline)", "the order", "RECONSTRUCTED: share of the first stage"
    ),
}
