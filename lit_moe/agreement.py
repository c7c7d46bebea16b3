"""What all processes of a run must have in common."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from lit_moe.contact import introduce
from lit_moe.errors import LitMoEError

PACKAGES = ("lit-moe", "torch", "lightning", "transformers", "deepspeed")


def installed_versions() -> dict[str, str]:
    """Return the versions that decide whether ranks compute the same."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def check_versions_agree() -> None:
    """Refuse a run whose machines have different software. Collective; no-op on one process.

    The first thing that ranks do together: here they also learn where the others run.

    Raises:
        LitMoEError: naming the first package that differs, and on which ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    introduce()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, installed_versions())
    for name, first in everywhere[0].items():
        others = [rank for rank, found in enumerate(everywhere) if found[name] != first]
        if others:
            raise LitMoEError(
                f"rank 0 has {name} {first}, but rank {others[0]} has "
                f"{everywhere[others[0]][name]}: install the same versions on all machines "
                "(constraints.txt lists those that were tested)"
            )


def set_up_of(trainer: Any) -> str:
    """Return in words what all ranks of a run must have been told alike.

    Strategy, ZeRO stage, precision, length, and what callbacks are there and how much they keep.
    """
    strategy = trainer.strategy
    callbacks = [
        f"{type(callback).__name__}({getattr(callback, 'budget', None) or ''})"
        for callback in trainer.callbacks
    ]
    return (
        f"{type(strategy).__name__} (stage {getattr(strategy, 'stage', None)}), precision "
        f"{trainer.precision}, max_steps {trainer.max_steps}, max_epochs {trainer.max_epochs}, "
        f"accumulate_grad_batches {trainer.accumulate_grad_batches} and {', '.join(callbacks)}"
    )


def check_equal_everywhere(what: str, value: object, hint: str) -> None:
    """Refuse a run whose ranks would do different things. Collective; no-op on one process.

    Args:
        what: completes "rank 0 ...".
        value: of this rank; compared by its text.
        hint: what to do about it.

    Raises:
        LitMoEError: naming two ranks that differ.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, str(value))
    others = [rank for rank, found in enumerate(everywhere) if found != everywhere[0]]
    if others:
        raise LitMoEError(
            f"rank 0 {what} {everywhere[0]}, but rank {others[0]} {everywhere[others[0]]}: {hint}"
        )
