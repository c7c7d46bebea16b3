"""Which entries of rows or of groups are the smallest, and how they become zeros, in little time.

On a CPU torch compares and converts booleans at about a nanosecond per weight, several times what
reading a weight costs. numpy does the same over the same memory with the vector instructions of the
machine; on other devices torch's own kernels are quick.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NETWORK = 16
"""Groups up to this size are sorted by exchanging whole planes of members; larger ones as rows."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def without_smallest(scores: Tensor, count: int) -> Tensor:
    """Return False for exactly ``count`` entries of each row: the smallest, then the first.

    Args:
        scores: shape ``(..., inputs)``, no NaN.
        count: in [0, inputs].

    Returns:
        Boolean, shape as given.
    """
    if count in (0, scores.shape[-1]):
        return torch.full_like(scores, count == 0, dtype=torch.bool)
    if not scores.is_cpu:
        return _by_order(scores, count)
    values = scores.numpy()
    parted = np.partition(values, count, axis=-1)
    limit, following = parted[..., :count].max(axis=-1), parted[..., count]
    keep = torch.from_numpy(np.greater(values, limit[..., None]))
    return _settle_ties(scores, keep, torch.from_numpy(limit == following), count)


def without_smallest_of_groups(scores: Tensor, count: int, group: int) -> Tensor:
    """Return False for ``count`` of every ``group`` consecutive entries, as above.

    Args:
        scores: shape ``(..., inputs)``, ``inputs`` a multiple of ``group``, no NaN.
        count: in [0, group).
        group: entries that are compared with each other.
    """
    grouped = scores.unflatten(-1, (-1, group))
    if count == 0 or group > _NETWORK:
        return without_smallest(grouped, count).flatten(-2)
    if not scores.is_cpu:
        return (_rank_in_groups(grouped) >= count).flatten(-2)
    values = grouped.numpy()
    planes = [values[..., member] for member in range(group)]
    ranked = _sorted_planes(planes, count)
    limit, following = ranked[count - 1], ranked[count]
    keep = np.empty(values.shape, dtype=np.bool_)
    for member, plane in enumerate(planes):
        np.greater(plane, limit, out=keep[..., member])
    tied = torch.from_numpy(limit == following)
    return _settle_ties(grouped, torch.from_numpy(keep), tied, count).flatten(-2)


def zero_entries_(tensor: Tensor, stays: Tensor) -> None:
    """Set the entries that do not stay to +0, in place; the others keep every bit.

    Args:
        tensor: floating point.
        stays: boolean, same shape and device.
    """
    if not tensor.is_cpu:
        tensor.masked_fill_(~stays, 0.0)
        return
    bits = tensor.detach().view(_BITS[tensor.element_size()]).numpy()
    np.multiply(bits, stays.numpy(), out=bits)
    torch.autograd.graph.increment_version(tensor)  # as any operation in place would


def _settle_ties(scores: Tensor, keep: Tensor, tied: Tensor, count: int) -> Tensor:
    """Of rows whose limit is reached by several entries, drop the first of them."""
    if bool(tied.any()):
        keep[tied] = _by_order(scores[tied], count)
    return keep


def _by_order(scores: Tensor, count: int) -> Tensor:
    order = scores.argsort(dim=-1, stable=True)
    keep = torch.ones_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :count], False)


def _rank_in_groups(grouped: Tensor) -> Tensor:
    """Return how many of its group come before each entry, shape as given, uint8."""
    members = grouped.movedim(-1, 0).contiguous()
    rank = torch.zeros(members.shape, dtype=torch.uint8, device=members.device)
    for first in range(len(members)):
        for second in range(first + 1, len(members)):
            is_less = members[second] < members[first]
            rank[first] += is_less
            rank[second] += ~is_less
    return rank.movedim(0, -1).contiguous()


def _sorted_planes(planes: list[NDArray[np.floating]], count: int) -> list[NDArray[np.floating]]:
    """Return the members of each group in ascending order, right at ``count - 1`` and ``count``."""
    planes = list(planes)
    for low, high, low_is_used, high_is_used in _exchanges(len(planes), count):
        smaller, larger = planes[low], planes[high]
        if low_is_used:
            planes[low] = np.minimum(smaller, larger)
        if high_is_used:
            planes[high] = np.maximum(smaller, larger)
    return planes


@lru_cache
def _exchanges(size: int, count: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return Batcher's merge exchange, less what ranks ``count - 1`` and ``count`` do not need.

    Each entry is ``(low, high, the smaller one is used later, the larger one is used later)``.
    """
    needed, kept = {count - 1, count}, []
    for low, high in reversed(_merge_exchange(size)):
        uses = (low in needed, high in needed)
        if any(uses):
            kept.append((low, high, *uses))
            needed |= {low, high}
    return tuple(reversed(kept))


def _merge_exchange(size: int) -> list[tuple[int, int]]:
    """Return pairs to compare that sort ``size`` entries (Knuth, volume 3, 5.2.2, algorithm M)."""
    pairs = []
    top = 1 << max(size - 1, 0).bit_length() >> 1
    step = top
    while step > 0:
        bound, remainder, distance = top, 0, step
        while True:
            pairs += [(i, i + distance) for i in range(size - distance) if i & step == remainder]
            if bound == step:
                break
            distance, bound, remainder = bound - step, bound >> 1, step
        step >>= 1
    return pairs
