"""One-shot expert pruning at fit start: observe, score, select, shrink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer

from lit_moe.adapters import count_experts, find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.callbacks.base import ExpertPruning, one_budget, source_of
from lit_moe.callbacks.report import ReportWriter, report_writer
from lit_moe.criteria import UnroutedRule
from lit_moe.errors import PlanError
from lit_moe.module import MoEModule
from lit_moe.plan import KeepPlan
from lit_moe.plans import only_drops
from lit_moe.selection import Budget, layer_counts, select

_RESUMING = "going on with a run that dropped experts"


class OneShotPruning(ExpertPruning):
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
        self.plan_file = None if plan is None else KeepPlan.load(plan)
        amount = None if plan is not None else one_budget(keep_ratio, budget)  # the plan says it
        super().__init__(criterion, criterion_options, amount, unrouted, protect)

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built and nothing wraps it yet. Decides on a plan and applies it.

        Only in a fit: validate, test and predict take the plan of the checkpoint that they load.
        Collective: every rank must call it.

        Raises:
            LitMoEError: for a budget that the model's routers cannot meet, or a plan of another
                model, before any text is read.
        """
        writer = self.begin(trainer, module)
        if writer is None:
            return
        model = module.built_model
        plan = only_drops(module.checkpoint_plan(), purpose=_RESUMING) or self.plan_file
        if plan is None:
            sites = find_sites(model)
            budget = self.checked_budget(trainer, module, sites)
            writer.measure(trainer, module, "before")
            plan = self._decide(trainer, module, sites, budget)
        elif not module.is_resumed:
            plan.check_fits(count_experts(find_sites(model)), family=model.config.model_type)
            _warn_of_another_source(plan, module, writer)
            writer.measure(trainer, module, "before")
        else:
            self._check_still_asked(plan, module)
        self.cut(trainer, module, self.agree(trainer, plan))
        self.record(
            trainer, module, self.criterion.name if self.plan_file is None else "replayed plan"
        )
        if not module.is_resumed:
            writer.measure(trainer, module, "pruned")

    @property
    def _is_counted_per_layer(self) -> bool:
        budget = self.budget
        return budget is not None and budget.max_bytes is None and budget.scope == "layer"

    def _check_still_asked(self, plan: KeepPlan, module: MoEModule) -> None:
        """Refuse a checkpoint of a run that was asked for another number of experts.

        Raises:
            PlanError: naming both.
        """
        asked = plan.counts
        if self.plan_file is not None:
            asked = self.plan_file.counts
        elif self.budget is not None and (self.budget.max_bytes, self.budget.scope) == (
            None,
            "layer",
        ):
            sites = find_sites(module.built_model)
            asked = dict(layer_counts(self.budget, sites, self.protect))
        for layer, count in plan.counts.items():
            if asked.get(layer) != count:
                raise PlanError(
                    f"checkpoint {module.resume_from} keeps {count} experts in {layer}, but this "
                    f"run asks for {asked.get(layer)}: resume with the amount of that run, or "
                    "begin a new one in another trainer.default_root_dir"
                )

    def _decide(
        self, trainer: Trainer, module: MoEModule, sites: tuple[MoESite, ...], budget: Budget
    ) -> KeepPlan:
        keep = _counts_to_keep(budget, sites, self.protect)
        evidence = self.gather(trainer, module, sites, keep=keep)
        protect = self.protection(trainer, evidence, budget)
        scores = self.rate(trainer, evidence)
        plan = select(scores, budget=budget, sites=sites, protect=protect)
        if budget.keep_ratio is not None and abs(plan.keep_ratio - budget.keep_ratio) > 1e-9:
            report_writer(trainer).report.warnings.append(
                f"keep_ratio={budget.keep_ratio:g} was asked; counts that the routers allow and "
                f"protected experts make it {plan.keep_ratio:.4g}"
            )
        family = module.built_model.config.model_type
        return plan.made_for(family=family, source=source_of(module))


def _warn_of_another_source(plan: KeepPlan, module: MoEModule, writer: ReportWriter) -> None:
    """Note that a plan was made for another checkpoint, which siblings may well share."""
    source = source_of(module)
    if plan.source and source and Path(plan.source).resolve() != Path(source).resolve():
        writer.report.warnings.append(
            f"the plan was made for {plan.source}, this model is {source}; a plan serves a "
            "fine-tuned sibling, but experts of an unrelated model do other things"
        )


def _counts_to_keep(
    budget: Budget, sites: tuple[MoESite, ...], protect: list[str]
) -> dict[str, int] | None:
    """Return the experts that will stay per layer; unknown beforehand for a global ranking."""
    return None if budget.scope == "global" else dict(layer_counts(budget, sites, protect))
