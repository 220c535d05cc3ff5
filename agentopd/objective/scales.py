"""How much each token weighs: in every component a skill has its share of the loss, whatever its number of tokens.

Shapes: N tokens taking part in any component, C components (``PARTS``), S skills of the run, names sorted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agentopd.objective.masks import num_kept
from agentopd.objective.streams import Batch

PARTS = ("teacher_part_N", "verifier_part_N", "anchor_part_N", "reference_part_N")


def skill_counts(parts_CN: Tensor, batch: Batch, entropy_top_ratio: float | None) -> Tensor:
    """Tokens of each skill taking part in each component (C, S).

    The entropy mask keeps a known number of each episode's tokens, but only the learner sees which: a token that may be
    kept counts for its share of them.
    """
    counted_CN = parts_CN.double()
    if entropy_top_ratio is not None and batch.num_rows:
        sizes_B = torch.bincount(batch.row_N[parts_CN[0]], minlength=batch.num_rows).tolist()
        share_B = torch.tensor([num_kept(n, entropy_top_ratio) / max(n, 1) for n in sizes_B], dtype=torch.float64)
        counted_CN[0] *= share_B[batch.row_N]
    zeros_CS = torch.zeros(len(PARTS), len(batch.skills), dtype=torch.float64)
    return zeros_CS.index_add(1, batch.skill_N, counted_CN)


def unsolved_share(counts_2S: Tensor) -> Tensor:
    """Share of each skill's prompts that the anchor answers (S,): a solved prompt's gold has weight, and loss, zero.

    Without it the gold of one unsolved prompt would weigh as much as that of a whole skill.
    """
    return (counts_2S[0] / counts_2S[1].clamp(min=1)).clamp(max=1).float()


def token_scales(batch: Batch, parts_CN: Tensor, counts_CS: Tensor, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """For each component, every token's share of its skill over the skill's global count of tokens taking part."""
    share_S = torch.tensor([shares[name] for name in batch.skills], dtype=torch.float64)
    unit_CS = share_S / counts_CS.clamp(min=1)
    scales_CN = torch.where(parts_CN, unit_CS[:, batch.skill_N], 0.0).float()
    return {name.replace("_part_", "_scale_"): scale_N for name, scale_N in zip(PARTS, scales_CN, strict=True)}
