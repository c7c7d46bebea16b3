"""From groups to coefficients: how much of each member goes into the new expert.

E experts, N groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_moe.grouping.partition import Groups

Coefficients = Literal["uniform", "frequency", "reap", "max_visited", "learned"]
Router = Literal["merge", "keep"]


def weighted_map(groups: Groups, weights_E: Tensor) -> Tensor:
    """Return ``w_e / sum of w over the group`` for the members of each group, shape ``(N, E)``.

    Members of a group whose weights are all 0 count the same.

    >>> weighted_map(((0, 2), (1,)), torch.tensor([3.0, 5.0, 1.0])).tolist()
    [[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]
    """
    map_NE = torch.zeros(len(groups), len(weights_E), dtype=torch.float64)
    for row, members in zip(map_NE, groups, strict=True):
        ids = list(members)
        weights = weights_E[ids].double().clamp(min=0)
        row[ids] = weights / weights.sum() if weights.sum() > 0 else 1 / len(ids)
    return map_NE


def strongest_map(groups: Groups, weights_E: Tensor) -> Tensor:
    """Return 1 for the member of each group with the largest weight (the first, if equal).

    >>> strongest_map(((0, 2), (1,)), torch.tensor([1.0, 0.0, 3.0])).tolist()
    [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    map_NE = torch.zeros(len(groups), len(weights_E), dtype=torch.float64)
    for row, expert in zip(map_NE, leaders(groups, weights_E), strict=True):
        row[expert] = 1.0
    return map_NE


def leaders(groups: Groups, weights_E: Tensor) -> list[int]:
    """Return the member of each group with the largest weight (the first, if equal)."""
    return [_strongest(members, weights_E) for members in groups]


def _strongest(members: Sequence[int], weights_E: Tensor) -> int:
    return members[int(weights_E[list(members)].argmax())]


def leaders_of(map_NE: Tensor) -> list[int]:
    """Return the old expert with the largest coefficient in each new one."""
    ids: list[int] = map_NE.abs().argmax(dim=1).tolist()
    return ids
