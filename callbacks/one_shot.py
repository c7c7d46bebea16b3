"""One-shot expert pruning at fit start: observe, score, select, shrink."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_moe.adapters import count_experts, find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.callbacks.calibration import calibration_share
from lit_moe.callbacks.report import ReportWriter, report_writer
from lit_moe.criteria import UnroutedRule, apply_unrouted, get_criterion, score
from lit_moe.errors import LitMoEError
from lit_moe.module import MoEModule
from lit_moe.plan import KeepPlan
from lit_moe.selection import (
    Budget,
    as_patterns,
    check_budget,
    find_super_experts,
    layer_counts,
    measure_bytes,
    parse_protection,
    select,
)
from lit_moe.stats import Observation, observe
from lit_moe.surgery import shrink

SUPER_EXPERTS = "super-experts"


class OneShotPruning(Callback):
    """Drops experts once, right after the model is built and before any strategy wraps it.

    The same plan comes out on one process and on many: each rank observes its share of the
    calibration data, sums are reduced, rank 0 decides, the decision is broadcast. A resumed run
    takes the plan of its checkpoint and does not calibrate again.

    Args:
        criterion: short name (``reap``, ``frequency``, ``random``, ...) or class path.
        criterion_options: fields of the criterion.
        keep_ratio: fraction of experts that stay, in (0, 1); short for a budget with only that.
        budget: any other amount (``keep_experts``, ``max_bytes``) or a global ranking.
        unrouted: what becomes of experts that saw no calibration token.
        protect: layers (``model.layers.0.*``) and experts (``model.layers.3.mlp:1,5``) that stay;
            ``super-experts`` protects those with extreme activations.
        plan: a plan file to replay; then nothing is observed, and criterion and budget do not
            count. It must be of the model's family; that it was made for another checkpoint of
            this family is noted in the report.
    """

    def __init__(
        self,
        criterion: str = "reap",
        criterion_options: dict[str, Any] | None = None,
        keep_ratio: float | None = None,
        budget: Budget | None = None,
        unrouted: UnroutedRule = "drop",
        protect: list[str] | None = None,
        plan: str | None = None,
    ) -> None:
        self.criterion = get_criterion(criterion, **(criterion_options or {}))
        self.unrouted = unrouted
        self.protect = [p for p in protect or [] if p != SUPER_EXPERTS]
        self.protect_super_experts = SUPER_EXPERTS in (protect or [])
        self.plan_file = None if plan is None else KeepPlan.load(plan)
        self.budget = _one_budget(keep_ratio, budget, replays=plan is not None)

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Makes sure that the run keeps a report."""
        report_writer(trainer)

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built and nothing wraps it yet. Decides on a plan and applies it.

        Only in a fit: validate, test and predict take the plan of the checkpoint that they load.
        Collective: every rank must call it.

        Raises:
            LitMoEError: for a budget that the model's routers cannot meet, or a plan of another
                model, before any text is read.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        writer = report_writer(trainer)
        writer.on_model_built(trainer, module)
        model = module.built_model
        module.to(trainer.strategy.root_device)
        plan = module.checkpoint_plan() or self.plan_file
        if plan is None:
            sites = find_sites(model)
            budget = self._complete_budget(module, sites)
            check_budget(budget, sites, self.protect)
            if self.criterion.needs & {"routing", "forward"}:
                calibration_share(trainer)  # a missing file should not show after an evaluation
            writer.measure(trainer, module, "before")
            plan = self._decide(trainer, module, sites, budget)
        elif not module.is_resumed:
            plan.check_fits(count_experts(find_sites(model)), family=model.config.model_type)
            _warn_of_another_source(plan, module, writer)
            writer.measure(trainer, module, "before")
        with writer.phase("shrink"):
            module.plan = KeepPlan.from_dict(trainer.strategy.broadcast(plan.to_dict()))
            shrink(model, module.plan)
        self._record(trainer, module, writer)
        if not module.is_resumed:
            writer.measure(trainer, module, "pruned")

    def _decide(
        self, trainer: Trainer, module: MoEModule, sites: tuple[MoESite, ...], budget: Budget
    ) -> KeepPlan:
        writer = report_writer(trainer)
        model = module.built_model
        observation = self._observe(trainer, module, writer)
        protect = list(self.protect)
        if self.protect_super_experts and observation is not None:
            protect += as_patterns(find_super_experts(observation))
            check_budget(budget, sites, protect)
        protected = parse_protection(protect, sites)
        writer.report.protected = {k: sorted(ids) for k, ids in protected.items() if ids}
        if hasattr(self.criterion, "progress"):
            self.criterion.progress = trainer.is_global_zero
        with writer.phase("score"):
            scores = score(
                model if observation is None else observation,
                self.criterion,
                model=model,
                batches=self._batches(trainer),
                keep=_counts_to_keep(budget, sites, protect),
                seed=writer.report.seed or 0,
            )
        writer.scores = dict(scores)
        if observation is not None and "routing" in self.criterion.needs:
            scores = apply_unrouted(scores, observation, self.unrouted)
        plan = select(scores, budget=budget, sites=sites, protect=protect)
        if budget.keep_ratio is not None and abs(plan.keep_ratio - budget.keep_ratio) > 1e-9:
            writer.report.warnings.append(
                f"keep_ratio={budget.keep_ratio:g} was asked; counts that the routers allow and "
                f"protected experts make it {plan.keep_ratio:.4g}"
            )
        return plan.made_for(family=model.config.model_type, source=_source(module))

    def _observe(
        self, trainer: Trainer, module: MoEModule, writer: ReportWriter
    ) -> Observation | None:
        if "routing" not in self.criterion.needs and not self.protect_super_experts:
            return None
        loader = calibration_share(trainer)
        with writer.phase("observe"):
            observation = observe(module.built_model, loader, progress=trainer.is_global_zero)
        writer.report.calibration.tokens = observation.tokens
        writer.report.unrouted = {k: list(v) for k, v in observation.unrouted.items()}
        if observation.unrouted:
            num = sum(map(len, observation.unrouted.values()))
            writer.report.warnings.append(
                f"{num} experts saw none of the {observation.tokens} calibration tokens; "
                f"unrouted={self.unrouted!r} decided about them"
            )
        writer.loads = {k: s.count for k, s in observation.layers.items()}
        return observation

    def _batches(self, trainer: Trainer) -> Iterable[dict[str, Tensor]] | None:
        """Return this rank's calibration batches for criteria that run the model."""
        if "forward" not in self.criterion.needs:
            return None
        device = trainer.strategy.root_device
        batches = [
            {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}
            for batch in calibration_share(trainer)
        ]
        tokens = torch.stack([batch["attention_mask"].sum() for batch in batches]).sum()
        total = trainer.strategy.reduce(tokens, reduce_op="sum")
        report_writer(trainer).report.calibration.tokens = int(total)
        return batches

    def _complete_budget(self, module: MoEModule, sites: tuple[MoESite, ...]) -> Budget:
        assert self.budget is not None
        if self.budget.max_bytes is None:
            return self.budget
        fields = {**vars(self.budget), "sizes": measure_bytes(module.built_model, sites)}
        return Budget(**fields)

    def _record(self, trainer: Trainer, module: MoEModule, writer: ReportWriter) -> None:
        assert module.plan is not None
        writer.report.record_plan(module.plan)
        writer.report.criterion = self.criterion.name if self.plan_file is None else "replayed plan"
        writer.count(module, "after")
        writer.write()
        if trainer.is_global_zero:
            writer.folder.mkdir(parents=True, exist_ok=True)
            module.plan.save(writer.folder / "plan.json")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _source(module: MoEModule) -> str | None:
    """Return where the weights came from; None where they began at random."""
    return None if module.architecture is not None else module.model_name_or_path


def _warn_of_another_source(plan: KeepPlan, module: MoEModule, writer: ReportWriter) -> None:
    """Note that a plan was made for another checkpoint, which siblings may well share."""
    source = _source(module)
    if plan.source and source and Path(plan.source).resolve() != Path(source).resolve():
        writer.report.warnings.append(
            f"the plan was made for {plan.source}, this model is {source}; a plan serves a "
            "fine-tuned sibling, but experts of an unrelated model do other things"
        )


def _one_budget(keep_ratio: float | None, budget: Budget | None, *, replays: bool) -> Budget | None:
    if replays:
        return None  # the plan says it all
    if budget is not None and keep_ratio is not None:
        raise LitMoEError(
            f"keep_ratio={keep_ratio:g} and a budget are both given; keep the budget by "
            "`keep_ratio: null`, or leave the budget out"
        )
    return budget if budget is not None else Budget(keep_ratio=keep_ratio)


def _counts_to_keep(
    budget: Budget, sites: tuple[MoESite, ...], protect: list[str]
) -> dict[str, int] | None:
    """Return the experts that will stay per layer; unknown beforehand for a global ranking."""
    return None if budget.scope == "global" else dict(layer_counts(budget, sites, protect))
