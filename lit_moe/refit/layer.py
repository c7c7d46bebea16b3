"""The least-squares problem of one layer: collect tokens, choose a penalty, solve, judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_moe.errors import CalibrationError
from lit_moe.refit.collective import all_sum, from_first
from lit_moe.refit.masked import solve_masked
from lit_moe.refit.memory import LayerSize, SolverChoice
from lit_moe.refit.options import RefitOptions
from lit_moe.refit.report import LayerRefit
from lit_moe.refit.ridge import (
    SingularGramError,
    choose_penalty,
    solve_jacobi,
    solve_joint,
)
from lit_moe.refit.seidel import GaussSeidel
from lit_moe.refit.store import PieceStore
from lit_moe.stats.grams import Gram, Piece

Solve = Callable[[float], Tensor]

_MASKED = 1e-4
"""Residual of solutions with fixed zeros, relative to the right-hand side."""


@dataclass(frozen=True)
class Weights:
    """What is known of the weights to refit.

    Attributes:
        size: experts, features and hidden size.
        top_k: experts per token.
        support: where weights may change, shape ``(E, D, H)``; None for everywhere.
    """

    size: LayerSize
    top_k: int
    support: Tensor | None = None


class LayerProblem:
    """Collects the pieces of one layer and finds the update of its down projections.

    Args:
        weights: of the layer.
        choice: how to solve.
        options: penalty and budget.
        keep_all: keep all pieces, which are needed again where the refitted layer's output is;
            otherwise only what the solver and the held-out judgement need.
        folder: for features beyond the budget.
        at_once: problems that share the budget.
    """

    def __init__(
        self,
        weights: Weights,
        choice: SolverChoice,
        options: RefitOptions,
        *,
        keep_all: bool,
        folder: Path | None = None,
        at_once: int = 1,
    ) -> None:
        self._weights, self._choice, self._options = weights, choice, options
        self._keep_all = keep_all or choice.name == "gauss_seidel"
        self.pieces = PieceStore(options.feature_bytes // at_once, folder)
        self._gram: Gram | None = None
        self._sweeps: GaussSeidel | None = None
        self._rest = (0, True)
        self._target = torch.zeros(2, dtype=torch.float64)
        self._tokens = torch.zeros((), dtype=torch.float64)
        self._count = torch.zeros(weights.size.num_experts, dtype=torch.float64)

    def add(self, piece: Piece, target_TH: Tensor) -> None:
        """Add one batch; ``target_TH`` is what the residual is a part of, to report fractions."""
        energy_T = target_TH.float().square().sum(1)
        self._target += torch.stack([energy_T @ piece.fit, energy_T @ piece.held]).double().cpu()
        self._tokens += float((piece.fit > 0).sum())
        for expert, tokens, _ in piece.by_expert():
            self._count[expert] += float((piece.fit[tokens] > 0).sum())
        if self._choice.name != "gauss_seidel":
            self._sums(piece).add(piece)
        self.pieces.add(piece if self._keep_all else piece.held_out())

    def solve(self) -> tuple[Tensor | None, LayerRefit]:
        """Collective: return the update ``(E, D, H)``, None to leave the layer, and the record.

        Raises:
            CalibrationError: if activations are not finite.
            SingularGramError: if ``lam`` is given and too small.
        """
        target = all_sum(self._target)
        count = all_sum(self._count)
        held_before = self._energy(None, "held") / max(float(target[1]), 1e-30)
        record = LayerRefit(
            solver=self._choice.name,
            residual_before=self._fit_energy(None, float(target[0])),
            held_out_before=held_before,
            unrouted=[e for e, n in enumerate(count.tolist()) if n == 0],
            tokens=int(all_sum(self._tokens)),
            features=self._num_features(),
        )
        energy = self._energy(None, "fit") if self._keep_all else self._gram_energy()
        if not math.isfinite(energy + held_before):
            raise CalibrationError(
                "a layer's output is not finite on the calibration text, in the teacher or the "
                "student; look for overflow (float16?) or damaged weights"
            )
        if energy == 0:
            record.kept, record.reason = True, "nothing to correct"
            record.held_out_after, record.residual_after = held_before, record.residual_before
            return None, record
        try:
            update, record.lam, held = self._search(self._solver())
            record.sweeps, record.converged = self._rest
        except SingularGramError as error:
            if self._options.lam != "auto":
                raise
            record.reason = str(error)
            return None, record
        record.held_out_after = held / max(float(target[1]), 1e-30)
        record.residual_after = self._fit_energy(update, float(target[0]))
        record.kept = record.held_out_after < held_before
        if not record.kept:
            record.reason = (
                f"the residual on held-out tokens did not fall ({held_before:.4g} before, "
                f"{record.held_out_after:.4g} after)"
            )
        return (update if record.kept else None), record

    def _search(self, solve: Solve) -> tuple[Tensor, float, float]:
        """Return update, penalty and held-out energy at the best penalty."""
        if self._options.lam != "auto":
            update = from_first(solve(self._options.lam))
            self._note_rest()
            return update, self._options.lam, self._energy(update, "held")
        best: list[tuple[float, float, Tensor]] = []  # only one update is kept: it may be large

        def loss(lam: float) -> float:
            try:
                update = from_first(solve(lam))
            except SingularGramError:
                return math.inf
            energy = self._energy(update, "held")
            if not best or energy < best[0][0]:
                best[:] = [(energy, lam, update)]
                self._note_rest()
            return energy

        choose_penalty(loss)
        if not best:
            raise SingularGramError(
                "the Gram matrix is singular at every penalty that was tried; give more "
                "calibration tokens, or a lam above 1"
            )
        energy, lam, update = best[0]
        return update, lam, energy

    def _note_rest(self) -> None:
        """Remember how the sweeps of the best update ended."""
        if self._sweeps is not None:
            self._rest = self._sweeps.sweeps, self._sweeps.converged

    def _solver(self) -> Solve:
        choice, support = self._choice, self._weights.support
        if choice.name == "gauss_seidel":
            size = self._weights.size
            shape = (size.num_experts, size.width, size.hidden)
            self._sweeps = GaussSeidel(
                list(self.pieces),
                shape,
                keep_blocks=choice.keep_blocks,
                support_EDH=support,
                dtype=choice.dtype,
            )
            return self._sweeps.solve
        assert self._gram is not None
        gram = self._gram
        gram.reduce()
        damping = 1 / self._weights.top_k
        if support is not None:
            return _Masked(gram, support, damping)
        if choice.name == "joint":
            return lambda lam: solve_joint(gram, lam)
        return lambda lam: solve_jacobi(gram, lam, damping)

    def _num_features(self) -> int:
        size = self._weights.size
        alone = self._choice.name == "jacobi"
        return size.width if alone else size.num_experts * size.width

    def _sums(self, piece: Piece) -> Gram:
        if self._gram is None:
            size = self._weights.size
            self._gram = Gram(
                size.num_experts,
                size.width,
                size.hidden,
                joint=self._choice.name == "joint",
                device=piece.residual.device,
                dtype=self._choice.dtype,
            )
        return self._gram

    def _gram_energy(self) -> float:
        assert self._gram is not None
        return float(all_sum(self._gram.energy.clone()))

    def _fit_energy(self, update: Tensor | None, target: float) -> float | None:
        if not self._keep_all:
            return None if update is not None else self._gram_energy() / max(target, 1e-30)
        return self._energy(update, "fit") / max(target, 1e-30)

    def _energy(self, update: Tensor | None, part: str) -> float:
        """Return the weighted square residual that an update leaves, over all ranks."""
        total = torch.zeros((), dtype=torch.float64)
        for piece in self.pieces:
            total += _energy(piece, update, getattr(piece, part))
        return float(all_sum(total))


def _energy(piece: Piece, update: Tensor | None, weight_T: Tensor) -> float:
    if not bool((weight_T > 0).any()):
        return 0.0
    left = piece.residual if update is None else piece.residual - piece.predict(update)
    return float(left.square().sum(1).double() @ weight_T.double())


class _Masked:
    """Solves with fixed zeros; each penalty begins where the one before ended."""

    def __init__(self, gram: Gram, support_EDH: Tensor, damping: float) -> None:
        self._gram, self._support_EDH = gram, support_EDH
        self._damping = 1.0 if gram.joint else damping
        self._last: list[Tensor] | None = None

    def __call__(self, lam: float) -> Tensor:
        systems = list(self._systems())
        starts = [None] * len(systems) if self._last is None else self._last
        penalty = lam * self._gram.mean_diagonal
        self._last = [
            solve_masked(*system[:2], penalty, system[2], start_NH=start, tolerance=_MASKED)
            for system, start in zip(systems, starts, strict=True)
        ]
        return torch.stack(self._last).reshape(self._gram.cross.shape) * self._damping

    def _systems(self) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Return matrix, right-hand side and support of all experts together, or of each."""
        gram, support_EDH = self._gram, self._support_EDH
        if not gram.joint:
            return zip(gram.matrix, gram.cross, support_EDH, strict=True)
        right, support = (t.reshape(-1, t.shape[-1]) for t in (gram.cross, support_EDH))
        return [(gram.matrix, right, support)]
