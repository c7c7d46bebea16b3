"""A plan as a reversible mask: the model computes as if it were shrunk, and can go back.

Masked logits and gradients are those of the shrunk model (up to the order in which floating-point
sums are added up), so masking while training and removing experts at the end is exact. No memory is
freed. Auxiliary losses that transformers computes from recorded logits still count the hidden
experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from lit_moe.adapters import Handle, adapter_for, count_experts, find_sites
from lit_moe.adapters.router_mask import is_masked
from lit_moe.mixed_routing import is_mixed
from lit_moe.plan import KeepPlan


class RouterMask:
    """Hides the dropped experts of a plan from the routers of a model.

    Hooks carry the mask, and DeepSpeed's inference set-up removes hooks: attach in
    ``on_{fit,train,validation,test}_start``, not in ``setup``.

    Args:
        model: the model the plan was made for.
        plan: which experts stay visible.

    Raises:
        PlanError: if the plan is for another model or a router could not work with it.
    """

    def __init__(self, model: PreTrainedModel, plan: KeepPlan) -> None:
        self._model = model
        self._plan = plan
        self._sites = find_sites(model)
        self._adapter = adapter_for(model.config)
        self._handles: list[Handle] = []
        plan.check_fits(count_experts(self._sites), family=model.config.model_type)
        for site in self._sites:
            self._adapter.check_keep(site, plan.kept[site.name])

    @property
    def attached(self) -> bool:
        """Whether the experts are hidden now."""
        return bool(self._handles)

    def attach(self) -> None:
        """Hide the experts.

        Raises:
            RuntimeError: if this or another mask is attached to the model already.
        """
        for site in self._sites:
            if is_masked(self._model.get_submodule(site.router)):
                raise RuntimeError(f"{site.name} is masked already; detach that mask first")
            if is_mixed(self._model.get_submodule(site.router)):
                raise RuntimeError(
                    f"the router of {site.name} mixes probabilities of former experts, so that no "
                    "expert has a row of its own to be hidden"
                )
        for site in self._sites:
            kept = self._plan.kept[site.name]
            if len(kept) < site.num_experts:
                self._handles.append(self._adapter.mask_(self._model, site, kept))

    def detach(self) -> None:
        """Show all experts again; the model is bit for bit what it was. No-op when detached."""
        while self._handles:
            self._handles.pop().remove()


@contextmanager
def masked(model: PreTrainedModel, plan: KeepPlan) -> Iterator[None]:
    """Hide the experts that ``plan`` drops while the context is open.

    Raises:
        PlanError: if the plan is for another model or a router could not work with it.
        RuntimeError: if the model is masked already.
    """
    mask = RouterMask(model, plan)
    try:
        mask.attach()
        yield
    finally:
        mask.detach()
