"""Figures of a report as PNG files; they need matplotlib, which is an optional extra."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lit_moe.grouping.partition import average_linkage
from lit_moe.quantities import with_error
from lit_moe.report.schema import RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG = logging.getLogger(__name__)
_KEPT, _DROPPED, _UNSEEN = "#2a6f97", "#d98e73", "#c9c9c9"
_STAGE_COLOURS = ("#6b7280", "#d98e73", "#2a6f97", "#4c956c", "#8e6c8a")
_DPI = 150
_COLUMNS = 4


def draw_figures(
    report: RunReport,
    folder: str | Path,
    *,
    scores: Mapping[str, Tensor] | None = None,
    loads: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Draw what is known and return the files; without matplotlib, log how to get it.

    Args:
        report: names the experts kept and the quality of each stage.
        folder: where the PNG files go.
        scores: layer -> criterion score per expert ``(E,)``, higher is kept.
        loads: layer -> tokens per expert ``(E,)``.
    """
    if find_spec("matplotlib") is None:
        _LOG.warning("no figures: matplotlib is missing; pip install lit-moe[plots]")
        return []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if scores:
        figures["scores.png"] = score_bars(report, scores)
    if loads:
        figures["expert_load.png"] = load_heatmap(report, loads)
    if report.quality:
        figures["quality.png"] = quality_bars(report)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_DPI, bbox_inches="tight")
    return [folder / name for name in figures]


def score_bars(report: RunReport, scores: Mapping[str, Tensor]) -> Figure:
    """One panel per layer: experts by falling score, coloured by whether they stay."""
    columns = min(_COLUMNS, len(scores))
    rows = math.ceil(len(scores) / columns)
    figure = _figure(2.6 * columns, 1.5 * rows + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (layer, score) in zip(panels, scores.items(), strict=False):
        _draw_scores(panel, score, _kept(report, layer, score.numel()))
        panel.set_title(layer.removeprefix("model."), fontsize=8)
    for panel in panels[len(scores) :]:
        panel.set_visible(False)
    _legend(figure, {"kept": _KEPT, "dropped": _DROPPED})
    figure.supylabel(f"score ({report.criterion or 'criterion'})", fontsize=9)
    figure.supxlabel("experts, best first", fontsize=9)
    return figure


def load_heatmap(report: RunReport, loads: Mapping[str, Tensor]) -> Figure:
    """Layers x experts: tokens of each expert over the mean of its layer, and which experts go."""
    from matplotlib.colors import LogNorm

    num_experts = max(load.numel() for load in loads.values())
    share = np.full((len(loads), num_experts), np.nan)
    for row, load in zip(share, loads.values(), strict=True):
        row[: load.numel()] = (load.double() / load.double().mean().clamp(min=1e-12)).numpy()
    figure = _figure(
        min(14.0, 2.8 + 0.25 * num_experts), 1.4 + min(0.25, 8 / len(loads)) * len(loads)
    )
    panel = figure.subplots()
    image = panel.imshow(
        np.where(share > 0, share, np.nan),
        aspect="auto",
        cmap="viridis",
        norm=LogNorm(1 / 8, 8, clip=True),
        interpolation="nearest",
    )
    _mark(panel, report, loads, share)
    panel.set_yticks(range(len(loads)), [k.removeprefix("model.") for k in loads], fontsize=7)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlabel("expert", fontsize=9)
    panel.set_title("cross: dropped   grey: saw no token", fontsize=8, loc="left")
    bar = figure.colorbar(image, ax=panel, pad=0.02, ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8])
    bar.ax.set_yticklabels(["≤1/8", "1/4", "1/2", "even", "2x", "4x", "≥8x"], fontsize=8)
    bar.ax.minorticks_off()
    bar.set_label("tokens per expert", fontsize=8)
    return figure


def similarity_heatmaps(
    similarities: Mapping[str, Tensor], groups: Mapping[str, Sequence[Sequence[int]]]
) -> Figure:
    """One panel per layer: experts by group, brighter = more alike; each group in a frame."""
    from matplotlib.patches import Rectangle

    figure, panels = _panels(similarities, 2.6, 2.6)
    for panel, (layer, similarity) in zip(panels, similarities.items(), strict=False):
        order = [expert for members in groups[layer] for expert in members]
        values = similarity.double()[order][:, order].clone()
        apart = values[~torch.eye(len(values), dtype=torch.bool)]
        panel.imshow(
            values.fill_diagonal_(float("nan")).numpy(),
            cmap="viridis",
            vmin=float(apart.min()),
            vmax=float(apart.max()),
            interpolation="nearest",
        )
        start = 0
        for members in groups[layer]:
            corner = (start - 0.5, start - 0.5)
            size, start = len(members), start + len(members)
            panel.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=_DROPPED, lw=1.2))
        _number(panel, order)
        panel.tick_params(labelsize=6)
    figure.supxlabel("experts, by group", fontsize=9)
    return figure


