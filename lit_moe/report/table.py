"""The table at the end of a run: one column per stage."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from lit_moe.evaluate import Quality, TaskQuality
from lit_moe.evaluate.images import ImageQuality
from lit_moe.quantities import count, size, with_error
from lit_moe.report.schema import Change, RunReport

FIRST_STAGE = "before"


def summary_table(report: RunReport) -> Table:
    """Return perplexity, parameters, bytes and speed for every stage that the run went through."""
    table = Table(title=f"{report.source} ({report.family})", title_justify="left")
    table.add_column("")
    for stage in stages(report):
        table.add_column(stage, justify="right")
    for label, cells in summary_rows(report):
        table.add_row(label, *cells)
    return table


def stages(report: RunReport) -> list[str]:
    """Return the stages of a report in order; a run without evaluation still has two."""
    if report.quality or report.images:
        return list(report.quality or report.images)
    return [FIRST_STAGE, "after"] if report.experts else [FIRST_STAGE]


def summary_rows(report: RunReport) -> list[tuple[str, list[str]]]:
    """Return label and one cell per stage, without rows that know nothing."""
    names = stages(report)
    rows = [
        ("perplexity", _quality_cells(report, lambda q: with_error(q.perplexity, q.stderr))),
        ("bits per byte", _quality_cells(report, lambda q: f"{q.bits_per_byte:.3f}")),
        *_task_rows(report),
        ("accuracy", [_accuracy(report.images.get(stage)) for stage in names]),
        ("parameters", _size_cells(report.parameters, names, count)),
        ("active parameters", _size_cells(report.active_parameters, names, count)),
        ("bytes in memory", _size_cells(report.bytes, names, size)),
        ("tokens per second", _quality_cells(report, _speed)),
    ]
    return [(label, cells) for label, cells in rows if any(cell != "-" for cell in cells)]


def _quality_cells(report: RunReport, show: Callable[[Quality], str]) -> list[str]:
    return [show(report.quality[s]) if s in report.quality else "-" for s in stages(report)]


def _task_rows(report: RunReport) -> list[tuple[str, list[str]]]:
    """Return exact match and choice for every number of solved examples."""
    rows: list[tuple[str, list[str]]] = []
    for shots in dict.fromkeys(key for tasks in report.tasks.values() for key in tasks):
        found = [report.tasks.get(stage, {}).get(shots) for stage in stages(report)]
        rows.append((f"{shots}: written right", [_written(q) for q in found]))
        rows.append((f"{shots}: chosen right", [_chosen(q) for q in found]))
    return rows


def _written(quality: TaskQuality | None) -> str:
    if quality is None:
        return "-"
    return with_error(quality.exact_match, quality.exact_match_stderr)


def _chosen(quality: TaskQuality | None) -> str:
    if quality is None or quality.choice_accuracy is None:
        return "-"
    return with_error(quality.choice_accuracy, quality.choice_stderr or 0.0)


def _accuracy(quality: ImageQuality | None) -> str:
    return "-" if quality is None else with_error(quality.accuracy, quality.stderr)


def _size_cells(change: Change, names: list[str], show: Callable[[float | None], str]) -> list[str]:
    return [show(change.before if name == FIRST_STAGE else change.after) for name in names]


def _speed(quality: Quality) -> str:
    return f"{quality.tokens_per_second:,.0f}" if quality.tokens_per_second else "-"
