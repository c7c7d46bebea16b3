"""The LightningModule: builds the model, steps, optimizer, losses. It knows no pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from lit_moe.assets import EMBEDDED
from lit_moe.distill.losses import (
    load_balancing_loss,
    logits_distillation_loss,
    next_token_loss,
    next_token_nll,
)
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.models import DType, build_model, check_vocabulary, frozen_copy
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink

Batch = dict[str, Tensor]
_CHECKPOINT_KEY = "lit_moe"


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        learning_rate: peak.
        weight_decay: of matrices; vectors (norms, biases) are not decayed.
        betas: of AdamW.
        warmup_steps: linear from 0.
        schedule: name known to ``transformers.get_scheduler``.
        schedule_options: its further arguments, for instance ``{min_lr_rate: 0.1}``.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 0
    schedule: str = "cosine"
    schedule_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LossWeights:
    """Weight of each term of the training loss; a term of weight 0 is not computed.

    Attributes:
        next_token: cross-entropy of the text itself.
        distillation: KL from the unpruned model's next-token distribution; above 0, a frozen copy
            of the model is kept as the teacher.
        temperature: of the distillation.
        load_balance: Switch auxiliary loss over the router's logits.
    """

    next_token: float = 1.0
    distillation: float = 0.0
    temperature: float = 1.0
    load_balance: float = 0.0


class MoEModule(L.LightningModule):
    """A Mixture-of-Experts language model, its recovery loss and its optimizer.

    The model is built in ``configure_model``; then every callback that has a method
    ``on_model_built(trainer, module)`` is called, before any strategy wraps the model.

    Args:
        model_name_or_path: folder or hub id of a Hugging Face checkpoint, or ``embedded``.
        architecture: config fields with ``model_type`` to start from random weights instead; then
            ``model_name_or_path`` only names the tokenizer.
        dtype: of the weights; ``auto`` takes the checkpoint's own. bf16 weights are for observing
            and pruning; for training prefer float32 here and ``precision`` in the trainer.
        optimizer: AdamW and schedule.
        loss: weights of the terms.
        trust_remote_code: run model code that comes with the checkpoint.
    """

    def __init__(
        self,
        model_name_or_path: str = EMBEDDED,
        architecture: dict[str, Any] | None = None,
        dtype: DType = "float32",
        optimizer: OptimizerConfig | None = None,
        loss: LossWeights | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.architecture = architecture
        self.dtype_name = dtype
        self.optimizer_config = optimizer or OptimizerConfig()
        self.loss_weights = loss or LossWeights()
        self.trust_remote_code = trust_remote_code
        self.model: PreTrainedModel | None = None
        self.teacher: PreTrainedModel | None = None
        self.plan: KeepPlan | None = None

    def configure_model(self) -> None:
        """Called before the strategy wraps. Builds model and teacher, then lets callbacks act."""
        if self.model is not None:
            return
        self.model = build_model(
            self.model_name_or_path,
            architecture=self.architecture,
            dtype=self.dtype_name,
            trust_remote_code=self.trust_remote_code,
        )
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            check_vocabulary(self.model, len(tokenizer), tokenizer.name_or_path)
        if self.loss_weights.distillation > 0:
            self.teacher = frozen_copy(self.model)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            act = getattr(callback, "on_model_built", None)
            if act is not None:
                act(self.trainer, self)
        self.model.train()

    @property
    def built_model(self) -> PreTrainedModel:
        """The model, once built."""
        if self.model is None:
            raise RuntimeError("the model is built in configure_model, which has not run yet")
        return self.model

    @property
    def is_resumed(self) -> bool:
        """Whether this run goes on from a checkpoint."""
        return self.trainer.ckpt_path is not None

    def checkpoint_plan(self) -> KeepPlan | None:
        """Return the plan in the checkpoint that this run resumes from, without its weights."""
        if not self.is_resumed:
            return None
        stored = torch.load(
            str(self.trainer.ckpt_path), mmap=True, map_location="cpu", weights_only=False
        )
        data = stored.get(_CHECKPOINT_KEY, {}).get("plan")
        return None if data is None else KeepPlan.from_dict(data)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted sum of the loss terms and log each."""
        weights = self.loss_weights
        outputs = self._forward(batch, router_logits=weights.load_balance > 0)
        mask = batch["attention_mask"]
        terms = {"next_token": next_token_loss(outputs.logits, batch["input_ids"], mask)}
        if self.teacher is not None and weights.distillation > 0:
            terms["distillation"] = logits_distillation_loss(
                outputs.logits, self._teacher_logits(batch), mask, temperature=weights.temperature
            )
        if weights.load_balance > 0:
            terms["load_balance"] = self._load_balance(outputs)
        loss = torch.stack([getattr(weights, k) * v for k, v in terms.items()]).sum()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean next-token loss in nats."""
        self._log_loss("validation", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean next-token loss in nats."""
        self._log_loss("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the nats per predicted token, shape ``(B, S-1)``."""
        logits = self._forward(batch).logits
        return next_token_nll(logits, batch["input_ids"], batch["attention_mask"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the parameters that take gradients, and the schedule."""
        config = self.optimizer_config
        trained = [p for p in self.built_model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas
        )
        scheduler = get_scheduler(
            config.schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=int(self.trainer.estimated_stepping_batches),
            scheduler_specific_kwargs=config.schedule_options,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the plan; leave the frozen teacher out, which ``model_name_or_path`` gives again."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not _is_teacher(k)}
        plan = None if self.plan is None else self.plan.to_dict()
        checkpoint[_CHECKPOINT_KEY] = {"plan": plan}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before weights are loaded. Re-applies the plan, and keeps the present teacher.

        Raises:
            PlanError: if the model was pruned by another plan than the checkpoint's.
        """
        data = checkpoint.get(_CHECKPOINT_KEY, {}).get("plan")
        plan = None if data is None else KeepPlan.from_dict(data)
        if plan is not None and self.plan is None:
            shrink(self.built_model, plan)
            self.plan = plan
        if plan != self.plan:
            raise PlanError(
                "the checkpoint was written under another plan than this run's: resume with the "
                "config of the run that wrote it"
            )
        own = self.state_dict()
        checkpoint["state_dict"].update({k: v for k, v in own.items() if _is_teacher(k)})

    def _forward(self, batch: Batch, *, router_logits: bool = False) -> Any:
        options: dict[str, Any] = {"output_router_logits": True} if router_logits else {}
        return self.built_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options
        )

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Tensor:
        assert self.teacher is not None
        self.teacher.eval()
        return self.teacher(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits

    def _load_balance(self, outputs: Any) -> Tensor:
        logits = getattr(outputs, "router_logits", None)
        if not logits:
            raise LitMoEError(
                f"{type(self.built_model).__name__} does not report router logits, so "
                "loss.load_balance must be 0"
            )
        return load_balancing_loss(logits, top_k=self.built_model.config.num_experts_per_tok)

    def _log_loss(self, stage: Literal["validation", "test"], batch: Batch) -> None:
        mask = batch["attention_mask"]
        loss = next_token_loss(self._forward(batch).logits, batch["input_ids"], mask)
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True, batch_size=mask.shape[0])


def _is_teacher(key: str) -> bool:
    return key.startswith("teacher.")
