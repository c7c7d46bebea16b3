"""DBRX: the matrices of all experts lie one under the other in 2-D tensors."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite


class DbrxAdapter(MoEAdapter):
    """``w1`` (gate), ``v1`` (up) and ``w2`` (down) of shape ``(E * I, H)``."""

    def expert_weights(self, model: PreTrainedModel, site: MoESite) -> dict[str, Tensor]:
        """Return the stacked views, see the base class."""
        mlp = model.get_submodule(f"{site.experts}.mlp")
        names = {"gate": "w1", "up": "v1", "down": "w2"}
        stacked = {
            name: mlp.get_parameter(own).unflatten(0, (site.num_experts, -1))
            for name, own in names.items()
        }
        return {**stacked, "down": stacked["down"].transpose(1, 2)}
