"""How well questions are answered: the task measures of all cells as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_moe.compare.options import Line
from lit_moe.compare.summary import Spread, Summary, markdown_table

MEASURES = {
    "exact_match": "written answers that are right",
    "f1": "F1 of the words of written answers",
    "choice_accuracy": "right choices that are the likeliest",
}
"""Field of ``TaskQuality`` -> what it is called in tables; each is a share in [0, 1]."""


@dataclass(frozen=True)
class AnswerTable:
    """One measure with one number of examples before each question.

    Attributes:
        shots: ``0-shot`` and so on.
        measure: one of ``MEASURES``.
        whole: with all experts, over models.
        rows: curve -> ratio -> over seeds and models; only what was measured.
    """

    shots: str
    measure: str
    whole: Spread
    rows: Mapping[Line, Mapping[float, Spread]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [
            {**vars(line), "values": {f"{ratio:g}": s.to_dict() for ratio, s in values.items()}}
            for line, values in self.rows.items()
        ]
        names = {"shots": self.shots, "measure": self.measure}
        return {**names, "whole": self.whole.to_dict(), "rows": rows}


def answer_tables(summary: Summary) -> list[AnswerTable]:
    """Return a table per measure and number of shots; none if no questions were asked."""
    asked = [cell["tasks"] for cell in summary.wholes if "tasks" in cell]
    found = []
    for measure in MEASURES:
        for shots in asked[0] if asked else ():
            whole = _spread(summary.wholes, shots, measure)
            if whole is not None:
                found.append(AnswerTable(shots, measure, whole, _rows(summary, shots, measure)))
    return found


def answers_markdown(summary: Summary) -> str:
    """Return the tables as Markdown; empty if no questions were asked."""
    tables = [_markdown(table, summary.ratios) for table in answer_tables(summary)]
    if not tables:
        return ""
    note = "Shares in [0, 1], mean over seeds and models, in brackets the standard deviation.\n"
    return "\n".join(["## Questions\n", note, *tables])


def _rows(summary: Summary, shots: str, measure: str) -> dict[Line, dict[float, Spread]]:
    rows = {}
    for row in summary.rows:
        spreads = {ratio: _spread(cells, shots, measure) for ratio, cells in row.cells.items()}
        rows[row.line] = {ratio: s for ratio, s in spreads.items() if s is not None}
    return rows


def _spread(cells: Sequence[Mapping[str, Any]], shots: str, measure: str) -> Spread | None:
    values = [cell.get("tasks", {}).get(shots, {}).get(measure) for cell in cells]
    numbers = tuple(value for value in values if value is not None)
    return Spread(numbers) if numbers else None


def _markdown(table: AnswerTable, ratios: Sequence[float]) -> str:
    head = ["kept", "100%", *(f"{ratio:.0%}" for ratio in ratios)]
    rows = [
        [
            f"{line.procedure.replace('_', '-')} {line.name}",
            table.whole.text,
            *(values[ratio].text if ratio in values else "failed" for ratio in ratios),
        ]
        for line, values in table.rows.items()
    ]
    rows = rows or [["all experts", table.whole.text, *("failed" for _ in ratios)]]
    return f"### {table.shots}: {MEASURES[table.measure]}\n\n{markdown_table(head, rows)}"
