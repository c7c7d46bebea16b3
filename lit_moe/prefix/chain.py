"""The layers of a model in the order in which they run, found out by watching a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from lit_moe.adapters.site import MoESite


@dataclass(frozen=True)
class Link:
    """One layer of the chain.

    Attributes:
        name: dotted name of the layer.
        stack: dotted name of the list of layers that it is in; encoder and decoder have their own.
        heads: modules inside the layer, with matrices, that are through before its router and
            experts begin: attention, mostly.
    """

    name: str
    stack: str
    heads: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Event:
    module: str
    enters: bool


def stack_of(model: nn.Module, module: str) -> str | None:
    """Return the outermost list of modules around a module, None if there is none."""
    parts = module.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        if isinstance(model.get_submodule(name), nn.ModuleList):
            return name
    return None


def find_chain(
    model: PreTrainedModel, sites: Sequence[MoESite], run: Callable[[], object]
) -> tuple[Link, ...]:
    """Return the layers in the order in which ``run`` calls them.

    Args:
        model: any supported MoE model.
        sites: its MoE layers; lists of layers without any are not looked at.
        run: a forward of the model.

    Returns:
        Empty if the layers do not run once each, one after the other.
    """
    stacks = dict.fromkeys(filter(None, (stack_of(model, site.name) for site in sites)))
    with _watching(model, stacks) as events:
        run()
    layers = {f"{stack}.{i}": stack for stack in stacks for i in range(_length(model, stack))}
    calls = [event for event in events if event.module in layers]
    if any(a.enters == b.enters or (a.enters and a.module != b.module) for a, b in pairwise(calls)):
        return ()
    names = [event.module for event in calls if event.enters]
    if len(set(names)) != len(names):
        return ()
    return tuple(
        Link(name, layers[name], _heads(model, _inside(events, name), sites)) for name in names
    )


def _heads(model: nn.Module, events: Sequence[_Event], sites: Sequence[MoESite]) -> tuple[str, ...]:
    """Return the outermost modules with matrices that have left before a site is entered."""
    begins = {part for site in sites for part in (site.router, site.experts)}
    first = next((i for i, e in enumerate(events) if e.enters and e.module in begins), 0)
    entered: dict[str, int] = {}
    for event in events:
        entered[event.module] = entered.get(event.module, 0) + event.enters
    left = {e.module for e in events[:first] if not e.enters and entered[e.module] == 1}
    heavy = [name for name in left if _has_matrix(model.get_submodule(name))]
    outer = [name for name in heavy if not any(name.startswith(f"{other}.") for other in heavy)]
    return tuple(sorted(outer))


def _inside(events: Sequence[_Event], layer: str) -> list[_Event]:
    return [event for event in events if event.module.startswith(f"{layer}.")]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _length(model: nn.Module, stack: str) -> int:
    return len(list(model.get_submodule(stack).children()))


@contextmanager
def _watching(model: nn.Module, stacks: dict[str, None]) -> Iterator[list[_Event]]:
    """Note when the modules in these lists begin and end."""
    events: list[_Event] = []

    def note(name: str, *, enters: bool) -> Callable[..., None]:
        return lambda *_: events.append(_Event(name, enters))

    with ExitStack() as undo:
        for name, module in model.named_modules():
            if any(name.startswith(f"{stack}.") for stack in stacks):
                begin = module.register_forward_pre_hook(note(name, enters=True))
                end = module.register_forward_hook(note(name, enters=False))
                undo.callback(begin.remove)
                undo.callback(end.remove)
        yield events
