"""Applies a plan to a model: the only way experts leave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lit_moe.accounting import count_bytes, count_parameters
from lit_moe.adapters import MoESite, adapter_for, count_experts, find_sites
from lit_moe.adapters.router_mask import is_masked
from lit_moe.mixed_routing import is_mixed
from lit_moe.plan import KeepPlan
from lit_moe.sharding.partitions import is_managed, is_partitioned, opened


@dataclass(frozen=True)
class ShrinkReport:
    """What a shrink changed.

    Attributes:
        layers: MoE layer name -> (experts before, experts after).
        params_before: parameters of the whole model before.
        params_after: and after.
        bytes_before: bytes of all parameters and buffers before.
        bytes_after: and after.
    """

    layers: Mapping[str, tuple[int, int]]
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int


def shrink(model: PreTrainedModel, plan: KeepPlan) -> ShrinkReport:
    """Remove, in place, the experts that ``plan`` drops.

    Weights, biases, module integers and the config (also nested) end up as if the model had been
    built with fewer experts; dtype, device, requires_grad and buffers stay what they were. A model
    that was shrunk before can be shrunk again: the plan numbers the experts of the model at hand.

    Args:
        model: a plain transformers model, before any strategy wraps it.
        plan: must name every MoE layer of the model.

    Raises:
        PlanError: if the plan is for another model or a router could not work with what stays.
            Nothing has been touched then.
        RuntimeError: if a router mask is still attached, or weights are offloaded or managed by a
            DeepSpeed engine.
    """
    sites = find_sites(model)
    adapter = adapter_for(model.config)
    plan.check_fits(count_experts(sites), family=model.config.model_type)
    for site in sites:
        adapter.check_keep(site, plan.kept[site.name])
    _refuse_masked(model, sites)
    _refuse_mixed(model, sites)
    _refuse_absent(model, sites)
    params_before, bytes_before = count_parameters(model, ()).total, count_bytes(model)
    if not plan.is_identity:
        adapter.check_counts(model.config, sites, plan.counts)
        for site in sites:
            with opened(model, site.owners):
                adapter.drop_(model, site, plan.kept[site.name])
        adapter.finish_(model, sites, plan.counts)
    return ShrinkReport(
        {site.name: (site.num_experts, len(plan.kept[site.name])) for site in sites},
        params_before,
        count_parameters(model, ()).total,
        bytes_before,
        count_bytes(model),
    )


def _refuse_masked(model: nn.Module, sites: tuple[MoESite, ...]) -> None:
    masked = [site.name for site in sites if is_masked(model.get_submodule(site.router))]
    if masked:
        raise RuntimeError(
            f"a router mask is attached to {masked[0]} and {len(masked) - 1} more layers; detach "
            "it before removing experts, its expert numbers would no longer fit"
        )


def _refuse_mixed(model: nn.Module, sites: tuple[MoESite, ...]) -> None:
    mixed = [site.name for site in sites if is_mixed(model.get_submodule(site.router))]
    if mixed:
        raise RuntimeError(
            f"the router of {mixed[0]} mixes probabilities of former experts, so that no expert "
            "has a row of its own; drop experts from the model that it was made of"
        )


def _refuse_absent(model: PreTrainedModel, sites: tuple[MoESite, ...]) -> None:
    """Refuse to cut placeholders: what would come back later are the uncut weights."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    names = [axis.name for site in sites for axis in site.axes if axis.name in tensors]
    absent = names if is_partitioned(model) and is_managed(model) else []
    if not all(tensor.is_meta for tensor in tensors.values()):
        absent += [name for name in names if tensors[name].is_meta]
    if absent:
        raise RuntimeError(
            f"{absent[0]} and {len(absent) - 1} more tensors are offloaded or sharded and are not "
            "here; remove experts before the strategy wraps the model, or load without offloading"
        )
