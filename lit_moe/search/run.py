"""Runs a search to its end: generations, heats, the choice on the dev split, what to tell of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lit_moe.search.evolution import Evolution
from lit_moe.search.genome import Genome
from lit_moe.search.history import History, Line
from lit_moe.search.options import Racing
from lit_moe.search.population import Individual, Score
from lit_moe.search.problem import Child, Generation, Phase
from lit_moe.search.request import Request


class Evaluator(Protocol):
    """What scores candidates, on one process or on several."""

    width: int
    """Candidates that are evaluated at once; with 1 each is put on record before the next."""

    def num_samples(self, split: str) -> int:
        """Return the size of a split."""
        ...

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """Return the scores of requests, in their order. Collective, with several processes."""
        ...


@dataclass
class Progress:
    """Where a search is after a generation; what a live view shows.

    Attributes:
        phase: of the generation that just ended.
        evaluated: candidates so far.
        total: candidates in all.
        best: points of the best so far; never falls.
        median: points of the median individual.
        per_second: evaluations per second in this generation, 0 where all were on record.
        genome: the best so far.
    """

    phase: Phase
    evaluated: int
    total: int
    best: float
    median: float
    per_second: float
    genome: Genome


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        pruned: best that only drops experts, as chosen on the dev split; None if none was tried.
        best: best of all.
        regrets: points that racing missed, one per audited generation.
        evaluations: candidates evaluated, stopped ones included.
        bounded: of them, those that a bound stopped.
        notes: sentences that a reader of the result must know.
    """

    pruned: Individual | None
    best: Individual
    regrets: list[float] = field(default_factory=list)
    evaluations: int = 0
    bounded: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def mean_regret(self) -> float | None:
        """Points that racing missed per audited generation; None without audits."""
        return sum(self.regrets) / len(self.regrets) if self.regrets else None


