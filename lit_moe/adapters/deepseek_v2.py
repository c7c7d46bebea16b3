"""DeepSeek-V2: group limits apply only with one of its two ways of choosing experts."""

from __future__ import annotations

from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.config_keys import ConfigKey
from lit_moe.adapters.site import MoESite


class DeepseekV2Adapter(MoEAdapter):
    """``topk_method`` is ``greedy`` (groups in the config mean nothing) or group-limited."""

    def groups(self, model: PreTrainedModel, site: MoESite) -> tuple[int, int]:
        """Return groups and groups per token, see the base class."""
        owner = ConfigKey.parse(site.config_key).owner(model.config)
        if getattr(owner, "topk_method", "greedy") == "greedy":
            return 1, 1
        return super().groups(model, site)
