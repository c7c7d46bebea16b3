"""What a comparison shows beside perplexities: agreement, rank correlation, load, super-experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_moe.callbacks.monitor import load_measures
from lit_moe.compare.ablation import AblationMap
from lit_moe.compare.agreement import Agreement, agreement_map, rank_correlations
from lit_moe.compare.cells import plan_of
from lit_moe.compare.grid import Grid
from lit_moe.compare.store import CellStore
from lit_moe.compare.summary import Summary

COLLAPSE = 1.5
"""A single expert without which the perplexity is so many times as large is called super."""


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


def agreements(grid: Grid, store: CellStore) -> dict[str, Agreement]:
    """Return ratio -> agreement of what the first seed's plans drop on the first model."""
    found = {}
    model, seed = grid.options.models[0], grid.options.seeds[0]
    for ratio in grid.ratios:
        plans = {}
        for line in grid.lines:
            cell = store.get("cell", **grid.key(line, model, seed, ratio))
            if cell is not None and "error" not in cell:
                plans[f"{line.name}, {line.procedure.replace('_', '-')}"] = plan_of(cell)
        if len(plans) > 1:
            found[f"{ratio:g}"] = agreement_map(plans)
    return found


def correlations(grid: Grid, store: CellStore) -> Agreement | None:
    """Return how alike criteria rank the experts, mean over seeds, on the first model.

    Criteria that rate subsets are left out: their scores are of one ratio only.
    """
    per_seed = []
    for seed in grid.options.seeds:
        scores: dict[str, dict[str, Tensor]] = {}
        for line in grid.lines:
            key = {**line.scored, "model": grid.options.models[0], "seed": seed, "keep_ratio": None}
            found = store.get("scores", **key)
            name = line.name.removesuffix(", global")
            if found is not None and name not in scores:
                scores[name] = {k: torch.tensor(v, dtype=torch.float64) for k, v in found.items()}
        if len(scores) > 1:
            per_seed.append(rank_correlations(scores))
    same = [found for found in per_seed if found.names == per_seed[0].names]
    if not same:
        return None
    layers = {
        layer: torch.stack([f.layers[layer] for f in same]).nanmean(dim=0)
        for layer in same[0].layers
    }
    overall = torch.stack([f.overall for f in same]).nanmean(dim=0)
    return Agreement(same[0].names, overall, layers)


def load_changes(loads: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Return layer -> shares, evenness and deviation of the load before and after fine-tuning.

    Args:
        loads: layer -> ``before`` and ``after`` -> tokens of each expert that is left.
    """
    found: dict[str, dict[str, Any]] = {}
    for layer, moments in loads.items():
        found[layer] = {}
        for moment, counts in moments.items():
            load_E = torch.tensor(counts, dtype=torch.float64)
            shares = (load_E / load_E.sum()).tolist()
            found[layer][moment] = {"shares": shares, **load_measures(load_E)}
    return found


def lottery_loads(summary: Summary) -> dict[str, dict[str, Any]]:
    """Return lottery and ratio -> mean deviation and evenness before and after, over cells."""
    found: dict[str, dict[str, Any]] = {}
    for row in summary.rows:
        for ratio, cells in row.cells.items():
            changes = [load_changes(cell["load"]) for cell in cells if "load" in cell]
            layers = [layer for change in changes for layer in change.values()]
            if layers:
                found[f"{row.line.name}, {ratio:g} kept"] = {
                    f"{measure}_{moment}": sum(layer[moment][measure] for layer in layers)
                    / len(layers)
                    for measure in ("load_cv", "entropy")
                    for moment in ("before", "after")
                }
    return found


def super_experts(found: Found) -> dict[str, Any]:
    """Return experts that one must not drop, by each of the signs that are known.

    ``extreme_activations``: those that ``protect: [super-experts]`` means, of the first seed.
    ``single_drop``: those without which the perplexity is 1.5 times as large, with the factor
    (MC-Suite, arXiv 2504.05586, figure 2: dropping one of two experts collapses the model).
    """
    seen, signs = calibrated(found), {}
    if seen is not None:
        signs["extreme_activations"] = seen["super_experts"]
    if found.ablation is not None:
        signs["single_drop"] = collapsing(found.ablation)
    return signs


def calibrated(found: Found) -> dict[str, Any] | None:
    """Return what the first calibration of the first model saw, if one was kept."""
    model = found.grid.options.models[0]
    loads = (found.store.get("load", model=model, seed=seed) for seed in found.grid.all_seeds)
    return next(filter(None, loads), None)


def collapsing(ablation: AblationMap) -> dict[str, dict[str, float]]:
    """Return layer -> expert -> how many times as large the perplexity is without it, if super."""
    found = {
        layer: {str(e): float(f) for e, f in enumerate(values.exp()) if f >= COLLAPSE}
        for layer, values in ablation.increases.items()
    }
    return {layer: experts for layer, experts in found.items() if experts}
