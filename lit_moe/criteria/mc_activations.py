"""MC-Suite's criteria of activations: EAS, EAE, EAO, EAN. All from one observed pass.

``A_e`` in R^{T_e x H} are the raw outputs of expert ``e`` (before the routing weight) on the
``T_e`` tokens that the model routed to it. None of it is stored: sums over tokens suffice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_moe.criteria.base import Need, RoutedCriterion
from lit_moe.criteria.direction import Directed, Extreme
from lit_moe.criteria.registry import register
from lit_moe.errors import LitMoEError
from lit_moe.stats.observation import LayerStats

_OUTPUTS: frozenset[Need] = frozenset({"routing", "outputs"})


@register("eas")
@dataclass(frozen=True)
class EAS(Directed, RoutedCriterion):
    """Expert activation similarity: how alike outputs are to those of others; LARGEST goes first.

    ``S_pq = mean over a in A_p, b in A_q of cos(a, b)``, ``m_p = sum_{q != p} S_pq``. The mean of
    cosines is the inner product of the mean directions ``u_e = 1/T_e sum_{a in A_e} a / ||a||``,
    so only those are kept. An expert without tokens resembles none.

    Source: MC-Suite (arXiv 2504.05586), direction from figure 12.
    """

    needs: ClassVar[frozenset[Need]] = _OUTPUTS
    drops: ClassVar[Extreme] = "largest"

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the (signed) sums of similarities."""
        directions = self.require(stats.direction_sum, "outputs")
        mean_EH = directions / stats.count.double().clamp(min=1.0)[:, None]
        similar_EE = (mean_EH @ mean_EH.T).fill_diagonal_(0.0)
        return self.oriented(similar_EE.sum(dim=1))


@register("eae")
@dataclass(frozen=True)
class EAE(Directed, RoutedCriterion):
    """Expert activation entropy: ``m_e = sum_j log(sigma_j(A_e) + eps)``; SMALLEST goes first.

    ``sigma_j`` is the (population) standard deviation over tokens of output dimension ``j``. With
    fewer than 2 tokens it is 0 in all dimensions, which ``eps`` makes the least there can be.

    Source: MC-Suite (arXiv 2504.05586), direction from figure 13; ``eps`` is ours.

    Attributes:
        eps: above 0, far below any deviation that matters.
    """

    needs: ClassVar[frozenset[Need]] = _OUTPUTS
    drops: ClassVar[Extreme] = "smallest"

    eps: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eps(self.name, self.eps)

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the (signed) sums of logarithms."""
        count_E1 = stats.count.double().clamp(min=1.0)[:, None]
        mean_EH = self.require(stats.output_sum, "outputs") / count_E1
        square_EH = self.require(stats.output_square_sum, "outputs") / count_E1
        variance_EH = (square_EH - mean_EH.square()).clamp(min=0.0)
        variance_EH = torch.where(stats.count[:, None] < 2, 0.0, variance_EH)
        return self.oriented(entropy(variance_EH.sqrt(), self.eps))


@register("eao")
@dataclass(frozen=True)
class EAO(Directed, RoutedCriterion):
    """Expert activation outliers: how many entries of ``A_e`` stand out; SMALLEST goes first.

    An entry stands out if it is further from the mean of its row (one token's output, over the
    hidden dimension) than 3 standard deviations of that row.

    Source: MC-Suite (arXiv 2504.05586), whose text does not state the better direction: experts
    with large single entries are the ones that models miss most (super-experts).
    """

    needs: ClassVar[frozenset[Need]] = _OUTPUTS
    drops: ClassVar[Extreme] = "smallest"

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the (signed) numbers of outliers."""
        return self.oriented(self.require(stats.outlier_count, "outputs"))


@register("ean")
@dataclass(frozen=True)
class EAN(Directed, RoutedCriterion):
    """Expert activation norm: ``m_e = sum_j ||A_e[:, j]||_2``; the SMALLEST goes first.

    l2 over tokens, then a sum over output dimensions; it grows with the square root of the tokens.
    Source: MC-Suite (arXiv 2504.05586, tables 1 and 2), its best criterion over all. ``ean_sum``
    is what REAP's comparison calls EAN: l2 over dimensions, then a sum over tokens.

    Attributes:
        per_token: divide by ``sqrt(T_e)``, so that usage does not count; not in the paper.
    """

    needs: ClassVar[frozenset[Need]] = _OUTPUTS
    drops: ClassVar[Extreme] = "smallest"

    per_token: bool = False

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the (signed) norms."""
        norms_E = self.require(stats.output_square_sum, "outputs").sqrt().sum(dim=1)
        if self.per_token:
            norms_E = norms_E / stats.count.double().clamp(min=1.0).sqrt()
        return self.oriented(norms_E)


def entropy(deviation_EH: Tensor, eps: float) -> Tensor:
    """Return ``sum_j log(sigma_j + eps)``, shape ``(E,)``: a Gaussian's entropy but for constants.

    >>> round(float(entropy(torch.tensor([[1.0, 10.0]]), 0.0)), 4)
    2.3026
    """
    return (deviation_EH + eps).log().sum(dim=1)


def check_eps(name: str, eps: float) -> None:
    """Refuse an ``eps`` that would leave the logarithm of 0.

    Raises:
        LitMoEError: if it is not above 0.
    """
    if not eps > 0:
        raise LitMoEError(f"{name}: eps={eps} must be above 0, such as 1e-12")
