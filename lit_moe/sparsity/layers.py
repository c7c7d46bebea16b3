"""One layer: from the matrices of its experts and sums over their inputs to what stays.

E experts, O outputs (rows), D inputs (columns) of a matrix.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor

from lit_moe.adapters.site import MoESite
from lit_moe.errors import CalibrationError
from lit_moe.sparsity.moments import InputMoments
from lit_moe.sparsity.options import SparsityOptions
from lit_moe.sparsity.patterns import Pattern
from lit_moe.sparsity.sparsegpt import sparsegpt

MATRICES = ("gate", "up", "down")
_CACHED = 2**16
"""Weights that are scored at once: a quarter of a megabyte in float32."""
_FACTOR_BYTES = 2**31
"""Experts are factored together as long as their matrices of products stay below this."""


@dataclass(frozen=True)
class ThinnedLayer:
    """What was decided for one layer.

    Attributes:
        keep: matrix -> True where a weight stays, shape ``(E, O, D)``.
        weights: matrix -> new weights, for methods that change those that stay.
        unrouted: experts that saw no token.
    """

    keep: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    unrouted: tuple[int, ...] = ()


def check_widths(site: MoESite, weights: dict[str, Tensor], pattern: Pattern) -> None:
    """Refuse a pattern that the matrices of a layer cannot bear.

    Raises:
        LitMoEError: naming layer, matrix and numbers.
    """
    for name in matrices_of(weights):
        pattern.check(weights[name].shape[-1], f"the {name} projections of {site.name}")


def matrices_of(weights: dict[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the matrices that a layer has; biases are never pruned."""
    return tuple(name for name in MATRICES if name in weights)


@torch.no_grad()
def thin_layer(
    name: str,
    weights: dict[str, Tensor],
    moments: InputMoments | None,
    options: SparsityOptions,
    pattern: Pattern | None = None,
) -> ThinnedLayer:
    """Decide which weights of one layer stay; changes nothing.

    Args:
        name: of the layer.
        weights: its matrices, see ``MoEAdapter.expert_weights``.
        moments: of the kind that the method needs; None for ``magnitude``.
        options: method and rules.
        pattern: instead of that of the options, on the way to it.

    Raises:
        CalibrationError: for experts without tokens under ``unrouted: error``.
    """
    pattern = pattern or options.parsed
    unrouted = () if moments is None else moments.unrouted()
    if unrouted and options.unrouted == "error":
        raise CalibrationError(
            f"experts {list(unrouted)} of {name} saw no calibration token; give more text, or "
            "unrouted: magnitude (by weight size alone) or keep (all their weights)"
        )
    routed = [e for e in range(len(weights["down"])) if e not in unrouted]
    keep, changed = {}, {}
    for matrix in matrices_of(weights):
        rest_keeps = partial(_unrouted_rows, weights[matrix], pattern, options)
        if options.method == "sparsegpt" and moments is not None and routed:
            new, kept = _fitted(weights[matrix], moments.of(matrix), pattern, routed)
            changed[matrix] = new
        else:
            kept = _scored(weights[matrix], moments, matrix, pattern, routed)
        for expert in unrouted:
            kept[expert] = rest_keeps(expert)
        keep[matrix] = kept
        if matrix in changed:
            changed[matrix].masked_fill_(~kept, 0.0)
    return ThinnedLayer(keep, changed, unrouted)


def score_by_inputs(weight_OD: Tensor, squares_D: Tensor) -> Tensor:
    """Return ``|W_ij| sqrt(sum of (c x_j)^2)``.

    With ``c = 1`` it is the score of Wanda (arXiv 2306.11695), with the routing weight of each
    token that of MoE-Pruner (arXiv 2410.12013, equation 9).

    Args:
        weight_OD: one matrix of one expert.
        squares_D: sums over its tokens.
    """
    norms_D = squares_D.sqrt().to(weight_OD.device, _precision(weight_OD))
    return _size(weight_OD).mul_(norms_D)


def _scored(
    weight_EOD: Tensor,
    moments: InputMoments | None,
    matrix: str,
    pattern: Pattern,
    routed: list[int],
) -> Tensor:
    """Some rows of one expert at a time, which stay in the cache; not filled for the unrouted.

    Blocks are spread over as many threads as torch may use: numpy, which selects, has one each.
    """
    weight_EOD = weight_EOD.detach()  # threads have gradients on
    keep = torch.empty(weight_EOD.shape, dtype=torch.bool, device=weight_EOD.device)
    at_once = max(1, _CACHED // weight_EOD.shape[2])

    def fill(block: tuple[int, int]) -> None:
        expert, start = block
        squares_D = None if moments is None else moments.of(matrix)[expert]
        rows = slice(start, start + at_once)
        keep[expert, rows] = pattern.keep(_scores(weight_EOD[expert, rows], squares_D))

    blocks = list(product(routed, range(0, weight_EOD.shape[1], at_once)))
    if not weight_EOD.is_cpu or torch.get_num_threads() == 1:
        for block in blocks:
            fill(block)
        return keep
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(fill, blocks))
    return keep


def _scores(weight_OD: Tensor, squares_D: Tensor | None) -> Tensor:
    return _size(weight_OD) if squares_D is None else score_by_inputs(weight_OD, squares_D)


def _fitted(
    weight_EOD: Tensor, products_EDD: Tensor, pattern: Pattern, routed: list[int]
) -> tuple[Tensor, Tensor]:
    new, keep = weight_EOD.detach().clone(), torch.ones_like(weight_EOD, dtype=torch.bool)
    at_once = max(1, _FACTOR_BYTES // (8 * 4 * products_EDD.shape[1] ** 2))
    for start in range(0, len(routed), at_once):
        some = routed[start : start + at_once]
        new[some], keep[some] = sparsegpt(weight_EOD[some], products_EDD[some], pattern)
    return new, keep


def _unrouted_rows(
    weight_EOD: Tensor, pattern: Pattern, options: SparsityOptions, expert: int
) -> Tensor:
    if options.unrouted == "keep":
        return torch.ones_like(weight_EOD[expert], dtype=torch.bool)
    return pattern.keep(_size(weight_EOD[expert]))


def _size(weight: Tensor) -> Tensor:
    return weight.detach().to(_precision(weight)).abs().contiguous()


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
