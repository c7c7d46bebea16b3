"""Pieces of work that processes share: who holds one does it, the others take another."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_moe.compare.store import digest


class Claims:
    """Locks of the operating system, one for each piece of work.

    A process gives up its pieces when it ends, however it ends. Nothing but the locks is kept in
    the folder.

    Args:
        folder: that all processes reach; made with the first piece. On a network file system it
            must pass locks on, as NFS does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def tried(self, **piece: Any) -> Iterator[bool]:
        """Hold a piece inside the block if nobody else does; yields whether it is held."""
        with self._file(piece) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextmanager
    def held(self, **piece: Any) -> Iterator[None]:
        """Hold a piece inside the block, after waiting for whoever holds it."""
        with self._file(piece) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _file(self, piece: dict[str, Any]) -> Iterator[Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{digest(piece)}.lock").open("a") as file:
            yield file
