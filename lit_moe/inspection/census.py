"""Every parameter of a model with its size before and after pruning, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lit_moe.adapters import MoESite


@dataclass(frozen=True)
class ParameterSize:
    """One parameter.

    Attributes:
        module: dotted path of the module that owns it.
        before: elements now.
        after: elements when the experts are gone; 0 if the whole parameter goes.
    """

    module: str
    before: int
    after: int


def census(
    model: nn.Module, sites: Sequence[MoESite], kept: Sequence[int]
) -> tuple[ParameterSize, ...]:
    """Return the sizes of all parameters, shared ones once.

    Args:
        model: also on the meta device.
        sites: its MoE layers.
        kept: experts that stay, per site; which ones does not matter for sizes.
    """
    shrunk = dict(_shrunk_axes(model, sites, kept))
    gone = tuple(_gone_modules(model, sites, kept))
    found = []
    for name, parameter in model.named_parameters():
        after = 0 if name.startswith(gone) else shrunk.get(id(parameter), parameter.numel())
        found.append(ParameterSize(name.rpartition(".")[0], parameter.numel(), after))
    return tuple(found)


def _shrunk_axes(
    model: nn.Module, sites: Sequence[MoESite], kept: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Yield identity and elements of every parameter that has an axis of experts.

    Not its name: one that encoder and decoder share has two.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for site, count in zip(sites, kept, strict=True):
        for axis in site.axes:
            if axis.kind == "id_table" or axis.name not in parameters:
                continue
            tensor = parameters[axis.name]
            rows = tensor.shape[axis.dim]
            lost = (site.num_experts - count) * axis.rows_per_expert
            yield id(tensor), tensor.numel() // rows * (rows - lost)


def _gone_modules(model: nn.Module, sites: Sequence[MoESite], kept: Sequence[int]) -> Iterator[str]:
    """Yield the prefixes of experts that are modules of their own and go."""
    for site, count in zip(sites, kept, strict=True):
        if not site.rows("expert"):
            children = [name for name, _ in model.get_submodule(site.experts).named_children()]
            yield from (f"{site.experts}.{name}." for name in children[count : site.num_experts])


def largest_module(sizes: Sequence[ParameterSize], *, pruned: bool) -> int:
    """Return the elements of the module with most parameters of its own."""
    return _largest((s.module, s.after if pruned else s.before) for s in sizes)


def largest_layer(sizes: Sequence[ParameterSize]) -> int:
    """Return the elements of the largest entry of a list of layers, or of a module outside."""
    return _largest((_layer_of(s.module), s.before) for s in sizes)


def _largest(named: Iterable[tuple[str, int]]) -> int:
    totals: dict[str, int] = {}
    for name, elements in named:
        totals[name] = totals.get(name, 0) + elements
    return max(totals.values())


def _layer_of(module: str) -> str:
    """Return the path up to the first number, or all of it."""
    words = module.split(".")
    end = next((i for i, word in enumerate(words) if word.isdigit()), len(words) - 1)
    return ".".join(words[: end + 1])
