"""LongCat-Flash: identity experts behind the routed ones, and code that fails with one slot."""

from __future__ import annotations

from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.errors import PlanError


class LongcatAdapter(MoEAdapter):
    """Slots may go to identity experts (ids from ``num_experts`` on); those are never scored."""

    needs_two_slots = True

    def set_top_k(self, model: PreTrainedModel, top_k: int) -> None:
        """Change the number of active experts, see the base class.

        Raises:
            PlanError: also for 1, with which the experts' code fails (it squeezes the slot axis).
        """
        if top_k == 1:
            raise PlanError("LongCat-Flash cannot run with top_k=1; use 2 or more")
        super().set_top_k(model, top_k)
