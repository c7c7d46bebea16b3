"""The sparse block in the place of an MLP, and the layer around it.

B images, S tokens per image (or slots), T tokens of all images, H hidden, R router rows, K rows
per token, M members.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTLayer

from lit_moe.vmoe.configuration import VMoEConfig
from lit_moe.vmoe.experts import VMoEExperts
from lit_moe.vmoe.router import VMoERouter
from lit_moe.vmoe.routing import capacity_of, places_with_room, slots_with_room


class VMoEBlock(nn.Module):
    """What stands in the place of an MLP. Slots without room or without expert give 0."""

    def __init__(self, config: VMoEConfig, layer_idx: int) -> None:
        super().__init__()
        own = config.per_layer_config[layer_idx]
        self.router = VMoERouter(config, own.num_experts, own.num_null_experts)
        self.experts = VMoEExperts(config, own.num_experts)
        self.num_members = config.n_group
        self.capacity_factors = (config.capacity_factor, config.eval_capacity_factor)
        self.batch_priority = config.batch_priority
        self.slot_tokens: Tensor | None = None

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Return what the experts make of each token, ``(B, S, H)``.

        While the experts run, ``slot_tokens`` says which tokens they are given; None for all.
        """
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        logits_TR, gates_TK, rows_TK, *chosen = self.router(hidden_BSH)
        if chosen:
            slots = (chosen[0], gates_TK[:, 0], rows_TK[:, 0])
            return self._combined(hidden_TH, *slots).view_as(hidden_BSH)
        capacity = self._capacity(logits_TR, rows_TK)
        if capacity is None and bool(self._is_live(gates_TK, rows_TK).all()):
            return self.experts(hidden_TH, rows_TK, gates_TK).view_as(hidden_BSH)
        by_gate = self.batch_priority and not self.training and capacity is not None
        priority_T = gates_TK[:, 0] if by_gate else None
        if capacity is not None and self._can_pad(hidden_TH, rows_TK, capacity):
            sizes = (self.experts.num_experts, logits_TR.shape[-1])
            places = places_with_room(rows_TK, priority_T, capacity, *sizes)
            return self.experts.padded(hidden_TH, *places, gates_TK).view_as(hidden_BSH)
        slots = self._slots(gates_TK, rows_TK, priority_T, capacity)
        return self._combined(hidden_TH, *slots).view_as(hidden_BSH)

    def _can_pad(self, hidden_TH: Tensor, rows_TK: Tensor, capacity: int) -> bool:
        # Whatever shards, adapts or quantises experts stands in their place, or has hooks on them.
        own = type(self.experts) is VMoEExperts
        return own and self.experts.can_pad(hidden_TH, rows_TK.numel(), capacity)

    def _is_live(self, gates: Tensor, rows: Tensor) -> Tensor:
        # A masked row can only be chosen where no other is left, with gate 0.
        return (rows < self.experts.num_experts) & (gates > 0)

    def _slots(
        self, gates_TK: Tensor, rows_TK: Tensor, priority_T: Tensor | None, capacity: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, gates and rows of the slots with room, sorted by row."""
        tokens_S, ranks_S, rows_S = slots_with_room(rows_TK, priority_T, capacity)
        places_S = tokens_S * rows_TK.shape[1] + ranks_S
        return tokens_S, gates_TK.reshape(-1).index_select(0, places_S), rows_S

    def _combined(
        self, hidden_TH: Tensor, tokens_S: Tensor, gates_S: Tensor, rows_S: Tensor
    ) -> Tensor:
        live_S = self._is_live(gates_S, rows_S)
        if not bool(live_S.all()):
            tokens_S, gates_S, rows_S = tokens_S[live_S], gates_S[live_S], rows_S[live_S]
        out_TH = torch.zeros_like(hidden_TH)
        if not len(tokens_S):
            return out_TH
        self.slot_tokens = tokens_S
        given_SH = hidden_TH.index_select(0, tokens_S)
        out_SH = self.experts(given_SH, rows_S[:, None], gates_S[:, None])
        self.slot_tokens = None
        return out_TH.index_add_(0, tokens_S, out_SH)

    def _capacity(self, logits_TR: Tensor, rows_TK: Tensor) -> int | None:
        """Return the tokens that each row serves; None for no limit."""
        factor = self.capacity_factors[0 if self.training else 1]
        if factor is None:
            return None
        # A masked row is -inf for all tokens of its member: it counts as if it were not there.
        first_S = logits_TR[:: len(logits_TR) // self.num_members].reshape(-1).tolist()
        num_rows = len(first_S) - first_S.count(-math.inf)
        num_slots = len(rows_TK) * min(rows_TK.shape[1], num_rows)
        return capacity_of(num_slots, num_rows, factor)


class VMoELayer(ViTLayer):
    """A layer of ViT with experts in the place of its MLP."""

    def __init__(self, config: VMoEConfig, layer_idx: int) -> None:
        super().__init__(config)
        block: Any = VMoEBlock(config, layer_idx)
        self.mlp = block
