"""How far plans and scores agree: Jaccard of what is dropped, Spearman of what is scored.

L layers, E experts, N plans or criteria.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor

from lit_moe.errors import PlanError
from lit_moe.plan import KeepPlan

Scores = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Agreement:
    """N things against each other.

    Attributes:
        names: of the things, N.
        overall: shape ``(N, N)``, float64.
        layers: layer -> the same of that layer alone.
    """

    names: tuple[str, ...]
    overall: Tensor
    layers: Mapping[str, Tensor]


def jaccard(first: KeepPlan, second: KeepPlan, layers: Sequence[str] | None = None) -> float:
    """Return how many of the experts that one of two plans drops both drop; NaN if none goes.

    Args:
        first: a plan.
        second: of the same model.
        layers: that are looked at; None for all.

    Raises:
        PlanError: if they are plans of different models.

    >>> one, other = KeepPlan({"a": (0, 1)}, {"a": 4}), KeepPlan({"a": (0, 2)}, {"a": 4})
    >>> jaccard(one, other)
    0.3333333333333333
    """
    if dict(first.num_experts) != dict(second.num_experts):
        raise PlanError(
            f"plans of different models cannot agree: {dict(first.num_experts)} and "
            f"{dict(second.num_experts)} experts"
        )
    dropped = [
        {(layer, e) for layer in layers or plan for e in _dropped(plan, layer)}
        for plan in (first, second)
    ]
    either = dropped[0] | dropped[1]
    return len(dropped[0] & dropped[1]) / len(either) if either else math.nan


def agreement_map(plans: Mapping[str, KeepPlan]) -> Agreement:
    """Return the Jaccard agreement of every two plans, over all layers and in each.

    Compare plans that drop equally many: of other amounts even nested plans agree less.

    Raises:
        PlanError: if they are plans of different models.
    """
    names, values = tuple(plans), list(plans.values())
    per_layer = {
        layer: _matrix(values, partial(jaccard, layers=[layer]))
        for layer in (values[0] if values else ())
    }
    return Agreement(names, _matrix(values, jaccard), per_layer)


def rank_correlations(scores: Mapping[str, Scores]) -> Agreement:
    """Return Spearman's correlation of every two criteria within each layer, and the mean of these.

    A layer where a criterion gives all experts the same score has no correlation (NaN) and is left
    out of the mean.

    Args:
        scores: criterion -> layer -> scores ``(E,)``, higher = keep; infinite ones rank last.
    """
    names, values = tuple(scores), list(scores.values())
    layers = {
        layer: _matrix([s[layer] for s in values], _spearman)
        for layer in (values[0] if values else ())
    }
    stacked = torch.stack(list(layers.values())) if layers else torch.zeros(1, 0, 0)
    return Agreement(names, stacked.nanmean(dim=0), layers)


def _spearman(first: Tensor, second: Tensor) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first.numpy(), second.numpy()).statistic)


def _matrix(values: Sequence[T], compare: Callable[[T, T], float]) -> Tensor:
    return torch.tensor(
        [[compare(a, b) for b in values] for a in values], dtype=torch.float64
    ).reshape(len(values), len(values))


def _dropped(plan: KeepPlan, layer: str) -> set[int]:
    return set(range(plan.num_experts[layer])) - set(plan.kept[layer])
