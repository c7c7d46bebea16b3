"""SparseGPT: prune by what a least-squares fit loses, and let the other weights make up for it.

Frantar and Alistarh, arXiv 2301.00774. With ``H = X^T X`` of one expert's inputs, a row ``w`` of
its matrix loses ``w_j^2 / [H_j^-1]_00`` when weight j goes and all later ones adapt, where ``H_j``
is ``H`` without the columns before j. Columns are visited in order; those before stay as they are.

E experts, O outputs, D inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_moe.errors import CalibrationError
from lit_moe.sparsity.patterns import Pattern

DAMPING = 0.01
"""Added to the diagonal, as a fraction of its mean."""
_BLOCK = 128
"""Columns whose updates of all later columns are done as one product."""


def sparsegpt(weight_EOD: Tensor, products_EDD: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return the pruned and corrected matrices of several experts, and what stays.

    Args:
        weight_EOD: matrices, any float dtype.
        products_EDD: sums over tokens of inputs times inputs; not all zero for any expert.
        pattern: the budget.

    Returns:
        Weights of shape ``(E, O, D)`` in the given dtype, exactly 0 where pruned, and a boolean
        tensor, True where a weight stays.

    Raises:
        CalibrationError: if an expert's products have no Cholesky factor.
    """
    work = weight_EOD.detach().to(torch.float64, copy=True)
    keep = torch.ones_like(work, dtype=torch.bool)
    factor = _inverse_factor(products_EDD)
    width = work.shape[2]
    size = max(_BLOCK // pattern.columns() * pattern.columns(), pattern.columns())
    for start in range(0, width, size):
        stop = min(start + size, width)
        block = slice(start, stop)
        errors = _prune_block(work, keep, factor, pattern, block)
        work[:, :, stop:] -= errors @ factor[:, block, stop:]
    return work.masked_fill_(~keep, 0.0).to(weight_EOD.dtype), keep


def _prune_block(
    work: Tensor, keep: Tensor, factor: Tensor, pattern: Pattern, block: slice
) -> Tensor:
    """Decide on one block of columns, in place; return the errors that later columns bear."""
    inner = factor[:, block, block]
    diagonal = inner.diagonal(dim1=1, dim2=2)
    weights = work[:, :, block]
    errors = torch.zeros_like(weights)
    for column in range(weights.shape[2]):
        if column % pattern.columns() == 0:
            ahead = slice(column, column + pattern.columns())
            scores = (weights[:, :, ahead] / diagonal[:, None, ahead]).square()
            kept = pattern.keep_columns(scores, block.start + column, work.shape[2])
            keep[:, :, block][:, :, ahead] = kept
        lost = weights[:, :, column].masked_fill(keep[:, :, block][:, :, column], 0.0)
        error = lost / diagonal[:, column, None]
        weights[:, :, column:] -= error[:, :, None] * inner[:, None, column, column:]
        errors[:, :, column] = error
    return errors


def _inverse_factor(products_EDD: Tensor) -> Tensor:
    """Return upper ``U`` with ``U^T U`` the inverse of the damped products, float64.

    Squares of its diagonal are ``[H_j^-1]_00``, its rows over them those of ``H_j^-1``.
    """
    damped = products_EDD.to(torch.float64, copy=True)
    mean_E = damped.diagonal(dim1=1, dim2=2).mean(dim=1)
    damped.diagonal(dim1=1, dim2=2).add_(DAMPING * mean_E[:, None])
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        raise CalibrationError(
            "products of expert inputs are not positive definite, so that SparseGPT has no "
            "inverse; give more calibration tokens or use method: moe_pruner"
        )
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)
