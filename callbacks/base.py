"""What callbacks that drop experts share: evidence, scores, surgery, record."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_moe.adapters.site import MoESite
from lit_moe.callbacks.calibration import calibration_share
from lit_moe.callbacks.report import ReportWriter, report_writer
from lit_moe.criteria import (
    Criterion,
    Evidence,
    UnroutedRule,
    apply_unrouted,
    get_criterion,
    score_evidence,
)
from lit_moe.distill.images import takes_images
from lit_moe.errors import LitMoEError, NoEffectWarning
from lit_moe.module import MoEModule
from lit_moe.plan import KeepPlan
from lit_moe.plans import Plan, only_drops
from lit_moe.selection import (
    Budget,
    as_patterns,
    check_budget,
    find_super_experts,
    measure_bytes,
    parse_protection,
)
from lit_moe.sharding.partitions import is_partitioned
from lit_moe.stats import GATHERABLE, GradientObservation, Observation, observe, observe_gradients
from lit_moe.surgery import shrink
from lit_moe.vmoe.configuration import num_tokens
from lit_moe.vmoe.ties import tie_under_expert_choice

SUPER_EXPERTS = "super-experts"
Kept = Mapping[str, Sequence[int]]


class ExpertPruning(Callback):
    """Evidence -> scores -> plan -> surgery -> record, for subclasses that say when and how much.

    The same plan comes out on one process and on many: each rank observes its share of the
    calibration data, sums are reduced, rank 0 decides, the decision is broadcast.

    Args:
        criterion: short name (``reap``, ``frequency``, ``random``, ...) or class path.
        criterion_options: fields of the criterion.
        budget: how many experts stay; None where a plan says it.
        unrouted: what becomes of experts that saw no calibration token.
        protect: layers (``model.layers.0.*``) and experts (``model.layers.3.mlp:1,5``) that stay;
            ``super-experts`` protects those with extreme activations.
    """

    shows_bars: ClassVar[bool] = True

    def __init__(
        self,
        criterion: str,
        criterion_options: dict[str, Any] | None,
        budget: Budget | None,
        unrouted: UnroutedRule,
        protect: list[str] | None,
    ) -> None:
        self.criterion = get_criterion(criterion, **(criterion_options or {}))
        self.budget = budget
        self.unrouted = unrouted
        self.protect = [p for p in protect or [] if p != SUPER_EXPERTS]
        self.protect_super_experts = SUPER_EXPERTS in (protect or [])

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Makes sure that the run keeps a report."""
        report_writer(trainer)

    def begin(self, trainer: Trainer, module: MoEModule) -> ReportWriter | None:
        """Return the report once the model is where it will be; None outside of a fit.

        Validate, test and predict take the plan of the checkpoint that they load.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            if module.plan is None:
                rank_zero_info(
                    f"{type(self).__name__} acts in fit: what is evaluated here is the model as it "
                    "was loaded; --ckpt_path of a fit, or its export, is the one with fewer experts"
                )
            return None
        writer = report_writer(trainer)
        writer.on_model_built(trainer, module)
        writer.scores, writer.loads = {}, {}
        module.to(trainer.strategy.root_device)
        return writer

    def checked_budget(
        self, trainer: Trainer, module: MoEModule, sites: tuple[MoESite, ...]
    ) -> Budget:
        """Return the budget with the sizes of the model, if these layers can meet it.

        Raises:
            LitMoEError: for one that the model's routers cannot meet, or if calibration text is
                needed and missing, before any text is read.
        """
        assert self.budget is not None
        budget = self.budget
        if budget.max_bytes is not None:
            sizes = measure_bytes(module.built_model, sites)
            budget = Budget(**{**vars(budget), "sizes": sizes})
        check_budget(budget, sites, self.protect)
        needs_whole = self.criterion.needs & {"forward", "gradients"}
        if needs_whole and is_partitioned(module.built_model):
            raise LitMoEError(
                f"criterion {self.criterion.name!r} needs the whole model on each rank, but the "
                "strategy loads it in shares: set shard_on_load: false in trainer.strategy."
                "init_args, or take a criterion of routing, activations or weights"
            )
        if takes_images(module.built_model):
            _check_takes_images(self.criterion)
        if self.criterion.needs - {"weights"}:
            calibration_share(trainer)  # a missing file should not show after an evaluation
        return budget

    def gather(
        self,
        trainer: Trainer,
        module: MoEModule,
        sites: tuple[MoESite, ...],
        *,
        keep: Mapping[str, int] | None = None,
        seed: int = 0,
        alive: Kept | None = None,
    ) -> Evidence:
        """Return what the criterion needs to know of the model as it now is. Collective.

        Args:
            trainer: of the run.
            module: holds the model.
            sites: its MoE layers.
            keep: experts that will stay per layer, where that is known.
            seed: added to the seed of the run.
            alive: experts that a router mask leaves; None if nothing is masked.
        """
        return Evidence(
            observation=self._observe(trainer, module),
            gradients=self._observe_gradients(trainer, module),
            model=module.built_model,
            sites=sites,
            batches=self._batches(trainer, module),
            keep=keep,
            seed=(report_writer(trainer).report.seed or 0) + seed,
            alive=None if alive is None else {name: tuple(ids) for name, ids in alive.items()},
        )

    def rate(self, trainer: Trainer, evidence: Evidence) -> dict[str, Tensor]:
        """Return layer name -> scores, with the rule for unrouted experts applied."""
        writer = report_writer(trainer)
        if hasattr(self.criterion, "progress"):
            self.criterion.progress = trainer.is_global_zero
        with writer.phase("score"), _noted(writer):
            scores = score_evidence(self.criterion, evidence)
            _warn_of_ties(evidence, scores, self.criterion.name)
        writer.scores = writer.scores or dict(scores)
        seen = evidence.gradients or evidence.observation
        if seen is None or not self.criterion.needs & {"routing", "gradients"}:
            return scores
        return apply_unrouted(scores, _among(seen, evidence.alive), self.unrouted)

    def protection(
        self, trainer: Trainer, evidence: Evidence, budget: Budget
    ) -> dict[str, frozenset[int]]:
        """Return layer name -> experts that stay, those with extreme activations too if asked."""
        protect = list(self.protect)
        if self.protect_super_experts and evidence.observation is not None:
            protect += as_patterns(find_super_experts(evidence.observation))
            check_budget(budget, evidence.sites, protect)
        protected = parse_protection(protect, evidence.sites)
        report = report_writer(trainer).report
        report.protected = {k: sorted(ids) for k, ids in protected.items() if ids}
        return protected

    def agree(self, trainer: Trainer, plan: KeepPlan) -> KeepPlan:
        """Return the plan of rank 0. Collective."""
        return KeepPlan.from_dict(trainer.strategy.broadcast(plan.to_dict()))

    def cut(self, trainer: Trainer, module: MoEModule, plan: KeepPlan) -> None:
        """Remove experts from the model, in place; ``module.plan`` numbers those of the first."""
        with report_writer(trainer).phase("shrink"):
            shrink(module.built_model, plan)
        whole = plan if module.plan is None else composed(module.plan, plan)
        module.plan = whole.made_for(family=plan.family, source=plan.source)

    def record(self, trainer: Trainer, module: MoEModule, criterion: str) -> None:
        """Write what was decided into the report and beside it."""
        plan = only_drops(module.plan, purpose="the record of dropped experts")
        assert plan is not None
        writer = report_writer(trainer)
        writer.report.record_plan(plan)
        writer.report.criterion = criterion
        writer.count(module, "after")
        writer.write()
        if trainer.is_global_zero:
            writer.folder.mkdir(parents=True, exist_ok=True)
            plan.save(writer.folder / "plan.json")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _observe(self, trainer: Trainer, module: MoEModule) -> Observation | None:
        needs = self.criterion.needs
        if "routing" not in needs and not self.protect_super_experts:
            return None
        writer, loader = report_writer(trainer), calibration_share(trainer)
        with writer.phase("observe"):
            observation = observe(
                module.built_model,
                loader,
                progress=self.shows_bars and trainer.is_global_zero,
                gather=[kind for kind in GATHERABLE if kind in needs],
            )
        if not writer.loads:
            if self.sees_all_experts:
                writer.loads = {k: s.count for k, s in observation.layers.items()}
            self._note_unrouted(writer, observation)
        return observation

    @property
    def sees_all_experts(self) -> bool:
        """Whether no expert is gone or hidden from what is observed next."""
        return True

    def _observe_gradients(self, trainer: Trainer, module: MoEModule) -> GradientObservation | None:
        if "gradients" not in self.criterion.needs:
            return None
        writer, loader = report_writer(trainer), calibration_share(trainer)
        with writer.phase("observe"):
            seen = observe_gradients(
                module.built_model, loader, progress=self.shows_bars and trainer.is_global_zero
            )
        calibration = writer.report.calibration
        if calibration.predicted is None:
            calibration.predicted = seen.predicted
        if not calibration.tokens:
            self._note_unrouted(writer, seen)
        return seen

    def _note_unrouted(self, writer: ReportWriter, seen: Observation | GradientObservation) -> None:
        writer.report.calibration.tokens = seen.tokens
        if not self.sees_all_experts:
            return
        writer.report.unrouted = {k: list(v) for k, v in seen.unrouted.items()}
        if seen.unrouted:
            num = sum(map(len, seen.unrouted.values()))
            writer.report.warnings.append(
                f"{num} experts saw none of the {seen.tokens} calibration tokens; "
                f"unrouted={self.unrouted!r} decided about them"
            )

    def _batches(self, trainer: Trainer, module: MoEModule) -> Iterable[dict[str, Tensor]] | None:
        """Return this rank's calibration batches for criteria that run the model."""
        if "forward" not in self.criterion.needs:
            return None
        device = trainer.strategy.root_device
        names = ("input_ids", "attention_mask", "pixel_values")
        batches = [
            {k: batch[k].to(device) for k in names if k in batch}
            for batch in calibration_share(trainer)
        ]
        tokens = torch.tensor(sum(_count(batch, module) for batch in batches), device=device)
        total = trainer.strategy.reduce(tokens, reduce_op="sum")
        report_writer(trainer).report.calibration.tokens = int(total)
        return batches


