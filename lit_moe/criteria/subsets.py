"""Which subsets of experts are worth trying: all of them, or a seeded sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

Subset = tuple[int, ...]


def num_subsets(num_experts: int, keep: int, num_groups: int = 1) -> int:
    """Return how many subsets keep ``keep`` experts, equally many of each group.

    >>> num_subsets(8, 4), num_subsets(8, 4, num_groups=2)
    (70, 36)
    """
    return math.comb(num_experts // num_groups, keep // num_groups) ** num_groups


def all_subsets(num_experts: int, keep: int, num_groups: int = 1) -> Iterator[Subset]:
    """Yield every subset once, in lexicographic order, ids ascending.

    >>> list(all_subsets(4, 2, num_groups=2))
    [(0, 2), (0, 3), (1, 2), (1, 3)]
    """
    size = num_experts // num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
    chosen = [itertools.combinations(group, keep // num_groups) for group in groups]
    for parts in itertools.product(*chosen):
        yield tuple(itertools.chain.from_iterable(parts))


def sampled_subsets(
    priority: Tensor, keep: int, num_groups: int, limit: int, generator: torch.Generator
) -> list[Subset]:
    """Return ``limit`` distinct subsets: the one of highest ``priority`` and random others.

    Args:
        priority: how often each expert is used, shape ``(E,)``; ties go to the lower id.
        keep: experts in a subset.
        num_groups: groups that contribute equally many.
        limit: how many; must be fewer than there are.
        generator: of the random ones.
    """
    found = {_best(priority, keep, num_groups): None}
    while len(found) < limit:
        found[_best(torch.rand(len(priority), generator=generator), keep, num_groups)] = None
    return list(found)


def _best(priority: Tensor, keep: int, num_groups: int) -> Subset:
    rows = priority.reshape(num_groups, -1)
    order = rows.argsort(dim=1, descending=True, stable=True)[:, : keep // num_groups]
    offset = torch.arange(num_groups)[:, None] * rows.shape[1]
    return tuple(sorted((order + offset).flatten().tolist()))
