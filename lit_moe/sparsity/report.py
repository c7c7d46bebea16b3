"""What a weight pruning did, for the report of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SparsityReport:
    """Zeros in the experts of a model.

    Attributes:
        method: that chose them.
        pattern: ``N:M`` or a ratio, as it was asked for.
        earlier: statistics of each layer with all earlier layers ``pruned`` or ``dense``.
        zeros: layer -> matrix (``gate``, ``up``, ``down``) -> fraction of weights that are exactly
            0, counted in the weights at the end.
        unrouted: layer -> experts that saw no calibration token; only layers with some.
        steps: training steps in which the zeros were kept.
    """

    method: str
    pattern: str
    earlier: str = "pruned"
    zeros: dict[str, dict[str, float]] = field(default_factory=dict)
    unrouted: dict[str, list[int]] = field(default_factory=dict)
    steps: int = 0
