"""What one observed pass leaves behind: a handful of sums per expert, never an activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerStats:
    """Sums over the observed tokens of one MoE layer; tensors are float64, shape ``(E,)``, on CPU.

    ``f_e(x)`` is the raw output of expert ``e`` (not multiplied by its routing weight), ``g_e(x)``
    the weight that the model itself gives it, ``p_e(x)`` the router's probability over all experts.

    Attributes:
        tokens: tokens seen, padding excluded.
        count: tokens routed to each expert.
        gate_sum: sum of ``g_e(x)`` over the tokens routed to ``e``.
        probability_sum: sum of ``p_e(x)`` over all tokens.
        norm_sum: sum of ``||f_e(x)||_2`` over the tokens routed to ``e``.
        weighted_norm_sum: sum of ``g_e(x) ||f_e(x)||_2``.
        squared_norm_sum: sum of ``||f_e(x)||_2^2``.
        max_abs: largest ``|f_e(x)_j|`` seen; 0 for an expert without tokens.
    """

    tokens: int
    count: Tensor
    gate_sum: Tensor
    probability_sum: Tensor
    norm_sum: Tensor
    weighted_norm_sum: Tensor
    squared_norm_sum: Tensor
    max_abs: Tensor

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
