"""Which experts stay, once their scores are known.

Experts are ranked in *rows*: a row is one expert of each group of the router, the best of every
group first, so that groups always keep equal numbers. Without groups a row is one expert.
Protected experts come first, then higher scores, then lower ids: the order is total, so equal
scores give equal plans everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.plan import KeepPlan
from lit_moe.selection.budget import Budget
from lit_moe.selection.counts import (
    LayerRule,
    check_bytes,
    layer_counts,
    layer_rules,
    total_experts,
)
from lit_moe.selection.protection import Protection

Scores = Mapping[str, Tensor]
Protected = Mapping[str, frozenset[int]]

# Infinite scores (experts forced by the unrouted rule) rank beyond all others and stay comparable.
_BEYOND = 1e300


def select(
    scores: Scores,
    *,
    keep_ratio: float | None = None,
    keep_experts: int | None = None,
    budget: Budget | None = None,
    sites: Sequence[MoESite] | None = None,
    protect: Protection = (),
) -> KeepPlan:
    """Return which experts stay: the third of the five lines.

    Args:
        scores: layer name -> ``(E,)``, higher = keep.
        keep_ratio: fraction that stays in each layer; short for ``Budget(keep_ratio=...)``.
        keep_experts: number that stays in each layer; short for ``Budget(keep_experts=...)``.
        budget: any other amount, or a global ranking.
        sites: the MoE layers of the model (``find_sites(model)``). Without them, nothing is known
            of top-k and groups, and surgery may have to refuse the plan.
        protect: layers and experts that stay, see :func:`parse_protection`.

    Raises:
        LitMoEError: for any budget that :func:`check_budget` refuses, or scores that do not
            belong to ``sites`` or hold NaN.

    >>> select({"mlp": torch.tensor([5.0, 0.0, 2.0, 2.0])}, keep_ratio=0.5).kept
    {'mlp': (0, 2)}
    """
    if budget is None:
        budget = Budget(keep_ratio=keep_ratio, keep_experts=keep_experts)
    elif keep_ratio is not None or keep_experts is not None:
        raise LitMoEError("give either a budget or keep_ratio / keep_experts, not both")
    if sites is None:
        sites = _bare_sites(scores)
    _check_scores(scores, sites)
    rules = layer_rules(sites, protect, budget.floor)
    scores = {site.name: scores[site.name] for site in sites}
    if budget.scope == "global":
        return _select_overall(scores, budget, rules)
    return keep_top_per_group(
        scores,
        layer_counts(budget, sites, protect),
        {rule.name: rule.num_groups for rule in rules},
        protected={rule.name: rule.protected for rule in rules},
    )


def keep_top_per_layer(
    scores: Scores, keep: int | Mapping[str, int], *, protected: Protected | None = None
) -> KeepPlan:
    """Keep the ``keep`` best experts of each layer.

    >>> keep_top_per_layer({"layers.0": torch.tensor([5.0, 0.0, 2.0])}, keep=2).kept
    {'layers.0': (0, 2)}
    """
    return keep_top_per_group(scores, keep, 1, protected=protected)


def keep_top_per_group(
    scores: Scores,
    keep: int | Mapping[str, int],
    num_groups: int | Mapping[str, int],
    *,
    protected: Protected | None = None,
) -> KeepPlan:
    """Keep ``keep`` experts of each layer: the ``keep / num_groups`` best of each of its groups.

    Group ``g`` of ``G`` holds the ids ``g E/G`` to ``(g + 1) E/G - 1``.

    >>> keep_top_per_group({"mlp": torch.tensor([4.0, 3.0, 2.0, 1.0])}, 2, 2).kept
    {'mlp': (0, 2)}
    """
    kept: dict[str, list[int]] = {}
    for layer, values in scores.items():
        groups = _of(num_groups, layer)
        rows = _rows(values, groups, (protected or {}).get(layer, frozenset()))
        best = rows[: _of(keep, layer) // groups]
        kept[layer] = sorted(e for _, row in best for e in row)
    return _plan(kept, scores)


def keep_top_overall(
    scores: Scores,
    limit: int,
    rules: Sequence[LayerRule],
    *,
    cost: Mapping[str, int] | None = None,
) -> KeepPlan:
    """Keep the best experts of all layers in one ranking, and what each layer needs at least.

    Args:
        scores: layer name -> ``(E,)``; compared across layers as they are.
        limit: experts that may stay in all layers together, or their cost.
        rules: what each layer allows, see :func:`layer_rules`.
        cost: layer name -> cost of one expert; 1 if not given.

    Rows are taken from the best down; one that does not fit any more is passed over, so a cheaper
    one may still find room. A row's score is the mean over its experts.
    """
    kept: dict[str, list[int]] = {}
    optional: list[tuple[float, int, int, LayerRule, tuple[int, ...]]] = []
    for position, rule in enumerate(rules):
        rows = _rows(scores[rule.name], rule.num_groups, rule.protected)
        needed = rule.legal[0] // rule.num_groups
        kept[rule.name] = [e for _, row in rows[:needed] for e in row]
        limit -= len(kept[rule.name]) * _of(cost or 1, rule.name)
        for rank, (value, row) in enumerate(rows[needed:]):
            optional.append((-value, position, rank, rule, row))
    for _, _, _, rule, row in sorted(optional, key=lambda item: item[:3]):
        price = len(row) * _of(cost or 1, rule.name)
        if price <= limit:
            limit -= price
            kept[rule.name].extend(row)
    return _plan({layer: sorted(ids) for layer, ids in kept.items()}, scores)


def standardised(scores: Scores) -> dict[str, Tensor]:
    """Return the scores of each layer with mean 0 and deviation 1; infinite ones stay infinite.

    A layer whose finite scores are all equal gets zeros.
    """
    return {layer: _standardised(values.double()) for layer, values in scores.items()}


def _standardised(values: Tensor) -> Tensor:
    finite = values[values.isfinite()]
    if finite.numel() == 0:
        return values
    spread = finite.std(unbiased=False)
    scaled = (values - finite.mean()) / spread if spread > 0 else torch.zeros_like(values)
    return torch.where(values.isfinite(), scaled, values)


def _select_overall(scores: Scores, budget: Budget, rules: Sequence[LayerRule]) -> KeepPlan:
    if budget.normalise:
        scores = standardised(scores)
    if budget.max_bytes is None:
        return keep_top_overall(scores, total_experts(budget, rules), rules)
    sizes = check_bytes(budget, rules)
    return keep_top_overall(scores, budget.limit - sizes.fixed, rules, cost=sizes.per_expert)


def _rows(
    values: Tensor, num_groups: int, protected: frozenset[int]
) -> list[tuple[float, tuple[int, ...]]]:
    """Return (score, one expert id per group), best row first."""
    score = values.double().clamp(-_BEYOND, _BEYOND).tolist()
    size = len(score) // num_groups
    columns = [
        sorted(range(g * size, (g + 1) * size), key=lambda e: (e not in protected, -score[e], e))
        for g in range(num_groups)
    ]
    return [(sum(score[e] / num_groups for e in row), row) for row in zip(*columns, strict=True)]


def _plan(kept: Mapping[str, Sequence[int]], scores: Scores) -> KeepPlan:
    num_experts = {layer: values.numel() for layer, values in scores.items()}
    return KeepPlan({layer: tuple(ids) for layer, ids in kept.items()}, num_experts)


def _of(value: int | Mapping[str, int], layer: str) -> int:
    return value if isinstance(value, int) else value[layer]


def _bare_sites(scores: Scores) -> tuple[MoESite, ...]:
    return tuple(
        MoESite(name, layer, experts="", router="", num_experts=values.numel(), top_k=1)
        for layer, (name, values) in enumerate(scores.items())
    )


def _check_scores(scores: Scores, sites: Sequence[MoESite]) -> None:
    if not scores:
        raise LitMoEError("there are no scores to select from")
    found = {name: values.numel() for name, values in scores.items()}
    expected = {site.name: site.num_experts for site in sites}
    for name in sorted(set(found) | set(expected)):
        if found.get(name) != expected.get(name):
            raise LitMoEError(
                f"scores and model disagree: layer {name!r} has {found.get(name, 'no')} scores "
                f"and {expected.get(name, 'no')} experts"
            )
        if scores[name].isnan().any():
            raise LitMoEError(f"layer {name!r} has NaN among its scores")
