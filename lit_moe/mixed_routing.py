"""Routers that mix the probabilities of experts which are no longer there (EEP, 2407.00945, eq. 5).

A merged model may keep the router of the E experts that it was made of. Its N experts then get the
probabilities ``g = W p``, where ``p`` are those of the old experts and ``W`` is the router map; the
top-k are taken of ``g``. The rows that the stock router would read are still there, as a likeness
of the mixed router for people who load the model without this file.

This file knows torch only: exports carry a copy of it as their remote code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CONFIG_KEY = "lit_moe_mixed_routers"
"""Key of the config that says how each mixed router works, by the name of its MoE layer."""

MAP = "expert_mix"
OLD = "mixed_"
"""Names of the router map, shape ``(N, E)``, and of what the old router reads, in the router."""

_LEAST = 1e-6


@dataclass(frozen=True)
class Mixing:
    """How one router turns logits into weights.

    Attributes:
        router: path of the router in the model.
        num_experts: E, experts that it was made for.
        routing: ``softmax`` or ``sigmoid``.
        renormalised: whether the chosen weights are divided by their sum.
        scale: constant factor on all weights.
        rows: tensors of the router that have one entry per expert, by path within it; and along
            which dimension.
        select_bias: the one of them that only steers selection; None without one.
        integers: attributes of the router that hold the number of experts, by path within it.
        top_k: experts per token; None for as many as the stock router takes.
    """

    router: str
    num_experts: int
    routing: str
    renormalised: bool
    scale: float = 1.0
    rows: Mapping[str, int] = field(default_factory=dict)
    select_bias: str | None = None
    integers: Sequence[str] = ()
    top_k: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as stored in a config."""
        return {**asdict(self), "integers": list(self.integers)}


@dataclass
class _State:
    """What a mixed router remembers outside its parameters and buffers."""

    mixing: Mixing
    has_old_rows: bool
    stock_class: type[nn.Module]
    integers: dict[str, int] = field(default_factory=dict)


class MixedRouter(nn.Module):
    """Stands before a router's own class; made by :func:`mix_router_` only."""

    mix_state: _State

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return logits ``(T, N)``, weights ``(T, K)`` and expert ids ``(T, K)``."""
        with _old_rows(self):
            output = super().forward(*args, **kwargs)
            bias = _select_bias(self)
        logits, weights, index = output[:3]
        map_NE = self.get_buffer(MAP)
        return (*mixed(self.mix_state.mixing, map_NE, logits, weights, index, bias), *output[3:])


def mixed(
    mixing: Mixing,
    map_NE: Tensor,
    logits_TE: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    bias_E: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, weights and ids of the N mixed experts.

    Mixed probabilities may be negative. Weights of a token whose chosen ones do not sum to more
    than 1e-6 are not divided by that sum. The logits are those whose probabilities are in
    proportion to the mixed ones, which 1e-6 bounds from below.
    """
    scores_TE = logits_TE.float()
    is_softmax = mixing.routing == "softmax"
    probs_TE = scores_TE.softmax(-1) if is_softmax else scores_TE.sigmoid()
    map_EN = map_NE.to(probs_TE).T
    probs_TN = probs_TE @ map_EN
    chosen_by_TN = probs_TN if bias_E is None else (probs_TE + bias_E.to(probs_TE)) @ map_EN
    top_k = mixing.top_k or index_TK.shape[-1]
    ids_TK = chosen_by_TN.topk(top_k, dim=-1).indices
    gates_TK = probs_TN.gather(-1, ids_TK)
    if mixing.renormalised:
        total = gates_TK.sum(-1, keepdim=True)
        gates_TK = gates_TK / torch.where(total > _LEAST, total, torch.ones_like(total))
    if mixing.scale != 1.0:
        gates_TK = gates_TK * mixing.scale
    bounded_TN = probs_TN.clamp(_LEAST, None if is_softmax else 1 - _LEAST)
    logits_TN = bounded_TN.log() if is_softmax else bounded_TN.logit()
    return logits_TN.to(logits_TE.dtype), gates_TK.to(weights_TK.dtype), ids_TK


def is_mixed(router: nn.Module) -> bool:
    """Whether a router mixes the probabilities of old experts."""
    return isinstance(router, MixedRouter)


