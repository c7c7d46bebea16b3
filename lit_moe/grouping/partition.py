"""From a similarity of experts to groups of them.

E experts, r groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_moe.errors import LitMoEError

Partition = Literal["auto", "exhaustive", "average", "spectral", "centroids"]
Groups = tuple[tuple[int, ...], ...]
MOST_PARTITIONS = 20_000


def partition(
    similarity_EE: Tensor,
    num_groups: int,
    *,
    method: Partition = "auto",
    saliency_E: Tensor | None = None,
) -> Groups:
    """Return exactly ``num_groups`` non-empty groups of ascending ids, ordered by their first.

    Args:
        similarity_EE: symmetric, higher = more alike; scale and offset do not matter.
        num_groups: from 1 to E.
        method: ``exhaustive``: the best of all partitions (see :func:`cohesion`); ``average``:
            agglomeration by average linkage; ``spectral``: Ward's linkage of the leading
            eigenvectors of the normalised affinity; ``centroids``: the most salient experts, each
            with those that are most like it; ``auto``: exhaustive where there are at most 20,000
            partitions, else average.
        saliency_E: how much each expert matters; only ``centroids`` asks for it.

    Raises:
        LitMoEError: if the number of groups is impossible, the method unknown or too expensive, or
            the similarity not finite.

    >>> similarity = torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]])
    >>> partition(similarity, 2)
    ((0, 2), (1,))
    """
    similarity_EE = similarity_EE.double()
    _check(similarity_EE, num_groups)
    num_experts = len(similarity_EE)
    if num_groups in (1, num_experts):
        ids = tuple(range(num_experts))
        return (ids,) if num_groups == 1 else tuple((e,) for e in ids)
    possible = num_partitions(num_experts, num_groups)
    if method == "auto":
        method = "exhaustive" if possible <= MOST_PARTITIONS else "average"
    if method == "exhaustive" and possible > MOST_PARTITIONS:
        raise LitMoEError(
            f"{num_experts} experts have {possible:,} partitions into {num_groups} groups, too "
            f"many to try ({MOST_PARTITIONS:,} at most); take average or spectral"
        )
    if method == "centroids":
        return _around_centroids(similarity_EE, num_groups, saliency_E)
    methods = {"exhaustive": _best_of_all, "average": _average, "spectral": _spectral}
    if method not in methods:
        known = ", ".join(["auto", *methods, "centroids"])
        raise LitMoEError(f"partition={method!r} is unknown; there are {known}")
    return _groups(methods[method](similarity_EE.numpy(), num_groups))


def partition_layer(
    similarity_EE: Tensor,
    num_groups: int,
    *,
    method: Partition = "auto",
    saliency_E: Tensor | None = None,
    protected: frozenset[int] = frozenset(),
    routing_groups: int = 1,
) -> Groups:
    """As :func:`partition`, with protected experts alone and routing groups kept apart.

    Args:
        similarity_EE: see :func:`partition`.
        num_groups: divisible by ``routing_groups``.
        method: see :func:`partition`.
        saliency_E: see :func:`partition`.
        protected: experts that stay as they are.
        routing_groups: equally large runs of experts between which nothing may be merged.

    Raises:
        LitMoEError: also if the protected experts leave no group for the others.
    """
    size = len(similarity_EE) // routing_groups
    found: list[tuple[int, ...]] = []
    for start in range(0, len(similarity_EE), size):
        ids = [e for e in range(start, start + size) if e not in protected]
        alone = [(e,) for e in range(start, start + size) if e in protected]
        left = num_groups // routing_groups - len(alone)
        if ids and left < 1:
            raise LitMoEError(
                f"{num_groups} groups were asked for, but {len(protected)} of "
                f"{len(similarity_EE)} experts are protected and the others need a group too"
            )
        inner: Groups = ()
        if ids:
            own = torch.tensor(ids)
            inner = partition(
                similarity_EE[own][:, own],
                left,
                method=method,
                saliency_E=None if saliency_E is None else saliency_E[own],
            )
        found += sorted([*alone, *(tuple(ids[i] for i in group) for group in inner)])
    return tuple(found)


def cohesion(similarity_EE: np.ndarray[Any, Any], labels_PE: np.ndarray[Any, Any]) -> Any:
    """Return ``sum_n 1/|V_n| sum_{i,j in V_n} S_ij`` of each partition, shape ``(P,)``.

    The objective of kernel k-means. The sum of all similarities is fixed, so that groups that are
    alike within are also unlike each other; scale and offset of S change nothing.

    Args:
        similarity_EE: symmetric.
        labels_PE: group of each expert in each of P partitions.
    """
    total = np.zeros(len(labels_PE))
    for group in range(int(labels_PE.max()) + 1):
        member_PE = (labels_PE == group).astype(float)
        within = ((member_PE @ similarity_EE) * member_PE).sum(axis=1)
        total += within / np.maximum(member_PE.sum(axis=1), 1)
    return total


@cache
def num_partitions(num_experts: int, num_groups: int) -> int:
    """Return the partitions of so many experts into so many groups (Stirling, second kind).

    >>> num_partitions(8, 4), num_partitions(8, 6)
    (1701, 266)
    """
    if num_groups in (0, num_experts):
        return int(num_groups == num_experts)
    if num_groups > num_experts:
        return 0
    alone = num_partitions(num_experts - 1, num_groups - 1)
    return alone + num_groups * num_partitions(num_experts - 1, num_groups)


def linked(steps: np.ndarray[Any, Any], num_experts: int, num_groups: int) -> list[int]:
    """Return the group of each expert after the first ``E - r`` merges of a linkage.

    Cutting at a height instead gives fewer groups where distances are equal.

    Args:
        steps: as from ``scipy.cluster.hierarchy.linkage``.
        num_experts: E.
        num_groups: r.
    """
    clusters = {e: [e] for e in range(num_experts)}
    for step, (one, other) in enumerate(steps[: num_experts - num_groups, :2].astype(int)):
        clusters[num_experts + step] = clusters.pop(one) + clusters.pop(other)
    labels = [0] * num_experts
    for label, members in enumerate(clusters.values()):
        for expert in members:
            labels[expert] = label
    return labels


def average_linkage(similarity_EE: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the merges by falling mean similarity between groups, as scipy writes them."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    distance = similarity_EE.max() - similarity_EE
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    merges: np.ndarray[Any, Any] = linkage(squareform(distance, checks=False), method="average")
    return merges


def _average(similarity_EE: np.ndarray[Any, Any], num_groups: int) -> list[int]:
    return linked(average_linkage(similarity_EE), len(similarity_EE), num_groups)


def _spectral(similarity_EE: np.ndarray[Any, Any], num_groups: int) -> list[int]:
    from scipy.cluster.hierarchy import linkage

    low, high = similarity_EE.min(), similarity_EE.max()
    affinity = (similarity_EE - low) / max(high - low, 1e-30)
    np.fill_diagonal(affinity, 1)
    root = 1 / np.sqrt(affinity.sum(axis=1))
    _, vectors = np.linalg.eigh(root[:, None] * affinity * root[None, :])
    leading = vectors[:, -num_groups:]
    rows = leading / np.maximum(np.linalg.norm(leading, axis=1, keepdims=True), 1e-30)
    return linked(linkage(rows, method="ward"), len(rows), num_groups)


def _best_of_all(similarity_EE: np.ndarray[Any, Any], num_groups: int) -> list[int]:
    labels_PE = np.array(list(_all_labels(len(similarity_EE), num_groups)))
    best: list[int] = labels_PE[np.argmax(cohesion(similarity_EE, labels_PE))].tolist()
    return best


def _all_labels(num_experts: int, num_groups: int) -> Iterator[list[int]]:
    """Yield every partition once: the first expert of a group takes the next free label."""

    def extend(labels: list[int], used: int) -> Iterator[list[int]]:
        missing = num_experts - len(labels)
        if missing == 0:
            yield labels
            return
        if missing > num_groups - used:
            for label in range(used):
                yield from extend([*labels, label], used)
        if used < num_groups:
            yield from extend([*labels, used], used + 1)

    yield from extend([], 0)


def _around_centroids(similarity_EE: Tensor, num_groups: int, saliency_E: Tensor | None) -> Groups:
    if saliency_E is None:
        raise LitMoEError(
            "partition='centroids' needs to know which experts matter: take coefficients "
            "frequency, reap or max_visited"
        )
    centroids = saliency_E.argsort(descending=True, stable=True)[:num_groups].tolist()
    nearest = similarity_EE[:, centroids].argmax(dim=1).tolist()
    for label, expert in enumerate(centroids):
        nearest[expert] = label
    return _groups(nearest)


def _groups(labels: Sequence[int]) -> Groups:
    found: dict[int, list[int]] = {}
    for expert, label in enumerate(labels):
        found.setdefault(label, []).append(expert)
    return tuple(tuple(ids) for ids in found.values())


def _check(similarity_EE: Tensor, num_groups: int) -> None:
    num_experts = len(similarity_EE)
    if similarity_EE.shape != (num_experts, num_experts):
        raise LitMoEError(f"a similarity must be (E, E), not {tuple(similarity_EE.shape)}")
    if not similarity_EE.isfinite().all():
        raise LitMoEError("the similarity of experts is not finite, so they cannot be grouped")
    if not 1 <= num_groups <= num_experts:
        raise LitMoEError(
            f"{num_experts} experts cannot form {num_groups} groups; 1 to {num_experts}"
        )
