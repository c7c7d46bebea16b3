"""ZAYA: an MLP router with state carried from layer to layer, and a last class "skip"."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite


class ZayaAdapter(MoEAdapter):
    """Tokens that choose "skip" reach the experts as expert 0 with weight 0."""

    top_k_is_fixed = True

    def finish_(
        self, model: PreTrainedModel, sites: Sequence[MoESite], counts: Mapping[str, int]
    ) -> None:
        """Also give routers of unequal layers configs of their own: they look up "skip" there."""
        super().finish_(model, sites, counts)
        shared = model.config
        for site in sites:
            own = shared
            if shared.is_heterogeneous:
                own = copy.deepcopy(shared)
                own.per_layer_config = None
                own.num_experts = counts[site.name]
            vars(model.get_submodule(site.router))["config"] = own

    def tap_kind(self, site: MoESite) -> Literal["contract", "custom"]:
        """Return "custom": skipped tokens must not be counted for expert 0."""
        del site
        return "custom"

    def is_real_slot(self, site: MoESite, expert_ids: Tensor, gates: Tensor) -> Tensor:
        """Return which slots did not choose "skip", shape ``(S,)``."""
        del site, expert_ids
        return gates != 0
