"""How many parameters an MoE model has, and how many of them one token meets. Meta tensors too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lit_moe.adapters.site import AxisKind, ExpertAxis, MoESite
from lit_moe.sharding.partitions import whole_numel, whole_shape


class ParameterCounts(NamedTuple):
    """Parameters of a model, shared ones once.

    Attributes:
        total: all.
        active: without the routed experts that one token is not sent to. Embeddings and head count
            in full, as model cards count them.
    """

    total: int
    active: int


def count_parameters(model: nn.Module, sites: Sequence[MoESite]) -> ParameterCounts:
    """Return total and active parameters of ``model``, whose MoE layers are ``sites``."""
    total = sum(whole_numel(parameter) for parameter in model.parameters())
    idle = sum(
        (site.num_experts - site.top_k) * elements_per_expert(model, site, ("expert",))
        + _unused_elements(model, site)
        for site in sites
    )
    return ParameterCounts(total, total - idle)


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones once."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return sum(whole_numel(tensor) * tensor.element_size() for tensor in tensors)


def elements_per_expert(model: nn.Module, site: MoESite, kinds: Sequence[AxisKind]) -> int:
    """Return the elements of one routed expert in the tensors of the given kinds."""
    axes = [axis for axis in site.axes if axis.kind in kinds]
    elements = sum(_elements_of_rows(model, axis, axis.rows_per_expert) for axis in axes)
    if "expert" in kinds and not site.rows("expert"):  # each expert is a module of its own
        modules = model.get_submodule(site.experts)
        elements += sum(whole_numel(p) for p in modules.parameters()) // site.num_experts
    return elements


def _unused_elements(model: nn.Module, site: MoESite) -> int:
    """Return the elements behind the routed experts that no token meets.

    LongCat-Flash stacks rows for its identity experts in the first projection, none in the second.
    """
    axes = site.rows("expert")
    if all(axis.tail for axis in axes):
        return 0
    return sum(_elements_of_rows(model, axis, axis.tail) for axis in axes)


def _elements_of_rows(model: nn.Module, axis: ExpertAxis, rows: int) -> int:
    tensor = tensor_at(model, axis.name)
    return whole_numel(tensor) * rows // whole_shape(tensor)[axis.dim]


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer with a dotted name."""
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), last)
    return found
