"""Results that survive a kill: a JSON line each, behind a header that says what they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lit_moe.errors import LitMoEError

Record = dict[str, Any]
WhenOther = Literal["refuse", "beside"]
_HEADER = "header"
_SHOWN = 60


class CellStore:
    """Records by kind and key, in a file that only grows.

    A record is written whole or not at all: a line that a kill cut off is not read, and spoils no
    other. Of two records with one key the later one counts.

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
        lines = [r for r in map(_parsed, _lines(path)) if r is not None]
        headers = [line["settings"] for line in lines if line.get("kind") == _HEADER]
        self._has_header = bool(headers)
        if headers and headers[0] != self.settings:
            if when_other == "refuse":
                raise LitMoEError(_refusal(path, headers[0], self.settings))
            path.replace(path.with_stem(f"{path.stem}-{digest(headers[0])}"))
            self._has_header = False
            return
        for line in lines:
            if line.get("kind") != _HEADER:
                self._records[line["kind"], _key(line["key"])] = line["value"]

    def get(self, kind: str, **key: Any) -> Record | None:
        """Return a record, None if there is none."""
        return self._records.get((kind, _key(key)))

    def put(self, kind: str, value: Record, **key: Any) -> None:
        """Write a record; it is on the disk when this returns."""
        if not self._has_header:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"kind": _HEADER, "settings": self.settings})
            self._has_header = True
        line = {"kind": kind, "key": key, "value": value}
        self._append(line)
        self._records[kind, _key(key)] = json.loads(json.dumps(value))

    def all(self, kind: str) -> Iterator[tuple[dict[str, Any], Record]]:
        """Yield key and value of all records of a kind, in the order of their first appearance."""
        for (found, key), value in self._records.items():
            if found == kind:
                yield json.loads(key), value

    def _append(self, line: Record) -> None:
        # The break comes first too, so that a line that a kill cut off ends before this one.
        text = "\n" + json.dumps(line) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def digest(value: Any) -> str:
    """Return eight characters that tell one plain value from another."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _parsed(line: str) -> Record | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # empty, or cut off


def _key(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


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
