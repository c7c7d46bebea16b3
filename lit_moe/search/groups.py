"""Layers that share their maps: by depth, one by one, or as patterns say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError

Grouping = int | Literal["per_layer"] | list[str]
_PATTERN = re.compile(r"(?P<path>.+?)\.(?:(?P<one>\d+)|\[(?P<first>\d+)-(?P<last>\d+)\])")


@dataclass(frozen=True)
class LayerGroup:
    """MoE layers with one router map and one expert map.

    Attributes:
        name: ``layers.[0-7]`` or ``layers.3``.
        layers: names of the MoE layers, in module order.
        num_experts: routed experts of each of them.
        routing_groups: groups of group-limited routing; 1 where routing is not limited.
    """

    name: str
    layers: tuple[str, ...]
    num_experts: int
    routing_groups: int = 1


def group_layers(sites: Sequence[MoESite], grouping: Grouping) -> tuple[LayerGroup, ...]:
    """Return the groups in the order of their first layers; together they hold every layer once.

    Args:
        sites: the MoE layers in module order.
        grouping: a number of groups of neighbours, about equally many layers in each; or
            ``per_layer``; or patterns such as ``layers.3`` and ``layers.[0-7]``, where ``layers``
            is the end of the path before the number of a layer.

    Raises:
        LitMoEError: for groups that leave out a layer or share one, a pattern without a layer, more
            groups than layers, or layers of one group with different numbers of experts.
    """
    if isinstance(grouping, list):
        return _by_pattern(sites, grouping)
    wanted = len(sites) if grouping == "per_layer" else grouping
    if not isinstance(wanted, int) or not 1 <= wanted <= len(sites):
        raise LitMoEError(
            f"groups={grouping!r}: the model has {len(sites)} MoE layers; use 1 to {len(sites)}, "
            "per_layer, or a list of patterns such as layers.[0-3]"
        )
    shares = np.array_split(np.arange(len(sites)), wanted)
    return tuple(_group(_depths(sites, share.tolist()), sites, share.tolist()) for share in shares)


def _by_pattern(sites: Sequence[MoESite], patterns: Sequence[str]) -> tuple[LayerGroup, ...]:
    members = {pattern: _matching(sites, pattern) for pattern in patterns}
    owner: dict[int, str] = {}
    for pattern, indices in members.items():
        if not indices:
            raise LitMoEError(
                f"group {pattern!r} holds no MoE layer; they are {sites[0].name} to "
                f"{sites[-1].name}"
            )
        for index in indices:
            if index in owner:
                raise LitMoEError(
                    f"groups {owner[index]!r} and {pattern!r} both hold {sites[index].name}; a "
                    "layer belongs to one group"
                )
            owner[index] = pattern
    missing = [site.name for index, site in enumerate(sites) if index not in owner]
    if missing:
        raise LitMoEError(
            f"groups {list(patterns)} leave out {missing[0]} and {len(missing) - 1} more MoE "
            "layers; add patterns for them"
        )
    groups = [_group(pattern, sites, indices) for pattern, indices in members.items()]
    order = {site.name: index for index, site in enumerate(sites)}
    return tuple(sorted(groups, key=lambda group: order[group.layers[0]]))


def _matching(sites: Sequence[MoESite], pattern: str) -> list[int]:
    found = _PATTERN.fullmatch(pattern)
    if found is None:
        raise LitMoEError(
            f"group {pattern!r} is no pattern; write layers.3 or layers.[0-7], with the path "
            "before the number of a layer"
        )
    first = int(found["one"] or found["first"] or 0)
    last = int(found["one"] or found["last"] or 0)
    number = re.compile(rf"(?:^|\.){re.escape(found['path'])}\.(\d+)(?:\.|$)")
    depths = [number.search(site.name) for site in sites]
    return [i for i, depth in enumerate(depths) if depth and first <= int(depth[1]) <= last]


def _group(name: str, sites: Sequence[MoESite], indices: Sequence[int]) -> LayerGroup:
    members = [sites[index] for index in indices]
    first = members[0]
    for site in members:
        shape, expected = (site.num_experts, site.num_groups), (first.num_experts, first.num_groups)
        if shape != expected:
            raise LitMoEError(
                f"group {name!r} holds {first.name} with {expected[0]} experts and {site.name} "
                f"with {shape[0]}, which cannot share maps; put them into different groups"
            )
    names = tuple(site.name for site in members)
    return LayerGroup(name, names, first.num_experts, first.num_groups)


def _depths(sites: Sequence[MoESite], indices: Sequence[int]) -> str:
    first, last = sites[indices[0]].layer, sites[indices[-1]].layer
    return f"layers.{first}" if first == last else f"layers.[{first}-{last}]"
