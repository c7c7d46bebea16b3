"""The evolutionary search as ask and tell: it proposes generations and is told what they score.

EEP (arXiv 2407.00945), as released: a steady-state population that is never cut off, a discrete
phase of dropping, then a continuous one of merging. Unlike the released code, no genome is ever
proposed twice, ties are broken by a finer fitness, and several children can be made of one
population, so that ranks can share them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lit_moe.errors import NoEffectWarning
from lit_moe.search.genome import Genome, one_hot
from lit_moe.search.groups import LayerGroup
from lit_moe.search.options import Effort, Rates
from lit_moe.search.population import Individual, Population, Score
from lit_moe.search.problem import Child, Generation, How, Phase, Problem
from lit_moe.search.request import Floor
from lit_moe.search.variation import (
    crossed,
    given,
    group_by_cost,
    moved,
    random_genome,
    shaken,
)

_DRAWS = 200
"""Draws for one new genome, before everything near the parents counts as known."""
_TELLING = 8
"""Individuals after which a fitness that is the same for all is called constant."""


@dataclass
class Evolution:
    """The state of one search; the same for the same seed and the same scores.

    Attributes:
        problem: what is searched for.
        rates: of variation.
        effort: how long.
        population: everybody evaluated in full.
        notes: sentences that a reader of the result must know.
    """

    problem: Problem
    rates: Rates = field(default_factory=Rates)
    effort: Effort = field(default_factory=Effort)
    population: Population = field(default_factory=Population)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = np.random.Generator(np.random.PCG64(self.effort.seed))
        self._known: set[str] = set()
        self._evaluated = self._generations = 0
        self._is_checked = self._chosen_out = False
        if self.problem.drops_nothing or self.effort.discrete == 0:
            self._chosen_out = True

    @property
    def phase(self) -> Phase:
        """The phase that the next generation belongs to."""
        is_over = self._chosen_out or self._evaluated >= self.effort.discrete
        return "continuous" if is_over else "discrete"

    @property
    def evaluated(self) -> int:
        """Candidates so far, those that racing stopped included."""
        return self._evaluated

    @property
    def draws(self) -> dict[str, str]:
        """The state of the generator, as numbers in text."""
        state = self._draw.bit_generator.state
        return {name: str(value) for name, value in state["state"].items()}

    @property
    def floor(self) -> Floor | None:
        """What a candidate must come to if it is ever to be drawn or listed; None: anything may be.

        Candidates below it change nothing, so they need not be evaluated to the end.
        """
        if not self.effort.bound or not self._is_checked:
            return None
        points = self.population.floor(self.rates, listed=self.effort.rerank)
        return Floor(points, by_finer=self.population.by_finer)

    def ask(self) -> Generation | None:
        """Return the next generation; None when the search is over."""
        left = self.effort.total - self._evaluated
        if left <= 0:
            return None
        children = self._start(left) if self._generations == 0 else self._children(left)
        if not children:
            return None
        generation = Generation(self._generations, self.phase, tuple(children))
        self._generations += 1
        return generation

    def tell(self, generation: Generation, scores: Sequence[Score | None]) -> None:
        """Take in what the children of a generation scored, in their order.

        Args:
            generation: the one that was asked for last.
            scores: None for children that racing stopped; they become no parents, like those of
                which only a bound is known.
        """
        for child, score in zip(generation.children, scores, strict=True):
            if score is not None and not score.is_bound:
                self.population.add(Individual(child.genome, score, self._evaluated))
            self._evaluated += 1
        self._check_fitness()

    def shortlist(self, num: int, *, only_drops: bool = False) -> list[Individual]:
        """Return the best individuals, at least one.

        Args:
            num: how many at most; 0 gives the best alone.
            only_drops: only those that keep experts as they are.
        """
        ranked = self.population.ranked
        found = [one for one in ranked if not only_drops or one.genome.only_drops]
        return found[: max(num, 1)]

    def _start(self, left: int) -> list[Child]:
        start = list(self.problem.start)
        if self.problem.drops_nothing and not start:
            start = [Genome(tuple(one_hot(range(g.num_experts), g.num_experts) for g in self._g))]
        children = [child for g in start if (child := self._new(Child(g, "start")))]
        wanted = min(self.effort.initial, left)
        if self.problem.drops_nothing or (self.effort.discrete == 0 and start):
            return children[:left]
        while len(children) < wanted:
            child = self._try(self._random)
            if child is None:
                break
            children.append(child)
        return children[:left]

    def _children(self, left: int) -> list[Child]:
        limit = left
        if self.phase == "discrete":
            limit = min(left, self.effort.discrete - self._evaluated)
        make = self._choose if self.phase == "discrete" else self._merge
        children: list[Child] = []
        while len(children) < min(self.effort.children, limit):
            child = self._try(make)
            if child is None and self.phase == "discrete":
                child = self._try(self._random)
            if child is None:
                break
            children.append(child)
        if not children and self.phase == "discrete":
            self.notes.append(f"all choices were tried after {self._evaluated} evaluations")
            self._chosen_out = True
            return self._children(left)
        return children

    def _choose(self) -> Child:
        """Return a child of the discrete phase, maybe a known one."""
        rates, draw, only = self.rates, self._draw, self._only()
        if draw.random() < rates.discrete_crossover:
            first, second = self.population.two_parents(draw, rates)
            parents: tuple[str, ...] = (first.key, second.key)
            child = crossed(draw, first, second, rates, coupled=True, only=only)
            child = self._without_repeats(child, first)
            how: How = "crossed"
        else:
            child = self.population.one_parent(draw, rates)
            parents, how = (child.key,), "moved"
        if self.problem.non_uniform and draw.random() < rates.count:
            return Child(given(draw, child, self._g, self.problem.floors), "given", parents)
        return Child(moved(draw, child, self._g, rates, only=only), how, parents)

    def _merge(self) -> Child:
        """Return a child of the continuous phase."""
        rates, draw, only = self.rates, self._draw, self._only()
        free = self.problem.free_router
        how: How = "shaken"
        parents: tuple[str, ...]
        if draw.random() < rates.crossover:
            first, second = self.population.two_parents(draw, rates)
            parents, how = (first.key, second.key), "crossed"
            parent = crossed(draw, first, second, rates, coupled=not free, only=only)
        else:
            parent = self.population.one_parent(draw, rates)
            parents = (parent.key,)
        return Child(shaken(draw, parent, self._g, rates, router=free, only=only), how, parents)

    def _only(self) -> int | None:
        """Return the one group that a child may differ in; None for any."""
        return group_by_cost(self._draw, self._g) if self.rates.touch == "by_cost" else None

    def _random(self) -> Child:
        genome = random_genome(self._draw, self._g, self.problem.counts)
        if self.problem.non_uniform:
            for _ in range(int(self._draw.integers(len(self._g) + 1))):
                genome = given(self._draw, genome, self._g, self.problem.floors)
        return Child(genome, "random")

    def _try(self, make: Callable[[], Child]) -> Child | None:
        """Return the first child that nobody knows, None if there seems to be none."""
        drawn = (make() for _ in range(_DRAWS))
        return next((child for c in drawn if (child := self._new(c))), None)

    def _new(self, child: Child) -> Child | None:
        if child.genome.key in self._known:
            return None
        self._known.add(child.genome.key)
        return child

    def _without_repeats(self, child: Genome, parent: Genome) -> Genome:
        """Return the child with the parent's maps wherever it keeps an expert twice."""
        twice = [i for i, maps in enumerate(child.maps) if maps.kept is None]
        return child.replaced({i: parent.maps[i] for i in twice})

    def _check_fitness(self) -> None:
        if self._is_checked or len(self.population) < _TELLING:
            return
        self._is_checked = True
        if not self.population.is_constant:
            return
        self.population.sort_by_finer()
        same = self.population.best.score.fitness
        note = (
            f"the fitness was {same:g} for each of the first {len(self.population)} candidates, so "
            "the search goes by the finer fitness; take another measure, or more samples"
        )
        self.notes.append(note)
        warnings.warn(note, NoEffectWarning, stacklevel=3)

    @property
    def _g(self) -> tuple[LayerGroup, ...]:
        return self.problem.groups
