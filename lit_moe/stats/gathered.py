"""Sums of a pass that cost something, so that they are kept only when a criterion asks for them.

Each class adds up, per layer, what :class:`~lit_moe.stats.observation.LayerStats` names. Slots come
sorted by expert, without padding and without null experts.

T tokens, S slots (token and chosen expert), E experts, H hidden, V token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lit_moe.stats.slots import Slots

_ROWS = 512  # slots at a time: a chunk stays in the cache of a CPU core
_SIGMAS = 3.0
_BYTES = 4096  # of packed ids compared at a time


class Gathering(Protocol):
    """Adds up one kind of sums over the forwards of all layers."""

    def update(self, layer: str, slots: Slots, token_ids: Tensor | None) -> None:
        """Add the slots of one forward of one layer.

        Args:
            layer: name of the MoE layer.
            slots: sorted by expert.
            token_ids: vocabulary id of each token, shape ``(T,)``; None if the batch has none.
        """
        ...

    def layer_sums(self, layer: str) -> dict[str, Tensor | int]:
        """Return fields of ``LayerStats``, over all ranks, on the CPU. Collective."""
        ...


class PairCounts:
    """Tokens that are routed to both of two experts.

    Args:
        num_experts: layer name -> E.
        device: where the sums live.
    """

    def __init__(self, num_experts: Mapping[str, int], device: torch.device) -> None:
        self._counts = {
            name: torch.zeros(num, num, dtype=torch.float64, device=device)
            for name, num in num_experts.items()
        }

    def update(self, layer: str, slots: Slots, token_ids: Tensor | None) -> None:
        """See :meth:`Gathering.update`."""
        del token_ids
        counts = self._counts[layer]
        num_tokens = int(slots.token_ids.max()) + 1
        chosen_TE = torch.zeros(num_tokens, len(counts), device=counts.device)
        chosen_TE[slots.token_ids, slots.expert_ids] = 1.0
        counts += chosen_TE.T @ chosen_TE  # float32 is exact below 2^24 tokens in a batch

    def layer_sums(self, layer: str) -> dict[str, Tensor | int]:
        """See :meth:`Gathering.layer_sums`."""
        return {"pair_count": _over_ranks(self._counts.pop(layer))}


class VocabularySets:
    """Which token ids each expert was sent: one bit per expert and id, however long the text.

    Args:
        num_experts: layer name -> E.
        size: V.
        device: where the bits live.
    """

    def __init__(self, num_experts: Mapping[str, int], size: int, device: torch.device) -> None:
        self._size = size
        self._bits = {
            name: torch.zeros(num, -(-size // 8), dtype=torch.uint8, device=device)
            for name, num in num_experts.items()
        }

    def update(self, layer: str, slots: Slots, token_ids: Tensor | None) -> None:
        """See :meth:`Gathering.update`; here ``token_ids`` must be given."""
        assert token_ids is not None
        bits = self._bits[layer].view(-1)
        ids = token_ids[slots.token_ids]
        place = slots.expert_ids * (bits.numel() // len(self._bits[layer])) + ids // 8
        for bit in range(8):
            mine = place[ids % 8 == bit]
            bits[mine] |= 1 << bit

    def layer_sums(self, layer: str) -> dict[str, Tensor | int]:
        """See :meth:`Gathering.layer_sums`."""
        bits = self._bits.pop(layer)
        overlap = torch.zeros(len(bits), len(bits), dtype=torch.float64, device=bits.device)
        shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
        for piece in bits.split(_BYTES, dim=1):
            seen_EV = ((piece[:, :, None] >> shifts) & 1).flatten(1)
            seen_EV = _over_ranks(seen_EV, dist.ReduceOp.MAX, cpu=False).float()
            overlap += seen_EV @ seen_EV.T
        return {"vocabulary_overlap": overlap.cpu(), "vocabulary_size": self._size}


class OutputMoments:
    """First and second moments of the experts' raw outputs, their directions, their outliers.

    Args:
        shapes: layer name -> (E, H).
        device: where the sums live.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self._sums = {
            name: torch.zeros(3, *shape, dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }
        self._outliers = {
            name: torch.zeros(shape[0], dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }

    def update(self, layer: str, slots: Slots, token_ids: Tensor | None) -> None:
        """See :meth:`Gathering.update`."""
        del token_ids
        sums, outliers = self._sums[layer], self._outliers[layer]
        for ids_S, outputs_SH in zip(
            slots.expert_ids.split(_ROWS), slots.outputs.split(_ROWS), strict=True
        ):
            rows_SH = outputs_SH if outputs_SH.dtype == torch.float64 else outputs_SH.float()
            experts, place_S = ids_S.unique_consecutive(return_inverse=True)
            # Of few experts in a chunk, sums over their slots are fastest as products of matrices.
            belongs_CS = torch.zeros(
                len(experts), len(ids_S), dtype=rows_SH.dtype, device=ids_S.device
            )
            belongs_CS[place_S, torch.arange(len(ids_S), device=ids_S.device)] = 1
            length_S = torch.linalg.vector_norm(rows_SH, dim=1)
            scale_S = torch.where(length_S > 0, 1 / length_S, 0.0)
            parts = (belongs_CS @ rows_SH, belongs_CS @ rows_SH.square())
            for row, part in enumerate((*parts, (belongs_CS * scale_S) @ rows_SH)):
                sums[row].index_add_(0, experts, part.double())
            outliers.index_add_(0, ids_S, outliers_per_row(rows_SH).double())

    def layer_sums(self, layer: str) -> dict[str, Tensor | int]:
        """See :meth:`Gathering.layer_sums`."""
        first, second, direction = _over_ranks(self._sums.pop(layer))
        return {
            "output_sum": first,
            "output_square_sum": second,
            "direction_sum": direction,
            "outlier_count": _over_ranks(self._outliers.pop(layer)),
        }


def outliers_per_row(rows_SH: Tensor) -> Tensor:
    """Return how many entries of each row are further than 3 deviations from its mean, ``(S,)``.

    Mean and (population) standard deviation are over the H entries of the row.

    >>> outliers_per_row(torch.tensor([[9.0] + [0.0] * 19, [9.0] * 20])).tolist()
    [1.0, 0.0]
    """
    centred = rows_SH - rows_SH.mean(dim=1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / rows_SH.shape[1] ** 0.5
    # In place, and without booleans, which are several times slower to make and to count.
    excess = centred.abs_().sub_(_SIGMAS * deviation).clamp_(min=0.0)
    return excess.sign_().sum(dim=1)


def _over_ranks(
    tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, *, cpu: bool = True
) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=operation)
    return tensor.cpu() if cpu else tensor
