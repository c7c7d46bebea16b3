"""Applies a merge plan to a model, in place; beside surgery, the other way experts leave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from lit_moe.accounting import count_bytes, count_parameters
from lit_moe.adapters import MoEAdapter, MoESite, adapter_for, count_experts, find_sites
from lit_moe.adapters.legality import check_top_k
from lit_moe.adapters.router_mask import is_masked
from lit_moe.adapters.site import ExpertAxis
from lit_moe.adapters.slicing import replace_tensor
from lit_moe.errors import PlanError
from lit_moe.merge_plan import MergePlan
from lit_moe.mixed_routing import Mixing, is_mixed
from lit_moe.mixing import mix_, mixings, old_rows
from lit_moe.plans import Plan
from lit_moe.sharding.partitions import is_managed, is_partitioned, opened
from lit_moe.surgery import ShrinkReport, shrink


def merge(model: PreTrainedModel, plan: MergePlan) -> ShrinkReport:
    """Combine, in place, the experts and router rows of each MoE layer as ``plan`` says.

    Sums are taken in float64 and cast back; dtype, device, requires_grad, module integers and
    configs end up as after :func:`lit_moe.surgery.shrink`. All tensors that change are new ones,
    so that a sharing copy of the model stays what it was.

    Args:
        model: a plain transformers model, before any strategy wraps it.
        plan: must name every MoE layer of the model.

    Raises:
        PlanError: if the plan is for another model, a router could not work with what stays, or
            experts of different routing groups would be merged. Nothing has been touched then.
        RuntimeError: if a router mask is attached, or weights are offloaded.
    """
    sites = find_sites(model)
    adapter = adapter_for(model.config)
    plan.check_fits(count_experts(sites), family=model.config.model_type)
    mixing = _mixing(model, plan)
    if plan.top_k is not None:
        for site in sites:
            check_top_k(site, plan.top_k, fixed=adapter.top_k_is_fixed)
        sites = tuple(replace(site, top_k=plan.top_k) for site in sites)
    slots = {site.name: _slots(site, plan) for site in sites}
    for site in sites:
        _check_site(model, site, plan, slots[site.name])
        adapter.check_keep(site, slots[site.name])
    _refuse_unready(model, sites)
    params_before, bytes_before = count_parameters(model, ()).total, count_bytes(model)
    if not plan.is_identity:
        adapter.check_counts(model.config, sites, plan.counts)
        mixed = {
            name: (how, plan.routers[name], old_rows(model, how)) for name, how in mixing.items()
        }
        if plan.top_k is not None:
            adapter.set_top_k(model, plan.top_k)
        for site in sites:
            with opened(model, site.owners):
                _combine_(model, adapter, site, plan, slots[site.name])
                adapter.slice_(model, site, slots[site.name])
        adapter.finish_(model, sites, plan.counts)
        mix_(model, mixed)
    return ShrinkReport(
        {site.name: (site.num_experts, plan.counts[site.name]) for site in sites},
        params_before,
        count_parameters(model, ()).total,
        bytes_before,
        count_bytes(model),
    )


def apply_plan(model: PreTrainedModel, plan: Plan) -> ShrinkReport:
    """Do to a model, in place, what a plan of any kind says.

    Raises:
        PlanError: see :func:`lit_moe.surgery.shrink` and :func:`merge`.
        RuntimeError: likewise.
    """
    return merge(model, plan) if isinstance(plan, MergePlan) else shrink(model, plan)


def combined(old: Tensor, axis: ExpertAxis, map_NE: Tensor, slots: Sequence[int]) -> Tensor:
    """Return a copy of a tensor in which the experts in ``slots`` are the new ones.

    A new expert that is one old one with coefficient 1 is copied bit for bit.

    Args:
        old: any tensor that is indexed by experts.
        axis: says along which dimension, and how many rows each has.
        map_NE: coefficients, one row per new expert.
        slots: N distinct expert ids, where the new experts go.
    """
    new = old.clone()
    old_E, new_E = (_by_expert(tensor, axis) for tensor in (old, new))
    for slot, row in zip(slots, map_NE, strict=True):
        members = row.nonzero().flatten().tolist()
        if len(members) == 1 and float(row[members[0]]) == 1.0:
            new_E[slot].copy_(old_E[members[0]])
            continue
        total = torch.zeros_like(old_E[0], dtype=torch.float64)
        for expert in members:
            total += float(row[expert]) * old_E[expert].double()
        new_E[slot].copy_(total)
    return new


def _by_expert(tensor: Tensor, axis: ExpertAxis) -> tuple[Tensor, ...]:
    """Return one view per expert."""
    rows = tensor.narrow(axis.dim, 0, axis.real * axis.rows_per_expert)
    return rows.unflatten(axis.dim, (axis.real, axis.rows_per_expert)).unbind(axis.dim)


@torch.no_grad()
def _combine_(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, plan: MergePlan, slots: list[int]
) -> None:
    """Give one layer tensors of its own in which ``slots`` hold the new experts.

    A router that will mix probabilities keeps the row of the expert that counts most in each.
    """
    experts, routers = plan.experts[site.name], plan.routers[site.name]
    if plan.router_space == "probabilities":
        routers = one_hot(routers.argmax(dim=1), routers.shape[1]).double()
    for axis in site.axes:
        if axis.kind == "id_table":
            continue
        path, _, name = axis.name.rpartition(".")
        owner = model.get_submodule(path)
        coefficients = experts if axis.kind == "expert" else routers
        value = combined(getattr(owner, name).detach(), axis, coefficients, slots)
        replace_tensor(owner, name, value)
    if not site.rows("expert"):
        _combine_modules_(model, adapter, site, experts, slots)


def _combine_modules_(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, map_NE: Tensor, slots: list[int]
) -> None:
    """As above, for families in which each expert is a module of its own."""
    own_parameters_(model, site.experts)
    values = {}
    for name, stacked in adapter.expert_weights(model, site).items():
        axis = ExpertAxis(name, 0, site.num_experts)
        values[name] = combined(stacked.detach(), axis, map_NE, slots)
    adapter.set_expert_weights_(model, site, values)


def own_parameters_(model: nn.Module, path: str) -> None:
    """Put new parameters with the same values into one module, in place, to be written into.

    A sharing copy of the model keeps the old ones; other modules that shared them share the new.
    """
    old = list(model.get_submodule(path).parameters())  # alive, so that no id is given twice
    new = {}
    for parameter in old:
        twin = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        twin.__dict__.update(parameter.__dict__)
        new[id(parameter)] = twin
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None and id(held) in new:
                module._parameters[name] = new[id(held)]


def _mixing(model: PreTrainedModel, plan: MergePlan) -> dict[str, Mixing]:
    """Return how the routers work that have to mix probabilities.

    A router whose map is one-hot and whose chosen weights are divided by their sum need not: its
    rows do the same.
    """
    if plan.router_space == "rows" or plan.is_identity:
        return {}
    found = mixings(model)
    return {
        name: how
        for name, how in found.items()
        if not (_is_one_hot(plan.routers[name]) and (how.renormalised or how.routing == "sigmoid"))
    }


def _is_one_hot(map_NE: Tensor) -> bool:
    ids = map_NE.argmax(dim=1)
    is_distinct = len(set(ids.tolist())) == len(ids)
    return is_distinct and torch.equal(map_NE, one_hot(ids, map_NE.shape[1]).to(map_NE))


def _slots(site: MoESite, plan: MergePlan) -> list[int]:
    """Return where new experts are put before the others are cut off: ascending ids.

    The first member of each group where groups are ordered by it, else the first ids of each
    routing group.
    """
    first = [members[0] for members in plan.members(site.name)]
    if first == sorted(set(first)):
        return first
    size, count = site.num_experts // site.num_groups, len(first)
    per_group = -(-count // site.num_groups)
    slots = [g * size + i for g in range(site.num_groups) for i in range(min(per_group, size))]
    return slots[:count]


def _check_site(model: nn.Module, site: MoESite, plan: MergePlan, slots: Sequence[int]) -> None:
    size = site.num_experts // site.num_groups
    for slot, members in zip(slots, plan.members(site.name), strict=True):
        if {e // size for e in members} != {slot // size}:
            raise PlanError(
                f"{site.name}: routing is limited to groups of {size} experts, and a merged expert "
                f"must be made of one group only, in their order; the plan merges {list(members)}"
            )
    _check_shapes(model, site)
    one_hot = plan.as_keep_plan() is not None
    if site.rows("id_table") and not one_hot:
        raise PlanError(
            f"{site.name} chooses experts by a table of token ids, which cannot be merged; keep "
            "its experts, or drop some with a keep plan"
        )


def _check_shapes(model: nn.Module, site: MoESite) -> None:
    """Refuse experts that are modules of their own and not equally wide."""
    if site.rows("expert"):
        return
    first: list[tuple[int, ...]] | None = None
    for name, expert in model.get_submodule(site.experts).named_children():
        shapes = [tuple(parameter.shape) for parameter in expert.parameters()]
        first = first or shapes
        if shapes != first:
            raise PlanError(
                f"{site.name}.{name} has matrices of shape {shapes}, the first expert {first}; "
                "only experts of one shape can be merged"
            )


def _refuse_unready(model: nn.Module, sites: Sequence[MoESite]) -> None:
    if is_partitioned(model) and is_managed(model):
        raise RuntimeError(
            "the experts are sharded and managed by an engine; merge before the strategy wraps "
            "the model"
        )
    for site in sites:
        router = model.get_submodule(site.router)
        if is_masked(router):
            raise RuntimeError(
                f"a router mask is attached to {site.name}; detach it before merging"
            )
        if is_mixed(router):
            raise RuntimeError(
                f"the router of {site.name} mixes probabilities of former experts; merge the model "
                "that it was made of"
            )
        block = model.get_submodule(site.name)
        absent = [name for name, p in block.named_parameters() if p.is_meta]
        if absent:
            raise RuntimeError(
                f"{site.name}.{absent[0]} is offloaded or has no values; load the model without "
                "offloading before merging"
            )
