"""The LightningModule: builds the model, steps, optimizer, losses. It knows no pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from lit_moe.adapters import find_sites
from lit_moe.agreement import check_versions_agree
from lit_moe.assets import EMBEDDED
from lit_moe.distill.losses import (
    load_balancing_loss,
    logits_distillation_loss,
    next_token_loss,
    next_token_nll,
)
from lit_moe.distill.routers import recorded_routers
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.models import (
    DType,
    build_model,
    check_vocabulary,
    checkpoint_dtype,
    frozen_copy,
    sharing_copy,
)
from lit_moe.partitions import is_partitioned, loading_partitioned, whole_shape
from lit_moe.plan import KeepPlan
from lit_moe.randomness import random_state, restore_random_state
from lit_moe.resuming import OURS, complete_epoch, read_header
from lit_moe.surgery import shrink

Batch = dict[str, Tensor]


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


# They are in every checkpoint, as hyper-parameters; loading by weights_only=True must know them.
torch.serialization.add_safe_globals([OptimizerConfig, LossWeights])


class MoEModule(L.LightningModule):
    """A Mixture-of-Experts language model, its recovery loss and its optimizer.

    The model is built in ``configure_model``; then every callback that has a method
    ``on_model_built(trainer, module)`` is called, before any strategy wraps the model.

    Before ``trainer.fit(..., ckpt_path=path)`` (or validate, test, predict) on a pruned checkpoint
    set ``resume_from = path`` (``lit-moe fit --ckpt_path`` does): lightning tells the path only
    after the model is built.

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
        self.source_dtype: str | None = None
        self.resume_from: str | None = None
        self.keep_unpruned = False
        self._random_to_restore: list[dict[str, Any]] = []
        self._unpruned: tuple[PreTrainedModel, ...] = ()  # a tuple, so that it is no submodule
        self.save_hyperparameters(logger=False)

    def configure_model(self) -> None:
        """Called before the strategy wraps. Builds model and teacher, then lets callbacks act."""
        if self.model is not None:
            return
        self._check_strategy()
        check_versions_agree()
        with loading_partitioned(self.loading_config):
            self.model = self._build()
            if self.loss_weights.distillation > 0:
                self.teacher = frozen_copy(self.model, rebuild=self._build)
        if self.architecture is None:
            self.source_dtype = checkpoint_dtype(self.model_name_or_path)
        if self._trainer is not None:  # load_from_checkpoint has none
            self._shrink_as_evaluated()
            if self.keep_unpruned and not is_partitioned(self.model):
                self.to(self.trainer.strategy.root_device)  # moving later would end the sharing
                self._unpruned = (self.teacher or sharing_copy(self.model),)
            self._let_callbacks_act()
            self._unpruned = ()
        self.model.train()

    def _shrink_as_evaluated(self) -> None:
        """Apply the plan of the checkpoint that is only evaluated, before anything wraps the model.

        In a fit the callback does it that made the plan.
        """
        plan = None if self.trainer.state.fn == TrainerFn.FITTING else self.checkpoint_plan()
        if plan is not None:
            shrink(self.built_model, plan)
            self.plan = plan

    def _build(self) -> PreTrainedModel:
        return build_model(
            self.model_name_or_path,
            architecture=self.architecture,
            dtype=self.dtype_name,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def loading_config(self) -> dict[str, Any] | None:
        """DeepSpeed's configuration if the strategy loads models straight into partitions."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return getattr(strategy, "loading_config", None)

    def _check_strategy(self) -> None:
        """Refuse a strategy that would let random weights become NaN and plans see nothing."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) and not hasattr(strategy, "loading_config"):
            raise LitMoEError(
                f"strategy {type(strategy).__name__} builds models inside deepspeed.zero.Init, "
                "where experts cannot be pruned and random weights become NaN; take strategy: "
                "zero1, zero2, zero3, or class_path: lit_moe.sharding.MoEDeepSpeed"
            )

    def _let_callbacks_act(self) -> None:
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            check_vocabulary(self.built_model, len(tokenizer), tokenizer.name_or_path)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            act = getattr(callback, "on_model_built", None)
            if act is not None:
                act(self.trainer, self)

    @property
    def built_model(self) -> PreTrainedModel:
        """The model, once built."""
        if self.model is None:
            raise RuntimeError("the model is built in configure_model, which has not run yet")
        return self.model

    @property
    def unpruned(self) -> PreTrainedModel | None:
        """The model as it was loaded, while callbacks act and if one set ``keep_unpruned``."""
        return self._unpruned[0] if self._unpruned else None

    @property
    def is_resumed(self) -> bool:
        """Whether this run goes on from a checkpoint."""
        return self.resume_from is not None

    def checkpoint_plan(self) -> KeepPlan | None:
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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted sum of the loss terms and log each."""
        weights = self.loss_weights
        sites = find_sites(self.built_model) if weights.load_balance > 0 else ()
        with recorded_routers(self.built_model, sites) as routers:
            outputs = self._forward(batch)
        mask = batch["attention_mask"]
        terms = {"next_token": next_token_loss(outputs.logits, batch["input_ids"], mask)}
        if self.teacher is not None and weights.distillation > 0:
            terms["distillation"] = logits_distillation_loss(
                outputs.logits, self._teacher_logits(batch), mask, temperature=weights.temperature
            )
        if weights.load_balance > 0:
            seen = [site for site in sites if site.name in routers]
            terms["load_balance"] = load_balancing_loss(
                [routers[site.name] for site in seen], [site.top_k for site in seen]
            )
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
            {"params": [p for p in trained if _is_matrix(p)], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if not _is_matrix(p)], "weight_decay": 0.0},
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
        """Add the plan and the random states of all ranks; leave the frozen teacher out.

        The teacher is what ``model_name_or_path`` gives again. Collective.
        """
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not _is_teacher(k)}
        plan = None if self.plan is None else self.plan.to_dict()
        checkpoint[OURS] = {"plan": plan, "random": self._random_states()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before weights are loaded. Re-applies the plan, and keeps the present teacher.

        Raises:
            PlanError: if the model was pruned by another plan than the checkpoint's.
        """
        data = checkpoint.get(OURS, {}).get("plan")
        plan = None if data is None else KeepPlan.from_dict(data)
        if plan is not None and self.plan is None:
            shrink(self.built_model, plan)
            self.plan = plan
        self.check_plan(plan)
        self._random_to_restore = checkpoint.get(OURS, {}).get("random", [])
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

    def _random_states(self) -> list[dict[str, Any]]:
        state = random_state()
        if self._trainer is None or self.trainer.world_size == 1:
            return [state]
        states: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(states, state)
        return states

    def check_plan(self, plan: KeepPlan | None) -> None:
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

    def _forward(self, batch: Batch) -> Any:
        return self.built_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Tensor:
        assert self.teacher is not None
        self.teacher.eval()
        return self.teacher(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits

    def _log_loss(self, stage: Literal["validation", "test"], batch: Batch) -> None:
        mask = batch["attention_mask"]
        loss = next_token_loss(self._forward(batch).logits, batch["input_ids"], mask)
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True, batch_size=mask.shape[0])


def _is_matrix(parameter: Tensor) -> bool:
    return len(whole_shape(parameter)) >= 2


def _is_teacher(key: str) -> bool:
    return key.startswith("teacher.")
