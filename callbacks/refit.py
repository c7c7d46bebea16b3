"""Closed-form refit after any plan: the experts that stay learn to do what the layer did before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import Progress as Bars
from torch import nn
from transformers import PreTrainedModel

from lit_moe.adapters import find_sites
from lit_moe.assets import resolve_model
from lit_moe.callbacks.calibration import calibration_share
from lit_moe.callbacks.report import report_writer
from lit_moe.checkpoints import read_config
from lit_moe.errors import LitMoEError
from lit_moe.merge_plan import MergePlan
from lit_moe.models import build_model, check_unwritten
from lit_moe.module import MoEModule
from lit_moe.plan import KeepPlan
from lit_moe.refit import (
    LayerRefit,
    OnLayer,
    RefitOptions,
    check_budget,
    check_expert_ids,
    check_num_rows,
    check_relatives,
    check_sizes,
    is_unchanged,
    refit,
)
from lit_moe.sharding.partitions import is_partitioned
from lit_moe.teachers import origin_of

PROGRESS_FOLDER = "refit_progress"


class Refit(Callback):
    """Re-fits the down projections of the experts in closed form, without gradients.

    Put it behind the callback that makes the plan: it acts when that one has, before any strategy
    wraps the model, on the same calibration text. On an already pruned checkpoint it is a step of
    its own, with ``teacher``. A killed run, started again, goes on at the layer where it was.

    Args:
        teacher: folder or hub id of the model to imitate: the unpruned MoE, or an earlier ancestor
            such as the dense model that was split into experts. None for the model as it was before
            this run changed it.
        options: see :class:`lit_moe.refit.RefitOptions`.
    """

    def __init__(self, teacher: str | None = None, options: RefitOptions | None = None) -> None:
        self.teacher = teacher
        self.options = options or RefitOptions()

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Asks for a copy of it as it will be before any plan."""
        report_writer(trainer)
        if stage != "fit":
            return
        others = [c for c in trainer.callbacks if isinstance(c, Refit)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise LitMoEError(
                f"{len(others)} Refit callbacks are given, but the second would find nothing left "
                "to correct; keep one, behind the last callback that changes the model"
            )
        if self.teacher is None:
            pl_module.keep_unpruned = True
        else:
            read_config(resolve_model(self.teacher))  # a missing one should not show after an hour

    def check_model(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built, before any callback acts on it. Refuses what cannot end well.

        Raises:
            LitMoEError: if the memory budget is too small for a single token's experts, the
                teacher's sizes or expert ids are not the model's, or there are too few calibration
                rows.
        """
        if trainer.state.fn != TrainerFn.FITTING or module.is_resumed:
            return
        if not is_partitioned(module.built_model):
            check_budget(module.built_model, self.options)
        if self.teacher is not None:
            check_sizes(read_config(resolve_model(self.teacher)), module.built_model.config)
            self._check_origins(self.teacher, module)
        self._check_rows(trainer)

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built and plans before this one are applied. Refits it.

        Collective: every rank must call it. A resumed run has refitted weights in its checkpoint.

        Raises:
            LitMoEError: if there is nothing to learn from, see :func:`lit_moe.refit.refit`.
        """
        if trainer.state.fn != TrainerFn.FITTING or module.is_resumed:
            return
        if is_partitioned(module.built_model):
            raise LitMoEError(
                "Refit needs the whole model on each rank, but the strategy loads it in shares: "
                "set shard_on_load: false in trainer.strategy.init_args, or leave Refit out"
            )
        writer = report_writer(trainer)
        writer.on_model_built(trainer, module)
        module.to(trainer.strategy.root_device)
        teacher = self._teacher(module)
        check_relatives(teacher, module.built_model, find_sites(module.built_model))
        if self.teacher is not None and not {"pruned", "merged"} & set(writer.report.quality):
            writer.measure(trainer, module, "before")
        batches = calibration_share(trainer)
        num_layers = len(find_sites(module.built_model)) if trainer.is_global_zero else 0
        with writer.phase("refit"), _shown(num_layers) as on_layer:
            report = refit(
                module.built_model,
                teacher,
                batches,
                self.options,
                progress_folder=Path(trainer.default_root_dir) / PROGRESS_FOLDER,
                on_layer=on_layer,
            )
        if self.teacher is not None:
            report.teacher = self.teacher
        writer.report.refit = report
        writer.report.warnings.extend(report.sentences())
        writer.measure(trainer, module, "refitted")
        writer.write()

    def _check_origins(self, teacher: str, module: MoEModule) -> None:
        ours = None if module.architecture else _kept_in(module.model_name_or_path)
        theirs = _kept_in(teacher)
        if ours is not None and theirs is not None:
            check_expert_ids(theirs, ours)

    def _check_rows(self, trainer: Trainer) -> None:
        """Refuse too few rows; all ranks count all rows, so that they agree."""
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "calibration_dataloader"):
            return  # calibration_share says so
        rows = data.calibration_dataloader(rank=0, world_size=1).dataset
        if hasattr(rows, "__len__"):
            check_num_rows(len(rows), self.options.held_out)

    def _teacher(self, module: MoEModule) -> PreTrainedModel:
        if self.teacher is not None:
            teacher = build_model(
                self.teacher,
                dtype=module.dtype_name,
                trust_remote_code=module.trust_remote_code,
            )
            nn.Module.to(teacher, module.built_model.device, module.built_model.dtype)
            return teacher
        unpruned = module.unpruned
        if unpruned is not None:
            check_unwritten(unpruned)
        if unpruned is None or is_unchanged(module.built_model, unpruned):
            raise LitMoEError(
                "Refit has nothing to correct: no callback before it changed the model and no "
                "teacher is given; put it behind a callback that prunes, or name the model that "
                f"{module.model_name_or_path!r} was made from: --Refit.teacher FOLDER"
            )
        nn.Module.to(unpruned, module.built_model.device)
        return unpruned


def _kept_in(name_or_path: str) -> KeepPlan | None:
    """Return which experts an exported folder kept; None if it is whole or has merged ones."""
    plan = origin_of(name_or_path)
    return plan.as_keep_plan() if isinstance(plan, MergePlan) else plan


@contextmanager
def _shown(num_layers: int) -> Iterator[OnLayer]:
    """A bar over the layers and a line for each, while the block lasts; 0 shows nothing."""
    with Bars(disable=num_layers == 0) as bars:
        task = bars.add_task("refitting experts", total=num_layers)

        def on_layer(name: str, layer: LayerRefit) -> None:
            if num_layers:
                bars.console.print(f"  {name}: {describe(layer)}", highlight=False, soft_wrap=True)
                bars.advance(task)

        yield on_layer


def describe(layer: LayerRefit) -> str:
    """Return one line: residual before and after, fitted and held out."""
    if not layer.kept:
        return f"left as it was: {layer.reason}"
    parts = ["solved by an earlier run"] if layer.resumed else []
    parts.append(f"residual {_change(layer.residual_before, layer.residual_after)}")
    parts.append(f"held out {_change(layer.held_out_before, layer.held_out_after)}")
    if layer.lam is not None:
        parts.append(f"lam {layer.lam:.2g}")
    if not layer.converged:
        parts.append(f"still moving after {layer.sweeps} sweeps")
    return ", ".join(parts)


def _change(before: float | None, after: float | None) -> str:
    first, second = ("?" if x is None else f"{x:.3g}" for x in (before, after))
    return f"{first} -> {second}"