def dendrograms(similarities: Mapping[str, Tensor]) -> Figure:
    """One panel per layer: average linkage of the experts, whatever grouped them."""
    from scipy.cluster.hierarchy import dendrogram

    figure, panels = _panels(similarities, 2.6, 2.0)
    for panel, similarity in zip(panels, similarities.values(), strict=False):
        tree = dendrogram(average_linkage(similarity.double().numpy()), no_plot=True)
        for xs, ys in zip(tree["icoord"], tree["dcoord"], strict=True):
            panel.plot(xs, ys, color=_KEPT, linewidth=0.8)
        leaves = tree["leaves"]
        shown = range(0, len(leaves), max(1, len(leaves) // 16))
        panel.set_xticks([5 + 10 * i for i in shown], [str(leaves[i]) for i in shown])
        panel.tick_params(labelsize=6)
        _bare(panel)
    figure.supylabel("distance", fontsize=9)
    return figure


def _panels(layers: Mapping[str, Tensor], width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with a titled panel per layer."""
    columns = min(_COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = _figure(width * columns, height * rows + 0.3)
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for panel, layer in zip(panels, layers, strict=False):
        panel.set_title(layer.removeprefix("model."), fontsize=8)
    for panel in panels[len(layers) :]:
        panel.set_visible(False)
    return figure, panels


def _number(panel: Axes, ids: Sequence[int]) -> None:
    """Write some of the ids along both axes."""
    shown = range(0, len(ids), max(1, len(ids) // 16))
    names = [str(ids[i]) for i in shown]
    panel.set_xticks(list(shown), names)
    panel.set_yticks(list(shown), names)


def quality_bars(report: RunReport) -> Figure:
    """Perplexity of each stage with its standard error."""
    names, values = list(report.quality), list(report.quality.values())
    figure = _figure(1.6 + 1.1 * len(names), 3.2)
    panel = figure.subplots()
    heights = [q.perplexity for q in values]
    errors = [q.stderr for q in values]
    colours = [_STAGE_COLOURS[i % len(_STAGE_COLOURS)] for i in range(len(names))]
    panel.bar(names, heights, yerr=errors, color=colours, width=0.6, capsize=4)
    for i, quality in enumerate(values):
        top = quality.perplexity + quality.stderr
        label = with_error(quality.perplexity, quality.stderr).replace("+-", "±")
        panel.annotate(label, (i, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    panel.margins(y=0.12)
    panel.set_ylabel("perplexity (lower is better)", fontsize=9)
    _bare(panel)
    return figure


def _draw_scores(panel: Axes, score: Tensor, kept: set[int]) -> None:
    """Bars as one collection: thousands of single patches take matplotlib many seconds."""
    from matplotlib.collections import PolyCollection

    order = score.double().argsort(descending=True, stable=True).tolist()
    heights = score.double()[order].numpy()
    left, zero = np.arange(len(order)) + 0.08, np.zeros(len(order))
    right = left + 0.84
    corners = [(left, zero), (left, heights), (right, heights), (right, zero)]
    boxes = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)
    colours = [_KEPT if expert in kept else _DROPPED for expert in order]
    panel.add_collection(PolyCollection(boxes, facecolors=colours))  # type: ignore[arg-type]
    panel.set_xlim(-0.5, len(order) + 0.5)
    panel.set_ylim(min(0.0, heights.min()), max(0.0, heights.max()) * 1.05 or 1.0)
    panel.set_xticks([])
    panel.tick_params(labelsize=7)
    _bare(panel)


def _mark(panel: Axes, report: RunReport, loads: Mapping[str, Tensor], share: Any) -> None:
    """Grey for experts without tokens, a cross on those that go."""
    unseen = np.ma.masked_where(share != 0, np.ones_like(share))
    panel.imshow(unseen, aspect="auto", cmap=_flat(_UNSEEN), interpolation="nearest")
    gone = [
        (row, expert)
        for row, (layer, load) in enumerate(loads.items())
        for expert in sorted(set(range(load.numel())) - _kept(report, layer, load.numel()))
    ]
    if not gone:
        return
    rows_gone, experts_gone = (list(axis) for axis in zip(*gone, strict=True))
    colours = np.where(share[rows_gone, experts_gone] > 0, "white", "black").tolist()
    size = max(2.0, 14 - share.shape[1] / 8)
    panel.scatter(experts_gone, rows_gone, marker="x", s=size, linewidths=0.8, c=colours)


def _kept(report: RunReport, layer: str, num_experts: int) -> set[int]:
    known = report.experts.get(layer)
    return set(known.kept) if known else set(range(num_experts))


def _figure(width: float, height: float) -> Figure:
    """A figure outside pyplot: no global state, no display needed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _flat(colour: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([colour])


def _legend(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8)


def _bare(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
