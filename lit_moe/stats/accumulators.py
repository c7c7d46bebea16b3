"""Float64 sums per layer and expert as one torchmetrics Metric, so that they reduce over ranks.

L layers, E experts (of the widest layer), T tokens, S slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_moe.errors import CalibrationError
from lit_moe.stats.observation import LayerStats, Observation
from lit_moe.stats.slots import Slots

_CHUNK = 1024  # rows: a converted chunk stays in the cache of a CPU core
_ROWS = ("count", "gate_sum", "norm_sum", "weighted_norm_sum", "squared_norm_sum")


class RoutedSums(Metric):
    """All sums that the routed criteria need, from one pass.

    Args:
        num_experts: layer name -> number of routed experts.
    """

    full_state_update = False
    sums: Tensor
    probability: Tensor
    max_abs: Tensor
    tokens: Tensor

    def __init__(self, num_experts: Mapping[str, int]) -> None:
        super().__init__()
        self.num_experts = dict(num_experts)
        self._row = {name: i for i, name in enumerate(num_experts)}
        shape = (len(num_experts), max(num_experts.values()))
        zeros = torch.zeros(shape, dtype=torch.float64)
        self.add_state("sums", zeros.expand(len(_ROWS), *shape).clone(), dist_reduce_fx="sum")
        self.add_state("probability", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("max_abs", zeros.clone(), dist_reduce_fx="max")
        self.add_state("tokens", zeros[:, 0].clone(), dist_reduce_fx="sum")

    def update(self, layer: str, slots: Slots, mask_T: Tensor | None) -> None:
        """Add the slots of one forward of one layer.

        Args:
            layer: name of the MoE layer.
            slots: see :class:`Slots`; ids at or above the layer's expert count (identity and other
                null experts) are left out.
            mask_T: True where a token counts; None when all do.
        """
        width = self.num_experts[layer]
        counted = slots.expert_ids < width
        if mask_T is not None:
            counted &= mask_T[slots.token_ids]
        norms = _row_norms(slots.outputs).double()
        peaks = torch.maximum(slots.outputs.amax(dim=-1), -slots.outputs.amin(dim=-1)).double()
        gates = slots.gates.double()
        values = torch.stack(
            [torch.ones_like(norms), gates, norms, gates * norms, norms * norms]
        ).masked_fill_(~counted, 0.0)
        ids = slots.expert_ids.clamp(max=width - 1)
        row = self._row[layer]
        self.sums[:, row].index_add_(1, ids, values)
        self.max_abs[row].scatter_reduce_(0, ids, peaks.masked_fill_(~counted, 0.0), "amax")

    def add_probabilities(self, layer: str, probability_TE: Tensor, mask_T: Tensor | None) -> None:
        """Add the router's probabilities of one forward of one layer, and count its tokens."""
        row, width = self._row[layer], self.num_experts[layer]
        if mask_T is not None:
            probability_TE = probability_TE[mask_T]
        self.probability[row, :width] += probability_TE.sum(dim=0, dtype=torch.float64)
        self.tokens[row] += probability_TE.shape[0]

    def check_finite(self) -> None:
        """Refuse sums that are no longer numbers.

        Raises:
            CalibrationError: naming the first layer whose experts gave NaN or infinity.
        """
        finite = self.sums.isfinite().all(dim=2).all(dim=0) & self.max_abs.isfinite().all(dim=1)
        if not finite.all():
            names = list(self._row)
            bad = [names[i] for i in (~finite).nonzero().flatten().tolist()]
            raise CalibrationError(
                f"expert outputs of layer {bad[0]!r} became NaN or infinite during calibration "
                f"({len(bad)} of {len(names)} layers affected); try dtype float32, or look for a "
                "damaged weight in that layer"
            )

    def compute(self) -> dict[str, Tensor]:
        """Return all states, reduced over ranks, on the CPU."""
        names = ("sums", "probability", "max_abs", "tokens")
        return {name: getattr(self, name).cpu() for name in names}

    def observation(self) -> Observation:
        """Return what was seen, layer by layer. Collective: every rank must call it."""
        states = self.compute()
        layers = {}
        for name, row in self._row.items():
            width = self.num_experts[name]
            sums: dict[str, Any] = {
                key: states["sums"][i, row, :width] for i, key in enumerate(_ROWS)
            }
            layers[name] = LayerStats(
                tokens=int(states["tokens"].reshape(-1)[row]),  # torchmetrics squeezes (1,) to ()
                probability_sum=states["probability"][row, :width],
                max_abs=states["max_abs"][row, :width],
                **sums,
            )
        return Observation(layers)


def _row_norms(outputs_SH: Tensor) -> Tensor:
    """Return the l2 norm of each row, accumulated in float32, shape ``(S,)``.

    On a CPU, reducing bf16 into float32 in one call is 7 times slower than converting by chunks.
    """
    if outputs_SH.dtype in (torch.float32, torch.float64):
        return torch.linalg.vector_norm(outputs_SH, dim=-1)
    if not outputs_SH.is_cpu:
        return torch.linalg.vector_norm(outputs_SH, dim=-1, dtype=torch.float32)
    chunks = outputs_SH.split(_CHUNK)
    return torch.cat([torch.linalg.vector_norm(chunk.float(), dim=-1) for chunk in chunks])
