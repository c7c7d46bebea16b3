"""The training between two rounds of dropping: how long it can be, and how it begins anew."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from lightning import Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler
from transformers import get_scheduler

from lit_moe.callbacks.rounds import TrainingData
from lit_moe.errors import LitMoEError
from lit_moe.module import OptimizerConfig


def training_data(trainer: Trainer) -> TrainingData:
    """Return what one pass over the run's training text is, without reading a batch.

    Raises:
        LitMoEError: if the run has no training text.
    """
    data: Any = getattr(trainer, "datamodule", None)
    loader = None if data is None else data.train_dataloader()
    if loader is None or trainer.limit_train_batches == 0:
        raise LitMoEError(
            "fine_tuning is asked for, but the run has no training text (limit_train_batches is "
            f"{trainer.limit_train_batches}); give data.init_args.train_files, or leave "
            "fine_tuning out"
        )
    batches = len(loader) if isinstance(loader, Sized) else None
    if batches is not None and not isinstance(loader.sampler, DistributedSampler):
        batches //= trainer.world_size  # lightning will share it out
    limit = trainer.limit_train_batches
    if batches is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    accumulated = trainer.accumulate_grad_batches
    tokens = None
    if hasattr(loader.dataset, "__getitem__"):
        tokens = loader.dataset[0]["input_ids"].numel() * loader.batch_size
        tokens *= accumulated * trainer.world_size
    epochs = trainer.max_epochs
    return TrainingData(
        tokens_per_step=tokens,
        steps_per_epoch=None if batches is None else -(-batches // accumulated),
        max_epochs=-1 if epochs is None else epochs,
    )


def empty_moments(optimizer: Any) -> None:
    """Set the state of an optimizer to zero in place, as it is before the first step of AdamW."""
    inner = getattr(optimizer, "optimizer", optimizer)  # what DeepSpeed wraps
    for state in inner.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[name] = type(value)(0)


def restart_optimizer(trainer: Trainer, config: OptimizerConfig, steps: int) -> None:
    """Empty the optimizer's moments and begin a learning-rate schedule of so many steps.

    Args:
        trainer: of the run, once a strategy has wrapped the model.
        config: names the schedule.
        steps: of the round; 0 leaves the schedule alone.
    """
    for optimizer in trainer.optimizers:
        empty_moments(optimizer)
    for entry in trainer.lr_scheduler_configs if steps else ():
        entry.scheduler = get_scheduler(
            config.schedule,
            entry.scheduler.optimizer,
            num_warmup_steps=min(config.warmup_steps, steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=config.schedule_options,
        )


def set_max_steps(trainer: Trainer, total: int) -> None:
    """Let the trainer end with the last round.

    Raises:
        LitMoEError: if it was told to end earlier.
    """
    asked = trainer.max_steps
    if asked != -1 and asked < total:
        raise LitMoEError(
            f"fine_tuning takes {total:,} steps, but trainer.max_steps is {asked:,}: set it to -1, "
            "the rounds know when to end"
        )
    trainer.fit_loop.epoch_loop.max_steps = total
