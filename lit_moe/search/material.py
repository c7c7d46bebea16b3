"""Tensors of combined experts, made when a layer first needs them, and kept within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.search.genome import Map

Tensors = dict[str, Tensor]


class ByteCache:
    """Groups of tensors by key; the least recently used go when there are more bytes than allowed.

    Args:
        budget: bytes; 0 keeps nothing.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self.num_bytes = budget, 0
        self._held: OrderedDict[tuple[object, ...], Tensors] = OrderedDict()

    def get(self, key: tuple[object, ...], make: Callable[[], Tensors]) -> Tensors:
        """Return what is kept under a key, made anew if it is not."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        made = make()
        size = _bytes(made)
        if size > self._budget:
            return made
        while self.num_bytes + size > self._budget:
            _, gone = self._held.popitem(last=False)
            self.num_bytes -= _bytes(gone)
        self._held[key] = made
        self.num_bytes += size
        return made

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self.num_bytes = 0


def combined_tensors(
    model: nn.Module, site: MoESite, kinds: tuple[str, ...], rows: Map, cache: ByteCache
) -> Tensors:
    """Return the tensors of a layer with the new experts in place of the old.

    Sums are taken in float64 and cast back, an expert that is one old one with coefficient 1 is
    copied bit for bit: the values are those of :func:`lit_moe.merging.merge`. Combined experts are
    cached one by one, and the stacked layer too.

    Args:
        model: with all its experts; left alone.
        site: the layer.
        kinds: of the tensors: ``expert``, or ``router`` and ``select_bias``.
        rows: coefficients, ``(N, E)``.
        cache: where combined experts are kept.

    Returns:
        Dotted name -> tensor with N experts, and the tail that the old one had.
    """
    axes = [axis for axis in site.axes if axis.kind in kinds]

    def stacked() -> Tensors:
        made = [
            cache.get((site.name, kinds, row.tobytes()), lambda row=row: _expert(model, axes, row))  # type: ignore[misc]
            for row in rows
        ]
        return {
            axis.name: _with_tail(_tensor(model, axis), axis, [one[axis.name] for one in made])
            for axis in axes
        }

    return cache.get((site.name, kinds, rows.shape, rows.tobytes()), stacked)


def combined_modules(model: nn.Module, site: MoESite, rows: Map, cache: ByteCache) -> Tensors:
    """Return the same for a layer whose experts are modules of their own.

    Args:
        model: with all its experts; left alone.
        site: the layer; its experts have matrices of one shape.
        rows: coefficients, ``(N, E)``.
        cache: where combined experts are kept.

    Returns:
        Dotted name -> tensor of one expert, of the first N modules.
    """
    children = list(model.get_submodule(site.experts).named_children())

    def expert(row: np.ndarray) -> Tensors:
        names = [name for name, _ in children[0][1].named_parameters()]
        return {
            name: _sum([c.get_parameter(name).detach() for _, c in children], row) for name in names
        }

    found: Tensors = {}
    for (child, _), row in zip(children, rows, strict=False):
        made = cache.get((site.name, ("module",), row.tobytes()), lambda row=row: expert(row))  # type: ignore[misc]
        found |= {f"{site.experts}.{child}.{name}": value for name, value in made.items()}
    return found


def _expert(model: nn.Module, axes: list[ExpertAxis], row: np.ndarray) -> Tensors:
    """Return one new expert: the part of each tensor that is its own."""
    return {axis.name: _sum(_parts(_tensor(model, axis), axis), row) for axis in axes}


def _parts(old: Tensor, axis: ExpertAxis) -> list[Tensor]:
    """Return the part of each expert."""
    size = axis.rows_per_expert
    return [old.narrow(axis.dim, e * size, size) for e in range(axis.real)]


def _sum(parts: Sequence[Tensor], row: np.ndarray) -> Tensor:
    """Return the parts of all experts, added up as a row says."""
    members = np.flatnonzero(row).tolist()
    if len(members) == 1 and row[members[0]] == 1.0:
        return parts[members[0]].clone()
    total = torch.zeros_like(parts[0], dtype=torch.float64)
    for expert in members:
        total += float(row[expert]) * parts[expert].double()
    return total.to(parts[0].dtype)


def _with_tail(old: Tensor, axis: ExpertAxis, experts: list[Tensor]) -> Tensor:
    first = axis.real * axis.rows_per_expert
    tail = old.narrow(axis.dim, first, axis.tail) if axis.tail else None
    return torch.cat([*experts, *([] if tail is None else [tail])], dim=axis.dim)


def _tensor(model: nn.Module, axis: ExpertAxis) -> Tensor:
    path, _, name = axis.name.rpartition(".")
    found = getattr(model.get_submodule(path), name)
    assert isinstance(found, Tensor)
    return found.detach()


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
