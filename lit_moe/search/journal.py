"""What each rank evaluated since its scores last came together, kept so that a kill loses little.

The history has one writer and one order; the ranks of a search work on many candidates at once. So
each rank puts what it finds into a file of its own, beside the history, and a search that goes on
reads them all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lit_moe.search.history import append_line, plain_score, score_from, whole_lines
from lit_moe.search.population import Score
from lit_moe.search.request import Request

FORMAT = "lit-moe/search-rank/1"


class Journal:
    """The scores that ranks found and that may not be in the history yet.

    Args:
        path: of this rank; None keeps nothing.
        fingerprint: of the search, see :class:`lit_moe.search.history.History`.
        scores: what is known, by request.
    """

    def __init__(self, path: Path | None, fingerprint: str, scores: dict[str, Score]) -> None:
        self._path, self._scores = path, scores
        if path is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            append_line(path, {"format": FORMAT, "fingerprint": fingerprint})

    @classmethod
    def open(cls, history: Path, fingerprint: str) -> Journal | None:
        """Read what the ranks of a search left behind that was killed. Collective.

        Args:
            history: the file of the search; journals lie beside it, on the host of their rank.
            fingerprint: journals of another search are removed.

        Returns:
            What all ranks left, the same everywhere; None on a single process, whose history is
            never behind.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        found = _read_all(history, fingerprint)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)  # nobody writes before everybody has read
        merged = {key: score for part in everywhere for key, score in part.items()}
        return cls(_path_of(history, dist.get_rank()), fingerprint, merged)

    def known(self, requests: Sequence[Request]) -> dict[int, Score]:
        """Return index -> score of those requests that a killed run had scored."""
        found = ((index, self._scores.get(_key(one))) for index, one in enumerate(requests))
        return {index: score for index, score in found if score is not None}

    def add(self, request: Request, score: Score) -> None:
        """Put a score on record; on the disk when this returns."""
        if self._path is not None:
            append_line(self._path, {"request": _key(request), **plain_score(score)})


def remove_journals(history: Path) -> None:
    """Remove the journals of a search whose history is complete."""
    for path in _paths(history):
        path.unlink(missing_ok=True)


def _read_all(history: Path, fingerprint: str) -> dict[str, Score]:
    """Return the scores in all journals that can be seen from here."""
    found: dict[str, Score] = {}
    for path in _paths(history):
        try:
            header, *records = [json.loads(line) for line in whole_lines(path)]
        except (ValueError, FileNotFoundError):  # killed in its first line, or removed by another
            header, records = {}, []
        if header == {"format": FORMAT, "fingerprint": fingerprint}:
            found |= {record["request"]: score_from(record) for record in records}
        else:
            path.unlink(missing_ok=True)
    return found


def _paths(history: Path) -> list[Path]:
    return sorted(history.parent.glob(f"{history.stem}.rank*.jsonl"))


def _path_of(history: Path, rank: int) -> Path:
    return history.with_name(f"{history.stem}.rank{rank}.jsonl")


def _key(request: Request) -> str:
    floor = "" if request.floor is None else f" {request.floor.points!r} {request.floor.by_finer}"
    return f"{request.split} {request.samples} {request.genome.key}{floor}"
