"""Which terms a recovery loss has, as fields of a YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

from lit_moe.errors import LitMoEError

Alignment = Literal["forced", "own", "dense"]


@dataclass
class LossWeights:
    """Weight of each term of the training loss; a term of weight 0 is not computed.

    Attributes:
        next_token: cross-entropy of the text itself.
        distillation: KL from the unpruned model's next-token distribution; above 0, a frozen copy
            of the model is kept as the teacher, as for ``experts`` and ``router``.
        temperature: of the distillation.
        top_k: compare only with the teacher's so many likeliest tokens, made to sum to 1; None
            takes all.
        cache: folder that holds those likeliest tokens on disk, completed before anything is
            pruned; then the distillation needs no teacher in memory. Needs ``top_k``.
        load_balance: Switch auxiliary loss over the router's logits.
        experts: expert-wise distillation (MoE-Pruner, arXiv 2410.12013): squared difference of the
            outputs of each expert and its original, summed over layers and experts.
        experts_lambda: factor of that sum; None takes next-token loss over sum at the first step,
            so that both begin equal, and keeps it.
        alignment: on which tokens experts are compared: ``forced``: those that the teacher sent to
            the expert; ``own``: those that the student sends, both fed the student's hidden states;
            ``dense``: all, which runs every expert for every token.
        router: KL from the teacher's router probabilities.
    """

    next_token: float = 1.0
    distillation: float = 0.0
    temperature: float = 1.0
    load_balance: float = 0.0
    experts: float = 0.0
    experts_lambda: float | None = None
    alignment: Alignment = "forced"
    router: float = 0.0
    top_k: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no term can use."""
        for name in (f.name for f in fields(self) if f.type == "float"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise LitMoEError(f"loss.{name} is {value}; it must be a number of at least 0")
        for name in ("temperature", "experts_lambda"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise LitMoEError(f"loss.{name} is {value}; it must be a number above 0")
        if self.alignment not in get_args(Alignment):
            raise LitMoEError(
                f"loss.alignment is {self.alignment!r}; it can be {', '.join(get_args(Alignment))}"
            )
        self._check_cache()

    def _check_cache(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise LitMoEError(f"loss.top_k is {self.top_k}; it must be at least 1, or null for all")
        if self.cache is None:
            return
        if self.top_k is None:
            raise LitMoEError(
                f"loss.cache is {self.cache!r}, but whole distributions are not kept on disk; set "
                "loss.top_k, for instance 64"
            )
        if self.distillation == 0:
            raise LitMoEError(
                f"loss.cache is {self.cache!r}, but loss.distillation is 0, so that nothing would "
                "read it; set loss.distillation, or leave the cache out"
            )


# It is in every checkpoint, as a hyper-parameter; loading by weights_only=True must know it.
torch.serialization.add_safe_globals([LossWeights, (LossWeights, "lit_moe.module.LossWeights")])
