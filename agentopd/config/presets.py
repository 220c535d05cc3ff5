"""The preset table: a named objective is a choice of blocks and nothing else.

Settings left out take the block's default. The published estimators are given without AgentOPD's bounds; a bound that
a preset has no term for stays at its default, where it does nothing.
"""

from __future__ import annotations

from typing import Any

_UNBOUNDED: dict[str, Any] = {"cap": None, "sequence_budget": None}

PRESETS: dict[str, dict[str, Any]] = {
    "verifier_calibrated": {
        "divergence": {"kind": "topk_rkl", "top_k": 32, "tail": "bucket"},
        "verifier": {"kind": "grpo", "coef": 0.2},
        "router": {"kind": "calibrated"},
        "reference": {"kl_coef": 0.0},
    },
    "opd": {
        "divergence": {"kind": "sampled_pg"},
        "stabiliser": {**_UNBOUNDED, "max_prob_drop": None, "clip_high": 0.2, "tis_cap": 5.0},
        "masks": {"special_tokens": False},
    },
    "topk_opd": {
        "divergence": {"kind": "topk_rkl", "top_k": 32, "tail": "bucket"},
        "stabiliser": _UNBOUNDED,
        "masks": {"special_tokens": False},
    },
    "grpo": {
        "divergence": {"kind": "none"},
        "verifier": {"kind": "grpo"},
        "stabiliser": {"max_prob_drop": None},
    },
    "sft": {
        "source": "gold",
        "divergence": {"kind": "none"},
        "anchor": {"kind": "gold_nll"},
    },
}

SUMMARIES: dict[str, str] = {
    "verifier_calibrated": "dense teacher divergence, weighted by the verdict, bounded, plus the group advantage",
    "opd": "plain on-policy distillation: sampled-token reverse KL",
    "topk_opd": "on-policy distillation by the exact reverse KL on the teacher's top-K ids",
    "grpo": "group-relative policy gradient on the verifier's reward, no teacher",
    "sft": "supervised learning on gold trajectories",
}
