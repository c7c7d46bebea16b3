"""MC-Suite's criteria of inference: EUF, ECC, EVTC, ETS. All from one observed pass.

``K(x)`` are the experts that the model chose for token ``x``, ``T`` the tokens (padding excluded),
``V_e`` the distinct vocabulary ids of the tokens that expert ``e`` was sent, ``V`` the vocabulary.

ECC and ETS measure pairs. Of the extreme pair, the member that is used less goes, then the same
again among those that are left; the score is the place in this order (see ``ranks_by_pairs``).
Scores of different layers are places, not amounts: rank layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_moe.criteria.base import Need, RoutedCriterion
from lit_moe.criteria.direction import Directed, Extreme, ranks_by_pairs
from lit_moe.criteria.registry import register
from lit_moe.stats.observation import LayerStats


@register("euf")
@dataclass(frozen=True)
class EUF(Directed, RoutedCriterion):
    """Expert usage frequency: ``m_e = |{x : e in K(x)}| / T``; the SMALLEST goes first.

    Source: MC-Suite (arXiv 2504.05586, figure 9). What ``frequency`` is.
    """

    drops: ClassVar[Extreme] = "smallest"

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the (signed) share of the tokens."""
        return self.oriented(stats.count.double() / max(stats.tokens, 1))


@register("ecc")
@dataclass(frozen=True)
class ECC(Directed, RoutedCriterion):
    """Expert-expert collaboration: ``C_pq = |{x : p and q in K(x)}|``.

    A member of the pair with the LARGEST count goes first. Source: MC-Suite (arXiv 2504.05586,
    figure 10). With top-1 routing all counts are 0 and only the usage decides.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"routing", "pairs"})
    drops: ClassVar[Extreme] = "largest"

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the places in the order of going."""
        pairs = self.require(stats.pair_count, "pairs")
        return ranks_by_pairs(pairs, stats.count, self.first_to_go)


@register("evtc")
@dataclass(frozen=True)
class EVTC(Directed, RoutedCriterion):
    """Expert vocabulary coverage: ``m_e = |V_e| / |V|``; the SMALLEST goes first.

    Source: MC-Suite (arXiv 2504.05586, finding 3 and figure 8).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"routing", "vocabulary"})
    drops: ClassVar[Extreme] = "smallest"

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the (signed) share of the vocabulary."""
        overlap = self.require(stats.vocabulary_overlap, "vocabulary")
        size = self.require(stats.vocabulary_size, "vocabulary")
        return self.oriented(overlap.diagonal() / size)


@register("ets")
@dataclass(frozen=True)
class ETS(Directed, RoutedCriterion):
    """Expert input-token similarity: ``M_pq = |V_p intersected with V_q|``.

    A member of the pair with the LARGEST overlap goes first. Source: MC-Suite (arXiv 2504.05586,
    table 1 and figure 11), its best criterion of inference. The paper says "tokens"; positions
    would make it ECC for top-2 routing, so it is vocabulary ids here, each counted once.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"routing", "vocabulary"})
    drops: ClassVar[Extreme] = "largest"

    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the places in the order of going."""
        overlap = self.require(stats.vocabulary_overlap, "vocabulary")
        return ranks_by_pairs(overlap, stats.count, self.first_to_go)
