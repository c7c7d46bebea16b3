"""How often, and how strongly, the router asks for an expert.

In all formulas ``T`` are the observed tokens (padding excluded), ``K(x)`` the experts that the
model chose for token ``x``, ``p_e(x)`` the router's probability of expert ``e`` over all experts,
and ``g_e(x)`` the weight that the model gave its output.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_moe.criteria.base import RoutedCriterion, routed_mean
from lit_moe.criteria.registry import register
from lit_moe.stats.observation import LayerStats


@register("frequency")
@dataclass(frozen=True)
class Frequency(RoutedCriterion):
    """Share of the tokens that are routed to the expert, in [0, 1].

    ``s_e = |{x : e in K(x)}| / T``

    Source: the usual baseline; "actual count" of SEER-MoE (Muzio et al., arXiv 2404.05089).
    """

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return tokens per expert over tokens."""
        return stats.count.double() / max(stats.tokens, 1)


@register("soft_count")
@dataclass(frozen=True)
class SoftCount(RoutedCriterion):
    """Router probability summed over ALL tokens, chosen or not.

    ``s_e = sum_x p_e(x)``

    Source: the soft counting of SEER-MoE (Muzio et al., arXiv 2404.05089).
    """

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the sum of probabilities."""
        return stats.probability_sum.double()


@register("gate_sum")
@dataclass(frozen=True)
class GateSum(RoutedCriterion):
    """Routing weight summed over the tokens that are routed to the expert.

    ``s_e = sum_{x : e in K(x)} g_e(x)``

    The weights are those that the model itself multiplies with: renormalised over the top-k and
    scaled where the model does so, never including a bias that only steers the selection.
    Known as weighted frequency in the code of REAP (Lasby et al., arXiv 2510.13999).
    """

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the sum of routing weights."""
        return stats.gate_sum.double()


@register("importance")
@dataclass(frozen=True)
class Importance(RoutedCriterion):
    """Share of the tokens times the exponential of the mean gate that they give the expert.

    ``s_e = |{x : e in K(x)}| / T * exp(mean_{x : e in K(x)} g_e(x))``

    The score of language-specific pruning (Koishekenov et al., arXiv 2212.09811), which counts only
    the tokens that choose the expert first; with one expert per token there is no difference.
    """

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return usage times confidence; 0 for an expert without tokens."""
        usage = stats.count.double() / max(stats.tokens, 1)
        return usage * routed_mean(stats.gate_sum, stats.count).exp()
