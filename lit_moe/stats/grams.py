"""Second moments of expert features: all that a linear least-squares problem needs to know.

``psi_e(x) = g_e(x) phi_e(x)`` is what the down projection of expert ``e`` sees of a token, times
the token's routing weight; 0 for tokens that are not routed to ``e``. With a residual ``r(x)`` that
the layer ought to add, sums over tokens of ``psi psi^T`` and ``psi r^T`` hold every ridge
regression of ``r`` on the experts.

T tokens, S slots, E experts, D features per expert (its width, one more with a bias), H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lit_moe.stats.features import FeatureSlots


@dataclass(frozen=True)
class Piece:
    """One batch of one layer's least-squares problem.

    Attributes:
        expert_ids: ascending, shape ``(S,)``.
        token_ids: shape ``(S,)``; ascending within each expert.
        features: ``psi``, already multiplied by the routing weights, shape ``(S, D)``.
        residual: what is still missing, shape ``(T, H)``.
        fit: weight of each token in the fit, shape ``(T,)``; 0 leaves it out.
        held: weight of each token in the held-out part, shape ``(T,)``.
    """

    expert_ids: Tensor
    token_ids: Tensor
    features: Tensor
    residual: Tensor
    fit: Tensor
    held: Tensor

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens ``(S_e,)`` and features ``(S_e, D)`` of one expert."""
        start, stop = (int(torch.searchsorted(self.expert_ids, e)) for e in (expert, expert + 1))
        features = self.features[start:stop].to(self.residual.device)  # they may lie on disk
        return self.token_ids[start:stop], features

    def by_expert(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield expert id, tokens and features of each expert that has some."""
        for expert in self.expert_ids.unique_consecutive().tolist():
            yield expert, *self.of_expert(expert)

    def held_out(self) -> Piece:
        """Return a piece of the held-out tokens only."""
        tokens = self.held.nonzero().flatten()
        new_id = torch.full((len(self.held),), -1, dtype=torch.long, device=tokens.device)
        new_id[tokens] = torch.arange(len(tokens), device=tokens.device)
        mine = new_id[self.token_ids] >= 0
        return Piece(
            self.expert_ids[mine],
            new_id[self.token_ids[mine]],
            self.features[mine.to(self.features.device)],
            self.residual[tokens],
            self.fit[tokens],
            self.held[tokens],
        )

    def predict(self, update_EDH: Tensor) -> Tensor:
        """Return what an update of the down projections adds to each token, shape ``(T, H)``."""
        added = torch.zeros_like(self.residual)
        for expert, tokens, features in self.by_expert():
            added.index_add_(0, tokens, features @ update_EDH[expert].to(features))
        return added


def gated_features(slots: FeatureSlots, *, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``expert_ids (S,)``, ``token_ids (S,)`` and ``psi (S, D)`` in float32, by expert.

    Args:
        slots: what one block was seen to do.
        bias: add the constant feature that a bias of the down projection multiplies.
    """
    by_token = torch.argsort(slots.token_ids, stable=True)
    order = by_token[torch.argsort(slots.expert_ids[by_token], stable=True)]
    gates = slots.gates[order].float()[:, None]
    features = slots.features[order].float().mul_(gates)  # indexing has copied them
    if bias:
        features = torch.cat([features, gates], dim=1)
    return slots.expert_ids[order], slots.token_ids[order], features


def relative_weights(outputs_TH: Tensor) -> Tensor:
    """Return one over the mean square of each token's output, as a norm behind it would weigh it.

    Tokens far smaller than their fellows (a hundredth of the mean square) count no more than those:
    where a block serves a token with no expert its output is 0.

    Returns:
        Shape ``(T,)``, float32.
    """
    size_T = outputs_TH.float().square().mean(1)
    return 1 / size_T.clamp(min=max(1e-2 * float(size_T.mean()), 1e-12))


class Gram:
    """Sums of ``psi psi^T`` and ``psi r^T`` over the tokens of the fit.

    Args:
        num_experts: E.
        width: D.
        hidden: H; 0 if no residual is of interest.
        joint: keep the products between experts too: ``(E D)^2`` numbers instead of ``E D^2``.
        device: where the sums live.
        dtype: of the sums; products are float32.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        joint: bool,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        size = num_experts * width
        shape = (size, size) if joint else (num_experts, width, width)
        self.joint, self.num_experts, self.width, self.hidden = joint, num_experts, width, hidden
        self.matrix = torch.zeros(shape, dtype=dtype, device=device)
        self.cross = torch.zeros((num_experts, width, hidden), dtype=dtype, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros(num_experts, dtype=torch.float64, device=device)

    def add(self, piece: Piece) -> None:
        """Add the tokens of a piece that have a weight in the fit."""
        used = piece.fit > 0
        weight = piece.fit.sqrt()
        residual = piece.residual * weight[:, None]
        self.energy += residual.square().sum(dtype=torch.float64)
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        for expert, all_tokens, all_features in piece.by_expert():
            mine = used[all_tokens]
            tokens = all_tokens[mine]
            features = all_features[mine] * weight[tokens][:, None]
            rows[expert] = (tokens, features)
            self.count[expert] += len(tokens)
            self._block(expert, expert).add_(features.T @ features)
            if self.hidden:
                self.cross[expert].add_(features.T @ residual[tokens])
        if self.joint:
            self._add_pairs(rows, len(used))

    def reduce(self) -> None:
        """Collective: add up over all ranks."""
        if dist.is_available() and dist.is_initialized():
            for tensor in (self.matrix, self.cross, self.energy, self.count):
                dist.all_reduce(tensor)

    @property
    def blocks(self) -> Tensor:
        """The products within each expert, shape ``(E, D, D)``."""
        if not self.joint:
            return self.matrix
        return torch.stack([self._block(e, e) for e in range(self.num_experts)])

    @property
    def mean_diagonal(self) -> float:
        """Mean square of the features that were seen at all; the unit of ridge penalties."""
        diagonal = self.matrix.diagonal(dim1=-2, dim2=-1).flatten()
        seen = diagonal[diagonal > 0]
        return float(seen.mean()) if len(seen) else 0.0

    @property
    def unrouted(self) -> tuple[int, ...]:
        """Ids of the experts without a token in the fit."""
        return tuple((self.count == 0).nonzero().flatten().tolist())

    def _block(self, row: int, column: int) -> Tensor:
        if not self.joint:
            return self.matrix[row]
        d = self.width
        return self.matrix[row * d : (row + 1) * d, column * d : (column + 1) * d]

    def _add_pairs(self, rows: dict[int, tuple[Tensor, Tensor]], num_tokens: int) -> None:
        """Add products between experts, on the tokens that two of them share."""
        experts = sorted(rows)
        for position, first in enumerate(experts):
            tokens, features = rows[first]
            where = torch.full((num_tokens,), -1, dtype=torch.long, device=tokens.device)
            where[tokens] = torch.arange(len(tokens), device=tokens.device)
            for second in experts[position + 1 :]:
                others, other_features = rows[second]
                at = where[others]
                both = at >= 0
                product = features[at[both]].T @ other_features[both]
                self._block(first, second).add_(product)
                self._block(second, first).add_(product.T)
