"""What becomes of experts that the calibration data never reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from lit_moe.errors import LitMoEError

UnroutedRule = Literal["keep", "drop", "error"]


class Seen(Protocol):
    """What was observed, routed or by gradients."""

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        ...

    @property
    def unrouted(self) -> Mapping[str, tuple[int, ...]]:
        """Layer name -> experts that saw no token, only for layers that have some."""
        ...


_FORCED = {"keep": math.inf, "drop": -math.inf}


def apply_unrouted(
    scores: Mapping[str, Tensor], observation: Seen, rule: UnroutedRule
) -> dict[str, Tensor]:
    """Return the scores with the experts that saw no token set by ``rule``.

    Args:
        scores: layer name -> ``(E,)``; left as it is.
        observation: says which experts saw no token.
        rule: ``keep`` scores them +inf (the data says nothing about them, so spare them),
            ``drop`` -inf (unused is useless), ``error`` refuses to guess.

    Returns:
        New tensors for the layers that have such experts, the same ones for the others. The rule
        ranks, it does not force: with more spared experts than places, the lower ids stay.

    Raises:
        LitMoEError: under ``error``, listing layers and expert ids; or for an unknown rule.

    >>> from lit_moe.stats.observation import LayerStats, Observation
    >>> zeros = torch.zeros(3, dtype=torch.float64)
    >>> stats = LayerStats(4, torch.tensor([4.0, 0.0, 4.0]), *[zeros] * 6)
    >>> scores = {"mlp": torch.tensor([1.0, 5.0, 2.0])}
    >>> apply_unrouted(scores, Observation({"mlp": stats}), "drop")
    {'mlp': tensor([1., -inf, 2.])}
    """
    if rule not in ("keep", "drop", "error"):
        raise LitMoEError(f"unrouted={rule!r} is no rule: use 'keep', 'drop' or 'error'")
    unrouted = {name: ids for name, ids in observation.unrouted.items() if name in scores}
    if unrouted and rule == "error":
        listed = "; ".join(f"{name}: {list(ids)}" for name, ids in unrouted.items())
        raise LitMoEError(
            f"{sum(map(len, unrouted.values()))} experts saw none of the {observation.tokens} "
            f"calibration tokens ({listed}); calibrate on more text or set unrouted to "
            f"'keep' or 'drop'"
        )
    result = dict(scores)
    for name, ids in unrouted.items():
        result[name] = scores[name].index_fill(0, torch.tensor(ids), _FORCED[rule])
    return result