@contextmanager
def _noted(writer: ReportWriter) -> Iterator[None]:
    """Write warnings of no effect into the report too, each sentence once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoEffectWarning)
        yield
    noted = writer.report.warnings
    for warning in caught:
        sentence = str(warning.message)
        if issubclass(warning.category, NoEffectWarning) and sentence not in noted:
            noted.append(sentence)
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _warn_of_ties(evidence: Evidence, scores: Mapping[str, Tensor], criterion: str) -> None:
    model = evidence.model
    sentence = model and tie_under_expert_choice(model.config, scores, criterion)
    if sentence:
        warnings.warn(sentence, NoEffectWarning, stacklevel=2)


def _check_takes_images(criterion: Criterion) -> None:
    if "gradients" in criterion.needs or not criterion.takes_images:
        raise LitMoEError(
            f"criterion {criterion.name!r} needs text to run the model on, which an image "
            "classifier does not read; take router_change, importance, reap, obs or another "
            "criterion of routing, activations or weights"
        )


def _count(batch: Mapping[str, Tensor], module: MoEModule) -> int:
    """Return the tokens of a batch; images are as many each as the model cuts them into."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    config: Any = module.built_model.config
    return len(batch["pixel_values"]) * num_tokens(config)


def source_of(module: MoEModule) -> str | None:
    """Return where the weights came from; None where they began at random."""
    return None if module.architecture is not None else module.model_name_or_path


