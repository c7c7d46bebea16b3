"""The experts of a V-MoE block.

T tokens, H hidden, E experts, C places of an expert, K experts per token, S slots (token and
expert).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from lit_moe.vmoe.configuration import VMoEConfig

SMALL = 2**18
"""Numbers in the inputs of all slots, up to which one product of padded stacks is the quickest."""


@use_experts_implementation(has_gate=False, has_bias=True)
class VMoEExperts(nn.Module):
    """Two-layer MLPs with biases, stacked."""

    def __init__(self, config: VMoEConfig, num_experts: int) -> None:
        super().__init__()
        hidden, width = config.hidden_size, int(config.moe_intermediate_size or 0)
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum over slots of gate times expert output, ``(T, H)``."""
        rows_S, weights_S1 = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
        if top_k_index.shape[-1] == 1 and bool((rows_S[1:] >= rows_S[:-1]).all()):
            return self._run(hidden_TH, rows_S) * weights_S1
        rows_S, order_S = torch.sort(rows_S, stable=True)
        tokens_S = order_S // top_k_index.shape[-1]
        out_SH = self._run(hidden_TH.index_select(0, tokens_S), rows_S)
        out_SH = out_SH * weights_S1.index_select(0, order_S)
        return torch.zeros_like(hidden_TH).index_add_(0, tokens_S, out_SH)

    def can_pad(self, hidden_TH: Tensor, num_slots: int, capacity: int) -> bool:
        """Return whether :meth:`padded` would do what a call does, and more quickly.

        Not if anybody has to be told of the call: hooks, or a forward in the place of ours.
        """
        num_places = self.num_experts * capacity
        small = num_places <= min(2 * num_slots, SMALL // hidden_TH.shape[1])
        told = self._forward_pre_hooks or self._forward_hooks or "forward" in vars(self)
        eager = self.config._experts_implementation == "eager"  # type: ignore[union-attr]
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(hidden_TH.device.type)
        return small and eager and plain and not told

    def padded(
        self, hidden_TH: Tensor, token_P: Tensor, place_KT: Tensor, gates_TK: Tensor
    ) -> Tensor:
        """Return the sum over slots of gate times expert output, ``(T, H)``, without gradients.

        Args:
            hidden_TH: the tokens.
            token_P: the token at each of an equal number of places of every expert, and one more.
            place_KT: the place of each slot, the one more for none.
            gates_TK: weights of the slots.
        """
        rows_PH = hidden_TH.index_select(0, token_P)
        stack_ECH = rows_PH[:-1].view(self.num_experts, -1, rows_PH.shape[1])
        inner = torch.baddbmm(self.up_proj_bias[:, None], stack_ECH, self.up_proj.transpose(1, 2))
        down = self.down_proj.transpose(1, 2)
        torch.baddbmm(self.down_proj_bias[:, None], self.act_fn(inner), down, out=stack_ECH)
        rows_PH[-1].zero_()
        first_T, *later_KT = place_KT.unbind()
        total_TH = rows_PH.index_select(0, first_T).mul_(gates_TK[:, :1])
        for rank, place_T in enumerate(later_KT, start=1):
            gate_T1 = gates_TK[:, rank : rank + 1]
            total_TH.addcmul_(rows_PH.index_select(0, place_T), gate_T1)
        return total_TH

    def _run(self, hidden_SH: Tensor, rows_S: Tensor) -> Tensor:
        """Return the output of each slot's expert, ``(S, H)``; slots are sorted by expert."""
        counts_E = torch.bincount(rows_S, minlength=self.num_experts)
        counts = counts_E.tolist()
        room = max(counts)
        if hidden_SH.numel() > SMALL or room * self.num_experts > 2 * len(rows_S):
            return self._run_one_by_one(hidden_SH, counts)
        # The first slot of expert e moves from place starts[e] to place e * room.
        shift_E = torch.arange(self.num_experts, device=rows_S.device) * room
        shift_E = shift_E - (counts_E.cumsum(0) - counts_E)
        places_S = torch.arange(len(rows_S), device=rows_S.device) + shift_E.index_select(0, rows_S)
        padded = hidden_SH.new_zeros(self.num_experts * room, hidden_SH.shape[-1])
        padded = padded.index_copy_(0, places_S, hidden_SH).unflatten(0, (self.num_experts, room))
        inner = torch.baddbmm(self.up_proj_bias[:, None], padded, self.up_proj.transpose(1, 2))
        down = self.down_proj.transpose(1, 2)
        outer = torch.baddbmm(self.down_proj_bias[:, None], self.act_fn(inner), down)
        return outer.flatten(0, 1).index_select(0, places_S)

    def _run_one_by_one(self, hidden_SH: Tensor, counts: list[int]) -> Tensor:
        own = (self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias)
        each = zip(hidden_SH.split(counts), *(weights.unbind() for weights in own), strict=True)
        return torch.cat(
            [F.linear(self.act_fn(F.linear(x, up, b)), down, c) for x, up, b, down, c in each]
        )
