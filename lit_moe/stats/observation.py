"""What one observed pass leaves behind: a handful of sums per expert, never an activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from torch import Tensor

Gathered = Literal["pairs", "vocabulary", "outputs"]
"""What a pass gathers only when asked: see :class:`LayerStats`."""
GATHERABLE: tuple[Gathered, ...] = ("pairs", "vocabulary", "outputs")


@dataclass(frozen=True)
class LayerStats:
    """Sums over the observed tokens of one MoE layer; tensors are float64, shape ``(E,)``, on CPU.

    ``f_e(x)`` is the raw output of expert ``e`` (not multiplied by its routing weight), ``g_e(x)``
    the weight that the model itself gives it, ``p_e(x)`` the router's probability over all experts.
    The attributes from ``pair_count`` on are None unless the pass was asked to gather them.

    Attributes:
        tokens: tokens seen, padding excluded.
        count: tokens routed to each expert.
        gate_sum: sum of ``g_e(x)`` over the tokens routed to ``e``.
        probability_sum: sum of ``p_e(x)`` over all tokens.
        norm_sum: sum of ``||f_e(x)||_2`` over the tokens routed to ``e``.
        weighted_norm_sum: sum of ``g_e(x) ||f_e(x)||_2``.
        squared_norm_sum: sum of ``||f_e(x)||_2^2``.
        max_abs: largest ``|f_e(x)_j|`` seen; 0 for an expert without tokens.
        pair_count: tokens routed to both of two experts, shape ``(E, E)``; its diagonal is
            ``count``. Gathered as ``pairs``.
        vocabulary_overlap: distinct token ids that both of two experts were sent, shape ``(E, E)``;
            its diagonal counts those of one expert. Gathered as ``vocabulary``.
        vocabulary_size: token ids that there are. Gathered as ``vocabulary``.
        output_sum: sum of ``f_e(x)``, shape ``(E, H)``. Gathered as ``outputs``, like the next.
        output_square_sum: sum of ``f_e(x)_j^2``, shape ``(E, H)``.
        direction_sum: sum of ``f_e(x) / ||f_e(x)||_2``, shape ``(E, H)``; an output of 0 adds 0.
        outlier_count: entries ``f_e(x)_j`` further from the mean of ``f_e(x)`` over its H entries
            than three of their standard deviations, shape ``(E,)``.
    """

    tokens: int
    count: Tensor
    gate_sum: Tensor
    probability_sum: Tensor
    norm_sum: Tensor
    weighted_norm_sum: Tensor
    squared_norm_sum: Tensor
    max_abs: Tensor
    _: KW_ONLY
    pair_count: Tensor | None = None
    vocabulary_overlap: Tensor | None = None
    vocabulary_size: int | None = None
    output_sum: Tensor | None = None
    output_square_sum: Tensor | None = None
    direction_sum: Tensor | None = None
    outlier_count: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer."""
        return self.count.numel()

    @property
    def unrouted(self) -> tuple[int, ...]:
        """Ids of the experts that saw no token."""
        return tuple((self.count == 0).nonzero().flatten().tolist())

    @property
    def load_cv(self) -> float:
        """Standard deviation over mean of the tokens per expert (0 = even load)."""
        return float(self.count.std(unbiased=False) / self.count.mean())


@dataclass(frozen=True)
class Observation:
    """Layer name -> :class:`LayerStats`, in the order of the model's layers."""

    layers: Mapping[str, LayerStats]

    @property
    def tokens(self) -> int:
        """Tokens seen by the layer that saw the most (encoder and decoder may differ)."""
        return max(stats.tokens for stats in self.layers.values())

    @property
    def num_experts(self) -> dict[str, int]:
        """Layer name -> number of routed experts."""
        return {name: stats.num_experts for name, stats in self.layers.items()}

    @property
    def unrouted(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> experts that saw no token, only for layers that have some."""
        return {name: s.unrouted for name, s in self.layers.items() if s.unrouted}
