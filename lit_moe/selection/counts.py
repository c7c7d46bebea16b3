"""How many experts each layer keeps: everything that can be known, and refused, without scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_moe.adapters.legality import legal_counts
from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.selection.budget import Budget, ModelBytes
from lit_moe.selection.protection import Protection, parse_protection


@dataclass(frozen=True)
class LayerRule:
    """What one layer allows.

    Attributes:
        name: name of the layer.
        num_experts: experts that it has.
        num_groups: groups that must keep equal numbers; 1 if routing is not group-limited.
        legal: ascending counts that its router works with and that honour floor and protection.
        protected: ids that stay; all of them for a protected layer.
        reason: why no smaller count than ``legal[0]`` is allowed.
    """

    name: str
    num_experts: int
    num_groups: int
    legal: tuple[int, ...]
    protected: frozenset[int]
    reason: str

    @property
    def frozen(self) -> bool:
        """Whether the whole layer is protected."""
        return len(self.protected) == self.num_experts


def layer_rules(
    sites: Iterable[MoESite], protect: Protection = (), floor: int = 1
) -> tuple[LayerRule, ...]:
    """Return what each layer allows.

    Raises:
        LitMoEError: if the protection names no layer or expert of the model.
    """
    sites = tuple(sites)
    protected = parse_protection(protect, sites)
    return tuple(_layer_rule(site, protected[site.name], floor) for site in sites)


def layer_counts(
    budget: Budget, sites: Iterable[MoESite], protect: Protection = ()
) -> dict[str, int]:
    """Return layer name -> number of experts that stay, for a budget of scope ``layer``.

    A layer with no more experts than ``keep_experts`` keeps all that it has.

    Raises:
        LitMoEError: if the budget cannot be met (see :func:`check_budget`), or its scope is
            ``global``, where the numbers depend on the scores.
    """
    if budget.scope == "global":
        raise LitMoEError("with scope='global' the number per layer is not known before scoring")
    rules = layer_rules(sites, protect, budget.floor)
    if budget.max_bytes is not None:
        return _counts_in_bytes(budget, rules)
    largest = max(rules, key=lambda rule: rule.num_experts)
    if (budget.keep_experts or 0) > largest.num_experts:
        raise LitMoEError(
            f"{budget.asked}, but {largest.name!r} has only {largest.num_experts} experts; the "
            f"largest count that prunes is {largest.num_experts - largest.num_groups}"
        )
    counts = {rule.name: _count(budget, rule) for rule in rules}
    if all(counts[rule.name] == rule.num_experts for rule in rules):
        raise LitMoEError(_no_effect(budget, rules))
    return counts


def total_experts(budget: Budget, rules: Sequence[LayerRule]) -> int:
    """Return how many experts stay in all layers together, for a ratio or count, scope ``global``.

    Raises:
        LitMoEError: if that is less than the layers need, or everything.
    """
    everyone = sum(rule.num_experts for rule in rules)
    least = sum(rule.legal[0] for rule in rules)
    if budget.keep_ratio is not None:
        total = _round(budget.keep_ratio * everyone)
    else:
        total = (budget.keep_experts or 0) * len(rules)
    if total < least:
        raise LitMoEError(
            f"{budget.asked} keeps {total} of {everyone} experts, but the {len(rules)} layers need "
            f"at least {least} together ({rules[0].name!r}: {rules[0].reason}); the smallest "
            f"keep_ratio is {_up(least / everyone)}"
        )
    if total >= everyone:
        raise LitMoEError(_no_effect(budget, rules))
    return total


def check_budget(budget: Budget, sites: Iterable[MoESite], protect: Protection = ()) -> None:
    """Refuse, before any calibration, a budget that these layers cannot meet.

    Raises:
        LitMoEError: if a layer would keep fewer experts than its router picks, than are
            protected, or than the floor; a count is not divisible by the groups; the bytes
            cannot be reached; nothing would be pruned. The message holds what was asked, what was
            found, and the nearest value that works.
    """
    sites = tuple(sites)
    if budget.scope == "layer":
        layer_counts(budget, sites, protect)
        return
    rules = layer_rules(sites, protect, budget.floor)
    if budget.max_bytes is not None:
        check_bytes(budget, rules)
    else:
        total_experts(budget, rules)


def check_bytes(budget: Budget, rules: Sequence[LayerRule]) -> ModelBytes:
    """Return the sizes of a byte budget that can be met and that prunes something.

    Raises:
        LitMoEError: if not even the smallest legal model fits, or the unpruned one does.
    """
    if budget.sizes is None:
        raise LitMoEError(
            f"{budget.asked} needs Budget(sizes=...): see lit_moe.selection.measure_bytes(model)"
        )
    limit = budget.limit
    smallest = budget.sizes.total({rule.name: rule.legal[0] for rule in rules})
    largest = budget.sizes.total({rule.name: rule.num_experts for rule in rules})
    if smallest > limit:
        raise LitMoEError(
            f"max_bytes={_show(limit)} cannot be met: {_show(budget.sizes.fixed)} are no experts, "
            f"and with the fewest experts allowed ({rules[0].name!r}: {rules[0].legal[0]}, "
            f"{rules[0].reason}) the model takes {_show(smallest)}"
        )
    if largest <= limit:
        raise LitMoEError(
            f"max_bytes={_show(limit)} prunes nothing: the model takes {_show(largest)} as it is"
        )
    return budget.sizes


def _layer_rule(site: MoESite, protected: frozenset[int], floor: int) -> LayerRule:
    size = site.num_experts // site.num_groups
    fullest = max(sum(e // size == g for e in protected) for g in range(site.num_groups))
    # Some families score a group by its best expert and could do with one; asking for two is safe.
    group_score: Literal["top2"] | None = (
        "top2" if site.num_groups > 1 and not site.one_per_group else None
    )
    legal = legal_counts(site, group_score) or (site.num_experts,)
    needs = {
        _router_needs(site, legal[0]): legal[0],
        f"floor={floor}": min(floor, site.num_experts),
        f"{len(protected)} of its experts are protected": fullest * site.num_groups,
    }
    reason = max(needs, key=lambda key: needs[key])
    allowed = tuple(n for n in legal if n >= max(needs.values()))
    return LayerRule(site.name, site.num_experts, site.num_groups, allowed, protected, reason)


def _router_needs(site: MoESite, least: int) -> str:
    if site.num_groups == 1:
        return f"its router picks {site.top_k} per token"
    return (
        f"its router picks {site.top_k} per token from {site.top_k_groups} of {site.num_groups} "
        f"groups, so each group needs {least // site.num_groups}"
    )


def _count(budget: Budget, rule: LayerRule) -> int:
    if rule.frozen:
        return rule.num_experts
    if budget.keep_ratio is not None:
        return _count_from_ratio(budget, rule)
    count = min(budget.keep_experts or 0, rule.num_experts)
    if count % rule.num_groups:
        raise LitMoEError(
            f"{budget.asked} is not divisible by the {rule.num_groups} groups of {rule.name!r}, "
            f"which must keep equal numbers; the nearest legal count is "
            f"{_nearest(rule.legal, count)}"
        )
    return _at_least(count, budget, rule, f"the smallest legal count is {rule.legal[0]}")


def _count_from_ratio(budget: Budget, rule: LayerRule) -> int:
    rows = _round((budget.keep_ratio or 0.0) * rule.num_experts / rule.num_groups)
    least = rule.legal[0]
    remedy = f"the nearest legal count is {least}, keep_ratio={_up(least / rule.num_experts)}"
    return _at_least(rows * rule.num_groups, budget, rule, remedy)


def _at_least(count: int, budget: Budget, rule: LayerRule, remedy: str) -> int:
    if count < rule.legal[0]:
        raise LitMoEError(
            f"{budget.asked} leaves {count} of {rule.num_experts} experts in {rule.name!r}, "
            f"but {rule.reason}; {remedy}"
        )
    return count


def _counts_in_bytes(budget: Budget, rules: Sequence[LayerRule]) -> dict[str, int]:
    sizes = check_bytes(budget, rules)
    limit = budget.limit
    counts = {rule.name: rule.legal[0] for rule in rules}
    for wanted in range(max(rule.num_experts for rule in rules), 0, -1):
        counts = {rule.name: _at_most(rule.legal, wanted) for rule in rules}
        if sizes.total(counts) <= limit:
            break
    return counts


def _no_effect(budget: Budget, rules: Sequence[LayerRule]) -> str:
    free = [rule for rule in rules if not rule.frozen]
    if not free:
        return f"all {len(rules)} MoE layers are protected, so nothing would be pruned"
    rule = free[0]
    if len(rule.legal) == 1:
        return (
            f"no expert of {rule.name!r} can go: {rule.reason}, "
            f"so {rule.num_experts} is its only legal count"
        )
    return (
        f"{budget.asked} keeps all {rule.num_experts} experts of {rule.name!r}, so nothing would "
        f"be pruned; the largest count that prunes is {rule.legal[-2]}, "
        f"keep_ratio={rule.legal[-2] / rule.num_experts:.4g}"
    )


def _nearest(legal: Sequence[int], count: int) -> int:
    """Return the legal count next to ``count``; of two, the larger."""
    return min(legal, key=lambda n: (abs(n - count), -n))


def _at_most(legal: Sequence[int], count: int) -> int:
    return max((n for n in legal if n <= count), default=legal[0])


def _round(number: float) -> int:
    """Round halves up; forgives the last bits, so that 0.35 * 10 is 3.5."""
    return math.floor(number + 0.5 + 1e-9)


def _up(ratio: float) -> float:
    """Round a ratio up to four digits, so that asking for it is enough."""
    return math.ceil(ratio * 1e4 - 1e-9) / 1e4


def _show(num_bytes: int) -> str:
    return f"{num_bytes} bytes ({num_bytes / 1e9:.3g} GB)"
