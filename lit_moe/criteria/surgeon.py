"""Optimal brain surgeon on whole experts: what each costs if the others make up for it.

n = E D features of a layer, H hidden. ``H = Psi^T Psi + lam m I`` are the second moments of the
gated features of all experts; ``W`` (n, H) the down projections. Without expert ``e`` the others
can imitate it at a cost of ``tr(W_e^T [(H^-1)_ee]^-1 W_e)``, by moving
``W -= (H^-1)_:e [(H^-1)_ee]^-1 W_e`` (LeCun et al. 1989; Hassibi and Stork 1993, by blocks).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Removal(NamedTuple):
    """One step of a greedy elimination.

    Attributes:
        expert: which one goes.
        cost: what its going adds to the squared error (in units of the sums).
    """

    expert: int
    cost: float


def eliminate(matrix_NN: Tensor, weights_EDH: Tensor, penalty: float) -> list[Removal]:
    """Remove all experts one by one, each time the one that costs least; exact after each removal.

    Args:
        matrix_NN: ``Psi^T Psi`` of all experts together.
        weights_EDH: down projections, features first.
        penalty: added to the diagonal, above 0.

    Returns:
        Experts in the order of their going, with the cost of each step.
    """
    num_experts, width, hidden = weights_EDH.shape
    weights = weights_EDH.to(matrix_NN.dtype).reshape(-1, hidden).clone()
    inverse = _inverse(matrix_NN, penalty)
    left = list(range(num_experts))
    removals = []
    while left:
        factors = {e: torch.linalg.cholesky(_block(inverse, e, width)) for e in left}
        costs = {e: _cost(factors[e], weights[e * width : (e + 1) * width]) for e in left}
        expert = min(left, key=lambda e: (costs[e], e))
        removals.append(Removal(expert, costs[expert]))
        left.remove(expert)
        if left:
            _remove_(inverse, weights, factors[expert], expert, width)
    return removals


def eliminate_alone(blocks_EDD: Tensor, weights_EDH: Tensor, penalty: float) -> list[Removal]:
    """Order experts by their own energy ``tr(W_e^T H_ee W_e)``, as if none could help another.

    The block-diagonal case of :func:`eliminate`, for layers whose joint matrix fits nowhere.
    """
    weights = weights_EDH.to(blocks_EDD.dtype)
    energy = (weights * (blocks_EDD @ weights)).sum((1, 2)) + penalty * weights.square().sum((1, 2))
    order = sorted(range(len(energy)), key=lambda e: (float(energy[e]), e))
    return [Removal(e, float(energy[e])) for e in order]


def as_scores(removals: list[Removal]) -> Tensor:
    """Return a score per expert that falls in the order of going, shape ``(E,)``, float64.

    The score is the largest cost so far, so that a threshold on it cuts the order at one place, and
    scores of several layers can be ranked together.
    """
    scores = torch.zeros(len(removals), dtype=torch.float64)
    highest = 0.0
    for expert, cost in removals:
        highest = max(cost, highest * (1 + 1e-9) + 1e-300)
        scores[expert] = highest
    return scores


def _inverse(matrix_NN: Tensor, penalty: float) -> Tensor:
    diagonal = matrix_NN.diagonal()
    own = diagonal.clone()
    diagonal += penalty  # in place and put back: there may be no room for a copy
    factor = torch.linalg.cholesky(matrix_NN)
    diagonal.copy_(own)
    return torch.cholesky_inverse(factor)


def _block(inverse: Tensor, expert: int, width: int) -> Tensor:
    rows = slice(expert * width, (expert + 1) * width)
    return inverse[rows, rows]


def _cost(factor_DD: Tensor, weights_DH: Tensor) -> float:
    whitened = torch.linalg.solve_triangular(factor_DD, weights_DH, upper=False)
    return float(whitened.square().sum())


def _remove_(inverse: Tensor, weights: Tensor, factor_DD: Tensor, expert: int, width: int) -> None:
    """Update inverse and weights to what they are without one expert; its own part becomes 0."""
    rows = slice(expert * width, (expert + 1) * width)
    column = inverse[:, rows].clone()
    weights -= column @ torch.cholesky_solve(weights[rows].clone(), factor_DD)
    inverse -= column @ torch.cholesky_solve(column.T.contiguous(), factor_DD)
    weights[rows] = 0
    inverse[rows] = 0
    inverse[:, rows] = 0
