"""How children come from parents: random starts, moves of experts, noise, crossover.

All functions draw from the generator they are given and from nothing else. Where routing is limited
to groups, an expert is only ever exchanged for, and mixed with, ones of its own routing group, and
rows are in the order of the groups.

E experts before, N experts after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lit_moe.search.genome import Genome, Map, Maps, one_hot
from lit_moe.search.groups import LayerGroup
from lit_moe.search.options import Rates

_SMALL = 1e-6
"""A row with a smaller sum is not divided by it."""


def random_genome(
    draw: np.random.Generator, groups: Sequence[LayerGroup], counts: Sequence[int]
) -> Genome:
    """Return random ascending subsets of ``counts`` experts, coupled."""
    pairs = zip(groups, counts, strict=True)
    return Genome(tuple(one_hot(_subset(draw, g, n), g.num_experts) for g, n in pairs))


def moved(
    draw: np.random.Generator,
    parent: Genome,
    groups: Sequence[LayerGroup],
    rates: Rates,
    *,
    only: int | None = None,
) -> Genome:
    """Return the parent with some experts exchanged for unused ones; both maps alike.

    At least one group is touched, ``only`` one where it is given; a touched group may still come
    out as it was.
    """
    touched = _touched(draw, groups, rates) if only is None else [only]
    return parent.replaced(
        {i: _moved_map(draw, parent.maps[i], groups[i], rates.row) for i in touched}
    )


def given(
    draw: np.random.Generator,
    parent: Genome,
    groups: Sequence[LayerGroup],
    floors: Sequence[int],
) -> Genome:
    """Return the parent with experts less in one group and more in another; the total stays.

    Between groups of equally many layers it is one expert of each layer, else the fewest that make
    the total come out even; in each case as many of every routing group. The parent itself where no
    pair of groups can.
    """
    pairs = exchanges(groups, parent.counts, floors)
    if not pairs:
        return parent
    (giver, less), (taker, more) = pairs[int(draw.integers(len(pairs)))]
    fewer, further = parent.maps[giver], parent.maps[taker]
    for _ in range(less):
        fewer = _without_one(draw, fewer, groups[giver])
    for _ in range(more):
        further = _with_one(draw, further, groups[taker])
    return parent.replaced({giver: fewer, taker: further})


Exchange = tuple[tuple[int, int], tuple[int, int]]


def exchanges(
    groups: Sequence[LayerGroup], counts: Sequence[int], floors: Sequence[int]
) -> list[Exchange]:
    """Return every pair of groups that can give and take, each with how many times it does.

    Once means one expert of each layer and routing group.
    """
    found = []
    for i, giver in enumerate(groups):
        for j, taker in enumerate(groups):
            gone, come = (len(g.layers) * g.routing_groups for g in (giver, taker))
            total = math.lcm(gone, come)
            less, more = total // gone, total // come
            enough = counts[i] - less * giver.routing_groups >= floors[i]
            room = counts[j] + more * taker.routing_groups <= taker.num_experts
            if i != j and enough and room:
                found.append(((i, less), (j, more)))
    return found


def shaken(
    draw: np.random.Generator,
    parent: Genome,
    groups: Sequence[LayerGroup],
    rates: Rates,
    *,
    router: bool,
    only: int | None = None,
) -> Genome:
    """Return the parent with Gaussian noise on some elements of some maps.

    Args:
        draw: where chance comes from.
        parent: left as it is.
        groups: of the genome.
        rates: chances and the size of the noise.
        router: whether router maps get noise too; expert and router maps are touched independently.
        only: the one group that is touched; None draws them.
    """
    if only is None:
        experts, routers = _touched_maps(draw, groups, rates, router=router)
    else:
        experts, routers = _one_touched(draw, only, router=router)
    maps = []
    for i, old in enumerate(parent.maps):
        group = groups[i]
        new_experts = _noisy(draw, old.experts, rates, group) if i in experts else old.experts
        new_routers = _noisy(draw, old.routers, rates, group) if i in routers else old.routers
        maps.append(Maps(new_experts, new_routers))
    if draw.random() < rates.normalise:
        maps = [
            Maps(_normalised(m.experts), m.routers) if only in (None, i) else m
            for i, m in enumerate(maps)
        ]
    return Genome(tuple(maps))


def crossed(
    draw: np.random.Generator,
    first: Genome,
    second: Genome,
    rates: Rates,
    *,
    coupled: bool,
    only: int | None = None,
) -> Genome:
    """Return a child of two parents, row by row in touched groups and map by map in others.

    A group in which the parents keep different numbers comes from the first, so that the total
    stays.

    Args:
        draw: where chance comes from.
        first: the parent whose counts the child has.
        second: the other.
        rates: chances.
        coupled: whether expert and router rows go together; else each map is crossed on its own,
            as released, which may part the two.
        only: the one group that is touched, all others come from the first; None draws them.
    """
    maps = []
    for index, (mine, theirs) in enumerate(zip(first.maps, second.maps, strict=True)):
        if only not in (None, index):
            maps.append(mine)
            continue
        by_row = only is not None or bool(draw.random() < rates.group)
        chance = rates.first_row if by_row else rates.first_map
        num = mine.experts.shape[0] if by_row else 1
        from_first = draw.random((2, num)) < chance
        if mine.experts.shape != theirs.experts.shape:
            maps.append(mine)
            continue
        expert_rows, router_rows = from_first[0][:, None], from_first[0 if coupled else 1][:, None]
        maps.append(
            Maps(
                np.where(expert_rows, mine.experts, theirs.experts),
                np.where(router_rows, mine.routers, theirs.routers),
            )
        )
    return Genome(tuple(maps))


def _subset(draw: np.random.Generator, group: LayerGroup, count: int) -> list[int]:
    size, share = group.num_experts // group.routing_groups, count // group.routing_groups
    chosen = [
        number * size + draw.choice(size, share, replace=False)
        for number in range(group.routing_groups)
    ]
    return sorted(np.concatenate(chosen).tolist())


def _touched(draw: np.random.Generator, groups: Sequence[LayerGroup], rates: Rates) -> list[int]:
    while True:
        found = np.flatnonzero(draw.random(len(groups)) < rates.group).tolist()
        if found:
            return found


def _touched_maps(
    draw: np.random.Generator, groups: Sequence[LayerGroup], rates: Rates, *, router: bool
) -> tuple[set[int], set[int]]:
    """Return the groups whose expert map, and those whose router map, get noise."""
    while True:
        hits = draw.random((2, len(groups))) < rates.group
        experts = set(np.flatnonzero(hits[0]).tolist())
        routers = set(np.flatnonzero(hits[1]).tolist()) if router else set()
        if experts or routers:
            return experts, routers


def _one_touched(
    draw: np.random.Generator, only: int, *, router: bool
) -> tuple[set[int], set[int]]:
    """As above, for one group: its expert map, its router map, or both."""
    which = int(draw.integers(3)) if router else 0
    return ({only} if which != 1 else set()), ({only} if which != 0 else set())


def group_by_cost(draw: np.random.Generator, groups: Sequence[LayerGroup]) -> int:
    """Return a group, with a chance inverse to the layers from its first on."""
    layers = [len(group.layers) for group in groups]
    behind = np.cumsum(layers[::-1])[::-1]
    chance = 1.0 / behind
    return int(draw.choice(len(groups), p=chance / chance.sum()))


def _moved_map(draw: np.random.Generator, old: Maps, group: LayerGroup, chance: float) -> Maps:
    ids = old.experts.argmax(axis=1).tolist()
    size = group.num_experts // group.routing_groups
    moves = (draw.random(len(ids)) < chance).tolist()
    for row, move in enumerate(moves):
        mine = ids[row] // size
        unused = sorted(set(range(mine * size, (mine + 1) * size)) - set(ids))
        if move and unused:
            ids[row] = unused[int(draw.integers(len(unused)))]
    return one_hot(ids, group.num_experts)


def _without_one(draw: np.random.Generator, old: Maps, group: LayerGroup) -> Maps:
    """Return maps without one row of each routing group."""
    size = group.num_experts // group.routing_groups
    home = old.experts.argmax(axis=1) // size
    gone = [int(draw.choice(np.flatnonzero(home == n))) for n in range(group.routing_groups)]
    return Maps(np.delete(old.experts, gone, axis=0), np.delete(old.routers, gone, axis=0))


def _with_one(draw: np.random.Generator, old: Maps, group: LayerGroup) -> Maps:
    """Return maps with one more old expert of each routing group, one that leads no row yet."""
    size, used = group.num_experts // group.routing_groups, set(old.experts.argmax(axis=1).tolist())
    experts, routers = old.experts, old.routers
    for n in range(group.routing_groups):
        unused = sorted(set(range(n * size, (n + 1) * size)) - used)
        row = np.eye(group.num_experts)[[unused[int(draw.integers(len(unused)))]]]
        experts, routers = np.concatenate([experts, row]), np.concatenate([routers, row])
    order = np.argsort(experts.argmax(axis=1) // size, kind="stable")  # routing groups in order
    return Maps(experts[order], routers[order])


def _noisy(draw: np.random.Generator, old: Map, rates: Rates, group: LayerGroup) -> Map:
    """Return a map with noise, in the part of each row that is of its own routing group."""
    hit = draw.random(old.shape) < rates.element
    noise = hit * draw.standard_normal(old.shape) * rates.noise
    if group.routing_groups == 1:
        return old + noise
    home, size = _homes(len(old), group), group.num_experts // group.routing_groups
    return old + noise * (home[:, None] == np.arange(group.num_experts) // size)


def _homes(count: int, group: LayerGroup) -> np.ndarray:
    """Return the routing group of each of ``count`` rows, which are in the order of the groups."""
    return np.arange(count) // (count // group.routing_groups)


def _normalised(old: Map) -> Map:
    total = old.sum(axis=1, keepdims=True)
    return old / np.where(np.abs(total) > _SMALL, total, 1.0)