def one_budget(keep_ratio: float | None, budget: Budget | None) -> Budget:
    """Return the one amount that is given.

    Raises:
        LitMoEError: if both are given, or neither.
    """
    if budget is not None and keep_ratio is not None:
        raise LitMoEError(
            f"keep_ratio={keep_ratio:g} and a budget are both given; keep the budget by "
            "`keep_ratio: null`, or leave the budget out"
        )
    return budget if budget is not None else Budget(keep_ratio=keep_ratio)


def composed(first: Plan, second: KeepPlan) -> KeepPlan:
    """Return what two plans do one after the other; the second numbers what the first keeps.

    Raises:
        PlanError: if the first one merges experts.

    >>> first, second = KeepPlan({"a": (0, 2, 3)}, {"a": 4}), KeepPlan({"a": (1,)}, {"a": 3})
    >>> composed(first, second).kept
    {'a': (2,)}
    """
    before = only_drops(first, purpose="dropping experts")
    assert before is not None
    kept = {name: tuple(before.kept[name][e] for e in ids) for name, ids in second.kept.items()}
    return KeepPlan(kept, before.num_experts, before.family, before.source)


@dataclass(frozen=True)
class _Seen:
    tokens: int
    unrouted: Mapping[str, tuple[int, ...]]


def _among(seen: Observation | GradientObservation, alive: Kept | None) -> _Seen:
    """Return what was seen of the experts that a mask leaves."""
    if alive is None:
        return _Seen(seen.tokens, seen.unrouted)
    left = {k: tuple(e for e in ids if e in alive[k]) for k, ids in seen.unrouted.items()}
    return _Seen(seen.tokens, {name: ids for name, ids in left.items() if ids})
