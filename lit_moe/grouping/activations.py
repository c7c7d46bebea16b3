"""Orders of neurons by what they do on text, instead of by their weights.

T tokens, E experts, I expert width, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for
from lit_moe.grouping.coefficients import leaders_of
from lit_moe.inference import evaluating
from lit_moe.merge_plan import MergePlan
from lit_moe.stats.features import FeatureSlots, features_of

_TOKENS = 1024  # whose features are held at a time


def orders_by_activations(
    model: PreTrainedModel, site: MoESite, plan: MergePlan, hidden_TH: Tensor
) -> Tensor:
    """Return the order of each expert's neurons that correlates most with its leader's.

    Maximises the sum of the correlations of matched neurons over the tokens (a linear assignment),
    as Li et al. (arXiv 1511.07543) match networks. The leader is the member of a group with the
    largest coefficient; experts that are not averaged keep their order.

    Args:
        model: unmerged.
        site: one layer.
        plan: says which experts belong together.
        hidden_TH: tokens that all experts are asked about, whatever the router says.

    Returns:
        Shape ``(E, I)``, int64, on the CPU: ``[e, j]`` is the neuron that comes to place ``j``.
    """
    from scipy.optimize import linear_sum_assignment

    width = adapter_for(model.config).expert_weights(model, site)["up"].shape[1]
    orders_EI = torch.arange(width).repeat(site.num_experts, 1)
    leaders = leaders_of(plan.experts[site.name])
    with evaluating(model):
        for leader, members in zip(leaders, plan.members(site.name), strict=True):
            for expert in set(members) - {leader}:
                score_II = correlations(model, site, hidden_TH, leader, expert)
                _, order = linear_sum_assignment(score_II.cpu().numpy(), maximize=True)
                orders_EI[expert] = torch.as_tensor(order)
    return orders_EI


def correlations(
    model: PreTrainedModel, site: MoESite, hidden_TH: Tensor, one: int, other: int
) -> Tensor:
    """Return the correlations of two experts' features, shape ``(I, I)``, in [-1, 1].

    0 for neurons that never change.
    """
    moments: Mapping[str, list[Tensor]] = {"first": [], "second": [], "product": []}
    for piece in hidden_TH.split(_TOKENS):
        pair = [features(model, site, piece, expert) for expert in (one, other)]
        moments["first"].append(torch.stack([f.sum(0, dtype=torch.float64) for f in pair]))
        moments["second"].append(torch.stack([(f * f).sum(0, dtype=torch.float64) for f in pair]))
        moments["product"].append((pair[0].T @ pair[1]).double())
        for sums in moments.values():
            sums[:] = [torch.stack(sums).sum(0)]
    count = len(hidden_TH)
    mean_2I, square_2I, product_II = (sums[0] / count for sums in moments.values())
    covariance_II = product_II - mean_2I[0][:, None] * mean_2I[1][None, :]
    spread_2I = (square_2I - mean_2I.square()).clamp(min=0).sqrt()
    products = spread_2I[0][:, None] * spread_2I[1][None, :]
    return torch.where(products > 1e-30, covariance_II / products, 0.0).clamp(-1, 1)


def features(model: PreTrainedModel, site: MoESite, hidden_TH: Tensor, expert: int) -> Tensor:
    """Return what one expert's down projection is fed on given tokens, shape ``(T, I)``."""
    adapter, experts = adapter_for(model.config), model.get_submodule(site.experts)
    slots = 2 if adapter.needs_two_slots else 1
    weights = torch.zeros(len(hidden_TH), slots, dtype=hidden_TH.dtype, device=hidden_TH.device)
    weights[:, 0] = 1
    ids = torch.full(weights.shape, expert, device=hidden_TH.device)
    seen: list[FeatureSlots] = []

    def enough(found: FeatureSlots) -> None:
        seen.append(found)
        raise _Enough

    with features_of(model, adapter, site, enough), contextlib.suppress(_Enough):
        experts(hidden_TH, ids, weights)
    (call,) = seen
    order = call.token_ids.argsort(stable=True)[::slots]
    return call.features[order].float()


class _Enough(Exception):  # noqa: N818 - nothing went wrong
    """Ends a forward whose down projections are of no interest."""
