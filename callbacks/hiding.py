"""Experts that are hidden from the routers while a model trains, until they are cut out."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from lit_moe.adapters import count_experts, find_sites
from lit_moe.masking import RouterMask
from lit_moe.plan import KeepPlan


class HiddenExperts:
    """What a callback that drops experts in the middle of training keeps of them.

    Hooks hide the experts, and some strategies remove hooks: call :meth:`hide` again in every
    ``on_{fit,train,validation,test,predict}_start``.

    Attributes:
        plan: the experts that are left, in the numbering of the model as it now is; None while
            nothing is hidden.
    """

    def __init__(self) -> None:
        self.plan: KeepPlan | None = None
        self._mask: RouterMask | None = None

    def alive(self, model: PreTrainedModel) -> KeepPlan:
        """Return the experts that are left; all, if nothing is hidden."""
        return self.plan or KeepPlan.identity(count_experts(find_sites(model)))

    def hide(self, model: PreTrainedModel, plan: KeepPlan | None = None) -> None:
        """Hide what a plan drops, instead of what was hidden before.

        Args:
            model: whose routers shall not see them; changed by hooks only.
            plan: None to hide the same experts again.

        Raises:
            PlanError: if the plan is for another model or a router could not work with it.
        """
        self.show()
        self.plan = plan or self.plan
        if self.plan is not None:
            self._mask = RouterMask(model, self.plan)
            self._mask.attach()

    def show(self) -> None:
        """Let the routers see all experts again; the plan stays, for :meth:`hide`."""
        if self._mask is not None:
            self._mask.detach()
            self._mask = None

    def release(self) -> KeepPlan | None:
        """Show all experts and forget the plan; return it, to be cut out for good."""
        self.show()
        plan, self.plan = self.plan, None
        return plan

    def state(self) -> dict[str, Any] | None:
        """Return the plan as plain values, for a checkpoint."""
        return None if self.plan is None else self.plan.to_dict()

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take over what :meth:`state` gave; nothing is hidden before :meth:`hide`."""
        self.plan = None if state is None else KeepPlan.from_dict(state)
