"""How much an expert's output weighs.

In all formulas ``X_e`` are the tokens that the model routed to expert ``e``, ``f_e(x)`` the
expert's raw output (before the routing weight), ``g_e(x)`` that weight as the model applied it,
and norms are l2 over the hidden dimension. Sums and means pool all tokens of all batches: a mean
of batch means would be another criterion.

They factor into frequency, gate and activation strength (Liu et al., arXiv 2606.15716): sums
reward experts that are used often, which suits pruning for one task; means do not, which suits
pruning for no task in particular.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_moe.criteria.base import RoutedCriterion, routed_mean
from lit_moe.criteria.registry import register
from lit_moe.stats.observation import LayerStats


@register("ean_sum")
@dataclass(frozen=True)
class EANSum(RoutedCriterion):
    """Expert activation norm, summed: ``s_e = sum_{x in X_e} ||f_e(x)||``.

    Source: "EAN" as REAP's comparison uses it (Lasby et al., arXiv 2510.13999), after MC-Suite
    (Jaiswal et al., arXiv 2504.05586), whose own EAN takes l2 over tokens first.
    """

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the sum of output norms."""
        return stats.norm_sum.double()


@register("ean_mean")
@dataclass(frozen=True)
class EANMean(RoutedCriterion):
    """Expert activation norm, averaged: ``s_e = 1/|X_e| sum_{x in X_e} ||f_e(x)||``.

    0 for an expert without tokens. Source: REAP's comparison (Lasby et al., arXiv 2510.13999).
    """

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the mean output norm over the routed tokens."""
        return routed_mean(stats.norm_sum, stats.count)


@register("man")
@dataclass(frozen=True)
class MAN(EANMean):
    """Mean activation norm: the formula of ``ean_mean`` under its second published name.

    ``s_e = 1/|X_e| sum_{x in X_e} ||f_e(x)||``

    Source: Liu et al., arXiv 2606.15716.
    """


@register("msan")
@dataclass(frozen=True)
class MSAN(RoutedCriterion):
    """Mean squared activation norm: ``s_e = 1/|X_e| sum_{x in X_e} ||f_e(x)||^2``.

    0 for an expert without tokens. Source: Liu et al., arXiv 2606.15716.
    """

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the mean squared output norm over the routed tokens."""
        return routed_mean(stats.squared_norm_sum, stats.count)


@register("weighted_ean_sum")
@dataclass(frozen=True)
class WeightedEANSum(RoutedCriterion):
    """Gate-weighted activation norm, summed: ``s_e = sum_{x in X_e} g_e(x) ||f_e(x)||``.

    REAP without the division by ``|X_e|``. Source: the code of REAP (arXiv 2510.13999).
    """

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the sum of gate x norm."""
        return stats.weighted_norm_sum.double()


@register("reap")
@dataclass(frozen=True)
class REAP(RoutedCriterion):
    """Router-weighted expert activation: ``s_e = 1/|X_e| sum_{x in X_e} g_e(x) ||f_e(x)||``.

    The mean is over the tokens routed to the expert, not over all tokens; 0 if there are none.
    Source: Lasby et al., arXiv 2510.13999.
    """

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the mean of gate x norm over the routed tokens."""
        return routed_mean(stats.weighted_norm_sum, stats.count)