class SearchRun:
    """A search with its evaluator and its record.

    Args:
        evolution: proposes candidates.
        evaluator: scores them.
        history: what was scored before.
        racing: stop the worse half of each generation early; None evaluates everybody in full.
        watch: called after each generation.
    """

    def __init__(
        self,
        evolution: Evolution,
        evaluator: Evaluator,
        history: History,
        *,
        racing: Racing | None = None,
        watch: Callable[[Progress], None] | None = None,
    ) -> None:
        self.evolution, self.history = evolution, history
        self._evaluate, self._racing = evaluator, racing
        self._watch = watch or (lambda _: None)
        self._regrets: list[float] = []
        self._pruned: Individual | None = None
        self._is_chosen = False
        self._spent, self._fresh = 0.0, 0
        self.seconds = 0.0
        """Spent on evaluations so far, without those on record."""

    def run(self) -> Outcome:
        """Search to the end, or go on where the record ends. Collective if the evaluator is."""
        while (generation := self.ask()) is not None:
            self.evaluate(generation)
        return self.outcome()

    def ask(self) -> Generation | None:
        """Return the next generation, to be evaluated before the next is asked for; None if over.

        Collective: before the first merging generation the best pruned candidate is chosen.
        """
        generation = self.evolution.ask()
        if generation is not None and generation.phase == "continuous":
            self._choose_pruned()
        return generation

    def is_on_record(self, generation: Generation) -> bool:
        """Whether nothing of a generation, the next one, needs evaluating; if in doubt, False."""
        each = 1  # lines of the record per child, at most
        if self._racing is not None:
            each += len(self._racing.heats(self._evaluate.num_samples("search")))
        return self.history.num_left >= each * len(generation.children)

    def evaluate(self, generation: Generation) -> Progress:
        """Evaluate a generation and return where the search then is. Collective."""
        self._spent, self._fresh = 0.0, 0
        self.evolution.tell(generation, self._scores(generation))
        progress = self._progress(generation)
        self._watch(progress)
        return progress

    def outcome(self) -> Outcome:
        """Choose what was found, once there is no further generation. Collective."""
        evolution, pruned = self.evolution, self._choose_pruned()
        best = self._choose()
        assert best is not None
        notes = list(evolution.notes)
        bounded = sum(line.score.is_bound for line in self.history.lines)
        found = Outcome(pruned, best, self._regrets, evolution.evaluated, bounded, notes)
        if found.mean_regret is not None:
            notes.append(
                f"racing missed {found.mean_regret:.2f} points per audited generation (at most "
                f"{max(self._regrets):.2f}, {len(self._regrets)} audits)"
            )
        return found

    def _choose_pruned(self) -> Individual | None:
        """Return the best that only drops experts, chosen once: when the discrete phase is over."""
        if not self._is_chosen:
            self._pruned, self._is_chosen = self._choose(only_drops=True), True
        return self._pruned

    def _choose(self, *, only_drops: bool = False) -> Individual | None:
        """Return the best on the dev split of the best on the search split; the first in a tie."""
        num = self.evolution.effort.rerank
        listed = self.evolution.shortlist(num, only_drops=only_drops)
        if not listed or num == 0:
            return listed[0] if listed else None
        size = self._evaluate.num_samples("dev")
        scores = self._all([Request(one.genome, "dev", size) for one in listed])
        by_finer = self.evolution.population.by_finer
        values = [(s.finer,) if by_finer else (s.fitness, s.finer) for s in scores]
        return listed[values.index(max(values))]

    def _scores(self, generation: Generation) -> list[Score | None]:
        children = generation.children
        size = self._evaluate.num_samples("search")
        heats = [size] if self._racing is None else self._racing.heats(size)
        if self._racing is None or generation.number == 0 or len(children) < 2 or len(heats) < 2:
            floor = None if self._racing else self.evolution.floor
            requests = [Request(child.genome, "search", size, floor) for child in children]
            return [*self._all(requests, generation)]
        return self._race(generation, heats, self._racing)

    def _race(
        self, generation: Generation, heats: Sequence[int], racing: Racing
    ) -> list[Score | None]:
        running = list(range(len(generation.children)))
        final: list[Score | None] = [None] * len(running)
        for samples in heats:
            requests = [Request(generation.children[i].genome, "search", samples) for i in running]
            found = dict(zip(running, self._all(requests, generation), strict=True))
            if samples == heats[-1]:
                for index, score in found.items():
                    final[index] = score
                break
            by_finer = self.evolution.population.by_finer
            order = sorted(running, key=lambda i: _worst_last(found[i], by_finer=by_finer))
            running = sorted(order[: max(1, round(len(order) * racing.keep))])
        if racing.audit_every and generation.number % racing.audit_every == 0:
            self._audit(generation, final, heats[-1])
        return final

    def _audit(self, generation: Generation, final: list[Score | None], size: int) -> None:
        """Evaluate those that racing stopped, and note what was missed; they stay stopped."""
        stopped = [i for i, score in enumerate(final) if score is None]
        requests = [Request(generation.children[i].genome, "search", size) for i in stopped]
        missed = [score.fitness for score in self._all(requests, generation)]
        winner = max(score.fitness for score in final if score is not None)
        self._regrets.append(max([0.0, *(fitness - winner for fitness in missed)]))

    def _all(
        self, requests: Sequence[Request], generation: Generation | None = None
    ) -> list[Score]:
        """Return scores from the record as far as it goes, then evaluated, in the same order."""
        scores: list[Score] = []
        draws = self.evolution.draws
        for request in requests:
            line = self.history.recorded(request.split, request.samples, request.genome.key, draws)
            if line is None:
                break
            scores.append(line.score)
        left = list(requests[len(scores) :])
        step = 1 if self._evaluate.width == 1 else max(1, len(left))
        for begin in range(0, len(left), step):
            chunk = left[begin : begin + step]
            start = time.perf_counter()
            found = self._evaluate(chunk)
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self._spent, self._fresh = self._spent + seconds, self._fresh + len(chunk)
            for request, score in zip(chunk, found, strict=True):
                self._record(request, score, generation, seconds / len(chunk))
            scores += found
        return scores

    def _record(
        self, request: Request, score: Score, generation: Generation | None, seconds: float
    ) -> None:
        details: dict[str, object] = {"number": len(self.history.lines)}
        if generation is not None:
            child = _child_of(generation, request.genome)
            details |= {"generation": generation.number, "phase": generation.phase}
            details |= {"how": child.how, "parents": list(child.parents)}
        if request.genome.only_drops:
            details["kept"] = [list(maps.kept or ()) for maps in request.genome.maps]
        details["seconds"] = round(seconds, 4)
        asked = (request.split, request.samples, request.genome.key)
        self.history.add(Line(*asked, self.evolution.draws, score, details))

    def _progress(self, generation: Generation) -> Progress:
        population = self.evolution.population
        return Progress(
            generation.phase,
            self.evolution.evaluated,
            self.evolution.effort.total,
            population.value(population.best),
            population.median(),
            self._fresh / self._spent if self._spent else 0.0,
            population.best.genome,
        )


def _child_of(generation: Generation, genome: Genome) -> Child:
    return next(child for child in generation.children if child.genome == genome)


def _worst_last(score: Score, *, by_finer: bool) -> tuple[float, ...]:
    return (-score.finer,) if by_finer else (-score.fitness, -score.finer)
