"""Keeps the pieces of a layer's problem; in memory, and on disk above a budget."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_moe.stats.grams import Piece


class PieceStore:
    """A list of pieces whose features go to a temporary file once they exceed a budget.

    Args:
        budget: bytes of features to hold in memory.
        folder: where the temporary folder is made; None for the system's.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self._budget = budget
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._pieces: list[Piece] = []
        self._held = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    @property
    def spilled(self) -> bool:
        """Whether some features lie on disk."""
        return self._folder is not None

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        size = piece.features.numel() * piece.features.element_size()
        if self._held + size > self._budget:
            piece = dataclasses.replace(piece, features=self._on_disk(piece.features))
        else:
            self._held += size
        self._pieces.append(piece)

    def clear(self) -> None:
        """Forget all pieces and remove what was on disk."""
        self._pieces.clear()
        self._held = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _on_disk(self, features: Tensor) -> Tensor:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lit-moe-refit-", dir=self._parent)
        path = Path(self._folder.name) / f"{len(self._pieces)}.bin"
        if not features.numel():
            return features
        mapped = torch.from_file(str(path), True, features.numel(), dtype=features.dtype)
        return mapped.view(features.shape).copy_(features)
