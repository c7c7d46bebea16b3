"""Architecture: what an MoE layer is in each model family, and how to cut and hide its experts."""

from lit_moe.adapters.base import MoEAdapter, Traits
from lit_moe.adapters.registry import adapter_for, count_experts, find_sites
from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.adapters.taps import Handle, OnSlots

__all__ = [
    "ExpertAxis",
    "Handle",
    "MoEAdapter",
    "MoESite",
    "OnSlots",
    "Traits",
    "adapter_for",
    "count_experts",
    "find_sites",
]
