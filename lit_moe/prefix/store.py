"""Hidden states by batch and prefix, as many as a budget of bytes holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_moe.prefix.standing import num_bytes

Prefix = tuple[Hashable, ...]


@dataclass(frozen=True)
class Snapshot:
    """What one batch looks like in front of the experts of one layer.

    Attributes:
        stacks: list of layers -> output of the last layer in it that is through.
        heads: modules of the layer that are through -> their outputs.
    """

    stacks: Mapping[str, Any]
    heads: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return num_bytes([*self.stacks.values(), *self.heads.values()])


class SnapshotStore:
    """Snapshots, of which the least recently used go first when there is no room.

    Batches are visited in turn, over and over. So a snapshot never takes the place of one with the
    same prefix: some batches then have one and others none, instead of each losing its own just
    before it is wanted.

    Args:
        budget: bytes.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._held: OrderedDict[tuple[int, Prefix], Snapshot] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Bytes that are in use."""
        return self._used

    def get(self, batch: int, prefix: Prefix) -> Snapshot | None:
        """Return a snapshot, or None."""
        found = self._held.get((batch, prefix))
        if found is not None:
            self._held.move_to_end((batch, prefix))
        return found

    def put(self, batch: int, prefix: Prefix, snapshot: Snapshot) -> None:
        """Keep a snapshot if there is room, or room can be made."""
        size = snapshot.num_bytes
        if (batch, prefix) in self._held:
            self._used -= self._held.pop((batch, prefix)).num_bytes
        others = (key for key in self._held if key[1] != prefix)
        going, free = [], self._budget - self._used
        while free < size:
            key = next(others, None)
            if key is None:
                return
            going.append(key)
            free += self._held[key].num_bytes
        for key in going:
            self._used -= self._held.pop(key).num_bytes
        self._held[batch, prefix] = snapshot
        self._used += size

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._used = 0
