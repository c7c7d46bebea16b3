"""DERN: neurons of dropped experts go to the kept expert that has the most similar ones.

An expert is the exact sum of its segments: neuron ``j`` reads by row ``j`` of gate and up and
writes by column ``j`` of down.

E experts, N kept, I expert width, P segments of one pool, D numbers of a segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_moe.errors import LitMoEError
from lit_moe.grouping.align import NEURON_DIM, neurons

_ROWS = 2048  # segments compared at a time


@dataclass(frozen=True)
class SegmentOptions:
    """How segments are handed on.

    Attributes:
        tau: cosine above which a segment of a dropped expert is used at all, in [-1, 1].
        gate: whether the gate's row takes part in the cosine.
        start: centres of the k-means: the kept expert's ``own`` segments, or those of the pool
            with the ``largest_gate`` entry.
        steps: of the k-means.
    """

    tau: float = 0.6
    gate: bool = False
    start: Literal["own", "largest_gate"] = "own"
    steps: int = 10

    def __post_init__(self) -> None:
        if not -1 <= self.tau <= 1:
            raise LitMoEError(f"tau={self.tau} is no cosine; it must lie in [-1, 1]")
        if self.start not in ("own", "largest_gate") or self.steps < 1:
            raise LitMoEError(
                f"start={self.start!r}, steps={self.steps}: start must be own or largest_gate, "
                "steps at least 1"
            )


@dataclass(frozen=True)
class Rebuilt:
    """Kept experts with what they were given.

    Attributes:
        weights: tensors of the N kept experts, named as ``MoEAdapter.expert_weights`` names them.
        moved: segments that went from each expert to each kept one, shape ``(N, E)``.
    """

    weights: dict[str, Tensor]
    moved: Tensor


@torch.no_grad()
def recombine(
    weights: Mapping[str, Tensor],
    kept: Sequence[int],
    importance_E: Tensor,
    options: SegmentOptions,
) -> Rebuilt:
    """Return the kept experts, each rebuilt from its own segments and those it was given.

    A segment whose nearest segment in any kept expert is above ``tau`` goes to that expert; the
    others are given up. Where something came, weighted spherical k-means makes I segments of the
    pool. Source: DERN, arXiv 2509.10377.

    Args:
        weights: as ``MoEAdapter.expert_weights`` names them.
        kept: ascending ids.
        importance_E: weight of each expert's segments in the k-means.
        options: see there.
    """
    num_experts = weights["up"].shape[0]
    dropped = [e for e in range(num_experts) if e not in set(kept)]
    moved = torch.zeros(len(kept), num_experts, dtype=torch.long)
    targets = [_compared(weights, e, options) for e in kept]
    given: list[list[tuple[int, Tensor]]] = [[] for _ in kept]
    for expert in dropped:
        receiver_I = _receivers(_compared(weights, expert, options), targets, options.tau)
        for n in range(len(kept)):
            which = (receiver_I == n).nonzero().flatten()
            moved[n, expert] = len(which)
            if len(which):
                given[n].append((expert, which))
    new = {name: tensor[list(kept)].detach().clone() for name, tensor in weights.items()}
    for n, parts in enumerate(given):
        if parts:
            own = (kept[n], torch.arange(weights["up"].shape[1], device=weights["up"].device))
            segments = _rebuild(weights, [own, *parts], importance_E, options)
            for name, value in as_tensors(segments, weights).items():
                new[name][n] = value
    return Rebuilt(new, moved)


def router_shares(moved_NE: Tensor, kept: Sequence[int], width: int) -> Tensor:
    """Return coefficients of router rows: each receiver's own and its share of the donors'.

    A donor counts as its segments that arrived over its width; rows sum to 1.

    Args:
        moved_NE: see :class:`Rebuilt`.
        kept: ascending ids.
        width: I.
    """
    map_NE = moved_NE.double() / width
    map_NE[range(len(kept)), list(kept)] = 1.0
    return map_NE / map_NE.sum(dim=1, keepdim=True)


def as_tensors(segments_ID: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`lit_moe.grouping.align.neurons`: the tensors of one expert."""
    found, start = {}, 0
    for name, dim in NEURON_DIM.items():
        if name not in weights:
            continue
        shape = list(weights[name].shape[1:])
        width = shape.pop(dim - 1)
        numbers = int(torch.tensor(shape).prod()) if shape else 1
        part = segments_ID[:, start : start + numbers].reshape(width, *shape)
        found[name] = part.movedim(0, dim - 1).to(weights[name].dtype)
        start += numbers
    return found


