"""Cholesky factorisation by panels: the speed of matrix products where LAPACK's has not.

On CPUs LAPACK's factorisation reaches a fraction of the speed of a product of the same size. Here
all but the diagonal blocks is products: panels are brought up to date from the left, and inverses
of the diagonal blocks stand in for triangular solves. On GPUs the library's own is taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 96
_GAP = 16
"""Numbers between rows: rows a power of two apart would share their places in the cache."""
_SMALLEST = 512
"""Below this many rows the library is as fast."""


class Factor:
    """The lower Cholesky factor of a symmetric positive definite matrix.

    Attributes:
        is_definite: whether there is one in this precision; nothing can be solved otherwise.
    """

    def __init__(self, matrix_NN: Tensor) -> None:
        self._by_panels = matrix_NN.device.type == "cpu" and len(matrix_NN) >= _SMALLEST
        self._inverses: list[Tensor] = []
        if self._by_panels:
            size = len(matrix_NN)
            self._lower = matrix_NN.new_empty(size, size + _GAP)[:, :size].copy_(matrix_NN)
            self.is_definite = self._factorise()
        else:
            self._lower, info = torch.linalg.cholesky_ex(matrix_NN)
            self.is_definite = not bool(info.any()) and bool(self._lower.isfinite().all())

    def solve(self, right_NH: Tensor) -> Tensor:
        """Return the solution for each column, same shape."""
        assert self.is_definite
        if not self._by_panels:
            return torch.cholesky_solve(right_NH, self._lower)
        solution = right_NH.clone()
        panels = list(self._panels())
        for (begin, end), inverse in zip(panels, self._inverses, strict=True):
            if begin:
                solution[begin:end].addmm_(
                    self._lower[begin:end, :begin], solution[:begin], alpha=-1
                )
            solution[begin:end] = inverse @ solution[begin:end]
        for (begin, end), inverse in zip(reversed(panels), reversed(self._inverses), strict=True):
            below = self._lower[end:, begin:end]
            solution[begin:end].addmm_(below.T, solution[end:], alpha=-1)
            solution[begin:end] = inverse.T @ solution[begin:end]
        return solution

    def _panels(self) -> Iterator[tuple[int, int]]:
        size = len(self._lower)
        return ((begin, min(begin + PANEL, size)) for begin in range(0, size, PANEL))

    def _factorise(self) -> bool:
        lower = self._lower
        unit = torch.eye(PANEL, dtype=lower.dtype)
        scratch = lower.new_empty(len(lower), PANEL)
        for begin, end in self._panels():
            panel = lower[begin:, begin:end]
            if begin:
                panel.addmm_(lower[begin:, :begin], lower[begin:end, :begin].T, alpha=-1)
            width = end - begin
            block, info = torch.linalg.cholesky_ex(panel[:width])
            # Rows that are not finite end in diagonals that are not.
            if bool(info) or not bool(block.diagonal().isfinite().all()):
                return False
            inverse = torch.linalg.solve_triangular(block, unit[:width, :width], upper=False)
            panel[:width] = block
            below = panel[width:]
            below.copy_(torch.mm(below, inverse.T, out=scratch[: len(below), :width]))
            self._inverses.append(inverse)
        return bool(lower[-1].isfinite().all())
