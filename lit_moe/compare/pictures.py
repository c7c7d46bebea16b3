"""The figures of a comparison, as PNG files and in TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lit_moe.compare.ablation import AblationMap
from lit_moe.compare.findings import (
    Found,
    agreements,
    calibrated,
    collapsing,
    correlations,
    load_changes,
)
from lit_moe.compare.summary import Summary
from lit_moe.report.comparison import (
    Point,
    ablation_figure,
    activation_figure,
    agreement_figure,
    load_figure,
    perplexity_curves,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 150


def draw(found: Found) -> dict[str, Figure]:
    """Return name -> figure of everything that was found and can be drawn."""
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
        figures["ablation"] = draw_ablation(found.ablation)
    seen = calibrated(found)
    if seen is not None and "max_abs" in seen:
        largest = {k: torch.tensor(v, dtype=torch.float64) for k, v in seen["max_abs"].items()}
        figures["largest_activations"] = activation_figure(largest, seen["super_experts"])
    return figures


def draw_ablation(found: AblationMap) -> Figure:
    """Return the map of single experts; those without which the model collapses are outlined."""
    marked = {layer: map(int, experts) for layer, experts in collapsing(found).items()}
    return ablation_figure(found.perplexities, math.exp(found.whole), marked)


def can_draw() -> bool:
    """Return whether matplotlib is installed, which is an extra."""
    return find_spec("matplotlib") is not None


def save(figures: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure as a PNG file named after it."""
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=_DPI, bbox_inches="tight")


def write_events(
    figures: Mapping[str, Figure], folder: Path, summary: Summary | None = None
) -> None:
    """Write TensorBoard events: figures, and a curve per line of a comparison.

    Args:
        figures: name -> figure, shown as images.
        folder: for the events; those of an earlier call are replaced.
        summary: of a comparison; a curve's step is the percentage of experts that is gone.
    """
    for old in folder.glob("events.*"):
        old.unlink()  # of an earlier call: it knew less
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_image(name, _pixels(figure), 0, dataformats="HWC")
        if summary is not None:
            _write_curves(writer, summary)


def _write_curves(writer: SummaryWriter, summary: Summary) -> None:
    for row in summary.rows:
        tag = f"{row.line.procedure}/{row.line.name.replace(' ', '_')}"
        writer.add_scalar(tag, summary.whole.mean, 0)
        for ratio, value in sorted(row.perplexity.items(), reverse=True):
            writer.add_scalar(tag, value.mean, round(100 * (1 - ratio)))


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


def _pixels(figure: Figure) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from numpy import asarray

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return asarray(canvas.buffer_rgba())[..., :3]
