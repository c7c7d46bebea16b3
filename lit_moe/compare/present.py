"""The files of a comparison: tables as Markdown and JSON, figures, TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lit_moe.compare.ablation import AblationMap
from lit_moe.compare.agreement import Agreement
from lit_moe.compare.answers import answer_tables, answers_markdown
from lit_moe.compare.findings import (
    COLLAPSE,
    agreements,
    collapsing,
    correlations,
    load_changes,
    lottery_loads,
    super_experts,
)
from lit_moe.compare.grid import Grid
from lit_moe.compare.store import CellStore
from lit_moe.compare.summary import Row, Summary, markdown_table, to_markdown
from lit_moe.report import installed_versions
from lit_moe.report.coding import plain_values
from lit_moe.report.comparison import (
    Point,
    ablation_figure,
    agreement_figure,
    load_figure,
    perplexity_curves,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON_NAME, MARKDOWN_NAME, EVENTS = "report.json", "report.md", "tensorboard"
_DPI = 150
_MOST_COSTLY = 5
_SIGNS = {
    "extreme_activations": "experts with extreme activations",
    "single_drop": f"experts without which the perplexity is {COLLAPSE:g} times as large or more",
}


@dataclass(frozen=True)
class Found:
    """Everything that a comparison knows.

    Attributes:
        grid: what was asked.
        store: the cells.
        summary: their table.
        ablation: what single experts are worth on the first model; None if not asked.
    """

    grid: Grid
    store: CellStore
    summary: Summary
    ablation: AblationMap | None = None

    @property
    def is_complete(self) -> bool:
        """Whether no cell failed."""
        return not self.summary.failures


def write_all(found: Found, folder: Path) -> None:
    """Write report.json, report.md, figures and TensorBoard events."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = _figures(found) if found.grid.options.figures and _can_draw() else {}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=_DPI, bbox_inches="tight")
    _replace(folder / JSON_NAME, json.dumps(plain_values(to_dict(found)), indent=2) + "\n")
    _replace(folder / MARKDOWN_NAME, markdown(found, list(figures)))
    _write_events(found, figures, folder / EVENTS)


def to_dict(found: Found) -> dict[str, Any]:
    """Return all findings as plain values."""
    grid, summary = found.grid, found.summary
    correlated = correlations(grid, found.store)
    agreed = agreements(grid, found.store)
    return {
        "models": grid.options.models,
        "settings": found.store.settings,
        "versions": installed_versions(),
        "whole": summary.whole.to_dict(),
        "rows": [_row(summary, row) for row in summary.rows],
        "questions": [table.to_dict() for table in answer_tables(summary)],
        "paper_direction_wins": summary.paper_wins(),
        "failed": [
            {**vars(f.line), "cells": f.cells, "error": f.sentence} for f in summary.failures
        ],
        "agreement": {ratio: _agreement(a) for ratio, a in agreed.items()},
        "rank_correlation": None if correlated is None else _agreement(correlated),
        "load": lottery_loads(summary),
        "super_experts": super_experts(found.ablation, found.store, grid),
        "ablation": None if found.ablation is None else _ablation(found.ablation),
    }


def markdown(found: Found, figures: list[str]) -> str:
    """Return the report for people."""
    parts = [f"# {', '.join(found.grid.options.models)}\n", to_markdown(found.summary)]
    parts += [text for text in [answers_markdown(found.summary)] if text]
    parts += [f"![{name}]({name}.png)\n" for name in figures]
    loads = lottery_loads(found.summary)
    if loads:
        head = ["load of the experts", "CV before", "CV after", "entropy before", "entropy after"]
        rows = [[name, *(f"{v:.3f}" for v in values.values())] for name, values in loads.items()]
        parts.append("## Load before and after fine-tuning\n\n" + markdown_table(head, rows))
    if found.ablation is not None:
        parts.append(_costly(found.ablation))
    signs = super_experts(found.ablation, found.store, found.grid)
    if signs:
        parts.append(_super_experts(signs))
    return "\n".join(parts)


def write_ablation(found: AblationMap, model: str, folder: Path, *, figures: bool) -> None:
    """Write the map of single experts alone: report.json, report.md and a figure."""
    folder.mkdir(parents=True, exist_ok=True)
    collapsed = collapsing(found)
    values = {
        "model": model,
        **_ablation(found),
        "super_experts": collapsed,
        "versions": installed_versions(),
    }
    _replace(folder / JSON_NAME, json.dumps(plain_values(values), indent=2) + "\n")
    image = ""
    if figures and _can_draw():
        figure = ablation_figure(found.perplexities, math.exp(found.whole))
        figure.savefig(folder / "ablation.png", dpi=_DPI, bbox_inches="tight")
        image = "\n![ablation](ablation.png)\n"
    head = f"# {model}\n\nPerplexity with all experts: {math.exp(found.whole):.4g}.\n\n"
    table = _super_experts({"single_drop": collapsed})
    _replace(folder / MARKDOWN_NAME, f"{head}{_costly(found)}\n{table}{image}")


