"""Whole evolutionary searches against naive ones that come to the same candidates and scores.

A 12-layer model; half of its experts are chosen, then merged. Naive: every candidate that the
operators draw is evaluated, duplicates too, by a plain forward of the model from the first layer,
logits at every place, its maps put together anew. Ours: what users run, with everything that spares
work: duplicates are not evaluated, hidden states in front of the first change and merged experts
are kept, logits are made where something is predicted, and candidates that cannot count are stopped
between batches. Seconds are those of the process, so that other programs do not count.

Both searches must come to the same candidates, in the same order, and the same result; every score
that ours took in full must be the naive one, bit for bit, and no bound may be below it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from lit_moe.adapters import find_sites
from lit_moe.search import (
    AnswerTokens,
    Effort,
    Evolution,
    Genome,
    History,
    LiveModel,
    Measures,
    ModelEvaluator,
    NegativeLoss,
    Problem,
    Rates,
    RowFitness,
    Score,
    SearchRun,
    SplitScorer,
    group_layers,
)
from lit_moe.search.groups import Grouping
from lit_moe.search.history import Line
from lit_moe.search.request import Request
from lit_moe.search.rows import RowBatch
from tests.benchmarks.search_task import EXPERTS, LAYERS, questions, trained_model
from tests.benchmarks.timing import markdown

KEPT, BATCH = EXPERTS // 2, 32
SIZES = {"search": 64, "dev": 32}
EFFORT = Effort(initial=30, discrete=100, total=400, rerank=20)
BYTES = 1 << 29
Batches = Mapping[str, Sequence[RowBatch]]
"""Split -> what is run, in order."""


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    groups: Grouping
    rates: Rates
    fitness: RowFitness


GROUPINGS: tuple[tuple[str, Grouping], ...] = (("4", 4), (str(LAYERS), "per_layer"))
SETTINGS = tuple(
    Setting(f"{groups} groups, {rates}, {measure}", number, options, fitness)
    for measure, fitness in (("negative loss", NegativeLoss()), ("right answers", AnswerTokens()))
    for groups, number in GROUPINGS
    for rates, options in (("released rates", Rates()), ("by cost", Rates(touch="by_cost")))
)


class Drawing(Evolution):
    """Keeps every proposal that was drawn for the present generation, duplicates too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.drawn: list[Genome] = []
        self.num_drawn = 0

    def _new(self, child):
        self.drawn.append(child.genome)
        self.num_drawn += 1
        return super()._new(child)


class Naive:
    """Evaluates everything that is drawn, by plain forwards."""

    width = 1

    def __init__(
        self, live: LiveModel, batches: Batches, fitness: RowFitness, finer: RowFitness
    ) -> None:
        self._live, self._batches, self._measures = live, batches, (fitness, finer)
        self.evolution: Drawing | None = None

    def num_samples(self, split: str) -> int:
        return SIZES[split]

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Score:
        assert self.evolution is not None
        again = self.evolution.drawn if request.split == "search" else []
        while again:
            genome = again.pop(0)
            if genome == request.genome:
                break
            self.score(request.split, genome)
        return self.score(request.split, request.genome)

    def score(self, split: str, genome: Genome | None) -> Score:
        """Return the score of a candidate: as it was drawn, nothing of it is known."""
        measures = {measure.name: measure for measure in self._measures}
        found: dict[str, list[torch.Tensor]] = {name: [] for name in measures}
        fresh = genome and Genome(tuple(replace(maps) for maps in genome.maps))
        with nullcontext() if fresh is None else self._live.applied(fresh), torch.no_grad():
            for batch in self._batches[split]:
                logits = self._live.model(**batch.inputs, use_cache=False).logits
                for name, measure in measures.items():
                    found[name].append(measure.points(logits, batch, None))
        fitness, finer = (float(torch.cat(found[one.name]).mean()) for one in self._measures)
        return Score(fitness, finer)


@dataclass
class Searched:
    """A search that is over, what it took, and what it ran on."""

    run: SearchRun
    seconds: float
    drawn: int
    layers: float
    batches: Batches

    @property
    def lines(self) -> list[Line]:
        return self.run.history.lines


