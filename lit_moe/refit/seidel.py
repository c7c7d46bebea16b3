"""Gauss-Seidel over experts: the joint minimiser without the joint Gram matrix.

Each step re-fits one expert to what all others leave over. The residual of every token is kept up
to date, so nothing between two experts is ever stored; the sweeps converge to the joint solution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_moe.refit.collective import all_sum, from_first
from lit_moe.refit.masked import solve_masked
from lit_moe.refit.ridge import penalised
from lit_moe.stats.grams import Piece

MAX_SWEEPS = 30
TOLERANCE = 1e-4


class GaussSeidel:
    """Sweeps over the experts of one layer. Collective: every rank holds its share of the tokens.

    Attributes:
        sweeps: of the last solve.
        converged: whether the last one changed the solution by less than 1e-4 of its norm.

    Args:
        pieces: all tokens of the fit; every sweep passes over them.
        shape: ``(E, D, H)`` of the solution.
        keep_blocks: hold the Gram matrix of every expert; else they are made again in each sweep.
        support_EDH: where the down projections may change; None for everywhere.
        dtype: of the sums and factors.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        shape: tuple[int, int, int],
        *,
        keep_blocks: bool,
        support_EDH: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._pieces, self._support, self._keep = pieces, support_EDH, keep_blocks
        device = pieces[0].residual.device
        self._solution = torch.zeros(shape, dtype=dtype, device=device)
        self._blocks: dict[int, Tensor] = {}
        self.unit = self._mean_diagonal()
        self.sweeps, self.converged = 0, False

    def solve(self, lam: float) -> Tensor:
        """Return the minimiser, shape ``(E, D, H)``; starts from the last one."""
        residuals = [p.residual - p.predict(self._solution) for p in self._pieces]
        self.converged = False
        for sweep in range(MAX_SWEEPS):
            self.sweeps = sweep + 1
            before = self._solution.clone()
            for expert in range(len(self._solution)):
                self._step(expert, lam, residuals)
            change = (self._solution - before).norm() / self._solution.norm().clamp(min=1e-30)
            if float(from_first(change)) < TOLERANCE:
                self.converged = True
                break
        return self._solution.clone()

    def _step(self, expert: int, lam: float, residuals: list[Tensor]) -> None:
        block, penalty = self._block(expert), lam * self.unit
        right = self._pull(expert, residuals) - penalty * self._solution[expert]
        if self._support is None:
            step = penalised(block, lam, self.unit).solve(right)
        else:
            support = self._support[expert]
            step = solve_masked(block, right, penalty, support, tolerance=1e-6)
        self._solution[expert] += step
        for piece, residual in zip(self._pieces, residuals, strict=True):
            tokens, features = piece.of_expert(expert)
            residual.index_add_(0, tokens, features @ step.to(features.dtype), alpha=-1)

    def _pull(self, expert: int, residuals: list[Tensor]) -> Tensor:
        """Return ``psi_e^T r`` of the present residual, shape ``(D, H)``."""
        total = torch.zeros_like(self._solution[expert])
        for piece, residual in zip(self._pieces, residuals, strict=True):
            tokens, features = piece.of_expert(expert)
            total += features.T @ (residual[tokens] * piece.fit[tokens][:, None])
        return all_sum(total)

    def _block(self, expert: int) -> Tensor:
        """Return ``psi_e^T psi_e``, shape ``(D, D)``."""
        if expert in self._blocks:
            return self._blocks[expert]
        width = self._solution.shape[1]
        block = self._solution.new_zeros(width, width)
        for piece in self._pieces:
            tokens, features = piece.of_expert(expert)
            block += features.T @ (features * piece.fit[tokens][:, None])
        block = all_sum(block)
        if self._keep:
            self._blocks[expert] = block
        return block

    def _mean_diagonal(self) -> float:
        total = torch.zeros_like(self._solution[:, :, 0])
        for piece in self._pieces:
            for expert, tokens, features in piece.by_expert():
                total[expert] += (features.square() * piece.fit[tokens][:, None]).sum(0)
        seen = all_sum(total)
        seen = seen[seen > 0]
        return float(seen.mean()) if len(seen) else 0.0
