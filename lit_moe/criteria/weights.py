"""What the weights alone say: no data, no forward pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoEAdapter, adapter_for
from lit_moe.adapters.site import MoESite
from lit_moe.criteria.base import Criterion, Evidence, Need
from lit_moe.criteria.direction import Extreme
from lit_moe.criteria.registry import register
from lit_moe.errors import LitMoEError
from lit_moe.sharding.partitions import gathered
from lit_moe.stats.matrices import CHUNK, matrices_of


class WeightCriterion(Criterion):
    """A criterion that reads the parameters of one layer at a time."""

    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})

    @abstractmethod
    def layer_scores(self, adapter: MoEAdapter, model: PreTrainedModel, site: MoESite) -> Tensor:
        """Return the scores of one layer, shape ``(E,)``, float64."""

    @torch.no_grad()
    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Score each layer by itself; see :meth:`Criterion.scores`."""
        model = evidence.require_model(self.name)
        adapter = adapter_for(model.config)
        found = {}
        for site in evidence.sites:
            with gathered(model.get_submodule(site.name)):
                found[site.name] = self.layer_scores(adapter, model, site).cpu()
        return found


@register("weight_norm")
@dataclass(frozen=True)
class WeightNorm(WeightCriterion):
    """Frobenius norm over all matrices of the expert: ``s_e = sqrt(sum_W ||W_e||_F^2)``.

    ``W`` runs over the gate (if there is one), up and down matrices; biases do not count.

    Source: EWN of MC-Suite (arXiv 2504.05586), which does not state the better extreme.

    Attributes:
        keep: which extreme to keep. ``largest`` by default: as in magnitude pruning, an expert
            with small weights writes little into the residual stream.
    """

    keep: Extreme = "largest"

    def __post_init__(self) -> None:
        _check_extreme(self.name, self.keep)

    def layer_scores(self, adapter: MoEAdapter, model: PreTrainedModel, site: MoESite) -> Tensor:
        """Return the (signed) norms."""
        return _signed(frobenius_norms(adapter.expert_weights(model, site)), self.keep)


@register("router_norm")
@dataclass(frozen=True)
class RouterNorm(WeightCriterion):
    """Norm of the expert's row of the router: ``||W_r[e, :]||_2``.

    Source: RWN of MC-Suite (arXiv 2504.05586, table 1), which found, as the best of its
    weight-only criteria, that the expert with the LARGEST norm should be dropped first.

    Attributes:
        keep: which extreme to keep; ``smallest`` by default, as the paper found.
    """

    keep: Extreme = "smallest"

    def __post_init__(self) -> None:
        _check_extreme(self.name, self.keep)

    def layer_scores(self, adapter: MoEAdapter, model: PreTrainedModel, site: MoESite) -> Tensor:
        """Return the (signed) norms."""
        rows = adapter.router_weight(model, site).double()
        return _signed(torch.linalg.vector_norm(rows, dim=1), self.keep)


@register("aimer")
@dataclass(frozen=True)
class AIMER(WeightCriterion):
    """Minus the absolute mean over the root mean square of the expert's weights.

    ``s_e = -(P / N) / sqrt(Q / N) = -P / sqrt(N Q)`` with ``N`` the number of weights in the gate,
    up and down matrices together, ``P`` the sum of their absolute values and ``Q`` of their
    squares. The ratio is 1 if all weights have the same size and falls as they concentrate in
    few; the paper drops the experts with the HIGHEST ratio, hence the minus.

    Source: Liu et al., arXiv 2603.18492, equation 4.
    """

    def layer_scores(self, adapter: MoEAdapter, model: PreTrainedModel, site: MoESite) -> Tensor:
        """Return minus the ratio, in [-1, 0]."""
        return -mean_over_rms(adapter.expert_weights(model, site))


def frobenius_norms(weights: Mapping[str, Tensor]) -> Tensor:
    """Return the Frobenius norm of each expert over its matrices, shape ``(E,)``, float64.

    Args:
        weights: any of ``gate``, ``up``, ``down``, each ``(E, ., .)``; other keys are ignored.

    >>> frobenius_norms({"up": torch.tensor([[[3.0]]]), "down": torch.tensor([[[4.0]]])})
    tensor([5.], dtype=torch.float64)
    """
    return _sums(weights)[1].sqrt()


def mean_over_rms(weights: Mapping[str, Tensor]) -> Tensor:
    """Return mean absolute weight over root mean square weight per expert, ``(E,)``, float64.

    Args:
        weights: as for :func:`frobenius_norms`. An expert of zeros gets 1, as if all were equal.
    """
    absolute, square, num = _sums(weights)
    ratio = absolute / (num * square).sqrt()
    return torch.where(square > 0, ratio, torch.ones_like(ratio))


def _sums(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """Return sum of |w| ``(E,)``, sum of w^2 ``(E,)`` and the number of weights of one expert."""
    matrices = matrices_of(weights)
    absolute = torch.zeros(len(matrices[0]), dtype=torch.float64, device=matrices[0].device)
    square = torch.zeros_like(absolute)
    for matrix in matrices:
        for e, expert in enumerate(matrix):
            for chunk in expert.reshape(-1).split(CHUNK):
                absolute[e] += chunk.double().abs().sum()
                square[e] += chunk.double().square().sum()
    return absolute, square, sum(matrix[0].numel() for matrix in matrices)


def _signed(norms: Tensor, keep: Extreme) -> Tensor:
    return norms if keep == "largest" else -norms


def _check_extreme(name: str, keep: str) -> None:
    if keep not in ("largest", "smallest"):
        raise LitMoEError(f"{name}: keep={keep!r} is unknown; use 'largest' or 'smallest'")
