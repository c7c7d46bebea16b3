"""Tells from what a router returned how it turns logits into weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Routing = Literal["softmax", "sigmoid", "custom"]


def classify(
    logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor
) -> tuple[Routing, bool | None]:
    """Return the kind of routing and whether the chosen weights are divided by their sum.

    A constant factor on all weights is allowed. With one expert per token a renormalised weight is
    always 1 and looks like softmax.
    """
    logits_TE = logits_TE.float()
    kinds: tuple[tuple[Routing, Tensor], ...] = (
        ("softmax", torch.softmax(logits_TE, -1)),
        ("sigmoid", logits_TE.sigmoid()),
    )
    for routing, scores_TE in kinds:
        chosen_TK = scores_TE.gather(1, index_TK)
        for renormalised in (False, True):
            expected_TK = chosen_TK / chosen_TK.sum(1, keepdim=True) if renormalised else chosen_TK
            if _is_constant(weights_TK / expected_TK):
                return routing, renormalised
    return "custom", None


def classify_output(output: object) -> tuple[Routing, bool | None]:
    """As :func:`classify`, of whatever a router returned; "custom" if it is no usual triple."""
    if not isinstance(output, tuple) or len(output) < 3:
        return "custom", None
    logits, weights, index = output[:3]
    if not isinstance(index, Tensor) or index.is_floating_point() or index.ndim < 2:
        return "custom", None
    return classify(*(part.reshape(-1, part.shape[-1]) for part in (logits, weights, index)))


def _is_constant(ratio: Tensor, tolerance: float = 1e-3) -> bool:
    return bool(ratio.max() - ratio.min() <= tolerance * ratio.abs().mean())
