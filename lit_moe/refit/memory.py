"""What a refit will hold in memory, known beforehand, and which solver fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lit_moe import quantities
from lit_moe.errors import LitMoEError
from lit_moe.refit.options import RefitOptions

SolverName = Literal["joint", "jacobi", "gauss_seidel"]
_DTYPES = (torch.float64, torch.float32)


@dataclass(frozen=True)
class LayerSize:
    """The numbers that decide about memory.

    Attributes:
        num_experts: experts to refit.
        width: features per expert, with one for a bias.
        hidden: hidden size.
    """

    num_experts: int
    width: int
    hidden: int


@dataclass(frozen=True)
class SolverChoice:
    """A solver that fits.

    Attributes:
        name: of the solver.
        dtype: of Gram matrices and factors.
        keep_blocks: whether the matrices of all experts are held at once.
        bytes: held at most for one layer, without the features.
        reason: one clause for the log.
    """

    name: SolverName
    dtype: torch.dtype
    keep_blocks: bool
    bytes: int
    reason: str


def choose_solver(size: LayerSize, options: RefitOptions, *, at_once: int = 1) -> SolverChoice:
    """Return the solver to use for layers of one size.

    Half of the budget is for matrices.

    Args:
        size: of the largest layer.
        options: what was asked.
        at_once: layers whose sums are held at the same time (all of them in parallel mode).

    Raises:
        LitMoEError: if the budget cannot hold what the solver needs at least; names that number.
    """
    limit = options.matrix_bytes
    candidates: tuple[SolverName, ...] = ("joint", "gauss_seidel")
    if options.mode == "parallel":
        candidates = ("joint", "jacobi", "gauss_seidel")
    if options.solver != "auto":
        candidates = (options.solver,)
    for name in candidates:
        for keep in (True, False) if name == "gauss_seidel" else (True,):
            for dtype in _DTYPES:
                needed = _bytes(name, size, dtype, keep, at_once)
                if needed <= limit:
                    return SolverChoice(name, dtype, keep, needed, _reason(name, options, size))
    least = min(_bytes(n, size, torch.float32, False, at_once) for n in candidates)
    raise LitMoEError(
        f"memory_gib={options.memory_gib:g} leaves {quantities.size(limit)} for matrices, but "
        f"{' or '.join(candidates)} needs at least {quantities.size(least)} for {size.num_experts} "
        f"experts of width {size.width}: set memory_gib to {_rounded_up(2 * least / 2**30):g} or "
        "more"
    )


def _bytes(name: SolverName, size: LayerSize, dtype: torch.dtype, keep: bool, at_once: int) -> int:
    """Matrices and a factor, right-hand sides, the solution at hand and the best one."""
    block, side = size.width**2, size.num_experts * size.width * size.hidden
    if name == "joint":
        matrix = (size.num_experts * size.width) ** 2
        numbers = at_once * (matrix + side) + matrix + 2 * side
    elif name == "jacobi":
        numbers = at_once * (size.num_experts * block + side) + block + 2 * side
    else:
        numbers = (size.num_experts if keep else 1) * block + block + 4 * side
    return dtype.itemsize * numbers


def _rounded_up(number: float) -> float:
    """Return the next number with two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return float(f"{math.ceil(number / unit) * unit:.2g}")


def _reason(name: SolverName, options: RefitOptions, size: LayerSize) -> str:
    features = size.num_experts * size.width
    if options.solver != "auto":
        return "asked for"
    if name == "joint":
        return f"the matrix of all {features} features fits memory_gib={options.memory_gib:g}"
    return f"the matrix of all {features} features does not fit memory_gib={options.memory_gib:g}"
