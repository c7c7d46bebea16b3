"""Everybody who was evaluated, the best first."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

import numpy as np

from lit_moe.search.genome import Genome
from lit_moe.search.options import Rates


@dataclass(frozen=True)
class Score:
    """What an evaluation found, in points; larger is better.

    Attributes:
        fitness: what is searched for.
        finer: a finer measure, usually the negative loss, for candidates that are equally fit.
        is_bound: the evaluation was stopped, and neither measure can be above these values.
    """

    fitness: float
    finer: float = 0.0
    is_bound: bool = False

    def __post_init__(self) -> None:
        for name in ("fitness", "finer"):
            if not math.isfinite(getattr(self, name)):
                object.__setattr__(self, name, -math.inf)


@dataclass(frozen=True)
class Individual:
    """An evaluated genome.

    Attributes:
        genome: the candidate.
        score: on the search split.
        number: how many were evaluated before it.
    """

    genome: Genome
    score: Score
    number: int


@dataclass
class Population:
    """Individuals, never cut off, sorted by fitness, then finer fitness, then age.

    Attributes:
        by_finer: sort by the finer measure alone: for a fitness that does not tell anybody apart.
    """

    by_finer: bool = False
    ranked: list[Individual] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ranked)

    def add(self, individual: Individual) -> None:
        """Take somebody in."""
        bisect.insort(self.ranked, individual, key=self._rank)

    def sort_by_finer(self) -> None:
        """Rank everybody, and whoever comes later, by the finer measure."""
        self.by_finer = True
        self.ranked.sort(key=self._rank)

    @property
    def best(self) -> Individual:
        """Whoever is first."""
        return self.ranked[0]

    def value(self, individual: Individual) -> float:
        """Return the points that margins are counted in."""
        return individual.score.finer if self.by_finer else individual.score.fitness

    @property
    def is_constant(self) -> bool:
        """Whether several are there and the fitness is the same for all."""
        return len(self.ranked) > 1 and len({one.score.fitness for one in self.ranked}) == 1

    def median(self) -> float:
        """Return the median of what is sorted by."""
        return float(np.median([self.value(one) for one in self.ranked]))

    def floor(self, rates: Rates, *, listed: int) -> float:
        """Return points below which a newcomer is never drawn as a parent, and never listed.

        The best only rises and nobody leaves, so that this holds for good: enough others are better
        already, and the margins of :class:`Rates` only move away.

        Args:
            rates: the margins.
            listed: of the best, so many are listed in the end.

        Returns:
            Points; minus infinity while anybody may still count.
        """
        beyond = self._within(rates.mutation_margin) + rates.mutation_extra
        places = (max(listed, 1), rates.crossover_least, beyond)
        if not self.ranked or max(places) > len(self.ranked):
            return -math.inf
        margin = max(rates.mutation_margin, rates.crossover_margin)
        nth = min(self.value(self.ranked[place - 1]) for place in places if place)
        return min(self.value(self.best) - margin, nth)

    def one_parent(self, draw: np.random.Generator, rates: Rates) -> Genome:
        """Return a parent for mutation alone."""
        reach = self._within(rates.mutation_margin) + rates.mutation_extra
        return self._drawn(draw, reach)

    def two_parents(self, draw: np.random.Generator, rates: Rates) -> tuple[Genome, Genome]:
        """Return parents for a crossover; they may be the same."""
        reach = max(self._within(rates.crossover_margin), rates.crossover_least)
        return self._drawn(draw, reach), self._drawn(draw, reach)

    def _drawn(self, draw: np.random.Generator, reach: int) -> Genome:
        return self.ranked[int(draw.integers(min(reach, len(self.ranked))))].genome

    def _within(self, margin: float) -> int:
        """Return how many are within a margin of the best."""
        least = self.value(self.best) - margin
        return sum(self.value(one) >= least for one in self.ranked)

    def _rank(self, one: Individual) -> tuple[float, ...]:
        """Return a sorting key, the best first."""
        score = one.score
        if self.by_finer:
            return (-score.finer, one.number)
        return (-score.fitness, -score.finer, one.number)
