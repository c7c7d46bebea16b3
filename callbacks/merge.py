"""Merging of similar experts at fit start: compare, group, combine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_moe.adapters import count_experts, find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.callbacks.base import ExpertPruning
from lit_moe.callbacks.calibration import calibration_share
from lit_moe.callbacks.report import ReportWriter, report_writer
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.grouping import (
    Align,
    Coefficients,
    Decision,
    LearnOptions,
    MergeOptions,
    Partition,
    Router,
    SegmentOptions,
    apply,
    decide,
    layer_merge,
    report_of,
)
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.module import MoEModule
from lit_moe.plans import Plan
from lit_moe.report.figures import dendrograms, similarity_heatmaps
from lit_moe.selection import Budget, layer_counts, parse_protection
from lit_moe.sharding.partitions import is_partitioned

PLAN_NAME = "merge_plan.json"
_LOG = logging.getLogger(__name__)


class ExpertMerging(Callback):
    """Merges similar experts once, right after the model is built and before any strategy wraps it.

    The same plan comes out on one process and on many. ``Refit`` behind it re-fits the merged
    experts. A resumed run takes the plan of its checkpoint and compares nothing again.

    Args:
        similarity: what experts are grouped by: ``cka``, ``output_cosine``, ``mean_output``,
            ``ream``, ``coactivation`` from text; ``weights``, ``surrogate``, ``router`` without.
        partition: ``auto``, ``exhaustive``, ``average``, ``spectral`` or ``centroids``.
        coefficients: ``uniform``, ``frequency``, ``reap``, ``max_visited`` or ``learned``.
        keep_ratio: experts that there will be over those that there are, in (0, 1).
        groups: instead: experts that each layer will have.
        router: ``merge`` router rows with the same coefficients, or ``keep`` one of each group.
        align: bring the neurons of a group into one order before they are averaged, by ``weights``
            (or true) or by their ``activations`` on the calibration text.
        segments: DERN instead of averages; then only ``router`` and the amount count.
        protect: layers (``model.layers.0.*``) and experts (``model.layers.3.mlp:1,5``) that stay.
        max_tokens: of the calibration text that the model reads to compare outputs of all experts
            and to learn coefficients.
        effort: calls of experts for that, in multiples of what a plain forward makes; where all
            experts would be more, they see a part of the tokens. null: all.
        memory_gib: for the comparison, and for what coefficients are learned on, beside the model
            and one batch's forward; see :class:`lit_moe.grouping.MergeOptions`.
        learn: options of ``coefficients: learned``.
        plan: a merge plan to replay, with ``align`` by weights; then nothing else counts.
    """

    def __init__(
        self,
        similarity: str = "cka",
        partition: Partition = "auto",
        coefficients: Coefficients = "uniform",
        keep_ratio: float | None = None,
        groups: int | None = None,
        router: Router = "merge",
        align: Align = False,
        segments: SegmentOptions | None = None,
        protect: list[str] | None = None,
        max_tokens: int = 2048,
        effort: float | None = 3.0,
        memory_gib: float = 2.0,
        learn: LearnOptions | None = None,
        plan: str | None = None,
    ) -> None:
        self.plan_file = None if plan is None else _replayable(MergePlan.load(plan), plan)
        self.budget = None if plan is not None else Budget(keep_ratio, groups)
        self.protect = protect or []
        self.options = MergeOptions(
            similarity=similarity,
            partition=partition,
            coefficients=coefficients,
            router=router,
            align=align,
            segments=segments,
            max_tokens=max_tokens,
            effort=effort,
            memory_gib=memory_gib,
            learn=learn,
        )
        if plan is not None and align == "activations":
            raise LitMoEError(
                "a replayed plan reads no text, so that neurons cannot be aligned by activations; "
                "take align: weights"
            )

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Refuses a second plan."""
        report_writer(trainer)
        others = [c for c in trainer.callbacks if isinstance(c, ExpertMerging)]  # type: ignore[attr-defined]
        if stage != "fit":
            return
        if len(others) > 1:
            raise LitMoEError(f"{len(others)} ExpertMerging callbacks are given; keep one")
        droppers = [c for c in trainer.callbacks if isinstance(c, ExpertPruning)]  # type: ignore[attr-defined]
        if droppers:
            raise LitMoEError(
                f"ExpertMerging and {type(droppers[0]).__name__} are both given, but a run keeps "
                "one plan: take one of the two, export, and do the other to that folder"
            )

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built and nothing wraps it yet. Merges experts; only in a fit.

        Collective: every rank must call it.

        Raises:
            LitMoEError: for an amount that the model's routers cannot meet, a recipe that does not
                suit the model, or a plan of another model, before any text is read.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._check(module)
        plan = module.checkpoint_plan()
        if plan is not None:
            self._resume(trainer, module, plan)
            return
        writer, model = report_writer(trainer), module.built_model
        writer.on_model_built(trainer, module)
        module.to(trainer.strategy.root_device)
        sites = find_sites(model)
        counts = self._counts(model.config.model_type, sites)
        rows: list[dict[str, Tensor]] = []
        if self.plan_file is None and self.options.needs_text:
            rows = list(calibration_share(trainer))
        if "before" not in writer.report.quality:
            writer.measure(trainer, module, "before")
        with writer.phase("group"):
            decision = self._decide(trainer, module, sites, counts, rows)
        with writer.phase("merge"):
            moved = apply(model, decision)
        self._record(trainer, module, decision, moved)
        writer.measure(trainer, module, "merged")

    def _resume(self, trainer: Trainer, module: MoEModule, plan: Plan) -> None:
        """Give the model the shapes of the checkpoint, whose weights are loaded later.

        Raises:
            PlanError: if this run asks for other numbers of experts, or the checkpoint's run
                dropped experts.
        """
        model = module.built_model
        asked = self._counts(model.config.model_type, find_sites(model))
        if not isinstance(plan, MergePlan) or plan.counts != asked:
            done = "merged" if isinstance(plan, MergePlan) else "dropped"
            raise PlanError(
                f"checkpoint {module.resume_from} is of a run that {done} experts and has "
                f"{_numbers(plan.counts)} of them left per layer; this run asks to merge them to "
                f"{_numbers(asked)}: resume with the configuration of that run, or begin a new "
                "one in another trainer.default_root_dir"
            )
        writer = report_writer(trainer)
        writer.on_model_built(trainer, module)
        merge(model, plan)
        module.plan = plan
        writer.count(module, "after")

    def _check(self, module: MoEModule) -> None:
        if is_partitioned(module.built_model):
            raise LitMoEError(
                "ExpertMerging needs the whole model on each rank, but the strategy loads it in "
                "shares: set shard_on_load: false in trainer.strategy.init_args"
            )

    def _counts(self, family: str, sites: tuple[MoESite, ...]) -> dict[str, int]:
        everyone = count_experts(sites)
        if self.plan_file is not None:
            self.plan_file.check_fits(everyone, family=family)
            return self.plan_file.counts
        assert self.budget is not None
        if self.budget.keep_experts is not None and set(everyone.values()) == {
            self.budget.keep_experts
        }:
            return everyone  # nothing is merged, which ``decide`` warns of
        return layer_counts(self.budget, sites, self.protect)

    def _decide(
        self,
        trainer: Trainer,
        module: MoEModule,
        sites: tuple[MoESite, ...],
        counts: dict[str, int],
        rows: list[dict[str, Tensor]],
    ) -> Decision:
        if self.plan_file is not None:
            return Decision(self.plan_file, align=bool(self.options.align))
        protected = parse_protection(self.protect, sites)
        decision = decide(module.built_model, counts, rows, self.options, protected=protected)
        source = None if module.architecture is not None else module.model_name_or_path
        plan = decision.plan.made_for(family=module.built_model.config.model_type, source=source)
        agreed = MergePlan.from_dict(trainer.strategy.broadcast(plan.to_dict()))
        orders = {k: v.tolist() for k, v in decision.orders.items()}
        agreed_orders = trainer.strategy.broadcast(orders).items()
        return replace(decision, plan=agreed, orders={k: torch.tensor(v) for k, v in agreed_orders})

    def _record(
        self, trainer: Trainer, module: MoEModule, decision: Decision, moved: int | None
    ) -> None:
        writer = report_writer(trainer)
        report = report_of(decision, self.options)
        if self.plan_file is not None:
            report.recipe, report.router = "replayed plan", "as the plan says"
        report.neurons_moved = moved
        writer.report.merging = report
        asked = None if self.budget is None else self.budget.keep_ratio
        if asked is not None and abs(decision.plan.keep_ratio - asked) > 1e-9:
            writer.report.warnings.append(
                f"keep_ratio={asked:g} was asked; counts that the routers allow and protected "
                f"experts make it {decision.plan.keep_ratio:.4g}"
            )
        writer.report.calibration.tokens = decision.tokens
        module.plan = replace(decision.plan, replayable=not decision.rebuilt)
        writer.count(module, "after")
        if trainer.is_global_zero:
            writer.folder.mkdir(parents=True, exist_ok=True)
            if not decision.rebuilt:  # rebuilt experts are no combination of the old ones
                decision.plan.save(writer.folder / PLAN_NAME)
            if writer.figures and decision.similarity:
                report.figures = _draw(writer, decision)
        writer.write()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _replayable(plan: MergePlan, path: str) -> MergePlan:
    if not plan.replayable:
        raise PlanError(
            f"the experts of {path} were rebuilt from segments, which no plan of whole experts "
            "gives again; repeat the run that made them, or start from its export"
        )
    return plan


def _numbers(counts: Mapping[str, int]) -> str:
    return ", ".join(str(count) for count in sorted(set(counts.values())))


def _draw(writer: ReportWriter, decision: Decision) -> list[str]:
    if find_spec("matplotlib") is None:
        _LOG.warning("no figures: matplotlib is missing; pip install lit-moe[plots]")
        return []
    plan = decision.plan
    groups = {layer: layer_merge(m, m.shape[1]).groups for layer, m in plan.experts.items()}
    figures = {"dendrograms.png": dendrograms(decision.similarity)}
    maps = decision.similarity
    if all(
        sorted(e for ids in g for e in ids) == list(range(len(maps[k]))) for k, g in groups.items()
    ):
        figures["similarity.png"] = similarity_heatmaps(maps, groups)
    for name, figure in figures.items():
        figure.savefig(writer.folder / name, dpi=150, bbox_inches="tight")
    return sorted(figures, reverse=True)
