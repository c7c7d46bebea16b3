"""From a list of expert axes to MoE layers: which experts belong to which router.

An experts module is what owns the stacked expert weights; its router is the sibling that owns the
other axes; the MoE block is their closest common parent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from lit_moe.adapters.discovery import Discovery, TensorAxis
from lit_moe.adapters.site import AxisKind, ExpertAxis, MoESite
from lit_moe.errors import UnsupportedModelError


def pair(model: nn.Module, discovery: Discovery) -> tuple[MoESite, ...]:
    """Return the MoE layers of ``model`` in module order, without routing facts.

    Raises:
        UnsupportedModelError: if experts have no router beside them, or the model at hand lacks
            a tensor that its config promises (as quantised models do).
    """
    tensors = named_tensors(model)
    weights = [axis for axis in discovery.axes if is_stacked(axis)]
    owners = {parent(axis.name) for axis in weights}
    rest = [a for a in discovery.axes if not is_stacked(a) and parent(a.name) not in owners]
    blocks: dict[str, list[TensorAxis]] = {}
    for axis in weights:
        blocks.setdefault(_block_of(axis.name, rest), []).append(axis)
    return tuple(_site(name, axes, discovery, rest, tensors) for name, axes in blocks.items())


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict([*parameters, *model.named_buffers(remove_duplicate=False)])


def is_stacked(axis: TensorAxis) -> bool:
    """Whether the tensor holds the weight matrices of all experts."""
    return axis.ndim >= 3 or axis.rows > 1


def parent(name: str) -> str:
    """Return the dotted path without its last part."""
    return name.rpartition(".")[0]


def layer_index(name: str) -> int:
    """Return the first number in a module path, the index of its layer."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else 0


def _block_of(name: str, rest: Iterable[TensorAxis]) -> str:
    """Return the closest ancestor of an expert weight that also holds a router matrix."""
    path = parent(name)
    while path:
        path = parent(path)
        if any(is_router_matrix(axis) and axis.name.startswith(f"{path}.") for axis in rest):
            return path
    raise UnsupportedModelError(f"experts in {parent(name)!r} have no learned router beside them")


def is_router_matrix(axis: TensorAxis) -> bool:
    """Whether the tensor makes logits of hidden states."""
    return axis.ndim == 2 and axis.dim == 0


def _site(
    block: str,
    weights: list[TensorAxis],
    discovery: Discovery,
    rest: list[TensorAxis],
    tensors: dict[str, Tensor],
) -> MoESite:
    owners = {parent(axis.name) for axis in weights}
    routing = [axis for axis in rest if axis.name.startswith(f"{block}.")]
    matrix = next(axis for axis in routing if is_router_matrix(axis))
    inside = [axis for axis in discovery.axes if parent(axis.name) in owners]
    axes = [bind(axis, "expert", tensors) for axis in inside]
    axes += [bind(axis, axis_kind(axis), tensors) for axis in routing]
    children = {_first_part(axis.name, block) for axis in weights}
    return MoESite(
        name=block,
        layer=layer_index(block),
        experts=f"{block}.{children.pop()}" if len(children) == 1 else block,
        router=f"{block}.{_first_part(matrix.name, block)}",
        num_experts=min(axis.real for axis in axes),
        top_k=1,
        axes=tuple(axes),
        config_key=str(discovery.key),
    )


def _first_part(name: str, block: str) -> str:
    return name.removeprefix(f"{block}.").partition(".")[0]


def axis_kind(axis: TensorAxis) -> AxisKind:
    """Tell a bias that is part of the logits from one that only steers selection."""
    last = axis.name.rpartition(".")[2]
    if is_router_matrix(axis) or last == "bias":
        return "router"
    return "expert" if last.endswith("scale") else "select_bias"


def bind(axis: TensorAxis, kind: AxisKind, tensors: dict[str, Tensor]) -> ExpertAxis:
    """Return the axis with the expert count of the model at hand.

    Raises:
        UnsupportedModelError: if the model lacks the tensor.
    """
    if axis.name not in tensors:
        raise UnsupportedModelError(
            f"the config promises a tensor {axis.name!r} that the model does not have; "
            "quantised or already converted models cannot be cut, load the plain weights"
        )
    tensor = tensors[axis.name]
    # Under ZeRO-3 the tensor itself is an empty placeholder.
    shape = getattr(tensor, "ds_shape", tensor.shape)
    real = (shape[axis.dim] - axis.tail) // axis.rows
    return ExpertAxis(axis.name, axis.dim, real, axis.tail, kind, axis.rows)
