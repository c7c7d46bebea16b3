"""Squared differences between rows of the student's experts and the teacher's answers.

T tokens, H hidden, E experts of the student, R rows (token and expert).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_moe.distill.dispatch import Pairs, Rows
from lit_moe.distill.pairing import LayerPairing
from lit_moe.distill.step import Ranks


@dataclass(frozen=True)
class Wanted:
    """What the teacher's experts said, to be compared, in the student's numbering.

    Attributes:
        expert_ids: of the student, shape ``(R,)``.
        token_ids: shape ``(R,)``.
        valid: False where the student has no such expert, or the token is padding.
        outputs: shape ``(R, H)``, without gradient.
    """

    expert_ids: Tensor
    token_ids: Tensor
    valid: Tensor
    outputs: Tensor


class Differences:
    """Squared differences of one layer's experts, added up per expert over the calls of a step."""

    def __init__(self, layer: LayerPairing) -> None:
        self.layer = layer
        self.has_run = False
        self.sums_E: Tensor
        self.counts_E: Tensor

    def add(self, rows: Rows, wanted: Wanted) -> None:
        """Compare those rows that the teacher's experts have an answer for."""
        pairs, num_experts = rows.pairs, self.layer.student.num_experts
        answer_R = _positions(pairs, wanted, num_experts)
        found_R = answer_R >= 0
        targets_RH = wanted.outputs.index_select(0, answer_R.clamp(min=0))
        difference_RH = rows.outputs.float() - targets_RH.float()
        # The gradient of a norm is one pass over the rows; that of a mean of squares is three.
        squared_R = torch.linalg.vector_norm(difference_RH, dim=-1).square()
        squared_R = squared_R / difference_RH.shape[-1]
        ids = pairs.expert_ids.clamp(max=num_experts - 1)
        zeros_E = squared_R.new_zeros(num_experts)
        sums_E = zeros_E.index_add(0, ids, squared_R.where(found_R, 0.0))
        counts_E = zeros_E.index_add(0, ids, found_R.to(zeros_E.dtype))
        self.sums_E = self.sums_E + sums_E if self.has_run else sums_E
        self.counts_E = self.counts_E + counts_E if self.has_run else counts_E
        self.has_run = True

    def loss(self, counts_E: Tensor, ranks: Ranks) -> Tensor:
        """Return the sum over experts of their means; averaged over ranks it is that of all tokens.

        Args:
            counts_E: tokens of each expert on all ranks.
            ranks: that share them.
        """
        return (self.sums_E / counts_E.clamp(min=1)).sum() * ranks.size


def not_among(chosen: Pairs, wanted: Wanted, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return ``expert_ids`` and ``token_ids`` of what is wanted and routing did not choose."""
    taken = torch.zeros(
        chosen.num_tokens * num_experts, dtype=torch.bool, device=chosen.real.device
    )
    keys = chosen.token_ids * num_experts + chosen.expert_ids
    taken[keys[chosen.real]] = True
    asked = wanted.token_ids * num_experts + wanted.expert_ids.clamp(min=0)
    more = wanted.valid & ~taken[asked]
    return wanted.expert_ids[more], wanted.token_ids[more]


def _positions(pairs: Pairs, wanted: Wanted, num_experts: int) -> Tensor:
    """Return the row of ``wanted`` that answers each pair, -1 where there is none, ``(R,)``."""
    table = torch.full((pairs.num_tokens * num_experts,), -1, device=pairs.token_ids.device)
    rows = wanted.valid.nonzero().flatten()
    table[wanted.token_ids[rows] * num_experts + wanted.expert_ids[rows]] = rows
    keys = pairs.token_ids * num_experts + pairs.expert_ids.clamp(max=num_experts - 1)
    return table[keys].where(pairs.real, -1)