def spherical_means(
    segments_PD: Tensor, weights_P: Tensor, centres_ID: Tensor, *, steps: int
) -> Tensor:
    """Return I segments by weighted spherical k-means, shape ``(I, D)``.

    Each segment joins the centre with the largest cosine. A centre is the weighted mean of its
    segments, all brought to their weighted mean length; one without segments stays where it was.

    Args:
        segments_PD: the pool.
        weights_P: at least 0.
        centres_ID: where to begin.
        steps: rounds at most; fewer if nothing moves any more.
    """
    length_P = segments_PD.norm(dim=1).clamp(min=1e-30)
    weights_P = weights_P.to(segments_PD.dtype).clamp(min=1e-12)
    joined = torch.full((len(segments_PD),), -1, device=segments_PD.device)
    for _ in range(steps):
        unit_ID = torch.nn.functional.normalize(centres_ID, dim=1)
        nearest = torch.cat([(rows @ unit_ID.T).argmax(dim=1) for rows in segments_PD.split(_ROWS)])
        if torch.equal(nearest, joined):
            break
        joined = nearest
        mass_I = weights_P.new_zeros(len(centres_ID)).index_add_(0, joined, weights_P)
        size_I = weights_P.new_zeros(len(centres_ID)).index_add_(0, joined, weights_P * length_P)
        size_I = size_I / mass_I.clamp(min=1e-30)
        scale_P = weights_P / mass_I[joined] * size_I[joined] / length_P
        means = torch.zeros_like(centres_ID).index_add_(0, joined, segments_PD * scale_P[:, None])
        centres_ID = torch.where(mass_I[:, None] > 0, means, centres_ID)
    return centres_ID


def _rebuild(
    weights: Mapping[str, Tensor],
    parts: Sequence[tuple[int, Tensor]],
    importance_E: Tensor,
    options: SegmentOptions,
) -> Tensor:
    pool = torch.cat([neurons(weights, expert)[which] for expert, which in parts])
    mass = torch.cat([importance_E[e].float().expand(len(which)) for e, which in parts])
    width = weights["up"].shape[1]
    centres = pool[:width]
    if options.start == "largest_gate":
        first = weights["gate" if "gate" in weights else "up"].shape[2]
        centres = pool[pool[:, :first].abs().amax(dim=1).argsort(descending=True)[:width]]
    return spherical_means(pool, mass.to(pool.device), centres, steps=options.steps)


def _compared(weights: Mapping[str, Tensor], expert: int, options: SegmentOptions) -> Tensor:
    """Return unit segments as the cosine sees them, shape ``(I, D)``."""
    names = [n for n in weights if n in NEURON_DIM and (options.gate or not n.startswith("gate"))]
    return torch.nn.functional.normalize(neurons({n: weights[n] for n in names}, expert), dim=1)


def _receivers(unit_ID: Tensor, targets: Sequence[Tensor], tau: float) -> Tensor:
    """Return the kept expert that each segment goes to; -1 for none, shape ``(I,)``."""
    found = []
    for rows in unit_ID.split(_ROWS):
        nearest = torch.stack([(rows @ target.T).amax(dim=1) for target in targets])
        cosine, receiver = nearest.max(dim=0)
        found.append(torch.where(cosine > tau, receiver, -1))
    return torch.cat(found)