def ours(model, setting: Setting, effort: Effort = EFFORT, *, num_bytes: int = BYTES) -> Searched:
    begin = time.process_time()
    live, problem = _live(model, setting, cache_bytes=num_bytes // 4), _problem(model, setting)
    measures = Measures(setting.fitness, NegativeLoss(), BATCH)
    scorers = {
        name: SplitScorer(live, questions(num, seed=i), replace(measures, prefix_bytes=share))
        for i, (name, num, share) in enumerate(_shares(num_bytes))
    }
    scorers["search"].ask_hardest_first(problem.probes())
    evolution = Drawing(problem, setting.rates, effort)
    run = SearchRun(evolution, ModelEvaluator(scorers, live), History("ours"))
    run.run()
    seconds = time.process_time() - begin
    batches = {name: scorer.batches for name, scorer in scorers.items()}
    layers = scorers["search"].layers_run / len(batches["search"]) / effort.total
    return Searched(run, seconds, evolution.num_drawn, layers, batches)


def naive(model, setting: Setting, batches: Batches, effort: Effort = EFFORT) -> Searched:
    live = _live(model, setting, cache_bytes=0)
    evaluator = Naive(live, batches, setting.fitness, NegativeLoss())
    evaluator.score("search", None)
    begin = time.process_time()
    evolution = Drawing(_problem(model, setting), setting.rates, replace(effort, bound=False))
    evaluator.evolution = evolution
    run = SearchRun(evolution, evaluator, History("naive"))
    run.run()
    seconds = time.process_time() - begin
    return Searched(run, seconds, evolution.num_drawn, LAYERS, batches)


def same_results(fast: Searched, plain: Searched) -> tuple[int, float]:
    """Return how many scores differ in any bit, and by how many points at most.

    Raises:
        AssertionError: if the searches came to different candidates or results.
    """
    asked = [[(one.split, one.genome, one.draws) for one in s.lines] for s in (fast, plain)]
    assert asked[0] == asked[1], "other candidates"
    best = [s.run.outcome() for s in (fast, plain)]
    assert best[0].best.genome == best[1].best.genome, "another result"
    others, most = 0, 0.0
    for mine, whole in zip(fast.lines, plain.lines, strict=True):
        if mine.score.is_bound:
            assert mine.score.fitness >= whole.score.fitness, "a bound that is none"
            continue
        gaps = [abs(getattr(mine.score, n) - getattr(whole.score, n)) for n in ("fitness", "finer")]
        others, most = others + (max(gaps) > 0), max(most, *gaps)
    return others, most


def row_of(model, setting: Setting, effort: Effort = EFFORT) -> list[object]:
    fast = ours(model, setting, effort)
    plain = naive(model, setting, fast.batches, effort)
    assert fast.drawn == plain.drawn
    others, most = same_results(fast, plain)
    num = fast.run.evolution.evaluated
    stopped = sum(line.score.is_bound for line in fast.lines)
    return [
        setting.name,
        f"{plain.drawn / plain.seconds:.2f}",
        f"{fast.drawn / fast.seconds:.2f}",
        f"{plain.seconds / fast.seconds:.2f}",
        f"{fast.drawn / num:.2f}",
        f"{fast.layers:.1f}",
        f"{100 * stopped / num:.0f} %",
        "yes" if not others else f"{others} of {len(fast.lines)} by at most {most:.1e}",
    ]


HEADER = [
    "search",
    "naive, proposals/s",
    "ours, proposals/s",
    "ratio",
    "proposals per new candidate",
    f"layers run, of {LAYERS}",
    "stopped",
    "same bits",
]


def bound(num_groups: int, chance: float) -> float:
    """Return layers over expected layers behind the first of the groups that a child changes.

    Args:
        num_groups: by depth, about equally many of the layers in each.
        chance: that a child differs from its parent in a group, for each group on its own.
    """
    behind = np.cumsum([len(part) for part in np.array_split(np.arange(LAYERS), num_groups)][::-1])
    first = (1 - chance) ** np.arange(num_groups)
    return LAYERS / float((first * behind[::-1]).sum() / first.sum())


def bounds() -> str:
    """Return the bounds of both phases under the released rates, without crossings."""
    rates = Rates()
    chances = {
        "discrete": rates.group * (1 - (1 - rates.row) ** KEPT),
        "continuous": 1 - (1 - rates.group) ** 2,
    }
    rows = [
        [f"{num} groups", *(f"{bound(num, chance):.2f}" for chance in chances.values())]
        for num in (4, LAYERS)
    ]
    return markdown(["sharing layers, released rates, at most", *chances], rows)


def run() -> str:
    torch.set_num_threads(1)
    model = trained_model()
    rows = []
    for setting in SETTINGS:
        rows.append(row_of(model, setting))
        print(*rows[-1], sep=" | ", flush=True)
    return f"{markdown(HEADER, rows)}\n\n{bounds()}"


def _shares(num_bytes: int) -> list[tuple[str, int, int]]:
    """Return split, samples, and bytes for hidden states, as EvolutionarySearch shares them."""
    parts = {"search": num_bytes // 2, "dev": num_bytes // 4}
    return [(name, SIZES[name], part) for name, part in parts.items()]


def _live(model, setting: Setting, *, cache_bytes: int) -> LiveModel:
    return LiveModel(model, _problem(model, setting).groups, cache_bytes=cache_bytes)


def _problem(model, setting: Setting) -> Problem:
    groups = group_layers(find_sites(model), setting.groups)
    return Problem(groups, (KEPT,) * len(groups))


if __name__ == "__main__":
    print(run())
