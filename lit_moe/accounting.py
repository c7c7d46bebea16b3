"""How many parameters an MoE model has, and how many of them one token meets. Meta tensors too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lit_moe.adapters.site import AxisKind, MoESite


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
    total = sum(_numel(parameter) for parameter in model.parameters())
    idle = sum(
        (site.num_experts - site.top_k) * elements_per_expert(model, site, ("expert",))
        for site in sites
    )
    return ParameterCounts(total, total - idle)


def elements_per_expert(model: nn.Module, site: MoESite, kinds: Sequence[AxisKind]) -> int:
    """Return the elements of one routed expert in the tensors of the given kinds."""
    elements = 0
    for axis in site.axes:
        if axis.kind in kinds:
            tensor = tensor_at(model, axis.name)
            shape = getattr(tensor, "ds_shape", tensor.shape)
            elements += _numel(tensor) * axis.rows_per_expert // shape[axis.dim]
    return elements


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer with a dotted name."""
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), last)
    return found


def _numel(tensor: Tensor) -> int:
    """Elements of the whole tensor, also where ZeRO-3 leaves an empty placeholder."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))
