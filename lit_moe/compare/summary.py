"""Cells of all seeds and models as one table: mean and spread, against control and direction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_moe.compare.grid import Grid
from lit_moe.compare.options import CONTROL, Line
from lit_moe.compare.store import CellStore


@dataclass(frozen=True)
class Spread:
    """A number over seeds and models.

    Attributes:
        values: one each.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the values."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample; 0 for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def text(self) -> str:
        """Mean, and deviation in brackets if there are several values."""
        if len(self.values) < 2:
            return f"{self.mean:.4g}"
        return f"{_rounded(self.mean, self.deviation)} ({self.deviation:.2g})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        found = {"mean": self.mean, "deviation": self.deviation, "num": len(self.values)}
        return {**found, "min": min(self.values), "max": max(self.values)}


@dataclass(frozen=True)
class Row:
    """One curve of the comparison.

    Attributes:
        line: what it is.
        perplexity: ratio -> over seeds and models; only ratios with values.
        tokens: ratio -> that a lottery was trained on, mean; empty for others.
        cells: ratio -> finished cells behind the numbers.
    """

    line: Line
    perplexity: Mapping[float, Spread]
    tokens: Mapping[float, float]
    cells: Mapping[float, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Failure:
    """Cells that could not be measured, for one reason.

    Attributes:
        line: of the cells.
        sentence: the reason.
        cells: how many.
    """

    line: Line
    sentence: str
    cells: int


@dataclass(frozen=True)
class Summary:
    """What a comparison found.

    Attributes:
        whole: perplexity with all experts, over models.
        ratios: that were asked for, falling.
        rows: curves with at least one number, the control first in each procedure.
        failures: cells without one.
        wholes: what was measured with all experts, one per model.
    """

    whole: Spread
    ratios: tuple[float, ...]
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    wholes: tuple[Mapping[str, Any], ...] = ()

    def control(self, row: Row) -> Row | None:
        """Return the control of the same procedure and scope, None if there is none."""
        found = (
            r
            for r in self.rows
            if r.line.criterion == CONTROL
            and (r.line.procedure, r.line.scope) == (row.line.procedure, row.line.scope)
        )
        return next(found, None)

    def beats_control(self, row: Row, ratio: float) -> bool | None:
        """Return whether a row is better than the control by more than both spreads.

        None without a control, or below two values of either, which have no spread; the control
        itself is not compared.
        """
        control = self.control(row)
        if control is None or row is control:
            return None
        mine, other = row.perplexity.get(ratio), control.perplexity.get(ratio)
        if mine is None or other is None or min(len(mine.values), len(other.values)) < 2:
            return None
        return other.mean - mine.mean > mine.deviation + other.deviation

    def paper_wins(self) -> dict[str, dict[str, bool]]:
        """Return procedure and criterion -> ratio -> whether the paper's direction is better."""
        found: dict[str, dict[str, bool]] = {}
        rows = {row.line: row for row in self.rows}
        for line, row in rows.items():
            other = rows.get(Line(line.criterion, "opposite", line.procedure, line.scope))
            if line.direction == "opposite" or other is None:
                continue
            found[f"{line.procedure}: {line.name}"] = {
                f"{ratio:g}": row.perplexity[ratio].mean < other.perplexity[ratio].mean
                for ratio in self.ratios
                if ratio in row.perplexity and ratio in other.perplexity
            }
        return found


def summarise(grid: Grid, store: CellStore) -> Summary:
    """Return what the store knows of the cells of a grid."""
    rows, failures = [], []
    for line in grid.lines:
        found: dict[float, list[dict[str, Any]]] = {}
        errors: list[str] = []
        for ratio, cell in _cells(grid, store, line):
            if "error" in cell:
                errors.append(cell["error"])
            else:
                found.setdefault(ratio, []).append(cell)
        failures += [Failure(line, s, errors.count(s)) for s in dict.fromkeys(errors)]
        if found:
            rows.append(_row(line, found))
    found_wholes = (store.get("whole", model=model) for model in grid.options.models)
    wholes = tuple(whole for whole in found_wholes if whole is not None)
    whole = Spread(tuple(w["perplexity"] for w in wholes))
    return Summary(whole, tuple(grid.ratios), tuple(rows), tuple(failures), wholes)


def _cells(grid: Grid, store: CellStore, line: Line) -> Iterator[tuple[float, dict[str, Any]]]:
    for ratio in grid.ratios:
        for model in grid.options.models:
            for seed in grid.seeds(line):
                cell = store.get("cell", **grid.key(line, model, seed, ratio))
                if cell is not None:
                    yield ratio, cell


def to_markdown(summary: Summary) -> str:
    """Return the tables of all procedures, the directions, and what failed, as Markdown."""
    parts = [f"Perplexity with all experts: {summary.whole.text}.\n"]
    parts += [
        f"## {procedure.replace('_', '-')}\n\n{_table(summary, procedure)}"
        for procedure in dict.fromkeys(row.line.procedure for row in summary.rows)
    ]
    parts.append(
        "Mean over seeds and models, in brackets the standard deviation; `*`: better than random "
        "by more than both deviations together, which takes two values of each.\n"
    )
    parts += [_directions(summary), _failures(summary)]
    return "\n".join(part for part in parts if part)


def table_rows(summary: Summary, procedure: str) -> list[list[str]]:
    """Return the cells of one procedure's table, without its head."""
    found = []
    for row in summary.rows:
        if row.line.procedure != procedure:
            continue
        cells = [row.line.name]
        for ratio in summary.ratios:
            value = row.perplexity.get(ratio)
            star = " *" if summary.beats_control(row, ratio) else ""
            cells.append("failed" if value is None else f"{value.text}{star}")
        found.append(cells)
    return found


def _row(line: Line, found: Mapping[float, list[dict[str, Any]]]) -> Row:
    trained = {
        ratio: statistics.fmean(cell["trained_tokens"] for cell in cells)
        for ratio, cells in found.items()
        if all("trained_tokens" in cell for cell in cells)
    }
    perplexity = {r: Spread(tuple(c["perplexity"] for c in cells)) for r, cells in found.items()}
    return Row(line, perplexity, trained, found)


def _table(summary: Summary, procedure: str) -> str:
    head = ["kept", *(f"{ratio:.0%}" for ratio in summary.ratios)]
    trained = [row.tokens for row in summary.rows if row.line.procedure == procedure and row.tokens]
    rows = table_rows(summary, procedure)
    if trained:
        tokens = [trained[0].get(ratio) for ratio in summary.ratios]
        rows.append(["tokens trained on", *("-" if n is None else f"{n:,.0f}" for n in tokens)])
    return markdown_table(head, rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _directions(summary: Summary) -> str:
    wins = summary.paper_wins()
    if not wins:
        return ""
    head = ["paper's direction is better", *(f"{ratio:.0%}" for ratio in summary.ratios)]
    rows = [
        [name, *({True: "yes", False: "NO", None: "-"}[w.get(f"{r:g}")] for r in summary.ratios)]
        for name, w in wins.items()
    ]
    return "## Directions\n\n" + markdown_table(head, rows)


def _failures(summary: Summary) -> str:
    lines = [
        f"- {f.line.procedure} {f.line.name} ({f.cells} cells): {f.sentence}"
        for f in summary.failures
    ]
    return "## Failed\n\n" + "\n".join(lines) + "\n" if lines else ""


def _rounded(value: float, error: float) -> str:
    if error <= 0 or not math.isfinite(error):
        return f"{value:.4g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(error)))}f}"
