"""What a run leaves in its checkpoints beside weights, and how another one goes on from there."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from lit_moe.errors import LitMoEError, PlanError
from lit_moe.merging import apply_plan
from lit_moe.plans import Plan, plan_from_dict
from lit_moe.randomness import random_state, restore_random_state
from lit_moe.resuming import OURS, complete_epoch, read_header


class ResumableModule(L.LightningModule):
    """A module with a model that plans shrink, and a teacher that no checkpoint holds.

    Plan, random states of all ranks and the state of the loss are in every checkpoint; the plan is
    applied again before weights are loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: PreTrainedModel | None = None
        self.plan: Plan | None = None
        self.resume_from: str | None = None
        self._random_to_restore: list[dict[str, Any]] = []

    @property
    def built_model(self) -> PreTrainedModel:
        """The model, once built."""
        if self.model is None:
            raise RuntimeError("the model is built in configure_model, which has not run yet")
        return self.model

    @property
    def is_resumed(self) -> bool:
        """Whether this run goes on from a checkpoint."""
        return self.resume_from is not None

    def loss_state(self) -> dict[str, Any]:
        """Return what the loss remembers of former steps, as plain values."""
        return {}

    def load_loss_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`loss_state` gave."""

    def checkpoint_plan(self) -> Plan | None:
        """Return the plan in the checkpoint that this run resumes from, without its weights."""
        if self.resume_from is None:
            return None
        header = read_header(self.resume_from)
        is_sharding = isinstance(self.trainer.strategy, DeepSpeedStrategy)
        if header.is_sharded and not is_sharding:
            raise LitMoEError(
                f"{header.path} was written by {header.world_size} ranks under ZeRO stage "
                f"{header.stage}; resume it with --trainer.strategy zero{header.stage} "
                f"--trainer.devices {header.world_size}"
            )
        return header.plan

    def shrink_as_evaluated(self) -> None:
        """Apply the plan of the checkpoint that is only evaluated, before anything wraps the model.

        In a fit the callback does it that made the plan.
        """
        plan = None if self.trainer.state.fn == TrainerFn.FITTING else self.checkpoint_plan()
        if plan is not None:
            apply_plan(self.built_model, plan)
            self.plan = plan

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add plan, loss and the random states of all ranks; leave the frozen teacher out.

        The teacher is what ``model_name_or_path`` gives again. Collective.
        """
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not _is_teacher(k)}
        plan = None if self.plan is None else self.plan.to_dict()
        checkpoint[OURS] = {
            "plan": plan,
            "random": self._random_states(),
            "loss": self.loss_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before weights are loaded. Re-applies the plan, and keeps the present teacher.

        Raises:
            PlanError: if the model was pruned by another plan than the checkpoint's.
        """
        ours = checkpoint.get(OURS, {})
        data = ours.get("plan")
        plan = None if data is None else plan_from_dict(data)
        if plan is not None and self.plan is None:
            apply_plan(self.built_model, plan)
            self.plan = plan
        self.check_plan(plan)
        self._random_to_restore = ours.get("random", [])
        self.load_loss_state(ours.get("loss", {}))
        if self._trainer is not None and self.trainer.max_steps != -1 and "loops" in checkpoint:
            complete_epoch(checkpoint["loops"]["fit_loop"])
        if "state_dict" in checkpoint:  # a sharded checkpoint has been loaded already
            own = self.state_dict()
            checkpoint["state_dict"].update({k: v for k, v in own.items() if _is_teacher(k)})

    def on_train_start(self) -> None:
        """When training begins. A resumed run draws the numbers that it would have drawn."""
        states = self._random_to_restore
        if len(states) == self.trainer.world_size:
            restore_random_state(states[self.global_rank])
        self._random_to_restore = []

    def check_plan(self, plan: Plan | None) -> None:
        """Refuse a checkpoint of a model that kept other experts.

        Raises:
            PlanError: if the model was pruned by another plan than the checkpoint's.
        """
        if plan != self.plan:
            raise PlanError(
                "the checkpoint was written under another plan than the one that this run just "
                "made: resume with `lit-moe fit --ckpt_path`, or set module.resume_from = PATH "
                "before trainer.fit, so that the plan is taken from the checkpoint"
            )

    def _random_states(self) -> list[dict[str, Any]]:
        state = random_state()
        if self._trainer is None or self.trainer.world_size == 1:
            return [state]
        states: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(states, state)
        return states


def _is_teacher(key: str) -> bool:
    return key.startswith("teacher.")
