"""Phi-3.5-MoE: sparsemixer always routes to two experts, whatever the config says."""

from __future__ import annotations

from transformers import PreTrainedConfig

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite


class PhimoeAdapter(MoEAdapter):
    """Two successive argmax with a threshold mask; random in train mode."""

    top_k_is_fixed = True

    def top_k(self, config: PreTrainedConfig, site: MoESite) -> int:
        """Return 2, see the base class."""
        del config, site
        return 2
