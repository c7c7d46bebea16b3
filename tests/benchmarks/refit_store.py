"""Measured cells, one JSON line each in a file outside git, so that a benchmark can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class Store:
    """Cells by model, part and settings; of two lines for one cell the later one counts.

    Args:
        path: file of JSON lines; made on the first write.
        version: of the code that is measured; cells of another one do not count. Raise it when a
            change makes all earlier cells worthless.
        measures: whether cells that are missing may be measured; otherwise they stay missing.
    """

    def __init__(self, path: Path, *, version: int = 1, measures: bool = True) -> None:
        self.path = path
        self.version = version
        self.measures = measures
        self._cells: dict[str, Result] = {}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for record in filter(None, map(_record, lines)):
            if record["version"] == version:
                key = _key(record["model"], record["part"], record["settings"])
                self._cells[key] = record["result"]

    def get(self, model: str, part: str, **settings: Any) -> Result | None:
        return self._cells.get(_key(model, part, settings))

    def cells(self) -> Iterator[tuple[str, str, dict[str, Any], Result]]:
        """Yield model, part, settings and result of each cell."""
        for key, result in self._cells.items():
            model, part, settings = json.loads(key)
            yield model, part, settings, result

    def measure(self, work: Callable[[], Result], model: str, part: str, **settings: Any) -> None:
        """Call ``work`` and keep what it returns, if the cell is missing."""
        if not self.measures or self.get(model, part, **settings) is not None:
            return
        result = work()
        names = {"version": self.version, "model": model, "part": part, "settings": settings}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            # The line break comes first, so that a line cut off by a kill spoils only itself.
            file.write("\n" + json.dumps({**names, "result": result}))
        self._cells[_key(model, part, settings)] = result
        print(model, part, settings, _short(result), flush=True)


def _record(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # empty, or being written


def _key(model: str, part: str, settings: dict[str, Any]) -> str:
    return json.dumps([model, part, settings], sort_keys=True)


def _short(result: Result) -> Result:
    return {k: v for k, v in result.items() if isinstance(v, (int, float, str))}
