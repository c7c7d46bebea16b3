"""The router of a V-MoE block.

B images, S tokens per image, T tokens of all images, R router rows, K rows per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from lit_moe.vmoe.configuration import VMoEConfig
from lit_moe.vmoe.routing import best_rows, choose_tokens, importance_loss, load_loss, only_own_rows


class VMoERouter(nn.Module):
    """Logits of all rows, and which rows (or tokens) are chosen with which gates."""

    def __init__(self, config: VMoEConfig, num_experts: int, num_null: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = config.num_experts_per_tok
        self.num_members = config.n_group
        self.tokens_per_expert = config.tokens_per_expert
        self.chooses_tokens = config.router_type == "expert_choice"
        self.noise = config.router_noise
        self.loss_weights = (config.importance_loss, config.load_loss)
        self.weight = nn.Parameter(torch.empty(num_experts + num_null, config.hidden_size))
        self.aux_loss: Tensor | None = None

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, ...]:
        """Return logits ``(T, R)``, gates and rows ``(T, K)``.

        Under expert choice gates and rows are ``(S, 1)``, followed by the tokens ``(S,)``.
        """
        with maybe_autocast(hidden_BSH.device.type, enabled=False):  # halves would make ties
            logits_BSR = F.linear(hidden_BSH.float(), self.weight.float())
        logits_TR = logits_BSR.reshape(-1, logits_BSR.shape[-1])
        if self.chooses_tokens:
            gates_S, rows_S, tokens_S = choose_tokens(logits_BSR, self.tokens_per_expert or 1)
            return logits_TR, gates_S[:, None].to(hidden_BSH.dtype), rows_S[:, None], tokens_S
        if self.num_members > 1:
            logits_TR = only_own_rows(logits_TR, self.num_experts, self.num_members)
        noisy_TR, top_k = self._noisy(logits_TR), min(self.top_k, logits_TR.shape[-1])
        if self.training or self.aux_loss is not None:  # setting attributes of modules takes long
            self.aux_loss = self._auxiliary(logits_TR, noisy_TR) if self.training else None
        # Over a last dimension of a few numbers softmax is several times slower.
        probability_RT = torch.softmax(noisy_TR.T.contiguous(), dim=0)
        gates_TK, rows_TK = best_rows(probability_RT, top_k)
        return logits_TR, gates_TK.to(hidden_BSH.dtype), rows_TK

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and stored: not the loss of the last batch, which is no leaf."""
        return {**self.__dict__, "aux_loss": None}

    def _noisy(self, logits_TR: Tensor) -> Tensor:
        if not self.training or not self.noise:
            return logits_TR
        return logits_TR + torch.randn_like(logits_TR) * (self.noise / logits_TR.shape[-1])

    def _auxiliary(self, logits_TR: Tensor, noisy_TR: Tensor) -> Tensor:
        importance, load = self.loss_weights
        total = logits_TR.new_zeros(())
        seen = (logits_TR > -torch.inf).any(dim=0)  # the others are masked
        if importance:
            total = total + importance * importance_loss(logits_TR[:, seen])
        top_k = min(self.top_k, int(seen.sum()) // self.num_members)
        if load and self.noise and top_k:
            deviation = self.noise / logits_TR.shape[-1]
            total = total + load * load_loss(
                logits_TR[:, seen], noisy_TR[:, seen], top_k, deviation
            )
        return total
