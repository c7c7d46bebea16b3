"""Both theorems of arXiv 2405.16646 on synthetic data: numbers over seeds, and a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lit_moe.errors import LitMoEError
from lit_moe.models.vision.two_patterns import (
    RELEVANT,
    ExpertChoiceLayer,
    TwoPatterns,
    accuracy,
    proficiency,
    train,
)

PROFICIENT = 0.5
"""Experts that their own pattern reaches more often than this are relevant."""


@dataclass
class Changes:
    """Theorem 1 at one dimension: means over seeds.

    Attributes:
        dimension: d.
        relevant: mean change of the router's norm of relevant experts.
        irrelevant: mean absolute change of the others.
        irrelevant_share: of all experts, gamma.
        accuracy: of the trained network.
    """

    dimension: int
    relevant: float
    irrelevant: float
    irrelevant_share: float
    accuracy: float


@dataclass
class Pruned:
    """Theorem 2 at one ratio: accuracies, one per seed.

    Attributes:
        ratio: of the experts that were dropped, those with the smallest change.
        before: with all experts.
        pruned: without further training.
        recovered: with it.
        inverse: those with the largest change dropped instead, without further training.
    """

    ratio: float
    before: list[float] = field(default_factory=list)
    pruned: list[float] = field(default_factory=list)
    recovered: list[float] = field(default_factory=list)
    inverse: list[float] = field(default_factory=list)


def study_changes(task: TwoPatterns, dimensions: Iterable[int], num_seeds: int) -> list[Changes]:
    """Return what Theorem 1 speaks of, per dimension.

    Raises:
        LitMoEError: if the sizes do not fit together.
    """
    check_task(task)
    found = []
    for dimension in dimensions:
        runs = [_trained(task, dimension, seed) for seed in range(num_seeds)]
        relevant = torch.cat([change[relevant] for _, change, relevant, _ in runs])
        others = torch.cat([change[~relevant] for _, change, relevant, _ in runs])
        share = fmean(float((~relevant).float().mean()) for _, _, relevant, _ in runs)
        correct = fmean(right for *_, right in runs)
        found.append(
            Changes(dimension, float(relevant.mean()), float(others.abs().mean()), share, correct)
        )
    return found


def study_pruning(
    task: TwoPatterns, dimension: int, ratios: Sequence[float], num_seeds: int
) -> list[Pruned]:
    """Return what Theorem 2 speaks of, per ratio of dropped experts.

    Raises:
        LitMoEError: if the sizes do not fit together.
    """
    check_task(task)
    found = [Pruned(ratio) for ratio in ratios]
    for seed in range(num_seeds):
        layer, change, _, whole = _trained(task, dimension, seed)
        order = change.argsort()
        for row in found:
            row.before.append(whole)
            count = round(row.ratio * task.experts)
            small, large = layer.without(order[:count]), order[task.experts - count :]
            row.pruned.append(_tested(small, task, dimension))
            row.inverse.append(_tested(layer.without(large), task, dimension))
            generator = torch.Generator().manual_seed(1000 + seed)
            train(small, replace(task, steps=task.steps // 2), dimension, generator)
            row.recovered.append(_tested(small, task, dimension))
    return found


def check_task(task: TwoPatterns) -> None:
    """Refuse sizes that do not fit together.

    Raises:
        LitMoEError: naming them.
    """
    if task.chosen > task.tokens or task.experts % 2 or min(task.steps, task.batch) < 1:
        raise LitMoEError(
            f"experts choose {task.chosen} of {task.tokens} tokens, and half of {task.experts} "
            "experts vote for each class: chosen can be at most tokens, experts must be even, "
            "steps and batch at least 1"
        )


def check_amounts(
    dimensions: Sequence[int], pruned_dimension: int, ratios: Sequence[float], num_seeds: int
) -> None:
    """Refuse dimensions without an irrelevant pattern, ratios that leave no expert, and no run.

    Raises:
        LitMoEError: naming them.
    """
    smallest = min((pruned_dimension, *dimensions))
    is_odd = any(not 0 <= ratio < 1 for ratio in ratios)
    if not dimensions or not ratios or smallest <= RELEVANT or is_odd or num_seeds < 1:
        raise LitMoEError(
            f"dimensions={list(dimensions)} and pruned_dimension={pruned_dimension} must be above "
            f"{RELEVANT}, ratios={list(ratios)} at least 0 and below 1, one of each at least, and "
            f"num_seeds={num_seeds} at least 1"
        )


def as_dict(changes: Sequence[Changes], pruned: Sequence[Pruned]) -> dict[str, Any]:
    """Return both studies as plain values."""
    return {"changes": [asdict(c) for c in changes], "pruned": [asdict(p) for p in pruned]}


def draw_study(changes: Sequence[Changes], pruned: Sequence[Pruned], path: Path) -> None:
    """Write a figure with one panel per theorem; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [c.dimension for c in changes]
    left.loglog(sizes, [c.relevant for c in changes], "o-", label="relevant experts")
    left.loglog(sizes, [c.irrelevant for c in changes], "s-", label="irrelevant experts")
    first = changes[0]
    bound = [first.irrelevant * (first.dimension / d) ** 0.5 for d in sizes]
    left.loglog(sizes, bound, ":", color="grey", label="1 / sqrt(d)")
    left.set(xlabel="dimension d", ylabel="change of the router's norm")
    left.legend()
    ratios = [p.ratio for p in pruned]
    for name, style in (("recovered", "o-"), ("pruned", "s-"), ("inverse", "^--")):
        right.plot(ratios, [fmean(getattr(p, name)) for p in pruned], style, label=name)
    right.axvline(fmean(c.irrelevant_share for c in changes), ls=":", color="grey")
    right.set(xlabel="dropped experts (dotted: share of irrelevant ones)", ylabel="accuracy")
    right.legend()
    figure.savefig(path, dpi=130)


def _trained(
    task: TwoPatterns, dimension: int, seed: int
) -> tuple[ExpertChoiceLayer, Tensor, Tensor, float]:
    """Return the network, the change of each router, which experts are relevant, and accuracy."""
    generator = torch.Generator().manual_seed(seed)
    layer = ExpertChoiceLayer(task, dimension, generator)
    before = layer.router.detach().norm(dim=1)
    train(layer, task, dimension, generator)
    change = layer.router.detach().norm(dim=1) - before
    relevant = proficiency(layer, task, dimension, generator) > PROFICIENT
    return layer, change, relevant, _tested(layer, task, dimension)


def _tested(layer: ExpertChoiceLayer, task: TwoPatterns, dimension: int) -> float:
    return accuracy(layer, task, dimension, torch.Generator().manual_seed(10**6))
