"""What the search varies: a router map and an expert map for each group of layers.

E experts before, N experts after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lit_moe.errors import PlanError
from lit_moe.plan import KeepPlan
from lit_moe.search.groups import LayerGroup

Map = np.ndarray
"""float64, shape ``(N, E)``, not writeable."""


@dataclass(frozen=True)
class Maps:
    """How the experts of one layer are combined (EEP, arXiv 2407.00945, eq. 5 and 6).

    New expert ``n`` has the weights ``sum_e experts[n, e] W_e``; its routing probability is
    ``sum_e routers[n, e] p_e``, before the top-k are taken.

    Attributes:
        experts: W_EM.
        routers: W_RM, of the same shape.
    """

    experts: Map
    routers: Map

    def __post_init__(self) -> None:
        for name in ("experts", "routers"):
            own = np.array(getattr(self, name), dtype=np.float64) + 0.0  # -0.0 becomes 0.0
            own.setflags(write=False)
            object.__setattr__(self, name, own)
        shape = self.experts.shape
        if self.experts.ndim != 2 or shape != self.routers.shape or not 1 <= shape[0] <= shape[1]:
            raise PlanError(
                f"expert and router map must have one shape (new, old) with new <= old, they have "
                f"{shape} and {self.routers.shape}"
            )

    @cached_property
    def key(self) -> str:
        """What tells maps apart, whatever the order of the new experts."""
        rows = np.concatenate([self.experts, self.routers], axis=1)
        ordered = rows[np.lexsort(rows.T[::-1])]
        return hashlib.sha256(f"{rows.shape}".encode() + ordered.tobytes()).hexdigest()[:16]

    @cached_property
    def kept(self) -> tuple[int, ...] | None:
        """Ascending ids where both maps only drop experts; None where they do more."""
        ids = self.experts.argmax(axis=1)
        one_hot = np.eye(self.experts.shape[1])[ids]
        is_plain = np.array_equal(self.experts, one_hot) and np.array_equal(self.routers, one_hot)
        if not is_plain or len(set(ids.tolist())) < len(ids):
            return None
        return tuple(sorted(ids.tolist()))

    @property
    def is_identity(self) -> bool:
        """Whether every expert stays as it is."""
        return self.kept == tuple(range(self.experts.shape[1]))


@dataclass(frozen=True, eq=False)
class Genome:
    """One candidate: the maps of all groups. Equal genomes make equal models.

    Attributes:
        maps: one entry per group.
    """

    maps: tuple[Maps, ...]

    @cached_property
    def key(self) -> str:
        """Canonical hash, 16 hexadecimal digits."""
        text = "".join(maps.key for maps in self.maps)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Genome) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts after, per group."""
        return tuple(maps.experts.shape[0] for maps in self.maps)

    @property
    def only_drops(self) -> bool:
        """Whether this is pure pruning."""
        return all(maps.kept is not None for maps in self.maps)

    def by_layer(self, groups: Sequence[LayerGroup]) -> dict[str, Maps]:
        """Return MoE layer name -> its maps."""
        pairs = zip(groups, self.maps, strict=True)
        return {layer: maps for group, maps in pairs for layer in group.layers}

    def keep_plan(self, groups: Sequence[LayerGroup]) -> KeepPlan | None:
        """Return the plan of a genome that only drops experts, else None."""
        layers = self.by_layer(groups)
        kept = {name: maps.kept for name, maps in layers.items()}
        if any(ids is None for ids in kept.values()):
            return None
        totals = {name: maps.experts.shape[1] for name, maps in layers.items()}
        return KeepPlan({name: ids for name, ids in kept.items() if ids is not None}, totals)

    def replaced(self, changes: Mapping[int, Maps]) -> Genome:
        """Return a genome with other maps in some groups."""
        return Genome(tuple(changes.get(i, maps) for i, maps in enumerate(self.maps)))


def one_hot(ids: Sequence[int], num_experts: int) -> Maps:
    """Return the maps that keep ``ids``, in this order."""
    rows = np.eye(num_experts)[list(ids)]
    return Maps(rows, rows)


def genome_of_plan(plan: KeepPlan, groups: Sequence[LayerGroup], counts: Sequence[int]) -> Genome:
    """Return a plan as a genome that keeps ``counts`` experts per group.

    Layers of one group vote: the experts that most of them keep stay, the lower id in a tie. With
    one group per layer and the plan's own counts the genome is the plan.

    Raises:
        PlanError: if the plan is for other layers.
    """
    plan.check_fits({layer: g.num_experts for g in groups for layer in g.layers})
    maps = []
    for group, count in zip(groups, counts, strict=True):
        votes = np.zeros(group.num_experts, dtype=np.int64)
        for layer in group.layers:
            votes[list(plan.kept[layer])] += 1
        maps.append(one_hot(_most_voted(votes, group, count), group.num_experts))
    return Genome(tuple(maps))


def _most_voted(votes: np.ndarray, group: LayerGroup, count: int) -> list[int]:
    """Return ascending ids, equally many of each routing group."""
    size, share = group.num_experts // group.routing_groups, count // group.routing_groups
    order = np.argsort(-votes, kind="stable").tolist()
    per_group = (
        [e for e in order if e // size == number][:share] for number in range(group.routing_groups)
    )
    return sorted(e for ids in per_group for e in ids)
