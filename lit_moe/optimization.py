"""AdamW or SGD, its learning-rate schedule, and which parameters they train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler

from lit_moe.adapters import find_sites
from lit_moe.errors import LitMoEError
from lit_moe.sharding.partitions import whole_shape

Trained = Literal["all", "routers"]


@dataclass
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    Attributes:
        name: ``adamw`` or ``sgd``.
        learning_rate: peak.
        weight_decay: of matrices; vectors (norms, biases) are not decayed.
        betas: of AdamW.
        momentum: of SGD.
        warmup_steps: linear from 0.
        schedule: name known to ``transformers.get_scheduler``.
        schedule_options: its further arguments, for instance ``{min_lr_rate: 0.1}``.
        trained: ``all`` parameters, or the ``routers`` alone (Router-KD, together with the loss
            ``router``); the others are frozen.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 0
    schedule: str = "cosine"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    trained: Trained = "all"
    name: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse an optimizer that does not exist.

        Raises:
            LitMoEError: with those that do.
        """
        if self.name not in ("adamw", "sgd"):
            raise LitMoEError(f"optimizer.name is {self.name!r}; it can be 'adamw' or 'sgd'")


def freeze_untrained(model: PreTrainedModel, trained: Trained) -> None:
    """Let only the parameters that are to be trained take gradients; ``all`` changes nothing.

    Raises:
        LitMoEError: for an unknown value of ``trained``.
    """
    if trained == "all":
        return
    if trained != "routers":
        raise LitMoEError(f"optimizer.trained is {trained!r}; it can be 'all' or 'routers'")
    kept = router_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)


def router_parameters(model: PreTrainedModel) -> set[str]:
    """Return the names of all parameters that decide which experts a token goes to."""
    sites = find_sites(model)
    within = tuple(f"{site.router}." for site in sites)
    experts = tuple(f"{site.experts}." for site in sites)
    rows = {axis.name for site in sites for axis in site.rows("router")}
    names = [name for name, _ in model.named_parameters()]
    return {n for n in names if n in rows or (n.startswith(within) and not n.startswith(experts))}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that take gradients; only matrices are decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: Iterable[dict[str, Any]] = (
        {"params": [p for p in trained if _is_matrix(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if not _is_matrix(p)], "weight_decay": 0.0},
    )
    filled = [g for g in groups if g["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(filled, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(filled, lr=config.learning_rate, betas=config.betas)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, *, num_steps: int
) -> LRScheduler:
    """Return the schedule of the learning rate over ``num_steps`` optimizer steps."""
    return get_scheduler(
        config.schedule,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=config.schedule_options,
    )


def _is_matrix(parameter: Tensor) -> bool:
    return len(whole_shape(parameter)) >= 2


# It is in every checkpoint, as a hyper-parameter; loading by weights_only=True must know it.
torch.serialization.add_safe_globals(
    [OptimizerConfig, (OptimizerConfig, "lit_moe.module.OptimizerConfig")]
)
