"""Exports the model when the fit is over."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from lit_moe.callbacks.report import report_writer
from lit_moe.errors import ExportError
from lit_moe.export import (
    ExportResult,
    Wanted,
    check_layout,
    check_packable,
    check_target,
    export,
    whole_on_first_rank,
)
from lit_moe.module import MoEModule
from lit_moe.report.schema import Export


class ExportModel(Callback):
    """Writes a Hugging Face folder at the end of the fit, verified by reloading it.

    Args:
        path: the folder to make; relative to the run's folder unless absolute.
        layout: for layers with different numbers of experts, or to pack 2:4 zeros
            (``compressed_2_4``), see ``lit_moe.export.export``.
        overwrite: replace an older export.
        dtype: cast the weights before writing; ``auto`` is the source checkpoint's own, None
            keeps those of training.
        verify: reload the folder, without a second copy of the model on any rank if there are
            several or it is large, and compare weights and logits.
    """

    def __init__(
        self,
        path: str = "model",
        layout: Wanted = "auto",
        overwrite: bool = False,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = "auto",
        verify: bool = True,
    ) -> None:
        self.path = path
        self.dtype = dtype
        self.layout = layout
        self.overwrite = overwrite
        self.verify = verify

    def setup(self, trainer: Trainer, pl_module: MoEModule, stage: str) -> None:  # type: ignore[override]
        """Before the model is built. Refuses a taken path, or a layout that cannot be written."""
        if stage != "fit":
            return
        report_writer(trainer)
        folder = self._folder(trainer)
        refused = None
        if trainer.is_global_zero:
            try:
                check_layout(self.layout)
                check_target(folder, overwrite=self.overwrite)
            except ExportError as error:
                refused = str(error)
        refused = trainer.strategy.broadcast(refused)  # so that all ranks stop, not only the first
        if refused is not None:
            raise ExportError(refused)

    def check_model(self, trainer: Trainer, module: MoEModule) -> None:
        """When the model is built, before any callback acts on it. Refuses what cannot be packed.

        Raises:
            ExportError: if ``layout: compressed_2_4`` is not for this family or its widths.
        """
        if trainer.state.fn == TrainerFn.FITTING and self.layout == "compressed_2_4":
            check_packable(module.built_model)

    def on_fit_end(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """After training. Measures what is left to measure and writes the folder on rank 0."""
        writer = report_writer(trainer)
        writer.measure_recovered(trainer, pl_module)
        folder = self._folder(trainer)
        name = pl_module.source_dtype if self.dtype == "auto" else self.dtype
        dtype = None if name is None else getattr(torch, name)
        with writer.phase("export"):
            result = self._export_together(trainer, pl_module, folder, dtype)
        if result is not None:
            writer.report.export = Export(
                path=str(result.path),
                max_abs_logit_difference=result.max_abs_logit_difference,
                layout=result.layout,
            )
            writer.write()

    def _export_together(
        self, trainer: Trainer, module: MoEModule, folder: Path, dtype: torch.dtype | None
    ) -> ExportResult | None:
        """Return the result on rank 0; an export that fails there ends all ranks. Collective."""
        result, failed = None, None
        try:
            with whole_on_first_rank(
                module.built_model, folder, dtype=dtype, verify=self.verify
            ) as whole:
                result = None if whole is None else self._export(trainer, module, whole, folder)
        except ExportError as error:
            failed = str(error)
        failed = trainer.strategy.broadcast(failed)
        if failed is not None:
            raise ExportError(failed)
        return result

    def _export(
        self, trainer: Trainer, module: MoEModule, model: PreTrainedModel, folder: Path
    ) -> ExportResult:
        return export(
            model,
            folder,
            tokenizer=getattr(trainer.datamodule, "tokenizer", None),  # type: ignore[attr-defined]
            plan=module.plan,
            report=report_writer(trainer).report.to_dict(),
            layout=self.layout,
            overwrite=self.overwrite,
            verify=self.verify,
        )

    def _folder(self, trainer: Trainer) -> Path:
        base = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: every rank asks
        return Path(self.path) if Path(self.path).is_absolute() else base / self.path
