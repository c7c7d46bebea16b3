"""The theory behind dropping experts by their router's change, as a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from lightning import Callback, Trainer
from rich.console import Console
from rich.table import Table

from lit_moe.models.vision.pattern_study import (
    Changes,
    Pruned,
    as_dict,
    check_amounts,
    check_task,
    draw_study,
    study_changes,
    study_pruning,
)
from lit_moe.models.vision.two_patterns import TwoPatterns
from lit_moe.module import MoEModule


class TwoPatternStudy(Callback):
    """Trains the network of the theory on synthetic data and writes what the theorems speak of.

    Into the run's folder: ``report.json`` and, with matplotlib, ``theory.png``. The model and the
    data of the run have no part in it.

    Args:
        task: sizes and rates.
        dimensions: of the tokens, at each of which the changes of the routers are compared.
        pruned_dimension: at which experts are dropped.
        ratios: of the experts that are dropped.
        num_seeds: runs that are averaged.
    """

    def __init__(
        self,
        task: TwoPatterns | None = None,
        dimensions: Sequence[int] = (16, 32, 64, 128, 256, 512),
        pruned_dimension: int = 128,
        ratios: Sequence[float] = (0.0, 0.25, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375),
        num_seeds: int = 5,
    ) -> None:
        self.task = task or TwoPatterns()
        check_task(self.task)
        check_amounts(dimensions, pruned_dimension, ratios, num_seeds)
        self.dimensions = tuple(dimensions)
        self.pruned_dimension = pruned_dimension
        self.ratios = tuple(ratios)
        self.num_seeds = num_seeds

    def on_fit_start(self, trainer: Trainer, pl_module: MoEModule) -> None:  # type: ignore[override]
        """Before any training. Runs the study on rank 0 and writes it."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: every rank asks
        if not trainer.is_global_zero:
            return
        changes = study_changes(self.task, self.dimensions, self.num_seeds)
        pruned = study_pruning(self.task, self.pruned_dimension, self.ratios, self.num_seeds)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(as_dict(changes, pruned), indent=2)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        if find_spec("matplotlib") is not None:
            draw_study(changes, pruned, folder / "theory.png")
        self._print(changes, pruned, folder)

    def _print(self, changes: Sequence[Changes], pruned: Sequence[Pruned], folder: Path) -> None:
        console = Console()
        table = Table("d", "relevant", "irrelevant", "share of these", title="change of the norm")
        for row in changes:
            values = (row.relevant, row.irrelevant, row.irrelevant_share)
            table.add_row(str(row.dimension), *(f"{value:.3g}" for value in values))
        console.print(table)
        table = Table("dropped", "pruned", "recovered", "inverse order", title="accuracy")
        for cell in pruned:
            means = (fmean(v) for v in (cell.pruned, cell.recovered, cell.inverse))
            table.add_row(f"{cell.ratio:.2%}", *(f"{mean:.3f}" for mean in means))
        console.print(table)
        console.print(f"report: {folder / 'report.json'}", soft_wrap=True, highlight=False)
