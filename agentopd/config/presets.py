"""The preset table: a named objective is a choice of blocks and nothing else.

Settings left out take the block's default. ``off`` is the plain estimator without AgentOPD's bounds.
"""

from __future__ import annotations

from typing import Any

_OFF: dict[str, Any] = {"cap": None, "sequence_budget": None, "max_prob_drop": None, "clip_high": 0.2}

PRESETS: dict[str, dict[str, Any]] = {
    "verifier_calibrated": {
        "divergence": {"kind": "topk_rkl", "top_k": 32, "tail": "bucket"},
        "verifier": {"kind": "grpo", "coef": 0.2},
        "router": {"kind": "calibrated"},
        "reference": {"kl_coef": 0.0},
    },
    "opd": {
        "divergence": {"kind": "sampled_pg"},
        "stabiliser": {**_OFF, "tis_cap": 5.0},
        "masks": {"special_tokens": False},
    },
    "topk_opd": {
        "divergence": {"kind": "topk_rkl", "top_k": 32, "tail": "bucket"},
        "stabiliser": {**_OFF},
        "masks": {"special_tokens": False},
    },
    "grpo": {
        "divergence": {"kind": "none"},
        "verifier": {"kind": "grpo"},
        "stabiliser": {**_OFF, "clip_high": 0.28},
        "masks": {"special_tokens": False},
    },
    "sft": {
        "source": "gold",
        "divergence": {"kind": "none"},
        "stabiliser": {**_OFF},
        "masks": {"special_tokens": False},
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
