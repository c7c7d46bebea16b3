"""Ridge regression of down projections that have fixed zeros: row-wise masked least squares.

Each output row of a pruned down projection has its own support, so each is a least-squares problem
of its own. All rows are solved together by conjugate gradients on the supported entries, with the
Gram matrix applied once per iteration and its diagonal as preconditioner.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_ITERATIONS = 500
TOLERANCE = 1e-8


def solve_masked(
    matrix: Tensor,
    right_NH: Tensor,
    penalty: float,
    support_NH: Tensor,
    *,
    start_NH: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Return the minimiser that is zero outside the support, shape ``(N, H)``.

    Args:
        matrix: Gram matrix of the features, shape ``(N, N)``.
        right_NH: products of features and residual.
        penalty: added to the diagonal.
        support_NH: boolean; where the down projections may change.
        start_NH: a solution of a similar problem, zero outside the support, to begin with.
        tolerance: residual to reach, relative to the right-hand side of each column.
    """
    penalty = penalty or 1e-30
    diagonal = matrix.diagonal()[:, None] + penalty
    return conjugate_gradients(
        lambda x: (matrix @ x + penalty * x) * support_NH,
        right_NH * support_NH,
        diagonal,
        start_NH,
        tolerance,
    )


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    diagonal: Tensor,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Solve ``apply(x) = right`` for all columns at once, to a relative residual.

    Args:
        apply: a symmetric positive definite operator on each column, shape ``(N, H)``.
        right: right-hand sides, shape ``(N, H)``.
        diagonal: of the operator, shape ``(N, 1)``.
        start: to begin with; None for zeros.
        tolerance: of the norm of each column's residual, relative to its right-hand side.
    """
    x = torch.zeros_like(right) if start is None else start.clone()
    residual = right.clone() if start is None else right - apply(x)
    z = residual / diagonal
    direction = z.clone()
    rho = (residual * z).sum(-2, keepdim=True)
    goal = right.square().sum(-2, keepdim=True) * tolerance**2
    for _ in range(MAX_ITERATIONS):
        if bool((residual.square().sum(-2, keepdim=True) <= goal).all()):
            break
        applied = apply(direction)
        curvature = (direction * applied).sum(-2, keepdim=True)
        step = torch.where(curvature > 0, rho / curvature.clamp(min=1e-300), 0.0)
        x += step * direction
        residual -= step * applied
        z = residual / diagonal
        rho_next = (residual * z).sum(-2, keepdim=True)
        direction = z + torch.where(rho > 0, rho_next / rho.clamp(min=1e-300), 0.0) * direction
        rho = rho_next
    return x
