"""JetMoE: two MoE layers per decoder layer, one of them inside attention, with own dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.adapters.taps import Handle, Handles, OnSlots, on_forward


class JetMoeAdapter(MoEAdapter):
    """Blocks with ``input_linear``, ``output_linear`` and ``router`` side by side.

    Both kinds of layer read one expert count, so they must keep the same number of experts. The
    number of active experts also shapes attention (query heads), so it cannot be changed.
    """

    top_k_is_fixed = True

    def expert_weights(self, model: PreTrainedModel, site: MoESite) -> dict[str, Tensor]:
        """Return the stacked views, see the base class.

        Attention experts have no gate: ``up`` makes the queries, ``down`` the output.
        """
        first = model.get_parameter(f"{site.name}.input_linear.weight")
        down = model.get_parameter(f"{site.name}.output_linear.weight")
        if first.shape[1] == down.shape[2]:
            return {"up": first, "down": down}
        gate, up = first.chunk(2, dim=1)
        return {"gate": gate, "up": up, "down": down}

    def router_logits(self, router_output: object) -> Tensor:
        """Return the last output, see the base class."""
        assert isinstance(router_output, tuple)
        logits: Tensor = router_output[-1]
        return logits

    def attach_slots(self, model: PreTrainedModel, site: MoESite, on_slots: OnSlots) -> Handle:
        """Observe the output projection, whose rows are sorted by expert; see the base class."""
        routed: list[tuple[Tensor, Tensor, list[int]]] = []

        def keep_routing(_: Any, output: tuple[Any, ...]) -> None:
            _, token_ids, gates, expert_size, _ = output
            routed[:] = [(token_ids, gates, expert_size)]

        def report(_: Any, outputs_SH: Tensor) -> None:
            token_ids, gates, expert_size = routed.pop()
            sizes = torch.tensor(expert_size, device=token_ids.device)
            ids = torch.arange(len(expert_size), device=token_ids.device).repeat_interleave(sizes)
            on_slots(ids, gates, outputs_SH, token_ids)

        router = on_forward(model.get_submodule(site.router), keep_routing)
        output = model.get_submodule(f"{site.name}.output_linear")
        return Handles([router, on_forward(output, report)])
