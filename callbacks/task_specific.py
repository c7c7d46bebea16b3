"""Experts dropped during one fine-tuning run, by how much the task uses them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.callbacks.base import ExpertPruning, source_of
from lit_moe.callbacks.hiding import HiddenExperts
from lit_moe.callbacks.report import report_writer
from lit_moe.callbacks.rewrapping import unwrap
from lit_moe.errors import LitMoEError
from lit_moe.module import MoEModule
from lit_moe.plans import only_drops
from lit_moe.selection import keep_top_per_group
from lit_moe.stats.slots import Slots
from lit_moe.stats.tap import TokenMask, tapped


class TaskSpecificPruning(ExpertPruning):
    """Drops experts while the model is fine-tuned on one task, for good, window by window.

    Training is cut into windows. In each, every expert's proficiency is the sum of the gates of its
    tokens over that of all experts of its layer; at the end of the window, experts with less than
    ``beta / Z`` go, where ``Z`` are left. At ``force_at`` of the training, ``eager`` forces all but
    the best expert out (as many as the router needs), so that the rest of the training adapts it.
    Experts are hidden while training goes on, and cut out when it ends. What is left of a V-MoE
    then is what ``dropped_experts`` of its config says: under ``delete`` a single expert is a dense
    layer with gate 1; under ``zero`` rows of the dropped stay, and what chooses them becomes 0.

    Source: Task-Specific Expert Pruning (Chen et al., arXiv 2206.00277).

    Args:
        beta: above 0; 1 drops all that are used less than the mean.
        window: optimizer steps of one window.
        eager: force the best expert at ``force_at``.
        force_at: share of the training after which no further expert is dropped.
    """

    def __init__(
        self,
        beta: float = 0.5,
        window: int = 50,
        eager: bool = True,
        force_at: float = 0.5,
    ) -> None:
        super().__init__("gate_sum", None, None, "drop", None)
        if beta <= 0 or window < 1 or not 0 < force_at <= 1:
            raise LitMoEError(
                f"beta={beta:g} must be above 0, window={window} at least 1, force_at={force_at:g} "
                "above 0 and at most 1"
            )
        self.beta = beta
        self.window = window
        self.eager = eager
        self.force_at = force_at
        self._start()

    def _start(self) -> None:
        self._hidden = HiddenExperts()
        self._gates: dict[str, Tensor] = {}
        self._tap = ExitStack()
        self._token_mask = TokenMask()
        self._sites: tuple[MoESite, ...] = ()
        self._done = 0

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Forgets an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._start()

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built and nothing wraps it yet. Measures it.

        Raises:
            LitMoEError: if the run has no number of steps that could be halved, or the model's
                experts are all used equally much by design.
        """
        writer = self.begin(trainer, module)
        if writer is None:
            return
        if trainer.max_steps < 1:
            raise LitMoEError(
                f"TaskSpecificPruning divides the training into windows and must know its length, "
                f"but trainer.max_steps is {trainer.max_steps}; set it"
            )
        _check_tokens_choose(module)
        plan = only_drops(module.checkpoint_plan(), purpose="going on with task-specific dropping")
        if plan is not None:
            self.cut(trainer, module, plan)
        else:
            writer.measure(trainer, module, "before")

    def on_train_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training begins. Begins to watch; a resumed run hides what was dropped before."""
        model = pl_module.built_model
        self._sites = find_sites(model)
        for site in self._sites:
            zeros = torch.zeros(site.num_experts, dtype=torch.float64)
            self._gates.setdefault(site.name, zeros)
        self._hidden.hide(model)
        self._tap.enter_context(
            tapped(model, self._sites, _GateSums(self._gates, model), self._token_mask)
        )

    def on_validation_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When a validation begins, also of a checkpoint from the middle of the training."""
        self._hidden.hide(pl_module.built_model)

    def on_test_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When a test begins."""
        self._hidden.hide(pl_module.built_model)

    def on_predict_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When a prediction begins."""
        self._hidden.hide(pl_module.built_model)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: MoEModule, batch: Any, batch_idx: int
    ) -> None:
        """Before each batch. Tells padding; at the end of a window, drops experts."""
        if isinstance(batch, Mapping):
            self._token_mask.set(batch)
        step, last = trainer.global_step, self._last(trainer)
        if step == last and self.eager and not self._is_forced(pl_module):
            self._done = step  # by what the last window saw, so that must not end before
            self._end_window(trainer, pl_module, force=True)
        elif step and step % self.window == 0 and self._done < step <= last:
            self._done = step
            self._end_window(trainer, pl_module, force=False)

    def on_train_end(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training ends, before any export. Cuts experts out for good."""
        self._tap.close()
        plan = self._hidden.release()
        if plan is None:
            report_writer(trainer).report.warnings.append(
                f"no expert fell below beta / Z = {self.beta:g} / Z in any window, so none was "
                "dropped; raise beta"
            )
            return
        unwrap(trainer)
        self.cut(trainer, pl_module, plan)
        trainer.strategy.setup_optimizers(trainer)  # moments of experts that are gone fit nothing
        self.record(trainer, pl_module, "task-specific proficiency")

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """When the run breaks. Shows all experts again."""
        self._tap.close()
        self._hidden.show()

    def state_dict(self) -> dict[str, Any]:
        """Return which experts are gone, and what this window has seen."""
        return {
            "mask": self._hidden.state(),
            "gates": {name: gates.tolist() for name, gates in self._gates.items()},
            "done": self._done,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """When a run resumes. Goes on in the middle of the window."""
        self._hidden.load_state(state_dict["mask"])
        self._done = state_dict["done"]
        self._gates = {
            name: torch.tensor(gates, dtype=torch.float64)
            for name, gates in state_dict["gates"].items()
        }

    def _last(self, trainer: Trainer) -> int:
        return max(round(trainer.max_steps * self.force_at), 1)

    def _is_forced(self, module: MoEModule) -> bool:
        fewest = self._fewest(module)
        counts = self._hidden.alive(module.built_model).counts
        return all(counts[name] == fewest[name] for name in counts)

    def _fewest(self, module: MoEModule) -> dict[str, int]:
        adapter = adapter_for(module.built_model.config)
        return {site.name: adapter.legal_counts(site)[0] for site in self._sites}

    def _end_window(self, trainer: Trainer, module: MoEModule, *, force: bool) -> None:
        """Drop what the window found too little used. Collective."""
        device = trainer.strategy.root_device
        sums = {
            name: torch.as_tensor(
                trainer.strategy.reduce(gates.clone().to(device), reduce_op="sum")
            ).cpu()
            for name, gates in self._gates.items()
        }
        for gates in self._gates.values():
            if not force:
                gates.zero_()
        alive = self._hidden.alive(module.built_model)
        fewest = self._fewest(module)
        counts = {
            site.name: fewest[site.name]
            if force
            else self._enough(module, site, sums[site.name], alive.kept[site.name])
            for site in self._sites
        }
        scores = {
            name: proficiency(values, alive.kept[name]).index_fill(
                0, _gone(values, alive.kept[name]), -torch.inf
            )
            for name, values in sums.items()
        }
        groups = {site.name: site.num_groups for site in self._sites}
        plan = self.agree(trainer, keep_top_per_group(scores, counts, groups))
        if plan.counts == alive.counts:
            return
        family = module.built_model.config.model_type
        made = plan.made_for(family=family, source=source_of(module))
        self._hidden.hide(module.built_model, made)
        report_writer(trainer).report.warnings.append(
            f"step {trainer.global_step}: {sum(alive.counts.values())} -> "
            f"{sum(plan.counts.values())} experts{' (forced)' if force else ''}"
        )

    def _enough(
        self, module: MoEModule, site: MoESite, sums_E: Tensor, alive: tuple[int, ...]
    ) -> int:
        """Return how many experts of a layer stay: the next count that its router can work with."""
        values = proficiency(sums_E, alive)[list(alive)]
        wanted = int((values >= self.beta / len(alive)).sum())
        legal = adapter_for(module.built_model.config).legal_counts(site)
        return min(n for n in legal if n >= min(wanted, len(alive)))


class _GateSums:
    """Adds up the gates of each expert's tokens in training; what :func:`tapped` hands its sums to.

    Validations between training steps do not count.
    """

    def __init__(self, gates: dict[str, Tensor], model: PreTrainedModel) -> None:
        self._gates = gates
        self._model = model

    def update(
        self, layer: str, slots: Slots, mask_T: Tensor | None, token_ids: Tensor | None
    ) -> None:
        del token_ids
        if not self._model.training:
            return
        total = self._gates[layer]
        gates, ids = slots.gates.detach().double(), slots.expert_ids
        if mask_T is not None:
            gates = gates * mask_T[slots.token_ids]
        real = ids < len(total)
        total.index_add_(0, ids[real].cpu(), gates[real].cpu())

    def add_probabilities(
        self, layer: str, probability_TE: Tensor, mask_T: Tensor | None, token_ids: Tensor | None
    ) -> None:
        """Nothing: only gates count."""


def _check_tokens_choose(module: MoEModule) -> None:
    if getattr(module.built_model.config, "router_type", "token_choice") == "expert_choice":
        raise LitMoEError(
            "TaskSpecificPruning compares how much experts are used, but under router_type: "
            "expert_choice each expert takes equally many tokens, with gates that add up to 1; "
            "take a model with router_type: token_choice, or OneShotPruning with router_change"
        )


def proficiency(sums_E: Tensor, alive: tuple[int, ...]) -> Tensor:
    """Return each expert's share of the gates of those that are left, ``(E,)``; 0 for the others.

    >>> proficiency(torch.tensor([1.0, 3.0, 9.0]), (0, 1)).tolist()
    [0.25, 0.75, 0.0]
    """
    kept = torch.zeros_like(sums_E)
    kept[list(alive)] = sums_E[list(alive)]
    return kept / kept.sum().clamp(min=1e-300)


def _gone(values: Tensor, alive: tuple[int, ...]) -> Tensor:
    return torch.tensor(sorted(set(range(len(values))) - set(alive)), dtype=torch.long)
