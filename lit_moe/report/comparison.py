"""Figures that set plans, scores, loads and single experts side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lit_moe.report.figures import _bare, _figure, _panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

_COLOURS = ("#2a6f97", "#d98e73", "#4c956c", "#8e6c8a", "#c9a227", "#5f8fa8", "#a44a3f", "#7f9c5b")
_GREY = "#6b7280"


@dataclass(frozen=True)
class Point:
    """One ratio of a curve.

    Attributes:
        dropped: fraction of the experts that is gone.
        mean: perplexity over seeds.
        low: smallest.
        high: largest.
    """

    dropped: float
    mean: float
    low: float
    high: float


def perplexity_curves(
    panels: Mapping[str, Mapping[str, Sequence[Point]]], *, whole: float, control: str = "random"
) -> Figure:
    """Draw perplexity against sparsity, one panel per procedure: mean, and band over seeds.

    Args:
        panels: title -> name of the curve -> points.
        whole: perplexity with all experts, where all curves begin.
        control: name of the curve that is drawn in grey.
    """
    figure = _figure(1.4 + 3.6 * len(panels), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    others = [name for name in names if name != control]
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, points in curves.items():
            _draw_curve(panel, name, points, whole, colours.get(name, _GREY))
        panel.set_title(title, fontsize=9)
        panel.set_yscale("log")
        panel.set_xlabel("experts dropped (%)", fontsize=9)
        panel.tick_params(labelsize=7, which="both")
        _bare(panel)
    axes[0].set_ylabel("perplexity (lower is better)", fontsize=9)
    handles = {h.get_label(): h for panel in axes for h in panel.get_lines()}
    figure.legend(
        handles=[handles[name] for name in names if name in handles],
        loc="outside right upper",
        fontsize=7,
    )
    return figure


def agreement_figure(matrices: Mapping[str, Tensor], names: Sequence[str], label: str) -> Figure:
    """Draw symmetric matrices of names against names, one panel each.

    Args:
        matrices: title -> values in [-1, 1], shape ``(N, N)``; NaN stays white.
        names: of rows and columns, N.
        label: what the values are.
    """
    size = 1.6 + 0.32 * len(names)
    columns = min(3, len(matrices))
    rows = math.ceil(len(matrices) / columns)
    figure = _figure(size * columns + 1.2, size * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    image = None
    for panel, (title, values) in zip(panels, matrices.items(), strict=False):
        low = -1.0 if any((m < 0).any() for m in matrices.values()) else 0.0
        image = panel.imshow(values.numpy(), cmap="viridis", vmin=low, vmax=1.0)
        panel.set_title(title.removeprefix("model."), fontsize=8)
        panel.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        panel.set_yticks(range(len(names)), names, fontsize=6)
        if len(names) <= 12:
            _write_values(panel, values, low)
    for panel in panels[len(matrices) :]:
        panel.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=panels, pad=0.02, shrink=0.7).set_label(label, fontsize=8)
    return figure


def load_figure(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Figure:
    """Draw the share of the tokens of each expert before and after, one panel per layer.

    Args:
        before: layer -> tokens per expert, ``(E,)``; experts are sorted by it.
        after: the same experts later.
    """
    figure, panels = _panels(before, 2.6, 1.6)
    for panel, layer in zip(panels, before, strict=False):
        order = before[layer].argsort(descending=True, stable=True)
        for loads, colour, name in (
            (before, "#d98e73", "before fine-tuning"),
            (after, "#2a6f97", "after"),
        ):
            share = (loads[layer] / loads[layer].sum())[order]
            panel.plot(range(len(share)), share.numpy(), marker=".", color=colour, label=name)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=6)
        _bare(panel)
    figure.legend(handles=panels[0].get_lines(), loc="outside upper right", ncols=2, fontsize=7)
    figure.supxlabel("experts, most used first", fontsize=8)
    figure.supylabel("share of tokens", fontsize=8)
    return figure


def ablation_figure(
    perplexities: Mapping[str, Tensor],
    whole: float,
    marked: Mapping[str, Iterable[int]] | None = None,
) -> Figure:
    """Draw layers x experts: perplexity without each expert over that with all.

    Args:
        perplexities: layer -> perplexity without each expert, ``(E,)``.
        whole: perplexity with all experts.
        marked: layer -> experts that are outlined, as those without which the model collapses.
    """
    ratios = {layer: values / whole for layer, values in perplexities.items()}
    finite = [float(r[r.isfinite()].max()) for r in ratios.values() if r.isfinite().any()]
    figure, bar = _expert_map(ratios, 1.0, max([1.05, *finite]), "magma", marked or {})
    figure.axes[0].set_xlabel("expert that is left out", fontsize=9)
    bar.set_label(f"perplexity over {whole:.4g}", fontsize=8)
    return figure


def activation_figure(
    max_abs: Mapping[str, Tensor], marked: Mapping[str, Iterable[int]] | None = None
) -> Figure:
    """Draw layers x experts: how far the largest entry of an expert's outputs is above the usual.

    Args:
        max_abs: layer -> largest absolute entry of each expert's outputs, ``(E,)``.
        marked: layer -> experts that are outlined, as the super-experts.
    """
    usual = float(torch.cat(list(max_abs.values())).median().clamp(min=1e-12))
    ratios = {layer: values / usual for layer, values in max_abs.items()}
    top = max(1.05, *(float(r.max()) for r in ratios.values()))
    figure, bar = _expert_map(ratios, 1.0, top, "cividis", marked or {})
    figure.axes[0].set_xlabel("expert", fontsize=9)
    bar.set_label(f"largest activation\nover the usual {usual:.3g}", fontsize=8)
    return figure


def _expert_map(
    ratios: Mapping[str, Tensor],
    low: float,
    top: float,
    colours: str,
    marked: Mapping[str, Iterable[int]],
) -> tuple[Figure, Colorbar]:
    """Draw factors of layers x experts on a logarithmic scale; layers may differ in experts."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    num_experts = max(values.numel() for values in ratios.values())
    cells = np.full((len(ratios), num_experts), np.nan)
    for row, values in zip(cells, ratios.values(), strict=True):
        row[: values.numel()] = values.numpy()
    figure = _figure(min(14.0, 3.0 + 0.25 * num_experts), 1.4 + 0.3 * len(cells))
    panel = figure.subplots()
    norm = LogNorm(low, top, clip=True)
    image = panel.imshow(cells, aspect="auto", cmap=colours, norm=norm, interpolation="none")
    for height, layer in enumerate(ratios):
        for expert in marked.get(layer, ()):
            corner = (expert - 0.5, height - 0.5)
            panel.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#2fc6b1", linewidth=1.5))
    names = [layer.removeprefix("model.") for layer in ratios]
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.tick_params(axis="x", labelsize=8)
    bar = figure.colorbar(image, ax=panel, pad=0.02)
    ticks = np.geomspace(low, top, 5)
    bar.set_ticks(ticks.tolist(), labels=[f"x {tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    return figure, bar


def _draw_curve(panel: Axes, name: str, points: Sequence[Point], whole: float, colour: str) -> None:
    ordered = sorted(points, key=lambda point: point.dropped)
    x = [0.0, *(100 * point.dropped for point in ordered)]
    style = "--" if colour == _GREY else "-"
    means = [whole, *(point.mean for point in ordered)]
    panel.plot(x, means, style, marker="o", markersize=3, color=colour, label=name)
    low = [whole, *(point.low for point in ordered)]
    high = [whole, *(point.high for point in ordered)]
    panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _write_values(panel: Axes, values: Tensor, low: float) -> None:
    middle = (low + 1) / 2
    for row, column in torch.cartesian_prod(*[torch.arange(len(values))] * 2).tolist():
        value = float(values[row, column])
        if math.isfinite(value):
            colour = "white" if value < middle else "black"
            panel.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=5, color=colour
            )
