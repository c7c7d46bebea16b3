"""What can be watched of an evolutionary search while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import Progress as ProgressBar
from torch import Tensor

from lit_moe.callbacks.monitor import enlarge
from lit_moe.search.genome import Genome
from lit_moe.search.run import Progress


class LiveView:
    """Shows where a search is: scalars, the maps of the best, a bar.

    Args:
        trainer: its loggers are told.
        bar: where the bar is added.
        total: evaluations in all.
    """

    def __init__(self, trainer: Trainer, bar: ProgressBar, total: int) -> None:
        self._loggers, self._is_first = list(trainer.loggers), trainer.is_global_zero
        self._bar = bar
        self._task = bar.add_task("searching", total=total)
        self._shown: str | None = None

    def show(self, progress: Progress) -> None:
        """Show a generation that has ended."""
        text = f"searching ({progress.phase}), best {progress.best:.2f}"
        self._bar.update(self._task, completed=progress.evaluated, description=text)
        values = {
            "search/best": progress.best,
            "search/median": progress.median,
            "search/evaluations_per_second": progress.per_second,
        }
        is_new = self._shown != progress.genome.key
        if is_new and self._bar.disable:
            done = f"{progress.evaluated} of {progress.total} candidates evaluated"
            rank_zero_info(f"{text}, {done}")
        for logger in self._loggers:
            logger.log_metrics(values, step=progress.evaluated)
            if is_new and isinstance(logger, TensorBoardLogger) and self._is_first:
                for name, image in best_maps(progress.genome).items():
                    tag = f"search/{name}"
                    logger.experiment.add_image(tag, image, progress.evaluated, dataformats="HW")
        self._shown = progress.genome.key

    def show_validation(self, metrics: Sequence[Mapping[str, Tensor | float]], step: int) -> None:
        """Show what a validation of the best so far logged, by candidates evaluated."""
        values = {f"search/{k}": float(v) for found in metrics for k, v in found.items()}
        for logger in self._loggers if values else ():
            logger.log_metrics(values, step=step)
            logger.save()


def best_maps(genome: Genome) -> dict[str, np.ndarray]:
    """Return images of the expert and router maps: rows new experts of all groups, columns old.

    0 is grey, 1 white, -1 black.
    """
    width = max(maps.experts.shape[1] for maps in genome.maps)
    found = {}
    for name in ("experts", "routers"):
        parts = []
        for maps in genome.maps:
            values = getattr(maps, name)
            parts.append(np.pad(values, ((0, 1), (0, width - values.shape[1]))))
        found[name] = enlarge((np.concatenate(parts)[:-1].clip(-1, 1) + 1) / 2)
    return found
