"""Llama 4: every expert runs on every token, and the routing weight multiplies the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import weights
from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.adapters.taps import Handle, Handles, OnSlots, on_forward


class Llama4Adapter(MoEAdapter):
    """Router returns ``(scores (T, E), logits (T, E))``; experts take ``(E * T, H)``."""

    def expert_weights(self, model: PreTrainedModel, site: MoESite) -> dict[str, Tensor]:
        """Return the stacked views, see the base class; stored ``(in, out)``."""
        experts = model.get_submodule(site.experts)
        return weights.canonical(experts, site.num_experts, transposed=True)

    def router_logits(self, router_output: object) -> Tensor:
        """Return the second output, see the base class."""
        assert isinstance(router_output, tuple)
        logits: Tensor = router_output[1]
        return logits

    def attach_slots(self, model: PreTrainedModel, site: MoESite, on_slots: OnSlots) -> Handle:
        """Observe the slots that routing chose, see the base class.

        An expert gives ``f(g x)``, not ``g f(x)``. The outputs reported are ``f(g x) / g``, so
        that gate times output is what the expert adds to the layer, as in every other family.
        """
        scores: list[Tensor] = []

        def keep_scores(_: Any, output: tuple[Tensor, Tensor]) -> None:
            scores[:] = [output[0]]

        def report(_: Any, output: Tensor) -> None:
            scores_TE = scores.pop()
            num_tokens, num_experts = scores_TE.shape
            ids = scores_TE.topk(min(site.top_k, num_experts), dim=1).indices
            tokens = torch.arange(num_tokens, device=ids.device).repeat_interleave(ids.shape[1])
            ids = ids.reshape(-1)
            gates = scores_TE[tokens, ids]
            outputs_SH = output.view(num_experts, num_tokens, -1)[ids, tokens]
            on_slots(ids, gates, outputs_SH / gates[:, None], tokens)

        router = on_forward(model.get_submodule(site.router), keep_scores)
        return Handles([router, on_forward(model.get_submodule(site.experts), report)])
