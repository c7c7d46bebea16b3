"""Results that survive a kill: a JSON line each, behind a header that says what they belong to."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from lit_moe.errors import LitMoEError

Record = dict[str, Any]
WhenOther = Literal["refuse", "beside"]
_HEADER = "header"
_SHOWN = 60


class CellStore:
    """Records by kind and key, in a file that only grows.

    A record is written whole or not at all: a line that a kill cut off is not read, and spoils no
    other. Of two records with one key the later one counts. Several processes may write to one
    file; :meth:`refresh` takes in what the others wrote. If another process sets the file aside and
    begins anew with other settings, the next read or write of this one is refused.

    Args:
        path: file of JSON lines; made on the first write.
        settings: what the results depend on; plain values. They are the first line.
        when_other: what becomes of a file with other settings: ``refuse`` it, or keep it
            ``beside`` under another name and begin anew.

    Raises:
        LitMoEError: if the file has other settings and ``when_other`` is ``refuse``; names the
            first that differs.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], *, when_other: WhenOther = "refuse"
    ) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self._records: dict[tuple[str, str], Record] = {}
        self._new: set[tuple[str, str]] = set()
        self._read_to, self._read_from = 0, 0
        self._is_open = False
        if when_other == "beside":
            _set_aside(path, self.settings)
        self.refresh()
        self._new.clear()
        self._is_open = True

    def get(self, kind: str, **key: Any) -> Record | None:
        """Return a record, None if there is none."""
        return self._records.get((kind, _key(key)))

    def put(self, kind: str, value: Record, **key: Any) -> None:
        """Write a record; it is on the disk when this returns.

        Raises:
            LitMoEError: if the file has other settings by now; names the first that differs.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(self.path) as file:
            if not self._has_header(file):
                _append(file, {"kind": _HEADER, "settings": self.settings})
            _append(file, {"kind": kind, "key": key, "value": value})
        self._take(kind, key, json.loads(json.dumps(value)))

    def refresh(self) -> int:
        """Take in what was written since; return how many cells are new among it.

        Raises:
            LitMoEError: if the file has other settings; names the first that differs.
        """
        if not self.path.exists():
            return 0
        with self.path.open(encoding="utf-8") as file, _locked(file, alone=False):
            self._has_header(file)
            is_same = self._read_from == _identity(file)
            file.seek(self._read_to if is_same else 0)
            lines = file.read().splitlines()
            self._read_to, self._read_from = file.tell(), _identity(file)
        known = len(self._records)
        cells = {name for name in self._records if name[0] == "cell"}
        for line in filter(None, map(_parsed, lines)):
            if line.get("kind") != _HEADER:
                self._take(line["kind"], line["key"], line["value"])
        if len(self._records) == known:
            return 0
        return sum(name[0] == "cell" and name not in cells for name in self._records)

    def is_new(self, kind: str, **key: Any) -> bool:
        """Return whether a record was written, by whomever, after this store was opened."""
        return (kind, _key(key)) in self._new

    def all(self, kind: str) -> Iterator[tuple[dict[str, Any], Record]]:
        """Yield key and value of all records of a kind, in the order of their first appearance."""
        for (found, key), value in self._records.items():
            if found == kind:
                yield json.loads(key), value

    def _take(self, kind: str, key: Mapping[str, Any], value: Record) -> None:
        name = (kind, _key(key))
        self._records[name] = value
        self._new.add(name)

    def _has_header(self, file: TextIO) -> bool:
        """Return whether the file has a header.

        Raises:
            LitMoEError: if it has other settings than these.
        """
        found = _settings(file)
        if found is not None and found != self.settings:
            refusal = _late_refusal if self._is_open else _refusal
            raise LitMoEError(refusal(self.path, found, self.settings))
        return found is not None


def digest(value: Any) -> str:
    """Return eight characters that tell one plain value from another."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _append(file: TextIO, line: Record) -> None:
    # The break comes first too, so that a line that a kill cut off ends before this one.
    file.write("\n" + json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Yield the file that has this name, made if there is none, with nobody else at it."""
    while True:
        with path.open("a+", encoding="utf-8") as file, _locked(file):
            if _is_at(file, path):
                yield file
                return


def _is_at(file: TextIO, path: Path) -> bool:
    """Return whether an open file still has this name; it may have been renamed meanwhile."""
    try:
        return path.stat().st_ino == _identity(file)
    except FileNotFoundError:
        return False


def _identity(file: TextIO) -> int:
    return os.fstat(file.fileno()).st_ino


@contextmanager
def _locked(file: TextIO, *, alone: bool = True) -> Iterator[None]:
    """Let no other process write inside the block, nor read if ``alone``."""
    fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    try:
        yield
    finally:
        file.flush()
        fcntl.flock(file, fcntl.LOCK_UN)


def _settings(file: TextIO) -> Record | None:
    """Return the settings that the results in a file belong to; leaves it at its end."""
    file.seek(0)
    lines = (line for line in map(_parsed, file) if line is not None)
    found = next((line["settings"] for line in lines if line.get("kind") == _HEADER), None)
    file.seek(0, os.SEEK_END)
    return found


def _set_aside(path: Path, settings: Record) -> None:
    """Rename a file with other settings and begin a new one; of several processes one does."""
    while path.exists():
        with _opened(path) as file:
            found = _settings(file)
            if found == settings:
                return
            if found is not None:
                path.rename(_free_name(path, digest(found)))
        with _opened(path) as file:
            if _settings(file) is None:
                _append(file, {"kind": _HEADER, "settings": settings})


def _free_name(path: Path, mark: str) -> Path:
    """Return a name beside a file that no earlier results have."""
    stems = (f"{path.stem}-{mark}" + (f"-{n}" if n else "") for n in itertools.count())
    return next(name for name in map(path.with_stem, stems) if not name.exists())


def _parsed(line: str) -> Record | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # empty, or cut off


def _key(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _late_refusal(path: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    name, was, now = next(_differences(found, asked))
    return (
        f"another process has begun {path} anew with {name} = {_short(was)}, this run has "
        f"{_short(now)}: give runs of different settings that run at the same time an `output` each"
    )


def _refusal(path: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    name, was, now = next(_differences(found, asked))
    return (
        f"{path} holds results with {name} = {_short(was)}, this run has {_short(now)}: take "
        "another `output`, or `when_changed: beside` to keep the old results under another name"
    )


def _differences(
    found: Mapping[str, Any], asked: Mapping[str, Any], inside: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*found, *asked}):
        was, now = found.get(name), asked.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{inside}{name}.")
        elif was != now:
            yield f"{inside}{name}", was, now


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
