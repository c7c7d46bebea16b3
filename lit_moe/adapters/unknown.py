"""Families that nobody has tried yet."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter, Traits
from lit_moe.adapters.self_test import self_test
from lit_moe.adapters.site import MoESite


class UnknownAdapter(MoEAdapter):
    """The default adapter, after it has proven itself on a small copy of the model at hand.

    Groups of experts, if any, are taken to be scored by their two best, the stricter rule.
    """

    def __init__(self) -> None:
        super().__init__(Traits(group_score="top2"))

    def sites(self, model: PreTrainedModel) -> tuple[MoESite, ...]:
        """Return the MoE layers, see the base class.

        Raises:
            UnsupportedModelError: also if the small copy fails the test; says how.
        """
        found = super().sites(model)
        traits = self_test(type(model), model.config)
        assert not isinstance(traits.renormalised, str)
        return tuple(
            dataclasses.replace(s, routing=traits.routing, renormalised=traits.renormalised)
            for s in found
        )
