"""What a search is asked and what it proposes: the problem, candidates, generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lit_moe.errors import LitMoEError
from lit_moe.search.genome import Genome
from lit_moe.search.groups import LayerGroup
from lit_moe.search.variation import random_genome

Phase = Literal["discrete", "continuous"]
How = Literal["start", "random", "moved", "given", "crossed", "shaken"]


@dataclass(frozen=True)
class Child:
    """A candidate to be evaluated.

    Attributes:
        genome: one that was never proposed before.
        how: the last step that made it.
        parents: keys of the genomes that it comes from; none for those of the start.
    """

    genome: Genome
    how: How
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """Candidates made from one population.

    Attributes:
        number: 0 for the start.
        phase: of the search.
        children: at least one.
    """

    number: int
    phase: Phase
    children: tuple[Child, ...]


@dataclass(frozen=True)
class Problem:
    """What is searched for, as numbers.

    Attributes:
        groups: of layers.
        counts: experts that each group keeps; at the start, if they may differ later.
        floors: least experts of each group, where counts are genes.
        non_uniform: whether groups may exchange experts of their budgets.
        free_router: whether router maps become continuous too.
        start: genomes to begin with, in front of random ones.
    """

    groups: tuple[LayerGroup, ...]
    counts: tuple[int, ...]
    floors: tuple[int, ...] = ()
    non_uniform: bool = False
    free_router: bool = True
    start: tuple[Genome, ...] = ()

    def __post_init__(self) -> None:
        for group, count in zip(self.groups, self.counts, strict=True):
            if not 1 <= count <= group.num_experts or count % group.routing_groups:
                raise LitMoEError(
                    f"group {group.name!r} has {group.num_experts} experts and cannot keep {count}"
                )
        total = self.total(self.counts)
        for genome in self.start:
            same = self.total(genome.counts) == total if self.non_uniform else False
            if genome.counts != self.counts and not same:
                raise LitMoEError(
                    f"a warm start keeps {genome.counts} experts per group, the search "
                    f"{self.counts}; give a plan of the same size"
                )

    def total(self, counts: Sequence[int]) -> int:
        """Return the experts of all layers together."""
        return sum(len(g.layers) * n for g, n in zip(self.groups, counts, strict=True))

    def probes(self, num: int = 4, *, seed: int = 0) -> list[Genome]:
        """Return random candidates, to learn which samples such candidates do worst on.

        None where nothing is dropped: candidates are then like the whole model.
        """
        if self.drops_nothing:
            return []
        draw = np.random.Generator(np.random.PCG64(seed))
        return [random_genome(draw, self.groups, self.counts) for _ in range(num)]

    @property
    def drops_nothing(self) -> bool:
        """Whether all experts stay, so that there is nothing to choose."""
        return all(n == g.num_experts for g, n in zip(self.groups, self.counts, strict=True))
