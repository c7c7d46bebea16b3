"""Sums over the inputs of each expert's matrices, from one pass, reduced over ranks.

``x`` is what the first projections of an expert are fed, ``phi`` what its down projection is fed,
for each token that is routed to it; ``c`` is 1, or the routing weight.

S slots, R rows, E experts, D inputs of a matrix (hidden size or expert width).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lit_moe.adapters.site import MoESite
from lit_moe.errors import CalibrationError
from lit_moe.stats.inputs import InputSlots

_SUMS = ("count", "hidden", "features")


class InputMoments:
    """Float64 sums of ``(c x_j)^2`` and ``(c phi_j)^2`` per expert and input.

    Args:
        num_experts: E.
        hidden: inputs of the first projections.
        width: inputs of the down projections.
        gated: whether ``c`` is the routing weight.
        device: where the sums live.
    """

    def __init__(
        self, num_experts: int, hidden: int, width: int, *, gated: bool, device: torch.device
    ) -> None:
        self._gated = gated
        zeros = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.count = zeros
        self.hidden = self._empty(zeros, hidden)
        self.features = self._empty(zeros, width)

    def _empty(self, zeros_E: Tensor, inputs: int) -> Tensor:
        return zeros_E.new_zeros(len(zeros_E), inputs)

    def add(self, slots: InputSlots, mask_T: Tensor | None) -> None:
        """Add one call of the block.

        Args:
            slots: see :class:`lit_moe.stats.inputs.InputSlots`.
            mask_T: True where a token counts; None when all do.
        """
        weight = _precise(slots.gates if self._gated else slots.scale)
        if mask_T is not None:
            weight = weight * mask_T[slots.token_ids]
        self.count.index_add_(0, slots.expert_ids, (weight != 0).double())
        self._add_hidden(slots, weight)
        self._add_features(slots, weight)

    def _add_hidden(self, slots: InputSlots, weight_S: Tensor) -> None:
        squares_RH = _precise(slots.hidden).square()
        shares_ER = squares_RH.new_zeros(len(self.count), len(squares_RH))
        shares_S = weight_S.square().to(shares_ER)
        shares_ER.index_put_((slots.expert_ids, slots.rows), shares_S, accumulate=True)
        self.hidden += shares_ER @ squares_RH

    def _add_features(self, slots: InputSlots, weight_S: Tensor) -> None:
        for expert, mine in _by_expert(slots.expert_ids, len(self.count)):
            squares = _precise(slots.features[mine]).square()
            self.features[expert] += weight_S[mine].square().to(squares) @ squares

    def of(self, matrix: str) -> Tensor:
        """Return the sums for ``gate``, ``up`` or ``down``."""
        return self.features if matrix == "down" else self.hidden

    def unrouted(self) -> tuple[int, ...]:
        """Ids of the experts that saw no token."""
        return tuple((self.count == 0).nonzero().flatten().tolist())

    def reduce(self, layer: str) -> None:
        """Collective: add up over all ranks.

        Raises:
            CalibrationError: on all ranks, if the sums are no longer numbers.
        """
        if dist.is_available() and dist.is_initialized():
            for name in _SUMS:
                dist.all_reduce(getattr(self, name))
        if not (self.hidden.isfinite().all() and self.features.isfinite().all()):
            raise CalibrationError(
                f"inputs of the experts of layer {layer!r} became NaN or infinite during "
                "calibration; try dtype float32, or look for a damaged weight before that layer"
            )

    def state(self) -> dict[str, Tensor]:
        """Return the sums, as kept in checkpoints."""
        return {name: getattr(self, name).cpu() for name in _SUMS}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> InputMoments:
        """Inverse of :meth:`state`; to be read, not to be added to."""
        sizes = (len(state["count"]), *(state[name].shape[1] for name in _SUMS[1:]))
        moments = cls(*sizes, gated=False, device=state["count"].device)
        for name in _SUMS:
            setattr(moments, name, state[name])
        return moments

    def of_experts(self, expert_ids: Sequence[int]) -> InputMoments:
        """Return the sums of some experts, as those that a plan keeps."""
        return self.from_state({k: v[list(expert_ids)] for k, v in self.state().items()})


class InputProducts(InputMoments):
    """Float32 sums of ``x x^T`` and ``phi phi^T`` per expert: E (hidden^2 + width^2) numbers."""

    def _empty(self, zeros_E: Tensor, inputs: int) -> Tensor:
        return zeros_E.new_zeros((len(zeros_E), inputs, inputs), dtype=torch.float32)

    def _add_hidden(self, slots: InputSlots, weight_S: Tensor) -> None:
        for expert, mine in _by_expert(slots.expert_ids, len(self.count)):
            rows = slots.hidden[slots.rows[mine]].float() * weight_S[mine, None].float()
            self.hidden[expert].addmm_(rows.T, rows)

    def _add_features(self, slots: InputSlots, weight_S: Tensor) -> None:
        for expert, mine in _by_expert(slots.expert_ids, len(self.count)):
            rows = slots.features[mine].float() * weight_S[mine, None].float()
            self.features[expert].addmm_(rows.T, rows)


def moments_for(site: MoESite, weights: dict[str, Tensor], *, method: str) -> InputMoments:
    """Return empty sums of the kind that a method needs for one layer.

    Args:
        site: the MoE layer.
        weights: its matrices, as the adapter gives them.
        method: a name of ``SparsityOptions.method``.
    """
    kind = InputProducts if method == "sparsegpt" else InputMoments
    return kind(
        site.num_experts,
        weights["up"].shape[2],
        weights["down"].shape[2],
        gated=method == "moe_pruner",
        device=weights["down"].device,
    )


def _precise(tensor: Tensor) -> Tensor:
    """Return at least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _by_expert(expert_ids: Tensor, num_experts: int) -> Iterator[tuple[int, slice | Tensor]]:
    """Yield each expert that has slots, with where they are; a slice where they are sorted."""
    counts = torch.bincount(expert_ids, minlength=num_experts).tolist()
    order = None
    if bool((expert_ids[1:] < expert_ids[:-1]).any()):
        order = torch.argsort(expert_ids, stable=True)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            where = slice(start, start + count)
            yield expert, where if order is None else order[where]
        start += count
