"""Between matrices as mathematics sees them and parameters as a family stores them.

Nothing here knows a layout: the adapter is asked to write into stand-ins of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.sharding.partitions import gathered, zero_shard_
from lit_moe.sparsity.layers import matrices_of
from lit_moe.sparsity.masks import WeightMasks
from lit_moe.sparsity.selection import zero_entries_

_ORIGINAL = "stands_in_for"


def shapes_of(model: PreTrainedModel) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return layer -> matrix -> experts, outputs, inputs."""
    adapter = adapter_for(model.config)
    found = {}
    for site in find_sites(model):
        with gathered(model.get_submodule(site.experts)):
            weights = adapter.expert_weights(model, site)
            found[site.name] = {name: tuple(weights[name].shape) for name in matrices_of(weights)}
    return found


def write_matrices(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, values: Mapping[str, Tensor]
) -> None:
    """Write matrices of one layer, in place, into memory of its own.

    Copies that share tensors with the model (``lit_moe.sharing_copy``) stay what they were, also in
    the eyes of ``check_unwritten``.
    """
    with _rewritten(model, site):
        adapter.set_expert_weights_(model, site, values)


@torch.no_grad()
def zero_matrices(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, keep: Mapping[str, Tensor]
) -> None:
    """Zero the weights of one layer that do not stay, in place; see :func:`write_matrices`.

    Args:
        model: the model.
        adapter: of its family.
        site: the MoE layer.
        keep: matrix -> True where a weight stays, shape ``(E, O, D)``, on the weights' device.
    """
    with _rewritten(model, site) as pairs:
        memory = {new.untyped_storage().data_ptr() for _, new in pairs.values()}
        weights = adapter.expert_weights(model, site)
        for name, stays_EOD in keep.items():
            for weight_OD, stays_OD in zip(weights[name], stays_EOD, strict=True):
                zero_entries_(weight_OD, stays_OD)
            if weights[name].untyped_storage().data_ptr() not in memory:  # the adapter gave copies
                adapter.set_expert_weights_(model, site, {name: weights[name]})


@contextmanager
def _rewritten(
    model: PreTrainedModel, site: MoESite
) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Inside the block the experts of a layer are copies, which then replace their tensors."""
    with _stand_ins(model.get_submodule(site.experts), _copy) as pairs:
        yield pairs
    for own, written in pairs.values():
        own.data = written.data
        if isinstance(original := vars(own).get(_ORIGINAL), nn.Parameter):
            original.data = written.data


@contextmanager
def unnoticed(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, writing to experts does not count as a change of their parameters.

    Watching some families means to write other weights for a moment and to put them back; copies
    that share tensors would otherwise be taken for damaged (``check_unwritten``).
    """
    with ExitStack() as stack:
        for site in find_sites(model):
            pairs = stack.enter_context(_stand_ins(model.get_submodule(site.experts), _same_memory))
            for own, stand_in in pairs.values():
                vars(stand_in)[_ORIGINAL] = own
        yield


def parameter_zeros(model: PreTrainedModel, masks: WeightMasks) -> dict[str, Tensor]:
    """Return parameter name -> boolean tensor in the parameter's layout, True where a zero stays.

    Only parameters with such entries are named; one byte per weight, on the model's device.
    """
    adapter = adapter_for(model.config)
    zeros = {}
    for site in find_sites(model):
        with _stand_ins(model.get_submodule(site.experts), _ones) as pairs:
            adapter.set_expert_weights_(model, site, masks.keep(site.name))
        for name, (_, written) in pairs.items():
            if not bool((stays := written.data != 0).all()):
                zeros[f"{site.experts}.{name}"] = ~stays
    return zeros


@torch.no_grad()
def zero_(parameter: Tensor, zeros: Tensor) -> None:
    """Set entries of a parameter to exactly 0, in place.

    This is the only thing done after an optimizer's step. Of a parameter that is spread over ranks
    each rank sets its share.
    """
    if hasattr(parameter, "ds_tensor"):
        zero_shard_(parameter, zeros)
    else:
        zero_entries_(parameter, ~zeros)


def zero_gradient(gradient: Tensor, zeros: Tensor) -> Tensor:
    """Return a gradient that is 0 where zeros stay; a hook of the parameter calls it.

    It acts before gradients are accumulated, averaged over ranks, sharded or clipped, so that an
    optimizer that starts with such gradients never moves those weights.
    """
    return gradient.masked_fill(zeros, 0.0)


def _same_memory(own: Tensor) -> Tensor:
    return own.data  # unlike detach(), it has a version counter of its own


def _copy(own: Tensor) -> Tensor:
    return own.detach().clone()


def _ones(own: Tensor) -> Tensor:
    # A parameter that is spread over ranks is an empty placeholder and knows its whole shape.
    shape = getattr(own, "ds_shape", own.shape)
    return torch.ones(shape, dtype=own.dtype, device=own.device)


@contextmanager
def _stand_ins(
    module: nn.Module, make: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Put new parameters in the place of a module's; yield name -> (own, stand-in).

    Afterwards the module has its own back.
    """
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, part in module.named_modules():
        for name, own in part._parameters.items():
            if own is not None:
                stand_in = nn.Parameter(make(own), requires_grad=False)
                pairs[f"{path}.{name}".lstrip(".")] = (own, stand_in)
                places.append((part, name, own))
    for (part, name, _), (_, stand_in) in zip(places, pairs.values(), strict=True):
        part._parameters[name] = stand_in
    try:
        yield pairs
    finally:
        for part, name, own in places:
            part._parameters[name] = own
