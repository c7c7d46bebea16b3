"""The samples of a search, taken from a data module: none serves two splits.

The search sees what experts are otherwise observed on (``calibration``), the choice among its best
falls on ``validation``, and ``test`` is for the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lit_moe.errors import LitMoEError
from lit_moe.search.splits import SplitData, check_splits

SOURCES = {"search": "calibration", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class SampleSizes:
    """How many samples each split has, drawn without order; None for all that there are.

    Attributes:
        search: evaluated for every candidate.
        dev: evaluated for the best.
        test: for the report.
        batch_size: rows per forward; a question with choices has a row for each.
        seed: of the draw.
    """

    search: int | None = None
    dev: int | None = None
    test: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("search", "dev", "test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LitMoEError(f"samples.{name}={value} leaves the split empty; give at least 1")
        if self.batch_size < 1:
            raise LitMoEError(f"samples.batch_size={self.batch_size} must be at least 1")


def splits_of(data: Any, sizes: SampleSizes) -> dict[str, SplitData]:
    """Return the splits of a data module of texts or of questions.

    Raises:
        LitMoEError: if a split is empty or shares samples with another, or the data module has no
            splits that could be read.
    """
    if not hasattr(data, "blocks"):
        raise LitMoEError(
            f"a search needs samples, but {type(data).__name__} has no splits of text or "
            "questions; use lit_moe.data.TextDataModule or TaskDataModule"
        )
    found = {name: _split(data, source, name, sizes) for name, source in SOURCES.items()}
    check_splits(found)
    return found


def _split(data: Any, source: str, name: str, sizes: SampleSizes) -> SplitData:
    blocks = data.blocks(source)
    generator = torch.Generator().manual_seed(sizes.seed)
    order = torch.randperm(len(blocks), generator=generator).tolist()
    chosen = order[: getattr(sizes, name)]
    rows = [blocks[index] for index in chosen]
    if not hasattr(data, "items"):
        return SplitData(rows)
    items = data.items(source)
    prompting = data.prompting(data.shots[0])
    return SplitData(rows, [items[index] for index in chosen], prompting, data.generation)
