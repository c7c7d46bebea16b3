"""The order of training blocks: the same on any number of ranks, and resumable in the middle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_moe.errors import LitMoEError


class ShuffledShare(DistributedSampler[int]):
    """This rank's share of a shuffle that all ranks agree on.

    Rank ``r`` of ``W`` takes every ``W``-th entry of the shuffle from entry ``r`` on: a step of
    ``W`` ranks with ``B`` blocks each sees the same blocks as a step of one rank with ``W B``.
    Epoch ``e`` is shuffled by ``seed + e``.

    Args:
        dataset: anything with a length ``N``.
        rank: of this process.
        world_size: processes; those entries that would give ranks unequal shares are left out.
        seed: of the first epoch.
        weights: chance of each entry, shape ``(N,)``, drawn with replacement; None draws each once.
        multiple_of: the entries of one optimizer step of this rank; an epoch has whole steps only.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        weights: Tensor | None = None,
        multiple_of: int = 1,
    ) -> None:
        super().__init__(
            dataset, num_replicas=world_size, rank=rank, seed=seed, drop_last=True, shuffle=True
        )
        self.weights = weights
        self.multiple_of = multiple_of

    def __iter__(self) -> Iterator[int]:
        """Yield indices of this rank's share of the present epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.weights is None:
            order = torch.randperm(size, generator=generator)
        else:
            order = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        yield from order[self.rank :: self.num_replicas][: len(self)].tolist()

    def __len__(self) -> int:
        """Return the entries of one rank."""
        share = len(self.dataset) // self.num_replicas  # type: ignore[arg-type]
        return share // self.multiple_of * self.multiple_of


class ShareInOrder(DistributedSampler[int]):
    """Every ``W``-th entry from entry ``r`` on, of a dataset whose length ``W`` divides."""

    def __init__(self, dataset: Dataset, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader that can say where it is and go on from there.

    Without it a run that was stopped within an epoch would begin that epoch anew. Lightning stores
    what :meth:`state_dict` returns, but gives it back too late where it had to count the batches
    of an epoch first, so the data module carries it as well.

    The position is an epoch and a number of blocks over all ranks: it holds for other numbers of
    ranks and other batch sizes too.
    """

    sampler: ShuffledShare

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._given = 0
        self._start: Mapping[str, int] = {}

    def __iter__(self) -> Any:
        """Yield the batches of an epoch, from where a loaded state says."""
        start, self._start = self._start, {}
        skip = start.get("blocks", 0) if start.get("epoch") == self.sampler.epoch else 0
        self._given = self._batches(skip)
        # Blocks lie in memory: walking past them costs nothing.
        for batch in itertools.islice(super().__iter__(), self._given, None):
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many blocks of it all ranks together have taken."""
        ended = self._given >= len(self)
        return {
            "epoch": self.sampler.epoch + ended,
            "blocks": 0 if ended else self._given * self._blocks_per_batch,
        }

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Let that epoch begin behind the blocks that were taken already."""
        self._start = dict(state_dict)

    @property
    def _blocks_per_batch(self) -> int:
        return (self.batch_size or 1) * self.sampler.num_replicas

    def _batches(self, blocks: int) -> int:
        if blocks % self._blocks_per_batch:
            raise LitMoEError(
                f"the checkpoint was written after {blocks} blocks of its epoch, which are no "
                f"whole number of this run's batches of {self._blocks_per_batch} (batch_size x "
                "ranks): resume with a batch_size that divides it"
            )
        return blocks // self._blocks_per_batch
