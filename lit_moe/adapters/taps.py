"""Observing experts that do not dispatch through transformers' registry of implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

OnSlots = Callable[[Tensor, Tensor, Tensor, Tensor], None]
IsReal = Callable[[Tensor, Tensor], Tensor]


class Handle(Protocol):
    """Something attached to a model that can be taken off again."""

    def remove(self) -> None:
        """Undo the attachment."""
        ...


class Handles:
    """Several attachments that are taken off together, the last one first."""

    def __init__(self, handles: Sequence[Handle | RemovableHandle]) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        """Undo all attachments; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()


class WrappedExperts:
    """Replaces ``experts(hidden, top_k_index, top_k_weights)`` by one call per (token, slot).

    Each slot becomes a token of its own with weight 1, which gives the raw expert outputs at the
    price of the plain forward; weights and sum are applied afterwards.

    Args:
        experts: the module; ``forward`` is shadowed on the instance until :meth:`remove`.
        on_slots: receives ``expert_ids (S,)``, ``gates (S,)``, ``outputs (S, H)``, ``token_ids
            (S,)``.
        is_real: ``(expert_ids, gates) -> bool (S,)``, False for slots that no routed expert serves.
        null_slot: whether to add a second slot of weight 0, for code that cannot run with one.
    """

    def __init__(
        self,
        experts: nn.Module,
        on_slots: OnSlots,
        *,
        is_real: IsReal,
        null_slot: bool = False,
    ) -> None:
        self._experts = experts
        self._forward = experts.forward
        self._on_slots = on_slots
        self._is_real = is_real
        self._null_slot = null_slot
        experts.forward = self._observed

    def remove(self) -> None:
        """Give the module its own forward back."""
        self._experts.__dict__.pop("forward", None)

    def _observed(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        num_tokens, top_k = top_k_index.shape
        ids, gates = top_k_index.reshape(-1), top_k_weights.reshape(-1)
        tokens_TH = hidden.reshape(num_tokens, -1)
        outputs_SH = self._raw(tokens_TH.repeat_interleave(top_k, 0), ids, gates)
        tokens = torch.arange(num_tokens, device=ids.device).repeat_interleave(top_k)
        real = self._is_real(ids, gates)
        self._on_slots(ids[real], gates[real], outputs_SH[real], tokens[real])
        weighted = outputs_SH * gates[:, None]
        return weighted.view(num_tokens, top_k, -1).sum(1).to(hidden.dtype).view(hidden.shape)

    def _raw(self, inputs_SH: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        index, weights = ids[:, None], torch.ones_like(gates)[:, None]
        if self._null_slot:
            index = index.expand(-1, 2)
            weights = torch.cat([weights, torch.zeros_like(weights)], dim=1)
        outputs: Tensor = self._forward(inputs_SH, index, weights)
        return outputs.reshape(inputs_SH.shape[0], -1)


def on_forward(module: nn.Module, hook: Callable[[tuple[Any, ...], Any], None]) -> RemovableHandle:
    """Call ``hook(args, output)`` after each forward, changing nothing."""

    def call(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hook(args, output)

    return module.register_forward_hook(call)
