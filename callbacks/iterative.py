"""Experts dropped in rounds: score the model as it now is, drop a few, maybe train, again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning import Trainer

from lit_moe.adapters import find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.callbacks.base import ExpertPruning, composed, one_budget, source_of
from lit_moe.callbacks.hiding import HiddenExperts
from lit_moe.callbacks.report import report_writer
from lit_moe.callbacks.rewrapping import (
    Compact,
    check_can_rewrap,
    check_compact,
    unwrap,
    wrap_again,
)
from lit_moe.callbacks.round_records import training_sentence, write_rounds
from lit_moe.callbacks.round_training import restart_optimizer, set_max_steps, training_data
from lit_moe.callbacks.rounds import (
    FineTuning,
    counts_per_round,
    mean_load_cv,
    select_round,
    steps_per_round,
    totals_per_round,
)
from lit_moe.criteria import UnroutedRule
from lit_moe.errors import LitMoEError
from lit_moe.module import MoEModule
from lit_moe.plan import KeepPlan
from lit_moe.plans import only_drops
from lit_moe.selection import Budget, layer_counts, layer_rules
from lit_moe.selection.counts import total_experts


class IterativePruning(ExpertPruning):
    """Drops experts in rounds, re-estimating on what is left, with or without training between.

    One driver for three procedures of MC-Suite (arXiv 2504.05586): ``rounds: 1`` is one-shot;
    several rounds without ``fine_tuning`` are iterative; with it, a lottery. All layers drop
    equally many experts in each round, unless the budget's scope is ``global``.

    Rounds before any training cut experts out of the model, before a strategy wraps it. Later ones
    hide experts from the routers, which trains exactly like a model without them, and cut them out
    when training ends, before the model is exported. The last round is trained on too. A run that
    is resumed from a checkpoint goes on in the middle of a round. ``rounds.json`` in the run's
    folder lists what each round kept.

    ``compact: each_round`` cuts them out in each round instead, and has the strategy wrap what is
    left anew (a DeepSpeed engine, DDP): a round holds less memory the fewer experts are
    left, for a pause at each. Callbacks with ``on_model_rebuilt(trainer, module)`` are told.

    With ``fine_tuning`` the number of training steps follows from it: leave ``trainer.max_steps``
    at -1.

    Args:
        criterion: short name or class path; scored anew in each round.
        criterion_options: fields of the criterion.
        keep_ratio: fraction of experts that stay in the end; short for a budget with only that.
        budget: any other amount, or a global ranking.
        unrouted: what becomes of experts that saw no calibration token.
        protect: layers and experts that stay, see :class:`~lit_moe.callbacks.base.ExpertPruning`;
            ``super-experts`` are those of the first round.
        rounds: must divide what each layer drops; None for one expert per layer and round.
        fine_tuning: training after each round; None for none.
        compact: when experts that go during training leave memory: at the ``end`` of it, or in
            ``each_round``, which needs ``fine_tuning.optimizer: reset``.
    """

    def __init__(
        self,
        criterion: str = "ean",
        criterion_options: dict[str, Any] | None = None,
        keep_ratio: float | None = None,
        budget: Budget | None = None,
        unrouted: UnroutedRule = "drop",
        protect: list[str] | None = None,
        rounds: int | None = None,
        fine_tuning: FineTuning | None = None,
        compact: Compact = "end",
    ) -> None:
        amount = one_budget(keep_ratio, budget)
        super().__init__(criterion, criterion_options, amount, unrouted, protect)
        self.rounds = rounds
        self.fine_tuning = fine_tuning
        self.compact = compact
        self._check_fields()
        self._start()

    def _start(self) -> None:
        self._keep: list[dict[str, int] | int] = []
        self._steps: list[int] = []
        self._one_pass: int | None = None
        self._round = 0
        self._ended = 0
        self._tokens = 0
        self._hidden = HiddenExperts()
        self._protected: dict[str, frozenset[int]] | None = None
        self._records: list[dict[str, Any]] = []
        self._load_cv: float | None = None

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Begins a new count of rounds for each fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._start()

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built and nothing wraps it yet. Does the rounds before any training.

        Collective: every rank must call it. A resumed run takes the plan of its checkpoint.

        Raises:
            LitMoEError: for rounds that do not divide the budget, a budget that the routers cannot
                meet, or more training than there is text, before anything is computed.
        """
        writer = self.begin(trainer, module)
        if writer is None:
            return
        if self.compact == "each_round":
            check_can_rewrap(trainer)
        sites = find_sites(module.built_model)
        self._plan_rounds(trainer, module, sites)
        plan = only_drops(module.checkpoint_plan(), purpose="going on with rounds of dropping")
        if plan is not None:  # the rest comes with the state of this callback
            self.cut(trainer, module, plan)
            self.record(trainer, module, self.criterion.name)
            return
        writer.measure(trainer, module, "before")
        while self._round < len(self._keep) and self._begins_at(self._round) == 0:
            self._end_round(trainer, module)
            self.cut(trainer, module, self._decide(trainer, module))
            self._finish_round(trainer, module)
        if self.fine_tuning is None:
            self._end_round(trainer, module)
        self.record(trainer, module, self.criterion.name)
        self._measure_last(trainer, module)

    def on_fit_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When the strategy has wrapped the model, before optimizer states are restored."""
        self._hidden.hide(pl_module.built_model)
        self._begin_schedule(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training begins. Hides experts again, if something removed hooks meanwhile."""
        self._hidden.hide(pl_module.built_model)

    def on_validation_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When a validation begins; DeepSpeed's set-up for it removes hooks."""
        self._hidden.hide(pl_module.built_model)

    def on_test_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When a test begins; also of a checkpoint from the middle of the rounds."""
        self._hidden.hide(pl_module.built_model)

    def on_predict_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When a prediction begins."""
        self._hidden.hide(pl_module.built_model)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: MoEModule, batch: Any, batch_idx: int
    ) -> None:
        """Before each batch. Does the rounds that are due, on the model as it now is."""
        while self._round < len(self._keep) and trainer.global_step >= self._begins_at(self._round):
            self._end_round(trainer, pl_module)
            self._mask_round(trainer, pl_module)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: MoEModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each batch. Counts the tokens that this rank was trained on, without padding."""
        if self._round and self.fine_tuning is not None and isinstance(batch, Mapping):
            mask = batch.get("attention_mask")
            self._tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())

    def on_train_end(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training ends, before any export. Does rounds that are left, and cuts for good."""
        if not self._keep:
            return
        left = len(self._keep) - self._round
        self._end_round(trainer, pl_module)
        while self._round < len(self._keep):
            self._mask_round(trainer, pl_module)
            self._end_round(trainer, pl_module)
        if self.fine_tuning is None:
            return
        self._note_training(trainer, left)
        if self._hidden.plan is not None:
            self._cut_for_good(trainer, pl_module)
        self.record(trainer, pl_module, self.criterion.name)
        write_rounds(trainer, self._steps, self._records)

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """When the run breaks. Shows all experts again."""
        self._hidden.show()

    def on_round_end(self, trainer: Trainer, module: MoEModule, number: int) -> None:
        """When the experts of a round are gone and its training, if any, is done; for subclasses.

        Collective. Again, after a resume from a checkpoint of exactly this moment.

        Args:
            trainer: of the run.
            module: holds the model, masked or cut to :meth:`kept`.
            number: of the round, from 1.
        """

    def kept(self, module: MoEModule) -> KeepPlan:
        """Return the experts that are left, in the numbering of the model as it was loaded."""
        here = self.alive(module)
        return here if module.plan is None else composed(module.plan, here)

    def alive(self, module: MoEModule) -> KeepPlan:
        """Return the experts that are left, in the numbering of the model as it now is."""
        return self._hidden.alive(module.built_model)

    def state_dict(self) -> dict[str, Any]:
        """Return where in the rounds the run is."""
        return {
            "round": self._round,
            "mask": self._hidden.state(),
            "tokens": self._tokens,
            "protected": {k: sorted(ids) for k, ids in (self._protected or {}).items()},
            "records": self._records,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """When a run resumes, or a checkpoint is tested. Goes on where it was."""
        self._round = state_dict["round"]
        self._ended = max(0, self._round - 1)
        self._hidden.load_state(state_dict["mask"])
        self._tokens = state_dict["tokens"]
        self._protected = {k: frozenset(ids) for k, ids in state_dict["protected"].items()}
        self._records = list(state_dict["records"])

    def _check_fields(self) -> None:
        assert self.budget is not None
        if self.budget.scope == "global" and self.budget.max_bytes is not None:
            raise LitMoEError(
                "max_bytes with a global ranking is no number of experts that rounds could share; "
                "give keep_ratio, or scope: layer"
            )
        if self.rounds is not None and self.rounds < 1:
            raise LitMoEError(f"rounds={self.rounds} must be at least 1")
        check_compact(self.compact, self.fine_tuning)
        if "forward" in self.criterion.needs and self.fine_tuning is not None:
            raise LitMoEError(
                f"criterion {self.criterion.name!r} uses masks of its own, which rounds during "
                "training already use; leave fine_tuning out, or take a criterion of routing, "
                "activations, gradients or weights"
            )

    def _begins_at(self, number: int) -> int:
        """Return the optimizer step before which a round is done."""
        return sum(self._steps[:number])

    def _plan_rounds(self, trainer: Trainer, module: MoEModule, sites: tuple[MoESite, ...]) -> None:
        budget = self.checked_budget(trainer, module, sites)
        if budget.scope == "global":
            final = total_experts(budget, layer_rules(sites, self.protect, budget.floor))
            everyone = sum(site.num_experts for site in sites)
            self._keep = [*totals_per_round(everyone, final, self.rounds)]
        else:
            counts = layer_counts(budget, sites, self.protect)
            self._keep = [*counts_per_round(sites, counts, self.rounds)]
        data = None if self.fine_tuning is None else training_data(trainer)
        self._steps = steps_per_round(self.fine_tuning, len(self._keep), data)
        self._one_pass = None if data is None else data.steps_per_epoch
        if self.fine_tuning is not None:
            set_max_steps(trainer, sum(self._steps))

    def _decide(self, trainer: Trainer, module: MoEModule) -> KeepPlan:
        """Return which experts of the model at hand stay after the next round. Collective."""
        sites = find_sites(module.built_model)
        alive = self.alive(module)
        keep = self._keep[self._round]
        evidence = self.gather(
            trainer,
            module,
            sites,
            keep=None if isinstance(keep, int) else keep,
            seed=self._round,
            alive=None if self._hidden.plan is None else alive.kept,
        )
        if self._protected is None:
            assert self.budget is not None
            self._protected = self.protection(trainer, evidence, self.budget)
        self._load_cv = mean_load_cv(evidence.observation, alive.kept)
        scores = self.rate(trainer, evidence)
        stay = select_round(
            {name: values[list(alive.kept[name])] for name, values in scores.items()},
            [replace(site, num_experts=len(alive.kept[site.name])) for site in sites],
            keep,
            self.budget,
            self._protected_here(module, alive),
        )
        family = module.built_model.config.model_type
        plan = composed(alive, stay).made_for(family=family, source=source_of(module))
        return self.agree(trainer, plan)

    def _protected_here(self, module: MoEModule, alive: KeepPlan) -> dict[str, frozenset[int]]:
        """Return layer name -> places of the protected experts among those that are left."""
        here = alive if module.plan is None else composed(module.plan, alive)
        return {
            name: frozenset(i for i, e in enumerate(ids) if e in (self._protected or {})[name])
            for name, ids in here.kept.items()
        }

    def _mask_round(self, trainer: Trainer, module: MoEModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)  # of the step that is over; frees memory
        mask = self._decide(trainer, module)
        self._hidden.hide(module.built_model, mask)
        if self.compact == "each_round":
            self._cut_and_wrap_again(trainer, module)
        self._finish_round(trainer, module)
        self._measure_last(trainer, module)
        self._begin_schedule(trainer, module)

    def _end_round(self, trainer: Trainer, module: MoEModule) -> None:
        if self._round > self._ended:
            self._ended = self._round
            self.on_round_end(trainer, module, self._round)

    def _finish_round(self, trainer: Trainer, module: MoEModule) -> None:
        self._round += 1
        whole = self.kept(module)
        self._records.append(
            {
                "round": self._round,
                "step": trainer.global_step,
                "tokens_before": self.tokens_trained(trainer),
                "load_cv": self._load_cv,
                "kept": {name: list(ids) for name, ids in whole.kept.items()},
            }
        )
        write_rounds(trainer, self._steps, self._records)

    def _measure_last(self, trainer: Trainer, module: MoEModule) -> None:
        if self._round == len(self._keep):
            report_writer(trainer).measure(trainer, module, "pruned")

    def _begin_schedule(self, trainer: Trainer, module: MoEModule) -> None:
        """Begin with empty moments and a learning rate of the round's own, unless it goes on."""
        if self.fine_tuning is not None and self.fine_tuning.optimizer == "reset" and self._round:
            restart_optimizer(trainer, module.optimizer_config, self._steps[self._round - 1])

    def _cut_and_wrap_again(self, trainer: Trainer, module: MoEModule) -> None:
        self._cut_masked(trainer, module)
        wrap_again(trainer)
        told: Any
        for told in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(told, "on_model_rebuilt"):
                told.on_model_rebuilt(trainer, module)

    def _cut_masked(self, trainer: Trainer, module: MoEModule) -> None:
        plan = self._hidden.release()
        assert plan is not None
        unwrap(trainer)
        self.cut(trainer, module, plan)

    def _cut_for_good(self, trainer: Trainer, module: MoEModule) -> None:
        self._cut_masked(trainer, module)
        # Moments of experts that are gone fit no parameter any more.
        trainer.strategy.setup_optimizers(trainer)

    def _note_training(self, trainer: Trainer, left: int) -> None:
        tokens, done = self.tokens_trained(trainer), trainer.global_step
        name = self.criterion.name
        sentence = training_sentence(
            self._steps, done, tokens, left=left, name=name, one_pass=self._one_pass
        )
        report_writer(trainer).report.warnings.append(sentence)

    @property
    def sees_all_experts(self) -> bool:
        """Whether no expert is gone or hidden: only in the first round."""
        return self._round == 0

    def tokens_trained(self, trainer: Trainer) -> int:
        """Return the tokens that all ranks were trained on so far. Collective."""
        tokens = torch.tensor(self._tokens, device=trainer.strategy.root_device)
        return int(torch.as_tensor(trainer.strategy.reduce(tokens, reduce_op="sum")))
