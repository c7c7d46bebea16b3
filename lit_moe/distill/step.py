"""One training step as the terms of the loss see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.distill.pairing import Pairing, PairingMemory
from lit_moe.plans import Plan
from lit_moe.stats.tap import TokenMask

IGNORED = -100
"""Label of a token that does not count, everywhere in this field."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share a batch.

    Attributes:
        size: how many.
        sum: adds a tensor up over all of them; collective, and leaves its argument alone.
    """

    size: int
    sum: Callable[[Tensor], Tensor]


ALONE = Ranks(1, lambda tensor: tensor)


@dataclass
class Step:
    """Models and batch of one step, and what has been computed of it so far.

    B blocks, S tokens per block, V vocabulary, T = B x S tokens.

    Attributes:
        student: the model that is trained.
        teacher: the model as it was loaded, frozen; None if no term needs it.
        batch: ``input_ids`` and ``attention_mask``, maybe ``labels``, each of shape ``(B, S)``.
        plan: which experts the student kept of those that it was loaded with; None for all.
        origin: which experts of the teacher it was loaded with; None for all.
        ranks: the processes that share the step.
        logits: of the student, after its forward, shape ``(B, S, V)``.
        teacher_logits: of the teacher; None if its forward was not needed.
        values: of the terms so far, by name.
        pairings: those of former steps.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    batch: Mapping[str, Tensor]
    plan: Plan | None = None
    origin: Plan | None = None
    ranks: Ranks = ALONE
    logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    pairings: PairingMemory = field(default_factory=PairingMemory)

    @cached_property
    def token_mask(self) -> TokenMask:
        """Which tokens are no padding."""
        mask = TokenMask()
        mask.set(self.batch)
        return mask

    @cached_property
    def pairing(self) -> Pairing:
        """Which expert of the student stems from which of the teacher."""
        assert self.teacher is not None
        return self.pairings.of(self.student, self.teacher, self.plan, self.origin)

    @cached_property
    def targets(self) -> Targets:
        """Which tokens are to be predicted."""
        return targets_of(self.batch)

    def num_tokens(self, mask: Tensor) -> Tensor | None:
        """Return what a sum over this rank's tokens is divided by, so that ranks average right.

        None where all ranks have equally many, that is without labels. Collective with them.
        """
        if not self.targets.are_labelled:
            return None
        return self.ranks.sum(mask.sum()) / self.ranks.size


@dataclass(frozen=True)
class Targets:
    """What the logits are to predict; tensors of shape ``(B, S)``.

    Attributes:
        ids: token ids.
        counted: 1 where a token is to be predicted from those before it.
        predicting: 1 where the logits predict such a token, or, without labels, at every token.
        are_labelled: whether the batch says which tokens count.
    """

    ids: Tensor
    counted: Tensor
    predicting: Tensor
    are_labelled: bool


def targets_of(batch: Mapping[str, Tensor]) -> Targets:
    """Return the tokens to predict: those with a label, or all that are no padding.

    Args:
        batch: ``input_ids`` and ``attention_mask``, and maybe ``labels`` (the ids again, -100 where
            a token does not count), each of shape ``(B, S)``.
    """
    mask_BS, labels_BS = batch["attention_mask"], batch.get("labels")
    if labels_BS is None:
        return Targets(batch["input_ids"], mask_BS, mask_BS, are_labelled=False)
    counted_BS = mask_BS * (labels_BS != IGNORED)
    predicting_BS = torch.cat([counted_BS[:, 1:], torch.zeros_like(counted_BS[:, :1])], dim=1)
    ids_BS = labels_BS.masked_fill(labels_BS == IGNORED, 0)
    return Targets(ids_BS, counted_BS, predicting_BS, are_labelled=True)
