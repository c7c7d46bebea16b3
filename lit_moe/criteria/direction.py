"""Measures that MC-Suite tried in both directions: drop the largest, or drop the smallest.

Source of all sixteen: Jaiswal et al., "Finding Fantastic Experts in MoEs", arXiv 2504.05586. They
score experts within a layer. ``direction: paper`` is what the paper found better, or, where its
text does not say, what seems likely (each criterion says which); ``opposite`` is the other one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_moe.errors import LitMoEError

Direction = Literal["paper", "opposite"]
Extreme = Literal["largest", "smallest"]


@dataclass(frozen=True)
class Directed:
    """A measure with a direction.

    Attributes:
        direction: ``paper`` or ``opposite``.
        drops: the extreme of the measure that goes first in the direction of the paper.
    """

    direction: Direction = "paper"

    drops: ClassVar[Extreme]

    def __post_init__(self) -> None:
        if self.direction not in ("paper", "opposite"):
            raise LitMoEError(f"direction={self.direction!r} is unknown; use 'paper' or 'opposite'")

    @property
    def first_to_go(self) -> Extreme:
        """The extreme of the measure that goes first, in the direction that was chosen."""
        if self.direction == "paper":
            return self.drops
        return "smallest" if self.drops == "largest" else "largest"

    def oriented(self, measure_E: Tensor) -> Tensor:
        """Return scores, higher = keep."""
        return measure_E if self.first_to_go == "smallest" else -measure_E


def ranks_by_pairs(pairs_EE: Tensor, usage_E: Tensor, extreme: Extreme) -> Tensor:
    """Return how late each expert goes when extreme pairs lose a member, shape ``(E,)``, float64.

    Of the pair with the extreme value among the experts that are left, the member that is used
    less goes (rank 0), then the same again with the others. Of equal pairs, the one with the least
    used member; of equally used experts, the one with the higher id.

    Args:
        pairs_EE: symmetric; the diagonal does not count.
        usage_E: how much each expert is used.
        extreme: of the pair.

    >>> pairs = torch.tensor([[0.0, 9.0, 1.0], [9.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
    >>> ranks_by_pairs(pairs, torch.tensor([5.0, 4.0, 3.0]), "largest").tolist()
    [2.0, 0.0, 1.0]
    """
    values = (pairs_EE if extreme == "largest" else -pairs_EE).double().clone()
    values.fill_diagonal_(-torch.inf)
    usage = usage_E.tolist()
    left = list(range(len(usage)))
    ranks = torch.zeros(len(usage), dtype=torch.float64)
    while len(left) > 1:
        members = (values == values.max()).any(dim=1).nonzero().flatten().tolist()
        loser = min(members, key=lambda e: (usage[e], -e))
        ranks[loser] = len(usage) - len(left)
        left.remove(loser)
        values[loser], values[:, loser] = -torch.inf, -torch.inf
    ranks[left] = len(usage) - 1
    return ranks
