"""MC-Suite's criteria of weights: EWS, RWN, WSR, EWN. No data.

``W_e`` are the weights of expert ``e``. The paper does not say which of its matrices; here all of
them (gate where there is one, up, down; never biases), flattened and concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoEAdapter, adapter_for
from lit_moe.adapters.site import MoESite
from lit_moe.criteria.base import Evidence
from lit_moe.criteria.direction import Directed, Extreme
from lit_moe.criteria.registry import register
from lit_moe.criteria.weights import WeightCriterion, frobenius_norms
from lit_moe.sharding.partitions import gathered
from lit_moe.stats.matrices import cosines, gram_of_experts, matrices_of


@register("ews")
@dataclass(frozen=True)
class EWS(Directed, WeightCriterion):
    """Expert weight similarity: ``m_e = sum_{q != e} cos(W_e, W_q)``; the LARGEST is redundant.

    Source: MC-Suite (arXiv 2504.05586), direction from figure 15. An expert of zeros resembles
    none. Under a router mask only the experts that it leaves count as others.
    """

    drops: ClassVar[Extreme] = "largest"

    def layer_scores(self, adapter: MoEAdapter, model: PreTrainedModel, site: MoESite) -> Tensor:
        """Return the scores of a layer without a mask."""
        return self._among(adapter, model, site, tuple(range(site.num_experts)))

    @torch.no_grad()
    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Score each layer by itself; see :meth:`Criterion.scores`."""
        if evidence.alive is None:
            return super().scores(evidence)
        model = evidence.require_model(self.name)
        adapter = adapter_for(model.config)
        scores = {}
        for site in evidence.sites:
            with gathered(model.get_submodule(site.name)):
                alive = evidence.alive[site.name]
                scores[site.name] = self._among(adapter, model, site, alive).cpu()
        return scores

    def _among(
        self, adapter: MoEAdapter, model: PreTrainedModel, site: MoESite, alive: tuple[int, ...]
    ) -> Tensor:
        similar_EE = cosines(gram_of_experts(adapter.expert_weights(model, site)))
        others = similar_EE.clone().fill_diagonal_(0.0)[:, list(alive)]
        return self.oriented(others.sum(dim=1))


@register("rwn")
@dataclass(frozen=True)
class RWN(Directed, WeightCriterion):
    """Router weight norm: ``m_e = ||W_r[e, :]||_2``; the LARGEST goes first.

    Source: MC-Suite (arXiv 2504.05586, table 1), its best criterion of weights. The norm is over
    the hidden dimension ("dim=1" of a matrix written (hidden, experts) is a misprint). What
    ``router_norm`` with ``keep: smallest`` is.
    """

    drops: ClassVar[Extreme] = "largest"

    def layer_scores(self, adapter: MoEAdapter, model: PreTrainedModel, site: MoESite) -> Tensor:
        """Return the (signed) norms."""
        rows = adapter.router_weight(model, site).double()
        return self.oriented(torch.linalg.vector_norm(rows, dim=1))


@register("wsr")
@dataclass(frozen=True)
class WSR(Directed, WeightCriterion):
    """Stable rank: ``m_e`` is the mean over matrices of ``||W||_F^2 / sigma_1(W)^2``.

    The LARGEST goes first.

    Source: MC-Suite (arXiv 2504.05586, finding 4: dominant experts have lower stable rank). Stable
    ranks of the matrices are averaged, not taken of a concatenation; a matrix of zeros has 0. The
    largest singular value is exact, from the smaller Gram matrix of each matrix: for experts of
    4096 x 14336 that is minutes per layer on a CPU.
    """

    drops: ClassVar[Extreme] = "largest"

    def layer_scores(self, adapter: MoEAdapter, model: PreTrainedModel, site: MoESite) -> Tensor:
        """Return the (signed) mean stable ranks."""
        matrices = matrices_of(adapter.expert_weights(model, site))
        ranks = [torch.stack([stable_rank(expert) for expert in m]) for m in matrices]
        return self.oriented(torch.stack(ranks).mean(dim=0))


@register("ewn")
@dataclass(frozen=True)
class EWN(Directed, WeightCriterion):
    """Expert weight norm: ``m_e = ||W_e||_2``; the SMALLEST goes first.

    Source: MC-Suite (arXiv 2504.05586), whose text does not state the better direction: small
    weights write little into the residual stream. What ``weight_norm`` is.
    """

    drops: ClassVar[Extreme] = "smallest"

    def layer_scores(self, adapter: MoEAdapter, model: PreTrainedModel, site: MoESite) -> Tensor:
        """Return the (signed) norms."""
        return self.oriented(frobenius_norms(adapter.expert_weights(model, site)))


def stable_rank(matrix: Tensor) -> Tensor:
    """Return ``sum of sigma_i^2 / sigma_1^2``, between 1 and the rank, 0 for zeros; float64.

    >>> float(stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))))
    1.5
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    wide = tall.double()
    largest = torch.linalg.eigvalsh(wide.T @ wide)[-1]
    return torch.where(largest > 0, wide.square().sum() / largest, torch.zeros_like(largest))
