"""MC-Suite's criteria of gradients: EGS, EGE, EGO, EGN. All from one pass forward and backward.

``G_e`` is the gradient of the mean next-token loss over all calibration tokens (of questions: over
the tokens of their answers) with respect to the weights of expert ``e`` (gate where there is one,
up, down; never biases). The paper reuses the names of the activation criteria for these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_moe.criteria.base import GradientCriterion
from lit_moe.criteria.direction import Directed, Extreme
from lit_moe.criteria.mc_activations import check_eps, entropy
from lit_moe.criteria.registry import register
from lit_moe.stats.gradient_stats import GradientStats
from lit_moe.stats.matrices import cosines


@register("egs")
@dataclass(frozen=True)
class EGS(Directed, GradientCriterion):
    """Expert gradient similarity: ``m_e = sum_{q != e} cos(G_e, G_q)``; the LARGEST goes first.

    Source: MC-Suite (arXiv 2504.05586), whose text does not state the better direction; taken
    from its twin EWS. An expert without a gradient resembles none.
    """

    drops: ClassVar[Extreme] = "largest"

    def layer_scores(self, stats: GradientStats) -> Tensor:
        """Return the (signed) sums of cosines."""
        return self.oriented(cosines(stats.gram).fill_diagonal_(0.0).sum(dim=1))


@register("ege")
@dataclass(frozen=True)
class EGE(Directed, GradientCriterion):
    """Expert gradient entropy: ``m_e = sum_j log(sigma_j(G_e) + eps)``; the SMALLEST goes first.

    ``sigma_j`` is the (population) standard deviation of the entries of ``G_e`` that belong to
    hidden dimension ``j``: of row ``j`` of ``[gate^T, up^T, down]``.

    Source: MC-Suite (arXiv 2504.05586, table 1 and figure 14), its best criterion of gradients.
    Which matrices, and ``eps``, are ours.

    Attributes:
        eps: above 0, far below any deviation that matters; gradients of a mean loss are small.
    """

    drops: ClassVar[Extreme] = "smallest"

    eps: float = 1e-20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eps(self.name, self.eps)

    def layer_scores(self, stats: GradientStats) -> Tensor:
        """Return the (signed) sums of logarithms."""
        return self.oriented(entropy(stats.deviation, self.eps))


@register("ego")
@dataclass(frozen=True)
class EGO(Directed, GradientCriterion):
    """Expert gradient outliers: how many entries of ``G_e`` stand out; the SMALLEST goes first.

    An entry stands out if it is further from the mean of its row (one neuron's H weights) than 3
    standard deviations of that row, as in EAO.

    Source: MC-Suite (arXiv 2504.05586), whose text does not state the better direction; taken
    from its twin EAO.
    """

    drops: ClassVar[Extreme] = "smallest"

    def layer_scores(self, stats: GradientStats) -> Tensor:
        """Return the (signed) numbers of outliers."""
        return self.oriented(stats.outlier_count)


@register("egn")
@dataclass(frozen=True)
class EGN(Directed, GradientCriterion):
    """Expert gradient norm: ``m_e = ||G_e||_2``; the SMALLEST goes first.

    Source: MC-Suite (arXiv 2504.05586), whose text does not state the better direction: what the
    loss does not depend on can go.
    """

    drops: ClassVar[Extreme] = "smallest"

    def layer_scores(self, stats: GradientStats) -> Tensor:
        """Return the (signed) norms."""
        return self.oriented(stats.gram.diagonal().sqrt())
