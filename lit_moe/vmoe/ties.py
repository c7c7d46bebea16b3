"""Scores that cannot tell experts apart because every expert takes as many tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig

ROUNDING = 1e-5
"""Relative differences below this come from the order of a sum in single precision."""


def tie_under_expert_choice(
    config: PreTrainedConfig, scores: Mapping[str, Tensor], criterion: str
) -> str | None:
    """Return a sentence if experts choose tokens and the scores of every layer are equal.

    Args:
        config: of the model.
        scores: layer name -> scores, shape ``(E,)``.
        criterion: that gave them.

    Returns:
        What happened and what would work; None for any other router, or if a layer has a choice.
    """
    if getattr(config, "router_type", None) != "expert_choice":
        return None
    if not scores or not all(_are_equal(values) for values in scores.values()):
        return None
    return (
        f"criterion {criterion!r} rates all experts of every layer alike, since under expert "
        "choice each takes the same number of tokens, so that ids or rounding decide; take "
        "router_change, router_norm, reap or obs"
    )


def _are_equal(scores_E: Tensor) -> bool:
    spread = (scores_E.max() - scores_E.min()).item()
    return len(scores_E) > 1 and spread <= ROUNDING * scores_E.abs().max().item()
