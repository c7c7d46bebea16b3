"""Take a model out of what a strategy wrapped it in, while training, and wrap it again."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning import Trainer
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_moe.callbacks.rounds import FineTuning
from lit_moe.callbacks.weight_sparsity import WeightPruning
from lit_moe.errors import LitMoEError

Compact = Literal["end", "each_round"]


def check_compact(compact: Compact, fine_tuning: FineTuning | None) -> None:
    """Refuse an unknown moment, and moments of an optimizer that would fit no parameter.

    Raises:
        LitMoEError: saying what would work.
    """
    if compact not in get_args(Compact):
        raise LitMoEError(f"compact={compact!r} is unknown; use end or each_round")
    kept = fine_tuning is not None and fine_tuning.optimizer == "keep"
    if compact == "each_round" and kept:
        raise LitMoEError(
            "compact: each_round makes parameters anew, for which fine_tuning.optimizer: keep has "
            "no moments; set it to reset, or compact: end"
        )


def check_can_rewrap(trainer: Trainer) -> None:
    """Refuse strategies whose wrapping cannot be made twice, and masks that fit one shape only.

    Raises:
        LitMoEError: for strategies other than one device, DDP and ours, and beside WeightPruning.
    """
    strategy: Any = trainer.strategy
    plain = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    if not plain and not hasattr(strategy, "wrap_again"):
        name = type(strategy).__name__
        raise LitMoEError(
            f"compact: each_round wraps the model anew in each round, which {name} cannot; take "
            "one device, ddp, or zero1 to zero3 (lit_moe.sharding.MoEDeepSpeed), or compact: end"
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, WeightPruning) for callback in callbacks):
        raise LitMoEError(
            "compact: each_round cuts experts out of matrices whose zeros WeightPruning keeps by "
            "place; take compact: end, or thin the exported model in a run of its own"
        )


def unwrap(trainer: Trainer) -> None:
    """Take the model out of its engine or out of DDP: no step until it is wrapped again."""
    strategy: Any = trainer.strategy
    release = getattr(strategy, "release_model", None)
    if release is not None:
        release()
    elif isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module


def wrap_again(trainer: Trainer) -> None:
    """Wrap a model whose parameters are others now, with a new optimizer and schedule. Collective.

    Args:
        trainer: in training, its model unwrapped.
    """
    strategy: Any = trainer.strategy
    if hasattr(strategy, "wrap_again"):
        strategy.wrap_again()
        return
    if isinstance(strategy, DDPStrategy):
        strategy.configure_ddp()
    strategy.setup_optimizers(trainer)
    _optimizers_to_device(strategy.optimizers, strategy.root_device)