def _row(summary: Summary, row: Row) -> dict[str, Any]:
    ratios = {}
    for ratio, value in row.perplexity.items():
        beats = summary.beats_control(row, ratio)
        ratios[f"{ratio:g}"] = {**value.to_dict(), "beats_random": beats}
        if ratio in row.tokens:
            ratios[f"{ratio:g}"]["trained_tokens"] = row.tokens[ratio]
    return {**vars(row.line), "perplexity": ratios}


def _agreement(agreement: Agreement) -> dict[str, Any]:
    layers = {layer: values.tolist() for layer, values in agreement.layers.items()}
    return {
        "names": list(agreement.names),
        "overall": agreement.overall.tolist(),
        "layers": layers,
    }


def _ablation(ablation: AblationMap) -> dict[str, Any]:
    perplexities = {layer: values.tolist() for layer, values in ablation.perplexities.items()}
    whole = math.exp(ablation.whole)
    return {"whole": whole, "tokens": ablation.tokens, "without": perplexities}


def _costly(ablation: AblationMap) -> str:
    drops = [
        (float(value.exp()), layer, expert)
        for layer, values in ablation.increases.items()
        for expert, value in enumerate(values)
    ]
    most = sorted(drops, reverse=True)[:_MOST_COSTLY]
    rows = [[f"`{layer}`", str(expert), f"x {factor:.4g}"] for factor, layer, expert in most]
    head = ["layer", "expert left out", "perplexity"]
    return "## The experts that cost most\n\n" + markdown_table(head, rows)


def _super_experts(signs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return layer -> experts by each sign that was looked for, as :func:`super_experts` does."""
    layers = dict.fromkeys(layer for found in signs.values() for layer in found)
    rows = [
        [f"`{layer}`", *(_named(found.get(layer, ())) for found in signs.values())]
        for layer in layers
    ]
    head = ["layer", *(_SIGNS[sign] for sign in signs)]
    table = markdown_table(head, rows or [["all", *("-" for _ in signs)]])
    return f"## Super-experts\n\n{table}"


def _named(experts: Sequence[int] | Mapping[str, float]) -> str:
    if isinstance(experts, Mapping):
        return ", ".join(f"{expert} (x {factor:.4g})" for expert, factor in experts.items()) or "-"
    return ", ".join(str(expert) for expert in experts) or "-"


def _figures(found: Found) -> dict[str, Figure]:
    summary, store, grid = found.summary, found.store, found.grid
    figures = {}
    if summary.rows:
        figures["perplexity"] = perplexity_curves(_curves(summary), whole=summary.whole.mean)
    agreed = agreements(grid, store)
    if agreed:
        matrices = {f"{ratio} kept": a.overall for ratio, a in agreed.items()}
        names = next(iter(agreed.values())).names
        if all(a.names == names for a in agreed.values()):
            figures["agreement"] = agreement_figure(
                matrices, names, "Jaccard of the dropped experts"
            )
    correlated = correlations(grid, store)
    if correlated is not None:
        figures["rank_correlation"] = agreement_figure(
            {"mean over layers": correlated.overall}, correlated.names, "Spearman"
        )
    loads = next(_lottery_loads(summary), None)
    if loads is not None:
        figures["expert_load"] = load_figure(*loads)
    if found.ablation is not None:
        whole = math.exp(found.ablation.whole)
        figures["ablation"] = ablation_figure(found.ablation.perplexities, whole)
    return figures


def _curves(summary: Summary) -> dict[str, dict[str, list[Point]]]:
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in summary.rows:
        curve = [
            Point(1 - ratio, s.mean, min(s.values), max(s.values))
            for ratio, s in row.perplexity.items()
        ]
        panels.setdefault(row.line.procedure.replace("_", "-"), {})[row.line.name] = curve
    return panels


def _lottery_loads(summary: Summary) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Yield loads before and after of lotteries, of the good criteria and small ratios first."""
    for row in reversed(summary.rows):
        for ratio in sorted(row.cells):
            cell = row.cells[ratio][0]
            if "load" in cell:
                changes = load_changes(cell["load"])
                yield tuple(  # type: ignore[misc]
                    {k: torch.tensor(v[moment]["shares"]) for k, v in changes.items()}
                    for moment in ("before", "after")
                )


def _write_events(found: Found, figures: dict[str, Figure], folder: Path) -> None:
    """One curve per line: step is the percentage of experts that is gone."""
    for old in folder.glob("events.*"):
        old.unlink()  # of an earlier call: it knew less
    with SummaryWriter(str(folder)) as writer:
        for row in found.summary.rows:
            tag = f"{row.line.procedure}/{row.line.name.replace(' ', '_')}"
            writer.add_scalar(tag, found.summary.whole.mean, 0)
            for ratio, value in sorted(row.perplexity.items(), reverse=True):
                writer.add_scalar(tag, value.mean, round(100 * (1 - ratio)))
        for name, figure in figures.items():
            writer.add_image(name, _pixels(figure), 0, dataformats="HWC")


def _pixels(figure: Figure) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from numpy import asarray

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return asarray(canvas.buffer_rgba())[..., :3]


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
