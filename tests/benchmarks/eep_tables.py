"""Evolutionary search against other ways to the same size, with several seeds, on one task.

``python -m tests.benchmarks.eep_tables MODEL FOLDER``: MODEL is the folder that
``configs/mc_suite/instruction_model.yaml`` exports; FOLDER takes one file per finished cell, so
that a run that was killed goes on where it was. Every cell is measured in four ways: answer tokens
(what the search goes by), written exact match, choosing by likelihood, and the share of written
answers that are none of the choices.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lit_moe.adapters import find_sites
from lit_moe.criteria import Evidence, get_criterion, score_evidence
from lit_moe.data import TaskDataModule
from lit_moe.evaluate.generation import generate_answers
from lit_moe.evaluate.squad import squad_exact_match, squad_normalised
from lit_moe.search import (
    AnswerTokens,
    ChoiceAccuracy,
    Effort,
    Evolution,
    Genome,
    History,
    LiveModel,
    Measures,
    ModelEvaluator,
    NegativeLoss,
    SearchRun,
    SearchSpace,
    SplitData,
    SplitScorer,
    genome_of_plan,
)
from lit_moe.search.options import Rates
from lit_moe.search.samples import SampleSizes, splits_of
from lit_moe.search.skipping import skipping, skipping_thresholds
from lit_moe.search.space import problem_of
from lit_moe.selection import Budget, select
from lit_moe.stats import observe
from tests.benchmarks.timing import markdown

RESULTS = Path(__file__).parent / "results"
SIZES = SampleSizes(search=120, dev=120, test=240, batch_size=120)
EFFORTS = {
    "half": Effort(initial=30, discrete=120, total=300, children=2, rerank=20),
    "k1": Effort(initial=1, discrete=0, total=120, children=2, rerank=20),
}
SPACES = {
    "half, one group per layer": ("half", SearchSpace(keep_ratio=0.5, groups="per_layer")),
    "half, one group for all": ("half", SearchSpace(keep_ratio=0.5, groups=1)),
    "k 2 -> 1": ("k1", SearchSpace(keep_ratio=1.0, top_k=1, groups="per_layer")),
}
SEEDS = (11450, 11451, 11452)
CRITERIA = ("frequency", "soft_count", "reap", "naee")
COLUMNS = ("search", "dev", "test", "exact", "chosen", "malformed")

WIDER = ("soft_count", "naee")
"""Criteria that are also calibrated on all questions that search and dev come from."""
CAPTION = (
    "The task of `configs/mc_suite/instruction_model.yaml`, percent, standard deviation over "
    "seeds; standard error over questions 2 to 4. 120 search, 120 dev, 240 test questions; 120 "
    "discrete of 300 candidates, 120 for k 2 -> 1; released rates, re-ranked on dev. Criteria were "
    "calibrated on the same 120 questions, where the row says so on all 240 of the split."
)

Cell = dict[str, float]


class Bench:
    """The model, its questions, and what is measured on them."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.data = TaskDataModule(
            task="domains",
            shots=[0],
            evaluated_shots=[0],
            tokenizer=model,
            sequence_length=384,
            batch_size=32,
        )
        self.splits: dict[str, SplitData] = splits_of(self.data, SIZES)
        self.sites = find_sites(self.model)
        self.plain = self.live(SPACES["half, one group per layer"][1])

    def live(self, space: SearchSpace) -> LiveModel:
        return LiveModel(self.model, problem_of(self.model, space).groups)

    def cell(self, genome: Genome | None = None, *, live: LiveModel | None = None) -> Cell:
        """Return all measures of a candidate, or of the model as it is."""
        live = live or self.plain
        found = {}
        for split in self.splits:
            scorer = self._scorer(live, split, AnswerTokens())
            found[split] = scorer.points(genome).fitness
        found["chosen"] = self._scorer(live, "test", ChoiceAccuracy()).points(genome).fitness
        with nullcontext() if genome is None else live.applied(genome):
            return found | self._written()

    def keep_plan_genome(self, name: str, seed: int = 0, *, wider: bool = False) -> Genome:
        """Return what a criterion keeps of half the experts of each layer."""
        criterion = get_criterion(name)
        keep = {site.name: site.num_experts // 2 for site in self.sites}
        batches = self._calibration(wider=wider)
        needs = criterion.needs
        evidence = Evidence(
            observation=observe(self.model, batches) if "routing" in needs else None,
            model=self.model,
            sites=self.sites,
            batches=batches,
            keep=keep,
            seed=seed,
        )
        scores = score_evidence(criterion, evidence)
        plan = select(scores, budget=Budget(keep_ratio=0.5), sites=self.sites)
        groups = self.plain.groups
        return genome_of_plan(plan, groups, tuple(keep[g.layers[0]] for g in groups))

    def skipping(self) -> Cell:
        """Return the measures under NAEE's dynamic skipping."""
        with skipping(self.model, skipping_thresholds(self.model, self._calibration())) as seen:
            cell = self.cell()
        return cell | {"experts": seen.active_experts}

    def searched(self, name: str, seed: int, history: Path) -> dict[str, Cell]:
        """Return the measures of what a search finds, after each phase."""
        kind, space = SPACES[name]
        effort = Effort(**{**vars(EFFORTS[kind]), "seed": seed})
        live = self.live(space)
        scorers = {s: self._scorer(live, s, AnswerTokens(), prefix=1 << 29) for s in self.splits}
        problem = problem_of(self.model, space)
        run = SearchRun(
            Evolution(problem, Rates(), effort),
            ModelEvaluator(scorers, live, top_k=space.top_k),
            History.open(history, f"{name} {seed} {effort}"),
        )
        outcome = run.run()
        found = {"merged": outcome.best}
        if outcome.pruned is not None and not problem.drops_nothing:
            found["pruned"] = outcome.pruned
        with live.active(space.top_k):
            cells = {stage: self.cell(one.genome, live=live) for stage, one in found.items()}
            if space.top_k is not None:
                cells["untouched"] = self.cell(live=live)
        return {stage: cell | {"seconds": run.seconds} for stage, cell in cells.items()}

    def _scorer(self, live: LiveModel, split: str, fitness: Any, prefix: int = 0) -> SplitScorer:
        measures = Measures(fitness, NegativeLoss(), SIZES.batch_size, prefix)
        return SplitScorer(live, self.splits[split], measures, self.data.tokenizer)

    def _calibration(self, *, wider: bool = False) -> list[dict[str, torch.Tensor]]:
        names = ("input_ids", "attention_mask")
        rows: Sequence[Any] = self.splits["search"].rows
        if wider:
            blocks = self.data.blocks("calibration")
            rows = [blocks[i] for i in range(len(blocks))]
        return [
            {n: torch.stack([row[n] for row in rows[i : i + 32]]) for n in names}
            for i in range(0, len(rows), 32)
        ]

    def _written(self) -> Cell:
        """Return exact match of what is written, and how much of it is no choice at all."""
        split = self.splits["test"]
        assert split.prompting is not None
        prompts = [split.prompting.prompt(item) for item in split.items]
        texts = generate_answers(self.model, self.data.tokenizer, prompts, split.generation)
        pairs = list(zip(texts, split.items, strict=True))
        exact = [squad_exact_match(text, item.answers) for text, item in pairs]
        odd = [
            squad_normalised(text) not in {squad_normalised(choice) for choice in item.choices}
            for text, item in pairs
        ]
        return {"exact": 100 * statistics.mean(exact), "malformed": 100 * statistics.mean(odd)}


def cells_of(bench: Bench, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield name -> measures after each cell, from the folder where they are there already."""
    found = {}
    for name, do in _work(bench, folder).items():
        store = folder / f"{_file_name(name)}.json"
        if not store.exists():
            store.write_text(json.dumps(do()))
        found[name] = json.loads(store.read_text())
        print(name, found[name], flush=True)
        yield found


def _work(bench: Bench, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return name -> what measures it, the most telling first."""

    def kept(criterion: str, seed: int = 0, *, wider: bool = False) -> Callable[[], Cell]:
        return lambda: bench.cell(bench.keep_plan_genome(criterion, seed, wider=wider))

    def searches(name: str) -> dict[str, Callable[[], Any]]:
        labels = {f"{name} {seed}": seed for seed in SEEDS}
        return {
            label: partial(bench.searched, name, seed, folder / f"{_file_name(label)}.jsonl")
            for label, seed in labels.items()
        }

    first, last, fewer = SPACES
    return {
        "whole": bench.cell,
        **{name: kept(name) for name in CRITERIA[:-1]},
        **{f"random {seed}": kept("random", seed) for seed in range(5)},
        "dynamic skipping": bench.skipping,
        **searches(first),
        "naee": kept("naee"),
        **searches(fewer),
        **searches(last),
        **{f"{name}, 240 questions": kept(name, wider=True) for name in WIDER},
    }


def _file_name(name: str) -> str:
    return name.replace(" ", "_").replace(">", "")


def rows_of(cells: dict[str, Any]) -> list[list[object]]:
    """Return a row per method, means with the standard deviation over seeds."""
    rows = [_row(name, [cells[name]]) for name in ("whole", *CRITERIA) if name in cells]
    drawn = [cell for name, cell in cells.items() if name.startswith("random")]
    rows += [_row(f"random, {len(drawn)} seeds", drawn)] if drawn else []
    for name in SPACES:
        runs = [cells[f"{name} {seed}"] for seed in SEEDS if f"{name} {seed}" in cells]
        stages = [s for s in ("untouched", "pruned", "merged") if runs and s in runs[0]]
        rows += [_row(f"{name}, {len(runs)} seeds: {s}", [run[s] for run in runs]) for s in stages]
    skipped = cells.get("dynamic skipping")
    rows += [_row("k 2: dynamic skipping", [skipped])] if skipped else []
    labels = [f"{name}, 240 questions" for name in WIDER]
    return rows + [_row(label, [cells[label]]) for label in labels if label in cells]


def _row(name: str, cells: Sequence[Cell]) -> list[object]:
    return [name, *(_mean([cell[column] for cell in cells]) for column in COLUMNS)]


def _mean(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    header = ["", "search", "dev", "test", "written, test", "chosen, test", "malformed, test"]
    for cells in cells_of(Bench(model), folder):
        text = f"{CAPTION}\n\n{markdown(header, rows_of(cells))}\n"
        (RESULTS / "eep_seeds.md").write_text(text)


if __name__ == "__main__":
    main()