def mix_router_(
    router: nn.Module, mixing: Mixing, map_NE: Tensor, old: Mapping[str, Tensor] | None = None
) -> None:
    """Let a router mix, in place.

    Args:
        router: its forward returns logits, weights and ids.
        mixing: how it works.
        map_NE: the router map.
        old: what it read before experts were merged, for each of ``mixing.rows``; None if the
            router at hand still has them.
    """
    for path, value in (old or {}).items():
        owner, name = _owner(router, path)
        if name in owner._buffers:
            owner.register_buffer(OLD + name, value)
            continue
        stock = owner.get_parameter(name)
        owner.register_parameter(OLD + name, nn.Parameter(value, stock.requires_grad))
        stock.requires_grad_(False)  # never read again, so DDP would wait for its gradient
    router.register_buffer(MAP, map_NE.to(torch.float32), persistent=old is not None)
    integers = dict.fromkeys(mixing.integers, mixing.num_experts) if old is not None else {}
    stock_class = type(router)
    router.mix_state = _State(mixing, old is not None, stock_class, integers)  # type: ignore[assignment]
    router.__class__ = _mixed_class(stock_class)


def unmix_router_(router: nn.Module) -> None:
    """Undo :func:`mix_router_` for a router that still has all its rows, in place."""
    state = router.mix_state
    assert isinstance(state, _State)
    router.__class__ = state.stock_class
    del router._buffers[MAP]
    router._non_persistent_buffers_set.discard(MAP)
    del router.mix_state


def mix_routers_(model: nn.Module) -> None:
    """Give a freshly built model the mixed routers that its config names, in place.

    Maps and old rows are placeholders, to be loaded from a checkpoint.
    """
    mixings: Mapping[str, Any] = getattr(model.config, CONFIG_KEY, None) or {}
    for values in mixings.values():
        mixing = Mixing(**values)
        router = model.get_submodule(mixing.router)
        old = {}
        for path, dim in mixing.rows.items():
            stock = getattr(*_owner(router, path)).detach()
            num_new = stock.shape[dim]
            shape = [*stock.shape[:dim], mixing.num_experts, *stock.shape[dim + 1 :]]
            old[path] = stock.new_zeros(shape)
            map_NE = torch.zeros(num_new, mixing.num_experts, device=stock.device)
        mix_router_(router, mixing, map_NE, old)


@contextmanager
def mixed_when_built(config: Any, model_class: type[nn.Module]) -> Iterator[None]:
    """Within it, models of ``model_class`` are built with the mixed routers that a config names.

    Patches the constructor for its duration only; not for several threads at once.
    """
    if not getattr(config, CONFIG_KEY, None):
        yield
        return
    original = model_class.__init__

    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        mix_routers_(self)

    is_own = "__init__" in vars(model_class)
    model_class.__init__ = build  # type: ignore[method-assign]
    try:
        yield
    finally:
        if is_own:
            model_class.__init__ = original  # type: ignore[method-assign]
        else:
            del model_class.__init__


def _mixed_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Mixed{stock.__name__}", (MixedRouter, stock), {"__module__": stock.__module__})


def _owner(router: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return router.get_submodule(owner), name


@contextmanager
def _old_rows(router: MixedRouter) -> Iterator[None]:
    """Within it, the router is the one of the old experts."""
    state = router.mix_state
    if not state.has_old_rows:
        yield
        return
    tensors: list[tuple[Any, str, Any]] = []
    numbers: list[tuple[nn.Module, str, int]] = []
    for path in state.mixing.rows:
        owner, name = _owner(router, path)
        held: Any = owner._buffers if name in owner._buffers else owner._parameters
        tensors.append((held, name, held[name]))
        held[name] = getattr(owner, OLD + name)
    for path, value in state.integers.items():
        owner, name = _owner(router, path)
        numbers.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
    try:
        yield
    finally:
        for held, name, tensor in tensors:
            held[name] = tensor
        for owner, name, number in numbers:
            setattr(owner, name, number)


def _select_bias(router: MixedRouter) -> Tensor | None:
    path = router.mix_state.mixing.select_bias
    if path is None:
        return None
    bias: Tensor = getattr(*_owner(router, path))
    return bias.detach().reshape(-1)
