"""What a search works with, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moe.adapters import find_sites
from lit_moe.callbacks.base import ExpertPruning
from lit_moe.callbacks.report import report_writer
from lit_moe.criteria import get_criterion
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.masking import masked
from lit_moe.module import MoEModule
from lit_moe.plan import KeepPlan
from lit_moe.plans import load_plan
from lit_moe.search.genome import Genome
from lit_moe.search.live import LiveModel
from lit_moe.search.problem import Problem
from lit_moe.search.report import SearchReport, SplitPoints
from lit_moe.search.scoring import Measures, SplitScorer
from lit_moe.search.skipping import check_skippable, skipping, skipping_thresholds
from lit_moe.search.splits import SplitData
from lit_moe.selection import Budget, layer_counts, select

DYNAMIC_SKIPPING = "dynamic_skipping"


@dataclass(frozen=True)
class Search:
    """One search on one model.

    Attributes:
        problem: as numbers.
        live: the model.
        splits: split -> samples.
        measures: what is measured on them.
        scorers: split -> what does it, with hidden states kept.
        plans: warm start -> what that file or criterion keeps.
        tokenizer: of the model.
        merges: whether there is a continuous phase.
    """

    problem: Problem
    live: LiveModel
    splits: Mapping[str, SplitData]
    measures: Measures
    scorers: Mapping[str, SplitScorer]
    plans: Mapping[str, KeepPlan]
    tokenizer: PreTrainedTokenizerBase | None
    merges: bool

    def points(self, genome: Genome | None) -> dict[str, SplitPoints]:
        """Return split -> points of a candidate; None for the model as it is."""
        return {name: scorer.points(genome) for name, scorer in self.scorers.items()}

    def fresh_scorer(self, split: str, live: LiveModel | None = None) -> SplitScorer:
        """Return a scorer that runs every layer: for a model that is changed by other means."""
        measures = replace(self.measures, prefix_bytes=0)
        return SplitScorer(live or self.live, self.splits[split], measures, self.tokenizer)


def measure_baselines(
    trainer: Trainer,
    module: MoEModule,
    search: Search,
    names: Sequence[str],
    report: SearchReport,
) -> None:
    """Measure other ways to the same size, each as it chooses layer by layer. Collective."""
    model, top_k = module.built_model, report.top_k
    for name in names:
        found = {}
        thresholds = {}
        if name == DYNAMIC_SKIPPING:
            thresholds = skipping_thresholds(model, _all_calibration(trainer))
        else:
            plan = search.plans.get(name) or plan_of(name, trainer, module, search.problem)
        for split in search.splits:
            scorer = search.fresh_scorer(split)
            scorer.learn_whole()
            if name == DYNAMIC_SKIPPING:
                with skipping(model, thresholds) as seen:
                    found[split] = scorer.points()
                report.active_experts = seen.active_experts
            else:
                with masked(model, plan), search.live.active(top_k):
                    found[split] = scorer.points()
        report.baselines[name] = found


def check_baselines(model: PreTrainedModel, names: Sequence[str], problem: Problem) -> None:
    """Refuse baselines that could not be measured after the search.

    Raises:
        LitMoEError: for an unknown criterion, a file that is missing, or one with nothing to do.
    """
    for name in names:
        if name == DYNAMIC_SKIPPING:
            check_skippable(model)
        elif _is_file(name):
            load_plan(name)
        elif problem.drops_nothing:
            raise _nothing_to_choose(name)
        else:
            get_criterion(name)


def plan_of(name: str, trainer: Trainer, module: MoEModule, problem: Problem) -> KeepPlan:
    """Return the plan in a file, or what a criterion keeps of so many experts. Collective.

    Raises:
        LitMoEError: if there is nothing to choose, or layers keep different numbers.
    """
    if _is_file(name):
        plan = load_plan(name)
        if not isinstance(plan, KeepPlan):
            raise PlanError(f"{name} merges experts; only keep plans can be started from")
        return plan
    if problem.drops_nothing:
        raise _nothing_to_choose(name)
    if len(set(problem.counts)) > 1:
        raise LitMoEError(
            f"{name!r} keeps equally many experts in all layers, the search {problem.counts}; "
            "give a plan file"
        )
    return _chosen_by(name, Budget(keep_experts=problem.counts[0]), trainer, module)


def _chosen_by(criterion: str, budget: Budget, trainer: Trainer, module: MoEModule) -> KeepPlan:
    """Return what a criterion keeps. Collective."""
    pruning = ExpertPruning(criterion, None, budget, "drop", None)
    sites, writer = find_sites(module.built_model), report_writer(trainer)
    budget = pruning.checked_budget(trainer, module, sites)
    evidence = pruning.gather(trainer, module, sites, keep=layer_counts(budget, sites))
    scores = pruning.rate(trainer, evidence)
    writer.scores, writer.loads = {}, {}  # not what this run goes by
    protect = pruning.protection(trainer, evidence, budget)
    return pruning.agree(trainer, select(scores, budget=budget, sites=sites, protect=protect))


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".json", ".safetensors")


def _nothing_to_choose(name: str) -> LitMoEError:
    return LitMoEError(
        f"all experts stay, so there is nothing that {name!r} could choose; leave it out of "
        "warm_start and baselines"
    )


def _all_calibration(trainer: Trainer) -> Any:
    """Return all calibration batches, on every rank: thresholds must be the same everywhere."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return data.calibration_dataloader(rank=0, world_size=1)
