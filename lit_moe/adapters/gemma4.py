"""Gemma 4: router and experts sit in the decoder layer itself, beside a dense MLP."""

from __future__ import annotations

from torch import Tensor, nn

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite


class Gemma4Adapter(MoEAdapter):
    """The router returns probabilities where other families return logits."""

    def router_probabilities(
        self, site: MoESite, router_output: object, router_module: nn.Module
    ) -> Tensor:
        """Return what the router calls its first output, see the base class."""
        del router_module
        probabilities = self.router_logits(router_output).float()
        return probabilities.reshape(-1, site.num_experts)
