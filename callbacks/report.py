"""Keeps the record of a run: phases, quality at each stage, the report files, the last screen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.accounting import count_bytes, count_parameters
from lit_moe.adapters import find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.errors import NotAnMoEError
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.module import MoEModule
from lit_moe.report import (
    Change,
    RunReport,
    draw_figures,
    summary_table,
    write_json,
    write_markdown,
)

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"
_RANDOM = "random weights"
_MEASURED_BEFORE = (
    "quality",
    "tasks",
    "images",
    "merging",
    "search",
    "calibration",
    "criterion",
    "unrouted",
    "protected",
    "rounds",
    "refit",
    "warnings",
)


class ReportWriter(Callback):
    """Writes ``report.json``, ``report.md`` and figures into the logger's folder.

    Every run has one: callbacks that prune or export add it when the config does not. The JSON file
    is rewritten after each stage, so that a killed run leaves what it had found.

    Args:
        measure_quality: evaluate the test split before pruning, after it, and after recovery.
        figures: draw PNG figures (needs matplotlib: ``pip install 'lit-moe[plots]'``).
        measure_before: evaluate before training also where no callback changes the model.
    """

    def __init__(
        self, measure_quality: bool = True, figures: bool = True, measure_before: bool = False
    ) -> None:
        self.measure_quality = measure_quality
        self.figures = figures
        self.measure_before = measure_before
        self.scores: dict[str, Tensor] = {}
        self.loads: dict[str, Tensor] = {}
        self._report: RunReport | None = None
        self._folder: Path | None = None
        self._show = True

    @property
    def report(self) -> RunReport:
        """What the run knows so far."""
        if self._report is None:
            raise RuntimeError("the report begins when the model is built, which it is not yet")
        return self._report

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built, before any callback changes it. Counts what there is."""
        if self._report is not None:
            return
        seed = os.environ.get("PL_GLOBAL_SEED")
        # trainer.log_dir is a collective: every rank must ask.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._show = trainer.is_global_zero
        self._report = RunReport.start(
            source=module.model_name_or_path if module.architecture is None else _RANDOM,
            family=module.built_model.config.model_type,
            seed=None if seed is None else int(seed),
        )
        self.count(module, "before")
        if self.measure_before and trainer.state.fn == TrainerFn.FITTING:
            module.to(trainer.strategy.root_device)
            self.measure(trainer, module, "before")

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Begins a new report for each fit."""
        if stage == "fit":
            self._report = None

    def on_fit_end(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """After training, or at once if there is none. Measures what is left."""
        self.measure_recovered(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Last of all, when every callback has done its part. Writes all, prints the table."""
        if stage != "fit" or not self._show or self._report is None:
            return
        self.report.status = "finished"
        self.write()
        figures = self._draw() if self.figures else []
        write_markdown(self.report, self.folder / MARKDOWN_NAME, figures=figures)
        if self.report.export is not None:
            write_json(self.report, Path(self.report.export.path) / JSON_NAME)
        self._print()

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """When the run breaks. Writes what there is and says where."""
        if self._report is None or not self._show:
            return
        self.report.status = "interrupted"
        self.write()
        if not self.report.quality and self.report.search is None:
            return  # refused, or ended before anything was found
        Console(stderr=True).print(
            f"interrupted; what was found is in {self.folder / JSON_NAME}", soft_wrap=True
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot measure again."""
        return {} if self._report is None else {"report": self.report.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """When a run resumes. Takes over what was measured before the checkpoint."""
        if "report" not in state_dict:
            return
        earlier = RunReport.from_dict(state_dict["report"])
        for name in _MEASURED_BEFORE:
            setattr(self.report, name, getattr(earlier, name))
        for name, seconds in earlier.seconds.items():
            self.report.seconds[name] = self.report.seconds.get(name, 0.0) + seconds
        for name in ("parameters", "active_parameters", "bytes"):
            getattr(self.report, name).before = getattr(earlier, name).before

    @property
    def folder(self) -> Path:
        """The logger's folder, or the trainer's root if there is no logger."""
        if self._folder is None:
            raise RuntimeError("the report begins when the model is built, which it is not yet")
        return self._folder

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside the block to a phase of the report."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.report.seconds
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def count(self, module: MoEModule, moment: str) -> None:
        """Record parameters and bytes ``before`` or ``after``."""
        model = module.built_model
        parameters, active = count_parameters(model, _sites(model))
        values = {
            "parameters": parameters,
            "active_parameters": active,
            "bytes": count_bytes(model),
        }
        for name, value in values.items():
            change: Change = getattr(self.report, name)
            setattr(change, moment, value)
            if moment == "before":
                change.after = value

    def measure(self, trainer: Trainer, module: MoEModule, stage: str) -> None:
        """Evaluate the test split on all ranks and record it under ``stage``."""
        data: Any = getattr(trainer, "datamodule", None)
        if self.measure_quality and hasattr(data, "evaluate_images"):
            with self.phase(f"evaluate_{stage}"):
                self.report.images[stage] = data.evaluate_images(module.built_model)
            self._log_images(trainer, stage)
            self.write()
            return
        if not self.measure_quality or not hasattr(data, "test_share"):
            return
        loader, domains = data.test_share(rank=trainer.global_rank, world_size=trainer.world_size)
        bar = track(
            loader, description=f"evaluating: {stage}", total=len(loader), disable=not self._show
        )
        with self.phase(f"evaluate_{stage}"):
            quality = evaluate_perplexity(module.built_model, bar, domains)
        self.report.quality[stage] = quality
        if hasattr(data, "evaluate"):
            with self.phase(f"answer_{stage}"):
                self.report.tasks[stage] = data.evaluate(module.built_model)
        self._log(trainer, stage)
        self.write()

    def measure_recovered(self, trainer: Trainer, module: MoEModule) -> None:
        """Record the stage after training, once; nothing if no step was taken."""
        measured = {*self.report.quality, *self.report.images}
        if trainer.global_step == 0 or {"recovered", "trained"} & measured:
            return
        changed = {"pruned", "merged", "refitted"} & measured
        self.measure(trainer, module, "recovered" if changed else "trained")

    def write(self) -> None:
        """Write the JSON file on rank 0, in one step."""
        if self._show:
            write_json(self.report, self.folder / JSON_NAME)

    def on_train_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training begins. Starts its clock."""
        self._train_start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """When training ends. Stops its clock."""
        spent = time.perf_counter() - self._train_start
        self.report.seconds["train"] = self.report.seconds.get("train", 0.0) + spent

    def _log(self, trainer: Trainer, stage: str) -> None:
        quality = self.report.quality[stage]
        step = len(self.report.quality) - 1
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                values = {"perplexity": quality.perplexity, "bits_per_byte": quality.bits_per_byte}
                for name, value in values.items():
                    logger.experiment.add_scalar(f"quality/{name}_by_stage", value, step)

    def _log_images(self, trainer: Trainer, stage: str) -> None:
        quality, step = self.report.images[stage], len(self.report.images) - 1
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_scalar("quality/accuracy_by_stage", quality.accuracy, step)

    def _draw(self) -> list[Path]:
        return draw_figures(self.report, self.folder, scores=self.scores, loads=self.loads)

    def _print(self) -> None:
        console = Console()
        console.print(summary_table(self.report))
        for sentence in self.report.warnings:
            console.print(f"note: {sentence}", soft_wrap=True, highlight=False)
        lines: dict[str, Any] = {
            "report": self.folder / MARKDOWN_NAME,
            "tensorboard": f"tensorboard --logdir {self.folder}",
            "model": self.report.export and self.report.export.path,
        }
        for name, value in lines.items():
            if value:
                console.print(f"{name + ':':<12} {value}", soft_wrap=True, highlight=False)


def _sites(model: PreTrainedModel) -> tuple[MoESite, ...]:
    try:
        return find_sites(model)
    except NotAnMoEError:  # training a dense model is odd, but no reason to stop
        return ()


def report_writer(trainer: Trainer) -> ReportWriter:
    """Return the run's report writer, adding one if there is none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ReportWriter):
            return callback
    writer = ReportWriter()
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    return writer
