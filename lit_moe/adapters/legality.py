"""Which expert counts and which sets of experts a router can work with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lit_moe.adapters.site import MoESite
from lit_moe.errors import PlanError

GroupScore = Literal["top2", "max"] | None


def legal_counts(site: MoESite, group_score: GroupScore) -> tuple[int, ...]:
    """Return the ascending numbers of experts with which routing still works.

    A token must find ``top_k`` experts in the groups it may use. Groups stay equally large, and a
    group that is scored by its two best experts must keep two.

    Args:
        site: the MoE layer.
        group_score: how groups are scored; None for a family without groups.
    """
    in_group = 2 if group_score == "top2" else 1
    return tuple(
        count
        for count in range(1, site.num_experts + 1)
        if count % site.num_groups == 0
        and count // site.num_groups >= in_group
        and count // site.num_groups * site.top_k_groups >= site.top_k
    )


def check_keep(site: MoESite, keep_ids: Sequence[int], group_score: GroupScore) -> None:
    """Refuse a set of experts that the router could not work with.

    Raises:
        PlanError: if the count is not legal, or groups would end up unequal.
    """
    legal = legal_counts(site, group_score)
    count = len(keep_ids)
    if count not in legal:
        raise PlanError(
            f"{site.name}: {count} of {site.num_experts} experts cannot stay "
            f"({_rule(site, group_score)}); nearest possible: {_nearest(count, legal)}"
        )
    size = site.num_experts // site.num_groups
    per_group = [0] * site.num_groups
    for expert in keep_ids:
        per_group[expert // size] += 1
    if len(set(per_group)) > 1:
        raise PlanError(
            f"{site.name}: routing is limited to groups of {size} experts, which must stay equally "
            f"large; the plan keeps {per_group} per group, keep {count // site.num_groups} of each"
        )


def check_top_k(site: MoESite, top_k: int, *, fixed: bool) -> None:
    """Refuse a number of active experts that a layer cannot serve.

    Raises:
        PlanError: if the family fixes the number or fewer experts can be reached.
    """
    if fixed and top_k != site.top_k:
        raise PlanError(
            f"{site.name}: the code of this family always uses {site.top_k} experts per token, "
            f"top_k={top_k} would be ignored"
        )
    reachable = site.num_experts // site.num_groups * site.top_k_groups
    if not 1 <= top_k <= reachable:
        raise PlanError(
            f"{site.name}: top_k={top_k} but a token can reach {reachable} of its "
            f"{site.num_experts} experts; use 1 to {reachable}"
        )


def _rule(site: MoESite, group_score: GroupScore) -> str:
    if site.num_groups == 1:
        return f"its router picks {site.top_k}"
    least = "at least 2 in each, " if group_score == "top2" else ""
    return (
        f"its router picks {site.top_k} from {site.top_k_groups} of {site.num_groups} equally "
        f"large groups, {least}so counts are multiples of {site.num_groups}"
    )


def _nearest(count: int, legal: Sequence[int]) -> str:
    below = max((n for n in legal if n < count), default=None)
    above = min((n for n in legal if n > count), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)
