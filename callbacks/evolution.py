"""Evolutionary search for experts to keep and to merge, before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import Progress as ProgressBar
from transformers import PreTrainedModel

from lit_moe.callbacks.base import ExpertPruning, source_of
from lit_moe.callbacks.calibration import calibration_share
from lit_moe.callbacks.evolution_loop import Loop, ValidationLoops, is_in_validation
from lit_moe.callbacks.evolution_parts import (
    Search,
    check_baselines,
    measure_baselines,
    plan_of,
)
from lit_moe.callbacks.evolution_record import finish_report, open_history
from lit_moe.callbacks.evolution_view import LiveView
from lit_moe.callbacks.merge import ExpertMerging
from lit_moe.callbacks.report import report_writer
from lit_moe.callbacks.rewrapping import unwrap, wrap_again
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import apply_plan
from lit_moe.module import MoEModule
from lit_moe.plan import KeepPlan
from lit_moe.plans import Plan, plan_from_dict
from lit_moe.projection import project_routers
from lit_moe.search.evolution import Evolution
from lit_moe.search.fitness import Fitness, NegativeLoss, RowFitness
from lit_moe.search.history import History
from lit_moe.search.journal import Journal, remove_journals
from lit_moe.search.live import LiveModel
from lit_moe.search.options import Effort, Racing, Rates, SearchSpace
from lit_moe.search.problem import Problem
from lit_moe.search.report import SearchReport
from lit_moe.search.run import Outcome, SearchRun
from lit_moe.search.samples import SampleSizes, splits_of
from lit_moe.search.scoring import Measures, SplitScorer
from lit_moe.search.sharing import ModelEvaluator
from lit_moe.search.space import problem_of
from lit_moe.selection.budget import parse_bytes
from lit_moe.sharding.partitions import is_partitioned

HISTORY_NAME, PLAN_NAME = "search.jsonl", "plan.json"


class EvolutionarySearch(Callback):
    """Searches for which experts stay and how they are merged, without gradients, before training.

    EEP (arXiv 2407.00945): candidates are masks and maps on the live model, evaluated by forward
    passes alone, one generation after the other. The best is applied; training, if there is any,
    begins with it. Several ranks share the candidates of a generation and make the same history as
    one.

    A generation is a validation loop of the trainer: its candidates are evaluated when the loop
    begins, and the loop validates the best so far, which loggers get as ``search/validation/loss``.
    The strategy has wrapped the whole model by then and wraps what is left again. ``loop:
    fit_start`` searches before anything wraps the model instead, for the same plan: memory then
    never holds an optimizer of the whole model, and ZeRO stage 3 can take part.

    A run that was killed goes on where its history ends when it is started again: give it the same
    ``trainer.default_root_dir``.

    Args:
        space: what is searched for.
        fitness: what a candidate is worth on the samples.
        finer: decides between equally fit candidates; None for the negative loss.
        effort: how many candidates.
        rates: chances of variation.
        racing: stop the worse half of each generation early; None for never.
        samples: of each split.
        warm_start: plan files, or names of criteria whose choice the search begins with.
        baselines: names of criteria, or ``dynamic_skipping``, measured on the same samples.
        project: turn routers that mix probabilities into plain ones afterwards.
        memory: bytes beside the model: half for hidden states of the search split, a quarter for
            those of the dev split, a quarter for merged experts.
        history: file; None for ``search.jsonl`` in ``trainer.default_root_dir``.
        loop: ``validation``, ``fit_start``, or ``auto``: validation loops wherever they are
            possible (``limit_val_batches`` above 0, one device, DDP or ZeRO stage 1 or 2, no Refit
            or WeightPruning beside it).
    """

    def __init__(
        self,
        space: SearchSpace,
        fitness: Fitness | None = None,
        finer: RowFitness | None = None,
        effort: Effort | None = None,
        rates: Rates | None = None,
        racing: Racing | None = None,
        samples: SampleSizes | None = None,
        warm_start: list[str] | None = None,
        baselines: list[str] | None = None,
        project: bool = False,
        memory: str = "512MiB",
        history: str | None = None,
        loop: Loop = "auto",
    ) -> None:
        self.space = space
        self.fitness = fitness or NegativeLoss()
        self.finer = finer or NegativeLoss()
        self.effort, self.rates, self.racing = effort or Effort(), rates or Rates(), racing
        self.samples = samples or SampleSizes()
        self.warm_start, self.baselines = warm_start or [], baselines or []
        self.project = project
        self.memory = parse_bytes(memory)
        self.history = history
        self.loop = loop
        self._waiting: Search | None = None
        self._loops: ValidationLoops | None = None

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Refuses a second plan."""
        self._waiting = self._loops = None
        report_writer(trainer)
        kinds = (ExpertPruning, ExpertMerging, EvolutionarySearch)
        others = [c for c in trainer.callbacks if isinstance(c, kinds) and c is not self]  # type: ignore[attr-defined]
        if stage == "fit" and others:
            raise LitMoEError(
                f"EvolutionarySearch and {type(others[0]).__name__} are both given, but a run "
                "keeps one plan: use the other's plan file as warm_start, or take one of the two"
            )

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built and nothing wraps it yet. Checks, and searches at fit start.

        Only in a fit. Collective: every rank must call it.

        Raises:
            LitMoEError: for a space that the model cannot serve, empty or overlapping splits, or a
                history of another search, before anything is evaluated.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        in_validation = is_in_validation(self.loop, trainer)
        writer = report_writer(trainer)
        writer.on_model_built(trainer, module)
        if module.is_resumed:
            self._resume(trainer, module, module.checkpoint_plan())
            return
        module.to(trainer.strategy.root_device)
        search = self._prepared(trainer, module)
        if "before" not in writer.report.quality:
            writer.measure(trainer, module, "before")
        if in_validation:
            self._waiting = search
        else:
            self._search(trainer, module, search)

    def on_fit_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When the strategy has wrapped the model. Searches in validation loops, wraps anew."""
        search, self._waiting = self._waiting, None
        if search is not None:
            self._search(trainer, pl_module, search, in_validation=True)

    def on_validation_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When a validation begins. During the search evaluates a generation. Collective."""
        if self._loops is not None:
            self._loops.begin()

    def on_validation_end(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When a validation ends. During the search shows all experts again."""
        if self._loops is not None:
            self._loops.end()

    def _search(
        self, trainer: Trainer, module: MoEModule, search: Search, *, in_validation: bool = False
    ) -> None:
        """Search, and apply the best. Collective."""
        writer = report_writer(trainer)
        with writer.phase("search"):
            outcome, report = self._searched(trainer, module, search, in_validation=in_validation)
        writer.report.search = report
        search.live.cache.clear()
        best = search.live.final_plan(outcome.best.genome, top_k=self.space.top_k)
        best = self._projected(trainer, module.built_model, best, report)
        if in_validation:
            unwrap(trainer)
        self._apply(trainer, module, best)
        if in_validation:
            wrap_again(trainer)
        self._measure_applied(module, search, report)
        writer.write()
        writer.measure(trainer, module, "pruned" if isinstance(best, KeepPlan) else "merged")

    def _resume(self, trainer: Trainer, module: MoEModule, plan: Plan | None) -> None:
        """Give the model the shapes of the checkpoint, whose weights are loaded later."""
        if plan is None:
            raise PlanError(
                f"checkpoint {module.resume_from} is of a run that searched for nothing, and its "
                "weights would be loaded after the search: export that run's model, and begin a "
                "new run with it"
            )
        asked = problem_of(module.built_model, self.space)
        total = sum(plan.counts.values())
        if asked.total(asked.counts) != total:
            raise PlanError(
                f"checkpoint {module.resume_from} has {total} routed experts, this run searches "
                f"for {asked.total(asked.counts)}: resume with the space of that run, or begin a "
                "new one in another trainer.default_root_dir"
            )
        self._cut(trainer, module, plan)

    def _prepared(self, trainer: Trainer, module: MoEModule) -> Search:
        """Return everything that is evaluated on, refused early if it does not fit."""
        model = module.built_model
        if is_partitioned(model):
            raise LitMoEError(
                "EvolutionarySearch needs the whole model on each rank, but the strategy loads it "
                "in shares: set shard_on_load: false in trainer.strategy.init_args"
            )
        problem = problem_of(model, self.space)  # refused before any text is read
        check_baselines(model, self.baselines, problem)
        splits = splits_of(getattr(trainer, "datamodule", None), self.samples)
        plans = {
            name: plan_of(name, trainer, module, problem) for name in dict.fromkeys(self.warm_start)
        }
        problem = problem_of(model, self.space, [plans[name] for name in self.warm_start])
        live = LiveModel(
            model,
            problem.groups,
            router_space=self.space.router_space,
            cache_bytes=self.memory // 4,
            merges=self._merges(problem),
        )
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        measures = Measures(self.fitness, self.finer, self.samples.batch_size)
        shares = {"search": self.memory // 2, "dev": self.memory // 4, "test": 0}
        scorers = {
            name: SplitScorer(live, data, replace(measures, prefix_bytes=shares[name]), tokenizer)
            for name, data in splits.items()
        }
        merges = self._merges(problem)
        return Search(problem, live, splits, measures, scorers, plans, tokenizer, merges)

    def _merges(self, problem: Problem) -> bool:
        """Whether there is a continuous phase."""
        return self.effort.total > self.effort.discrete or problem.drops_nothing

    def _searched(
        self, trainer: Trainer, module: MoEModule, search: Search, *, in_validation: bool
    ) -> tuple[Outcome, SearchReport]:
        if self.effort.bound and self.racing is None:
            with search.live.active(self.space.top_k):
                search.scorers["search"].ask_hardest_first(search.problem.probes())
        for scorer in search.scorers.values():
            scorer.learn_whole()
        report = self._begun_report(search)
        history, path = self._history(trainer, module, search)
        journal = Journal.open(path, history.fingerprint)
        top_k = self.space.top_k
        evaluator = ModelEvaluator(search.scorers, search.live, top_k=top_k, journal=journal)
        evolution = Evolution(search.problem, self.rates, self.effort)
        hidden = in_validation or not trainer.is_global_zero  # the trainer has a bar of its own
        with ProgressBar(disable=hidden, transient=True) as bar:
            view = LiveView(trainer, bar, evolution.effort.total)
            run = SearchRun(evolution, evaluator, history, racing=self.racing, watch=view.show)
            if in_validation:
                self._in_loops(trainer, search, view, run)
            outcome = run.run()
        if trainer.is_global_zero:
            remove_journals(path)
        finish_report(report, search, outcome, top_k=top_k)
        report.on_record, report.history = history.num_on_record, str(path)
        report.seconds = run.seconds
        measure_baselines(trainer, module, search, self.baselines, report)
        return outcome, report

    def _begun_report(self, search: Search) -> SearchReport:
        """Return what can be told before the search; measures the whole model."""
        report = SearchReport(
            self.fitness.name,
            self.finer.name,
            groups={group.name: list(group.layers) for group in search.problem.groups},
            router_space=self.space.router_space,
            top_k=self.space.top_k,
            samples={name: scorer.num_samples for name, scorer in search.scorers.items()},
        )
        report.stages["before"] = search.points(None)
        return report

    def _history(self, trainer: Trainer, module: MoEModule, search: Search) -> tuple[History, Path]:
        """Return what is on record, and its file. Collective."""
        path = Path(self.history or Path(trainer.default_root_dir) / HISTORY_NAME)
        names = ("space", "effort", "rates", "racing", "samples", "warm_start")
        options = {name: str(getattr(self, name)) for name in names}
        measures = {"fitness": self.fitness.name, "finer": self.finer.name}
        return open_history(trainer, module, search, path, {**options, **measures}), path

    def _in_loops(self, trainer: Trainer, search: Search, view: LiveView, run: SearchRun) -> None:
        """Evaluate all generations, each in a validation loop. Collective."""
        self._loops = ValidationLoops(trainer, search.live, self.space.top_k, view)
        try:
            self._loops.run(run)
        finally:
            self._loops = None

    def _projected(
        self, trainer: Trainer, model: PreTrainedModel, plan: Plan, report: SearchReport
    ) -> Plan:
        if not self.project or not isinstance(plan, MergePlan) or plan.router_space == "rows":
            return plan
        projected, losses = project_routers(model, plan, calibration_share(trainer))
        report.projection = {name: loss.other_choices for name, loss in losses.items()}
        return projected

    def _apply(self, trainer: Trainer, module: MoEModule, plan: Plan) -> None:
        writer = report_writer(trainer)
        plan = plan.made_for(family=plan.family, source=source_of(module))
        plan = plan_from_dict(trainer.strategy.broadcast(plan.to_dict()))
        with writer.phase("apply"):
            self._cut(trainer, module, plan)
        if trainer.is_global_zero:
            writer.folder.mkdir(parents=True, exist_ok=True)
            plan.save(writer.folder / PLAN_NAME)

    def _cut(self, trainer: Trainer, module: MoEModule, plan: Plan) -> None:
        """Give the model the shapes of a plan, and tell the report."""
        writer = report_writer(trainer)
        apply_plan(module.built_model, plan)
        module.plan = plan
        if isinstance(plan, KeepPlan):
            writer.report.record_plan(plan)
            writer.report.criterion = f"evolutionary search, {self.fitness.name}"
        writer.count(module, "after")

    def _measure_applied(self, module: MoEModule, search: Search, report: SearchReport) -> None:
        """Measure the model that the run goes on with, unless it is to agree with the whole one."""
        rows = (self.fitness, self.finer)
        if any(isinstance(m, RowFitness) and m.needs_whole for m in rows):
            return
        live = LiveModel(module.built_model, (), merges=False)
        report.stages["applied"] = {
            name: search.fresh_scorer(name, live).points() for name in search.splits
        }
