"""Gives neurons of experts one order before they are averaged; no expert computes anything else.

I expert width, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.jetmoe import JetMoeAdapter
from lit_moe.errors import UnsupportedModelError
from lit_moe.grouping.coefficients import leaders_of
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import own_parameters_
from lit_moe.stats.matrices import at_least_float32

NEURON_DIM = {"gate": 1, "up": 1, "down": 2, "gate_bias": 1, "up_bias": 1}
"""Dimension of each stacked tensor that counts neurons; others do not depend on their order."""


@torch.no_grad()
def align_(
    model: PreTrainedModel, plan: MergePlan, orders: Mapping[str, Tensor] | None = None
) -> int:
    """Reorder, in place, the neurons of experts that will be averaged; return how many moved.

    Each follows the member of its group with the largest coefficient. What the model computes
    stays the same up to the order of sums. Tensors that change are new ones.

    Args:
        model: not yet merged.
        plan: says which experts belong together.
        orders: layer name -> ``(E, I)``, see
            :func:`lit_moe.grouping.activations.orders_by_activations`; None: by
            weights, see :func:`matching`.

    Raises:
        UnsupportedModelError: for experts whose neurons have fixed places.
    """
    adapter = adapter_for(model.config)
    check_can_be_aligned(model)
    moved = 0
    for site in find_sites(model):
        weights = adapter.expert_weights(model, site)
        aligned = {k: weights[k].detach().clone() for k in NEURON_DIM if k in weights}
        groups = plan.members(site.name)
        for leader, members in zip(leaders_of(plan.experts[site.name]), groups, strict=True):
            for expert in members:
                if orders is None:
                    order = matching(weights, leader, expert)
                else:
                    order = orders[site.name][expert].to(weights["up"].device)
                moved += int((order != torch.arange(len(order), device=order.device)).sum())
                for name, tensor in aligned.items():
                    dim = NEURON_DIM[name] - 1
                    tensor[expert] = weights[name][expert].index_select(dim, order)
        own_parameters_(model, site.experts)
        adapter.set_expert_weights_(model, site, aligned)
    return moved


def check_can_be_aligned(model: PreTrainedModel) -> None:
    """Refuse experts whose neurons have fixed places.

    Raises:
        UnsupportedModelError: naming the family.
    """
    if isinstance(adapter_for(model.config), JetMoeAdapter):
        raise UnsupportedModelError(
            "jetmoe's attention experts make queries, whose places are fixed, so neurons cannot "
            "be aligned; merge with align: false"
        )


def matching(weights: Mapping[str, Tensor], leader: int, expert: int) -> Tensor:
    """Return the order of ``expert``'s neurons that is most like ``leader``'s, shape ``(I,)``.

    Maximises the sum over neurons of the inner products of what they read and write: rows of gate
    and up, columns of down (a linear assignment).

    Args:
        weights: as ``MoEAdapter.expert_weights`` names them.
        leader: id of the expert that is followed.
        expert: id of the one that follows.
    """
    from scipy.optimize import linear_sum_assignment

    device = weights["up"].device
    if leader == expert:
        return torch.arange(weights["up"].shape[1], device=device)
    score_II = neurons(weights, leader) @ neurons(weights, expert).T
    _, order = linear_sum_assignment(score_II.cpu().numpy(), maximize=True)
    return torch.as_tensor(order, device=device)


def neurons(weights: Mapping[str, Tensor], expert: int) -> Tensor:
    """Return what each neuron of one expert reads and writes, shape ``(I, M H + biases)``."""
    parts = []
    for name, dim in NEURON_DIM.items():
        if name in weights:
            own = at_least_float32(weights[name][expert].detach())
            parts.append(own.movedim(dim - 1, 0).reshape(own.shape[dim - 1], -1))
    return torch.cat(parts, dim=1)
