"""Squared differences between rows of the student's experts and the teacher's answers.

T tokens, H hidden, E experts of the student, R rows (token and expert).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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

    def to(self, device: torch.device) -> Wanted:
        """Return the same on a device."""
        if self.outputs.device == device:
            return self
        ids, tokens = self.expert_ids.to(device), self.token_ids.to(device)
        return Wanted(ids, tokens, self.valid.to(device), self.outputs.to(device))


class Differences:
    """Squared differences of one layer's experts, added up per expert over the calls of a step."""

    def __init__(self, layer: LayerPairing) -> None:
        self.layer = layer
        self.has_run = False
        self.sums_E: Tensor
        self.counts_E: Tensor

    def add(self, rows: Sequence[Rows], wanted: Wanted) -> None:
        """Compare those rows that the teacher's experts have an answer for."""
        for some in rows:
            self._add(some, wanted)

    def _add(self, rows: Rows, wanted: Wanted) -> None:
        pairs, num_experts = rows.pairs, self.layer.student.num_experts
        answer_R = _positions(pairs, wanted, num_experts)
        found_R = answer_R >= 0
        targets_RH = wanted.outputs.index_select(0, answer_R.clamp(min=0))
        squared_R = mean_square(rows.outputs, targets_RH)
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


def mean_square(outputs_RH: Tensor, targets_RH: Tensor) -> Tensor:
    """Return the mean of squared differences in each row, shape ``(R,)``, float32."""
    squared: Tensor = _MeanSquare.apply(outputs_RH, targets_RH)
    return squared


class _MeanSquare(torch.autograd.Function):
    """One pass over the rows for the gradient; autograd's own takes three, and keeps copies."""

    @staticmethod
    def forward(ctx: Any, outputs_RH: Tensor, targets_RH: Tensor) -> Tensor:
        difference_RH = outputs_RH.float() - targets_RH.float()
        ctx.save_for_backward(difference_RH)
        ctx.dtype = outputs_RH.dtype
        return torch.linalg.vecdot(difference_RH, difference_RH) / difference_RH.shape[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_R: Tensor) -> tuple[Tensor, None]:
        (difference_RH,) = ctx.saved_tensors
        scale_R = gradient_R * (2 / difference_RH.shape[-1])
        return (difference_RH * scale_R[:, None]).to(ctx.dtype), None


def joined(parts: Sequence[Wanted]) -> Wanted:
    """Return all rows of several."""
    if len(parts) == 1:
        return parts[0]
    names = ("expert_ids", "token_ids", "valid", "outputs")
    return Wanted(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


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
