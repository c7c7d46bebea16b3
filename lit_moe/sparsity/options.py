"""What a user may ask of weight pruning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from lit_moe.errors import LitMoEError
from lit_moe.sparsity.patterns import Pattern, parse_pattern

Method = Literal["magnitude", "wanda", "moe_pruner", "sparsegpt"]
UnroutedRule = Literal["magnitude", "keep", "error"]
Earlier = Literal["pruned", "dense"]


@dataclass(frozen=True)
class SparsityOptions:
    """Which weights of the routed experts go; all methods have the same budget.

    Attributes:
        method: ``magnitude``: ``|W|``. ``wanda`` (arXiv 2306.11695): ``|W_ij| ||X_j||`` over the
            tokens routed to the expert. ``moe_pruner`` (arXiv 2410.12013): ``|W_ij| ||g X_j||``,
            each token weighted by its routing weight. ``sparsegpt`` (arXiv 2301.00774): by the
            loss of a least-squares fit, whose other weights make up for those that go.
        pattern: ``"N:M"``: of every M consecutive inputs of a neuron N go.
        ratio: instead of a pattern: the fraction of each neuron's inputs that goes, in (0, 1).
        unrouted: experts that saw no token are pruned by ``magnitude``, ``keep`` all weights, or
            are an ``error``.
        earlier: whether statistics of a layer are taken with all layers before it ``pruned`` (each
            expert runs twice), or ``dense`` (one plain pass).
    """

    method: Method = "moe_pruner"
    pattern: str | None = None
    ratio: float | None = None
    unrouted: UnroutedRule = "magnitude"
    earlier: Earlier = "pruned"

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("unrouted", UnroutedRule), ("earlier", Earlier)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise LitMoEError(f"{name}={getattr(self, name)!r} is unknown; known: {known}")
        parse_pattern(self.pattern, self.ratio)

    @cached_property
    def parsed(self) -> Pattern:
        """The pattern or ratio."""
        return parse_pattern(self.pattern, self.ratio)

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is read at all."""
        return self.method != "magnitude"
