"""Pruning of single weights inside the experts, at fit start or little by little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import Progress as Bars
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_moe.adapters import find_sites
from lit_moe.callbacks.calibration import calibration_share
from lit_moe.callbacks.report import ReportWriter, report_writer
from lit_moe.errors import LitMoEError
from lit_moe.module import MoEModule
from lit_moe.plans import only_drops
from lit_moe.sharding.partitions import is_partitioned
from lit_moe.sparsity import (
    CubicSchedule,
    SparsityOptions,
    SparsityReport,
    Thinning,
    WeightMasks,
    apply_masks,
    check_request,
    masks_from_moments,
    measure_sparsity,
    observe_inputs,
    parameter_zeros,
    shapes_of,
    sparsify,
    zero_,
    zero_gradient,
)
from lit_moe.sparsity.api import OnLayer
from lit_moe.sparsity.moments import InputMoments
from lit_moe.sparsity.options import Earlier, Method, UnroutedRule

MASKS_NAME = "masks.safetensors"


class WeightPruning(Callback):
    """Zeroes weights of the routed experts and keeps them zero while training goes on.

    It acts when the model is built, in its turn among the callbacks: behind one that drops experts
    it thins those that are left, before ``Refit`` it leaves zeros that the refit keeps. During
    training, gradients of zeroed weights are 0 and the zeros are set again after each step, so that
    neither momentum nor weight decay revives them. A resumed run takes the masks of its checkpoint.

    Args:
        method: ``moe_pruner``, ``wanda``, ``magnitude`` or ``sparsegpt``.
        pattern: ``"N:M"``: of every M consecutive inputs of a neuron N go.
        ratio: instead of a pattern: the fraction of each neuron's inputs that goes, in (0, 1).
        unrouted: experts without calibration tokens: ``magnitude``, ``keep`` or ``error``.
        earlier: statistics of each layer with all layers before it ``pruned`` or ``dense``.
        schedule: prune little by little in training instead of at once; scores then come from the
            weights as they are at each decision and from inputs observed before training.
        masks: a mask file to replay; then nothing is observed, and the fields above do not count.
    """

    def __init__(
        self,
        method: Method = "moe_pruner",
        pattern: str | None = None,
        ratio: float | None = None,
        unrouted: UnroutedRule = "magnitude",
        earlier: Earlier = "pruned",
        schedule: CubicSchedule | None = None,
        masks: str | None = None,
    ) -> None:
        self.replayed = None if masks is None else WeightMasks.load(masks)
        if self.replayed is not None and pattern is None and ratio is None:
            pattern = "2:4"  # any will do: the masks say it all
        self.options = SparsityOptions(method, pattern, ratio, unrouted, earlier)
        self.schedule = schedule
        self.masks: WeightMasks | None = None
        self._moments: dict[str, InputMoments] = {}
        self._record: SparsityReport | None = None
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[RemovableHandle] = []
        self._decided_at = -1
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.schedule is None:
            return
        if self.replayed is not None:
            raise LitMoEError("masks and a schedule are both given; a mask file is applied at once")
        if self.options.method == "sparsegpt":
            raise LitMoEError(
                "method: sparsegpt changes the weights that stay, from inputs of this moment, so "
                "it cannot follow a schedule; use moe_pruner, wanda or magnitude, or no schedule"
            )

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Makes sure that the run keeps a report."""
        report_writer(trainer)
        others = [c for c in trainer.callbacks if isinstance(c, WeightPruning)]  # type: ignore[attr-defined]
        if stage == "fit" and len(others) > 1:
            raise LitMoEError(
                f"{len(others)} WeightPruning callbacks are given, whose zeros would mix; keep one"
            )

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built and plans before this one are applied. Zeroes weights.

        Collective: every rank must call it. A resumed run finds the zeros in its checkpoint.

        Raises:
            LitMoEError: for a pattern that the matrices cannot bear or masks of another model,
                before any text is read.
        """
        if trainer.state.fn != TrainerFn.FITTING or module.is_resumed:
            return
        writer = report_writer(trainer)
        writer.on_model_built(trainer, module)
        module.to(trainer.strategy.root_device)
        self._check(trainer, module)
        if "before" not in writer.report.quality:
            writer.measure(trainer, module, "before")
        with writer.phase("prune_weights"):
            thinning = self._act(trainer, module)
        if self.schedule is not None:
            self._take_down(trainer, module, {})
            return
        assert thinning is not None
        self.masks = thinning.masks
        self._take_down(trainer, module, thinning.unrouted)
        if trainer.is_global_zero:
            writer.folder.mkdir(parents=True, exist_ok=True)
            self.masks.save(writer.folder / MASKS_NAME)
        writer.measure(
            trainer,
            module,
            "thinned" if {"pruned", "merged"} & set(writer.report.quality) else "pruned",
        )

    def on_train_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training begins. Keeps gradients away from the zeros."""
        self._fit_to_plan(pl_module)
        if self._record is not None:
            report_writer(trainer).report.sparsity = self._record
        self._decided_at = trainer.global_step
        self._hold(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: MoEModule, *_: Any) -> None:  # type: ignore[override]
        """After each batch. Sets the zeros again, and more of them when the schedule says so."""
        step = trainer.global_step
        if step == self._decided_at:
            return  # gradients are still being accumulated
        self._decided_at = step
        for parameter, zeros in self._held:
            zero_(parameter, zeros)
        if self.schedule is not None and self.schedule.decides(step):
            self._decide(pl_module, self.schedule.progress(step))
        if self._record is not None:
            self._record.steps += 1

    def on_train_end(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training ends. Counts the zeros that there are."""
        self._release()
        if self._record is None:
            return
        writer = report_writer(trainer)
        self._record.zeros = measure_sparsity(pl_module.built_model)
        if self.schedule is not None:
            self._warn_of_early_end(trainer, writer)
            writer.measure(trainer, pl_module, "recovered")
        if self.masks is not None and trainer.is_global_zero:
            writer.folder.mkdir(parents=True, exist_ok=True)
            self.masks.save(writer.folder / MASKS_NAME)

    def state_dict(self) -> dict[str, Any]:
        """Return masks (one bit per weight), sums that decisions need, and the record."""
        return {
            "masks": None if self.masks is None else self.masks.to_dict(),
            "moments": {name: moments.state() for name, moments in self._moments.items()},
            "record": None if self._record is None else asdict(self._record),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """When a run resumes. Takes over what :meth:`state_dict` gave."""
        masks, record = state_dict["masks"], state_dict["record"]
        self.masks = None if masks is None else WeightMasks.from_dict(masks)
        self._moments = {k: InputMoments.from_state(v) for k, v in state_dict["moments"].items()}
        self._record = None if record is None else SparsityReport(**record)

    def _check(self, trainer: Trainer, module: MoEModule) -> None:
        model = module.built_model
        if is_partitioned(model):
            raise LitMoEError(
                "WeightPruning writes into whole matrices, but the strategy loads the model in "
                "shares: set shard_on_load: false in trainer.strategy.init_args"
            )
        if self.replayed is not None:
            self.replayed.check_fits(shapes_of(model), family=model.config.model_type)
            return
        check_request(model, self.options)
        if self.options.needs_text:
            calibration_share(trainer)  # a missing file should not show after an evaluation

    def _act(self, trainer: Trainer, module: MoEModule) -> Thinning | None:
        """Prune at once, or observe what a schedule will need."""
        model = module.built_model
        if self.replayed is not None:
            apply_masks(model, self.replayed)
            return Thinning(self.replayed)
        batches = self._batches(trainer)
        if self.schedule is not None:
            if batches is not None:
                self._moments = observe_inputs(model, batches, method=self.options.method)
            return None
        num_layers = len(find_sites(model)) if trainer.is_global_zero else 0
        with _shown(num_layers) as on_layer:
            return sparsify(model, batches, self.options, on_layer=on_layer)

    def _batches(self, trainer: Trainer) -> list[dict[str, Tensor]] | None:
        if not self.options.needs_text:
            return None
        batches = list(calibration_share(trainer))
        device = trainer.strategy.root_device
        tokens = sum((batch["attention_mask"].sum() for batch in batches), torch.tensor(0))
        total = trainer.strategy.reduce(tokens.to(device), reduce_op="sum")
        report_writer(trainer).report.calibration.tokens = int(total)
        return batches

    def _take_down(
        self, trainer: Trainer, module: MoEModule, unrouted: dict[str, list[int]]
    ) -> None:
        """Begin the record of what was done."""
        writer = report_writer(trainer)
        source = self.replayed
        self._record = SparsityReport(
            method=self.options.method if source is None else f"replayed {source.method}",
            pattern=str(self.options.parsed) if source is None else source.pattern,
            earlier=self.options.earlier if self.schedule is None else "dense",
            zeros=measure_sparsity(module.built_model),
            unrouted=unrouted,
        )
        writer.report.sparsity = self._record
        if unrouted:
            num = sum(map(len, unrouted.values()))
            writer.report.warnings.append(
                f"{num} experts saw no calibration token; unrouted={self.options.unrouted!r} "
                "decided about their weights"
            )
        writer.write()

    def _fit_to_plan(self, module: MoEModule) -> None:
        """Follow a plan that dropped experts after the masks were made."""
        plan = module.plan
        if plan is None:
            return
        shapes = shapes_of(module.built_model)
        if self.masks is not None and self.masks.shapes != shapes:
            kept = only_drops(plan, purpose="carrying weight masks over to a smaller model")
            assert kept is not None
            self.masks = self.masks.shrunk(kept)
        for name, moments in self._moments.items():
            if len(moments.count) != shapes[name]["down"][0]:
                kept = only_drops(plan, purpose="carrying statistics over to a smaller model")
                assert kept is not None
                self._moments[name] = moments.of_experts(kept.kept[name])

    def _decide(self, module: MoEModule, progress: float) -> None:
        self.masks = masks_from_moments(
            module.built_model, self._moments, self.options, progress=progress
        )
        self._release()
        self._hold(module)

    def _hold(self, module: MoEModule) -> None:
        if self.masks is None:
            return
        model = module.built_model
        for name, zeros in parameter_zeros(model, self.masks).items():
            parameter = model.get_parameter(name)
            self._held.append((parameter, zeros))
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(_kept_zero(zeros)))
            zero_(parameter, zeros)  # master weights of a checkpoint may lack the last zeros

    def _release(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._held.clear()

    def _warn_of_early_end(self, trainer: Trainer, writer: ReportWriter) -> None:
        assert self.schedule is not None
        if trainer.global_step < self.schedule.end_step:
            writer.report.warnings.append(
                f"training ended after {trainer.global_step} steps, before end_step="
                f"{self.schedule.end_step} of the schedule: fewer weights are zero than were asked"
            )


def _kept_zero(zeros: Tensor) -> Any:
    return lambda gradient: zero_gradient(gradient, zeros)


@contextmanager
def _shown(num_layers: int) -> Iterator[OnLayer]:
    """A bar over the layers while the block lasts; 0 shows nothing."""
    with Bars(disable=num_layers == 0) as bars:
        task = bars.add_task("pruning weights", total=num_layers)
        yield lambda _: bars.advance(task)
