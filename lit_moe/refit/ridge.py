"""Ridge regressions on expert features, and the choice of the penalty on held-out tokens.

``min || r - sum_e psi_e dW_e ||^2 + lam m ||dW||^2`` with ``m`` the mean diagonal of the Gram
matrix, so that ``lam`` has no unit. Solved jointly over all experts by one Cholesky factorisation,
or expert by expert, damped (block Jacobi).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_moe.errors import LitMoEError
from lit_moe.refit.factor import Factor
from lit_moe.stats.grams import Gram

STEP = math.sqrt(10.0)
"""Ratio of neighbouring penalties that are tried."""
SMALLEST, LARGEST = 1e-6, 1e4


class SingularGramError(LitMoEError):
    """A system that has no unique solution in this precision; a larger penalty helps."""


def solve_joint(gram: Gram, lam: float) -> Tensor:
    """Return the minimiser over all experts together, shape ``(E, D, H)``, in the Gram's dtype.

    Raises:
        SingularGramError: if the penalised matrix is singular.
    """
    shape = gram.cross.shape
    factor = penalised(gram.matrix, lam, gram.mean_diagonal)
    return factor.solve(gram.cross.reshape(-1, shape[-1])).reshape(shape)


def solve_jacobi(gram: Gram, lam: float, damping: float) -> Tensor:
    """Return each expert's own minimiser times ``damping``, shape ``(E, D, H)``.

    Experts that act together correct the same residual, so ``damping`` should be one over the
    experts per token.

    Raises:
        SingularGramError: if a penalised block is singular.
    """
    unit = gram.mean_diagonal
    blocks = zip(gram.blocks, gram.cross, strict=True)
    solved = [penalised(block, lam, unit).solve(right) for block, right in blocks]
    return torch.stack(solved) * damping


def choose_penalty(loss: Callable[[float], float], *, start: float = 1e-2) -> float:
    """Return the penalty with the least held-out loss, by walking downhill from ``start``.

    The loss is a smooth function of the penalty with one valley in practice; it is evaluated at
    powers of ``sqrt(10)``, each once; infinite where a system is singular.

    >>> round(choose_penalty(lambda lam: abs(math.log10(lam))), 6)
    1.0
    """
    best, best_loss = start, loss(start)
    while best_loss == math.inf and best * STEP <= LARGEST:  # singular: only more helps
        best *= STEP
        best_loss = loss(best)
    for factor in (STEP, 1 / STEP):
        lam = best * factor
        moved = False
        while SMALLEST <= lam <= LARGEST and (value := loss(lam)) < best_loss:
            best, best_loss, lam, moved = lam, value, lam * factor, True
        if moved:
            break
    return best


def penalised(matrix: Tensor, lam: float, unit: float) -> Factor:
    """Return the factor of ``matrix + lam unit I``, shape ``(N, N)``.

    The diagonal is changed in place and put back, so that memory holds no second copy.

    Raises:
        SingularGramError: if the sum is singular.
    """
    diagonal = matrix.diagonal()
    own = diagonal.clone()
    # Features that no token ever had have zero rows; the tiny addition keeps their solution at 0.
    diagonal += lam * unit + (own == 0).to(own) * (unit or 1.0)
    factor = Factor(matrix)
    diagonal.copy_(own)
    if not factor.is_definite:
        raise SingularGramError(
            f"the Gram matrix of {len(own)} features is singular with lam={lam:g}: give a larger "
            "lam, more calibration tokens, or lam: auto"
        )
    return factor
