"""Which tokens count: padding does not, and some rows are held out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lit_moe.adapters.site import MoESite
from lit_moe.errors import CalibrationError
from lit_moe.refit.collective import all_sum_of, on_all_ranks

Batch = Mapping[str, Tensor]
MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "pixel_values",
)


class Rows:
    """The calibration rows of this rank, a part of them held out.

    Rows are dealt to ranks in turn. Of every ``1 / held_out`` consecutive rows of all, one is held
    out, at a place drawn at random (seeded): the same rows on any number of ranks, and all domains
    of a text that deals its domains in turn.

    Args:
        batches: keyword arguments of the model.
        inputs: names that the model's body accepts; other keys of a batch are left out.
        held_out: fraction of the rows to hold out.
        device: where the batches go.
        rank: of this process.
        world_size: number of processes.

    Raises:
        CalibrationError: on all ranks, if one has no batch or there are too few rows to hold one
            out.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        held_out: float,
        device: torch.device,
        *,
        inputs: Collection[str] = MODEL_INPUTS,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batches = [
            {k: v.to(device) for k, v in batch.items() if k in inputs and isinstance(v, Tensor)}
            for batch in batches
        ]
        if not on_all_ranks(bool(self.batches)):
            raise CalibrationError("there is no calibration batch; give at least one per rank")
        counts = [len(next(iter(batch.values()))) for batch in self.batches]
        every = check_num_rows(all_sum_of(sum(counts)), held_out)
        mine = torch.arange(sum(counts)) * world_size + rank
        is_held = mine % every == _places(1 + int(mine.max()) // every, every)[mine // every]
        self._held = list(is_held.to(device).split(counts))

    def __len__(self) -> int:
        return len(self.batches)

    def weights(self, index: int, site: MoESite, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return fit and held-out weights (0 or 1) of one batch's tokens, shape ``(T,)``."""
        held = self._held[index]
        per_row = num_tokens // len(held)
        held_T = held.repeat_interleave(per_row)
        valid_T = self._mask(index, site)
        valid_T = torch.ones_like(held_T) if valid_T is None else valid_T
        return (valid_T & ~held_T).float(), (valid_T & held_T).float()

    def held_batches(self) -> list[dict[str, Tensor]]:
        """Return the held-out rows as batches of their own."""
        chosen = [
            {k: v[held] for k, v in batch.items()}
            for batch, held in zip(self.batches, self._held, strict=True)
        ]
        return [batch for batch in chosen if len(next(iter(batch.values())))]

    def count_tokens(self, per_image: int = 1) -> tuple[int, int]:
        """Return fitted and held-out tokens of this rank, padding excluded.

        Args:
            per_image: tokens of a row without text.
        """
        fit = held = 0
        for batch, is_held in zip(self.batches, self._held, strict=True):
            mask = batch.get("attention_mask", batch.get("input_ids"))
            per_row = (
                torch.full_like(is_held, per_image, dtype=torch.long)
                if mask is None
                else (mask != 0).sum(1)
                if "attention_mask" in batch
                else torch.full_like(is_held, mask.shape[1], dtype=torch.long)
            )
            held += int(per_row[is_held].sum())
            fit += int(per_row[~is_held].sum())
        return fit, held

    def _mask(self, index: int, site: MoESite) -> Tensor | None:
        batch = self.batches[index]
        is_decoder = "decoder_input_ids" in batch and site.name.split(".")[0] != "encoder"
        mask = batch.get("decoder_attention_mask" if is_decoder else "attention_mask")
        return None if mask is None else mask.reshape(-1).bool()


def check_num_rows(num_rows: int, held_out: float) -> int:
    """Return of how many rows of all ranks one is held out.

    Raises:
        CalibrationError: if there are fewer rows than that.
    """
    every = max(2, math.floor(1 / held_out))
    if num_rows < every:
        raise CalibrationError(
            f"{num_rows} calibration rows are too few to hold out one in {every}: "
            f"give more rows, {every} at least, or shorter ones"
        )
    return every


def _places(num_windows: int, every: int) -> Tensor:
    """Return which row of each window of rows is held out, shape ``(num_windows,)``.

    Every place comes once in ``every`` windows. The seed was chosen so that texts of 2 to 10
    domains dealt in turn have each among their held-out rows as soon as there is room.
    """
    generator = torch.Generator().manual_seed(1)
    rounds = [torch.randperm(every, generator=generator) for _ in range(-(-num_windows // every))]
    return torch.cat(rounds)[:num_windows]
