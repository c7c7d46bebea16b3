"""The text of a comparison: one calibration draw per seed, one evaluation for all."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor

from lit_moe.assets import Split
from lit_moe.compare.options import TextOptions
from lit_moe.data import TextDataModule
from lit_moe.data.blocks import Blocks

_ALL = 2**62


class ComparedText(TextDataModule):
    """Text whose calibration blocks are a draw of a seed.

    Args:
        options: files and amounts.
        tokenizer: folder or hub id.
    """

    def __init__(self, options: TextOptions, tokenizer: str) -> None:
        super().__init__(
            calibration_files=options.calibration_files,
            train_files=options.train_files,
            validation_files=options.evaluation_files,
            tokenizer=tokenizer,
            sequence_length=options.sequence_length,
            batch_size=options.batch_size,
            calibration_tokens=_ALL,
            text_column=options.text_column,
            balance_domains=True,
        )
        self.options = options

    def drawn(self, seed: int) -> ComparedText:
        """Return the same text with the calibration blocks and the training order of a seed."""
        pool = self.blocks("calibration")
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        mine = copy.copy(self)
        mine.seed = seed
        number = -(-self.options.calibration_tokens // self.options.sequence_length)
        mine._blocks = {**self._blocks, "calibration": pool.take(order).spread(number)}
        mine._loader, mine._position = None, {}
        return mine

    def calibration(self) -> list[dict[str, Tensor]]:
        """Return the calibration batches."""
        return list(self._in_order(self.blocks("calibration")))

    def evaluation(self) -> tuple[list[dict[str, Tensor]], tuple[str, ...]]:
        """Return the batches that every cell is judged by, and the names of their domains."""
        blocks = self.blocks("validation")
        if self.options.evaluation_tokens is not None:
            blocks = blocks.spread(-(-self.options.evaluation_tokens // self.sequence_length))
        return list(self._in_order(blocks)), blocks.domains

    def fingerprint(self, splits: tuple[Split, ...]) -> dict[str, str]:
        """Return split -> digest of its tokens."""
        return {split: _digest(self.blocks(split)) for split in splits}


def _digest(blocks: Blocks) -> str:
    return hashlib.sha256(blocks.input_ids.numpy().tobytes()).hexdigest()[:16]
