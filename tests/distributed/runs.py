"""One small fit in every mode, in processes forked from this one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest

from lit_moe import MoEModule
from lit_moe.data import TextDataModule
from lit_moe.module import LossWeights, OptimizerConfig
from lit_moe.sharding import MoEDeepSpeed
from lit_moe.testing import run_distributed

GLOBAL_BATCH = 8
MODES: dict[str, tuple[Any, int]] = {
    "single": ("auto", 1),
    "ddp": ("ddp", 2),
    "zero1": (1, 2),
    "zero2": (2, 2),
    "zero3": (3, 2),
    "zero3-sharded-load": ("sharded", 2),
}


def some(first, slow):
    """Modes as parameters: the first in every run of the tests, the others in `make test-all`."""
    return [*first, *[pytest.param(mode, marks=pytest.mark.slow) for mode in slow]]


def strategy_of(mode):
    """The strategy of a mode; tiny parameters are really sharded under stage 3."""
    kind = MODES[mode][0]
    if kind in ("auto", "ddp"):
        return kind
    strategy = (
        MoEDeepSpeed(stage=3, shard_on_load=True) if kind == "sharded" else MoEDeepSpeed(stage=kind)
    )
    strategy._content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return strategy


class Losses(L.Callback):
    """The loss of each batch, averaged over ranks."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, _, outputs, *__):
        loss = outputs["loss"].detach().clone()
        self.values.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))


@dataclass
class Setup:
    """What all fits of a test share."""

    checkpoint: Any
    text: str
    folder: Any
    options: dict = field(default_factory=dict)

    def validate(self, mode, checkpoint, *, look):
        """Evaluate a checkpoint, with nothing fitted before."""
        return self.fit(mode, look=look, resume=checkpoint, evaluate=True, limit_val_batches=4)

    def fit(self, mode, name="run", callbacks=lambda: [], *, look=None, resume=None, **options):
        """Fit in one mode; return per rank the losses, or what ``look(trainer, module)`` says."""
        world_size = options.get("ranks", MODES[mode][1])

        def rank(_):
            warnings.simplefilter("ignore")  # those of deepspeed are not ours to mend
            return self._fit_here(
                mode, name, callbacks(), look, resume, {**self.options, **options}
            )

        return run_distributed(rank, world_size, group=False)

    def _fit_here(self, mode, name, callbacks, look, resume, options):
        world_size = options.pop("ranks", MODES[mode][1])
        L.seed_everything(1, verbose=False)
        distillation = options.pop("distillation", 0.0)
        evaluate, tell_module = options.pop("evaluate", False), options.pop("tell_module", True)
        accumulate = options.get("accumulate_grad_batches", 1)
        data = TextDataModule(
            calibration_files=[self.text],
            train_files=[self.text],
            validation_files=[self.text],
            test_files=[self.text],
            sequence_length=32,
            batch_size=options.pop("batch_size", GLOBAL_BATCH // world_size // accumulate),
            calibration_tokens=options.pop("calibration_tokens", 512),
        )
        module = MoEModule(
            str(self.checkpoint),
            optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, warmup_steps=3),
            loss=LossWeights(next_token=1 - distillation, distillation=distillation),
        )
        losses = Losses()
        defaults = {
            "max_steps": 20,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": False,
        }
        strategy = options.pop("strategy", lambda: strategy_of(mode))()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=world_size,
            strategy=strategy,
            default_root_dir=str(self.folder / name / mode),
            callbacks=[losses, *callbacks],
            **{**defaults, **options},
        )
        module.resume_from = resume if tell_module else None
        if evaluate:
            trainer.validate(module, datamodule=data, ckpt_path=resume, verbose=False)
        else:
            trainer.fit(module, datamodule=data, ckpt_path=resume)
        return losses.values if look is None else look(trainer, module)
