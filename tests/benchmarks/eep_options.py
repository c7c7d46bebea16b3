"""What the options of the evolutionary search cost and bring: rates by cost, the bound, racing.

``python -m tests.benchmarks.eep_options MODEL STORE``: MODEL is the folder that
``configs/mc_suite/instruction_model.yaml`` exports; STORE takes a JSON line per finished search, so
that a run that was killed goes on where it was. A search is looked at twice, as if it ended there:
after equally many candidates, and after equal seconds of the processor. Its best twenty are then
ranked on the dev split, and the first of them is measured on the test split.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lit_moe.search import (
    AnswerTokens,
    Effort,
    Evolution,
    History,
    Measures,
    ModelEvaluator,
    NegativeLoss,
    Racing,
    Rates,
    SearchRun,
    SearchSpace,
    SplitScorer,
)
from lit_moe.search.samples import SampleSizes, splits_of
from lit_moe.search.space import problem_of
from tests.benchmarks.eep_tables import RESULTS, Bench
from tests.benchmarks.refit_store import Result, Store
from tests.benchmarks.timing import markdown

SIZES = SampleSizes(search=120, dev=120, test=240, batch_size=24)
SPACE = SearchSpace(keep_ratio=0.5, groups="per_layer")
CANDIDATES, SECONDS = 300, 60.0
EFFORT = Effort(initial=30, discrete=120, total=100_000, children=8, rerank=20, bound=False)
SEEDS = (11450, 11451, 11452)
BYTES = {"search": 1 << 28, "dev": 1 << 27, "test": 0}


@dataclass(frozen=True)
class Option:
    """What a search is run with."""

    bound: bool = False
    rates: Rates = field(default_factory=Rates)
    racing: Racing | None = None


BY_COST = Rates(touch="by_cost")
OPTIONS = {
    "released rates": Option(),
    "released rates, bound": Option(bound=True),
    "by cost": Option(rates=BY_COST),
    "by cost, bound": Option(bound=True, rates=BY_COST),
    "released rates, racing": Option(racing=Racing(first=24)),
}
CAPTION = (
    "The task of `configs/mc_suite/instruction_model.yaml`, half of the experts of each layer, "
    f"right answers in percent, mean and standard deviation over seeds. {SIZES.search} search, "
    f"{SIZES.dev} dev, {SIZES.test} test questions, {SIZES.batch_size} per forward; "
    f"{EFFORT.discrete} discrete candidates, {EFFORT.children} per generation. Every search is "
    f"looked at after {CANDIDATES} candidates, and after {SECONDS:.0f} seconds of one core."
)


class Options:
    """Runs searches on one model."""

    def __init__(self, model: str) -> None:
        self._bench = Bench(model)
        self._splits = splits_of(self._bench.data, SIZES)

    def searched(self, option: Option, seed: int) -> Result:
        """Return what a search came to at both looks, and the regret of racing."""
        begin = time.process_time()
        model, live = self._bench.model, self._bench.live(SPACE)
        problem = problem_of(model, SPACE)
        scorers = {name: self._scorer(live, name) for name in self._splits}
        if option.bound:
            scorers["search"].ask_hardest_first(problem.probes())
        evolution = Evolution(problem, option.rates, replace(EFFORT, bound=option.bound, seed=seed))
        evaluator = ModelEvaluator(scorers, live)
        run = SearchRun(evolution, evaluator, History("options"), racing=option.racing)
        looks = _Looks(evolution, scorers)
        seconds = time.process_time() - begin
        while not looks.are_taken(seconds):
            begin = time.process_time()
            generation = run.ask()
            assert generation is not None
            run.evaluate(generation)
            seconds += time.process_time() - begin
        stopped = sum(line.score.is_bound for line in run.history.lines)
        regret = run.outcome().mean_regret
        return {**looks.taken, "regret": regret, "stopped": stopped / evolution.evaluated}

    def _scorer(self, live: Any, split: str) -> SplitScorer:
        measures = Measures(AnswerTokens(), NegativeLoss(), SIZES.batch_size, BYTES[split])
        return SplitScorer(live, self._splits[split], measures, self._bench.data.tokenizer)


class _Looks:
    """A search as if it ended after so many candidates, and after so many seconds."""

    def __init__(self, evolution: Evolution, scorers: dict[str, SplitScorer]) -> None:
        self._evolution, self._scorers = evolution, scorers
        self.taken: Result = {}

    def are_taken(self, seconds: float) -> bool:
        """Take the looks that are due, and return whether no other is left."""
        due = {
            "candidates": self._evolution.evaluated >= CANDIDATES,
            "seconds": seconds >= SECONDS,
        }
        for name, is_due in due.items():
            if is_due and name not in self.taken:
                self.taken[name] = {**self._look(), "seconds": seconds}
        return len(self.taken) == len(due)

    def _look(self) -> Result:
        listed = self._evolution.shortlist(EFFORT.rerank)
        scores = [self._scorers["dev"].score(one.genome) for one in listed]
        best = max(range(len(listed)), key=lambda i: (scores[i].fitness, scores[i].finer))
        return {
            "evaluated": self._evolution.evaluated,
            "best": self._evolution.population.best.score.fitness,
            "search": listed[best].score.fitness,
            "dev": scores[best].fitness,
            "test": self._scorers["test"].points(listed[best].genome).fitness,
        }


def table(store: Store) -> str:
    """Return a row per option with what is in the store."""
    header = [
        "",
        "seeds",
        f"{CANDIDATES} candidates: seconds",
        "best on search",
        "test",
        f"{SECONDS:.0f} seconds: candidates",
        "best on search",
        "test",
        "stopped",
        "regret of racing",
    ]
    rows = []
    for name in OPTIONS:
        found = (store.get("instruction", name, seed=seed) for seed in SEEDS)
        cells = [cell for cell in found if cell is not None]
        if cells:
            rows.append([name, len(cells), *_columns(cells)])
    return f"{CAPTION}\n\n{markdown(header, rows)}\n"


def _columns(cells: Sequence[Result]) -> list[str]:
    equal, timed = ([cell[look] for cell in cells] for look in ("candidates", "seconds"))
    regrets = [cell["regret"] for cell in cells if cell["regret"] is not None]
    return [
        _mean([look["seconds"] for look in equal]),
        _mean([look["best"] for look in equal]),
        _mean([look["test"] for look in equal]),
        _mean([look["evaluated"] for look in timed]),
        _mean([look["best"] for look in timed]),
        _mean([look["test"] for look in timed]),
        f"{100 * statistics.mean(cell['stopped'] for cell in cells):.0f} %",
        _mean(regrets) if regrets else "",
    ]


def _mean(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    options, store = Options(sys.argv[1]), Store(Path(sys.argv[2]))
    for seed in SEEDS:
        for name, option in OPTIONS.items():
            store.measure(partial(options.searched, option, seed), "instruction", name, seed=seed)
            (RESULTS / "eep_options.md").write_text(table(store))


if __name__ == "__main__":
    main()
