"""What was evaluated, one line each, written so that a kill loses at most the line in work."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_moe.errors import LitMoEError
from lit_moe.search.population import Score

FORMAT = "lit-moe/search/1"
_ASKED = ("split", "samples", "genome", "draws")
_FOUND = ("fitness", "finer", "is_bound")


@dataclass(frozen=True)
class Line:
    """One evaluation.

    Attributes:
        split: ``search``, ``dev`` or ``test``.
        samples: so many samples of the split, the first ones.
        genome: key of the candidate.
        draws: state of the search's generator.
        score: what was found.
        details: generation, phase, parents, seconds and so on, for readers of the table.
    """

    split: str
    samples: int
    genome: str
    draws: Mapping[str, str]
    score: Score
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        asked = {name: getattr(self, name) for name in _ASKED}
        return {**self.details, **asked, **plain_score(self.score)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Line:
        """Inverse of :meth:`to_dict`."""
        known = {*_ASKED, *_FOUND}
        details = {name: value for name, value in data.items() if name not in known}
        split, samples, genome, draws = (data[name] for name in _ASKED)
        return cls(split, samples, genome, draws, score_from(data), details)


class History:
    """The lines of a search, and the file that they are in.

    A search that goes on asks for the same evaluations in the same order; what is on record is
    not evaluated again.

    Args:
        fingerprint: what the numbers depend on: model, samples, options.
        lines: what is on record.
        path: where new lines go; None for nowhere (another rank writes).
    """

    def __init__(
        self, fingerprint: str, lines: Sequence[Line] = (), path: Path | None = None
    ) -> None:
        self.fingerprint = fingerprint
        self.lines = list(lines)
        self.num_on_record = len(self.lines)
        """Lines that were there when it was opened."""
        self._path = path
        self._next = 0

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> History:
        """Read a file, or begin it. A line that a kill cut off is dropped.

        Raises:
            LitMoEError: if the file is of another search, or none at all.
        """
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            append_line(path, {"format": FORMAT, "fingerprint": fingerprint})
            return cls(fingerprint, (), path)
        whole = whole_lines(path)
        if not whole:
            path.unlink()
            return cls.open(path, fingerprint)
        try:
            header, *records = [json.loads(text) for text in whole]
            found = header["format"], header["fingerprint"]
            lines = [Line.from_dict(record) for record in records]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise LitMoEError(f"{path} is no history of a search ({error!r})") from error
        if found != (FORMAT, fingerprint):
            raise LitMoEError(
                f"{path} is the history of another search (model, samples or options differ): "
                "name another file in history, or remove it to begin anew"
            )
        return cls(fingerprint, lines, path)

    @property
    def num_left(self) -> int:
        """Lines on record that have not been asked for yet."""
        return len(self.lines) - self._next

    def recorded(
        self, split: str, samples: int, genome: str, draws: Mapping[str, str]
    ) -> Line | None:
        """Return the next line of the record, which must be of this evaluation; None at its end.

        Raises:
            LitMoEError: if the record goes on with something else.
        """
        if self._next >= len(self.lines):
            return None
        line = self.lines[self._next]
        asked = (split, samples, genome, dict(draws))
        if (line.split, line.samples, line.genome, dict(line.draws)) != asked:
            raise LitMoEError(
                f"line {self._next + 2} of the history was written by another search: it has "
                f"{line.genome} on {line.samples} samples of {line.split}, this one comes to "
                f"{genome} on {samples} of {split}; remove the history to begin anew"
            )
        self._next += 1
        return line

    def add(self, line: Line) -> None:
        """Put a line on record; on the disk when this returns."""
        self.lines.append(line)
        self._next += 1
        if self._path is not None:
            append_line(self._path, line.to_dict())


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record to a file of lines; on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """Return the lines that were written to their end, and cut off what comes after them.

    Raises:
        LitMoEError: if it is no text.
    """
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    try:
        return data[:end].decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise LitMoEError(f"{path} is no history of a search ({error})") from error


def plain_score(score: Score) -> dict[str, Any]:
    """Return a score as plain values; a measure that is no number is null."""
    found: dict[str, Any] = {"fitness": _plain(score.fitness), "finer": _plain(score.finer)}
    return {**found, "is_bound": True} if score.is_bound else found


def score_from(data: Mapping[str, Any]) -> Score:
    """Inverse of :func:`plain_score`."""
    bound = bool(data.get("is_bound", False))
    return Score(_number(data["fitness"]), _number(data["finer"]), bound)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return -math.inf if value is None else float(value)
