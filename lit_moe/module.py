"""The LightningModule: builds the model, steps, optimizer, losses. It knows no pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lit_moe.agreement import check_equal_everywhere, check_versions_agree, set_up_of
from lit_moe.assets import EMBEDDED
from lit_moe.checkpoint_io import keep_whole
from lit_moe.distill.images import accuracy, check_image_weights, image_recovery, takes_images
from lit_moe.distill.losses import next_token_loss, next_token_nll
from lit_moe.distill.step import Ranks, Step, targets_of
from lit_moe.distill.weights import LossWeights as LossWeights
from lit_moe.errors import LitMoEError
from lit_moe.models import (
    DType,
    build_model,
    check_vocabulary,
    checkpoint_dtype,
    sharing_copy,
)
from lit_moe.models.vision import check_images, check_labels
from lit_moe.optimization import OptimizerConfig as OptimizerConfig
from lit_moe.optimization import build_optimizer, build_schedule, freeze_untrained
from lit_moe.resuming import read_header
from lit_moe.sharding.partitions import is_partitioned, loading_partitioned
from lit_moe.taught import TaughtModule
from lit_moe.teachers import TeacherConfig as TeacherConfig

Batch = Mapping[str, Tensor]


class MoEModule(TaughtModule):
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
        teacher: who is imitated by the terms of the loss that need one; None takes the model as it
            was loaded. A model that lit-moe exported after dropping experts can learn from the
            one that it was made from: experts are paired by their former numbers.
        num_labels: of an image classifier; another number than the checkpoint's gives it a new,
            random classifier.
    """

    def __init__(
        self,
        model_name_or_path: str = EMBEDDED,
        architecture: dict[str, Any] | None = None,
        dtype: DType = "float32",
        optimizer: OptimizerConfig | None = None,
        loss: LossWeights | None = None,
        trust_remote_code: bool = False,
        num_labels: int | None = None,
        teacher: TeacherConfig | None = None,
    ) -> None:
        super().__init__(loss or LossWeights(), teacher)
        self.model_name_or_path = model_name_or_path
        self.architecture = architecture
        self.dtype_name = dtype
        self.optimizer_config = optimizer or OptimizerConfig()
        self.trust_remote_code = trust_remote_code
        self.num_labels = num_labels
        self.source_dtype: str | None = None
        self.keep_unpruned = False
        self._unpruned: tuple[PreTrainedModel, ...] = ()  # a tuple, so that it is no submodule
        self.save_hyperparameters(logger=False)

    def configure_model(self) -> None:
        """Called before the strategy wraps. Builds model and teacher, then lets callbacks act."""
        if self.model is not None:
            return
        self._check_strategy()
        check_versions_agree()
        self._check_checkpoint()
        with loading_partitioned(self.loading_config):
            self.model = self.build()
            if takes_images(self.model):
                check_image_weights(self.loss_weights)
            else:
                self.recovery.check(self.model)
        self.add_teacher(self.model)
        if self.architecture is None:
            self.source_dtype = checkpoint_dtype(self.model_name_or_path)
        if self._trainer is not None:  # load_from_checkpoint has none
            self.open_cache(self.model)
            self.shrink_as_evaluated()
            if self.keep_unpruned and not is_partitioned(self.model):
                self.to(self.trainer.strategy.root_device)  # moving later would end the sharing
                own = self.teacher if self.teacher_config is None else None
                self._unpruned = (own or sharing_copy(self.model),)
            self._let_callbacks_act()
            self._unpruned = ()
        freeze_untrained(self.model, self.optimizer_config.trained)
        self.model.train()

    def build(self) -> PreTrainedModel:
        """Return the model as it is loaded."""
        return build_model(
            self.model_name_or_path,
            architecture=self.architecture,
            dtype=self.dtype_name,
            trust_remote_code=self.trust_remote_code,
            num_labels=self.num_labels,
        )

    def _check_strategy(self) -> None:
        """Refuse a strategy that would let random weights become NaN and plans see nothing."""
        strategy = None if self._trainer is None else self.trainer.strategy
        # The class is asked: the strategy itself would settle its configuration before its time.
        is_ours = hasattr(type(strategy), "loading_config")
        if isinstance(strategy, DeepSpeedStrategy) and not is_ours:
            raise LitMoEError(
                f"strategy {type(strategy).__name__} builds models inside deepspeed.zero.Init, "
                "where experts cannot be pruned and random weights become NaN; take strategy: "
                "zero1, zero2, zero3, or class_path: lit_moe.sharding.MoEDeepSpeed"
            )

    def _check_checkpoint(self) -> None:
        """Let all ranks go on from the same step, or none."""
        if self._trainer is None:
            return
        keep_whole(self.trainer.strategy)
        check_equal_everywhere(
            "was set up with",
            set_up_of(self.trainer),
            "start all ranks with the same configuration",
        )
        header = None if self.resume_from is None else read_header(self.resume_from)
        check_equal_everywhere(
            "resumes",
            "from the beginning" if header is None else f"{header.path.name}, step {header.step}",
            "keep trainer.default_root_dir in a folder that all machines share, or name one "
            "checkpoint by --ckpt_path PATH",
        )

    def _let_callbacks_act(self) -> None:
        tokenizer = self.data_tokenizer
        if tokenizer is not None:
            check_vocabulary(self.built_model, len(tokenizer), tokenizer.name_or_path)
        names = getattr(getattr(self.trainer, "datamodule", None), "label_names", None)
        if names is not None:
            check_images(self.built_model, self.trainer.datamodule.image_shape)  # type: ignore[attr-defined]
            check_labels(self.built_model, names)
        for hook in ("check_model", "on_model_built"):
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                act = getattr(callback, hook, None)
                if act is not None:
                    act(self.trainer, self)

    @property
    def unpruned(self) -> PreTrainedModel | None:
        """The model as it was loaded, while callbacks act and if one set ``keep_unpruned``."""
        return self._unpruned[0] if self._unpruned else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted sum of the loss terms and log each. Collective."""
        if "pixel_values" in batch:
            recovery = image_recovery(self.built_model, self.teacher, batch, self.loss_weights)
        else:
            ranks = Ranks(self.trainer.world_size, self.sum_over_ranks)
            step = Step(self.built_model, self.teacher, batch, self.plan, self.origin, ranks)
            recovery = self.recovery(step)
        self.log("train/loss", recovery.total, prog_bar=True)
        logged = {**recovery.values, **recovery.details}
        self.log_dict({f"train/{name}": value for name, value in logged.items()})
        return recovery.total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean next-token loss in nats; of images loss and accuracy."""
        self._log_loss("validation", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean next-token loss in nats."""
        self._log_loss("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the nats per predicted token, shape ``(B, S-1)``, without rows of padding only.

        Of images the labels found likeliest, shape ``(B,)``.
        """
        if "pixel_values" in batch:
            return self.built_model(pixel_values=batch["pixel_values"]).logits.argmax(dim=-1)
        mask = batch["attention_mask"]
        nll = next_token_nll(self._forward(batch).logits, batch["input_ids"], mask)
        return nll[mask.any(dim=1)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the parameters that take gradients, and the schedule."""
        optimizer = build_optimizer(self.built_model, self.optimizer_config)
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = build_schedule(optimizer, self.optimizer_config, num_steps=num_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def loss_state(self) -> dict[str, Any]:
        """Return what the loss remembers of former steps."""
        return self.recovery.state()

    def load_loss_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`loss_state` gave."""
        self.recovery.load_state(state)

    def _forward(self, batch: Batch) -> Any:
        return self.built_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )

    def _log_loss(self, stage: Literal["validation", "test"], batch: Batch) -> None:
        """Log a mean over tokens: over all, or over those with a label."""
        if "pixel_values" in batch:
            self._log_image_loss(stage, batch)
            return
        targets = targets_of(batch)
        loss = next_token_loss(self._forward(batch).logits, targets.ids, targets.counted)
        counted = targets.counted[:, 1:]
        share = int((counted if targets.are_labelled else counted.any(dim=1)).sum())
        share *= self.trainer.world_size  # lightning divides it by that, in whole numbers
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True, batch_size=share)

    def _log_image_loss(self, stage: str, batch: Batch) -> None:
        logits, labels = (
            self.built_model(pixel_values=batch["pixel_values"]).logits,
            batch["labels"],
        )
        values = {"loss": cross_entropy(logits, labels), "accuracy": accuracy(logits, labels)}
        for name, value in values.items():
            self.log(
                f"{stage}/{name}", value, prog_bar=True, sync_dist=True, batch_size=len(labels)
            )
