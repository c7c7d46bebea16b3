"""Rows of mixed text: more calibration rows than there is text for.

S positions of a row, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.errors import LitMoEError

Row = Mapping[str, Tensor]
_IDS, _MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class Pair:
    """Two rows and how much of the first goes into the mixture.

    Attributes:
        first: a row of one, ``(1, S)``.
        second: another of the same shape.
        share: of the first, in [0, 1].
    """

    first: Row
    second: Row
    share: float

    @property
    def row(self) -> dict[str, Tensor]:
        """The first row; padding of either is padding."""
        row = dict(self.first)
        if _MASK in row and _MASK in self.second:
            row[_MASK] = row[_MASK] * self.second[_MASK]
        return row


def pairs_of(
    rows: Sequence[Row], *, per_row: int, mixing: float, judged: int, seed: int = 0
) -> list[Pair]:
    """Return this rank's pairs among the fitted rows of all ranks. Collective.

    Every row is the first of ``per_row`` pairs; partners are drawn among the others of its shape,
    shares from ``Beta(mixing, mixing)``. Together the ranks have what one process would.

    Args:
        rows: this rank's, one row each, every ``world_size``-th of all.
        per_row: pairs of each row.
        mixing: concentration, above 0.
        judged: every so many-th row is judged, so that it goes into no pair.
        seed: of partners and shares.

    Raises:
        LitMoEError: if no two fitted rows have one shape.
    """
    rank, shares = 0, [list(rows)]
    if dist.is_available() and dist.is_initialized():
        rank, shares = dist.get_rank(), [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, [{k: v.cpu() for k, v in row.items()} for row in rows])
    longest = max(map(len, shares))
    everyone = [share[i] for i in range(longest) for share in shares if i < len(share)]
    fitted = [row for i, row in enumerate(everyone) if i % judged != judged - 1]
    random, found = np.random.default_rng(seed), []
    for first in fitted * per_row:
        others = [row for row in fitted if row is not first and _shapes(row) == _shapes(first)]
        share = float(random.beta(mixing, mixing))
        if others:
            found.append(Pair(first, others[int(random.integers(len(others)))], share))
    if fitted and not found:
        raise LitMoEError(
            f"none of the {len(fitted)} fitted calibration rows have one length, so that no two "
            "can be mixed; give more text, or mixed_rows: 0"
        )
    return found[rank :: len(shares)]


def mixed(model: PreTrainedModel, pairs: Sequence[Pair]) -> Iterator[dict[str, Tensor]]:
    """Yield rows; what the model embeds before the next one is asked for is a mixture.

    The embedding of each position is ``share e(first) + (1 - share) e(second)``, as in mixup
    (arXiv 1710.09412) and for calibration in arXiv 2407.09590.

    Args:
        model: embeds by one module.
        pairs: see :func:`pairs_of`.
    """
    embeddings: Any = model.get_input_embeddings()
    for pair in pairs:
        ids = pair.second[_IDS].to(model.device)

        def mix(
            module: nn.Module, _: Any, own_1SH: Tensor, pair: Pair = pair, ids: Tensor = ids
        ) -> Tensor:
            return torch.lerp(module.forward(ids), own_1SH, pair.share)

        hook = embeddings.register_forward_hook(mix)
        try:
            yield pair.row
        finally:
            hook.remove()


def _shapes(row: Row) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in row.items()}
