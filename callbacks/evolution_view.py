"""What can be watched of an evolutionary search while it goes on."""

from __future__ import annotations

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import Progress as ProgressBar

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
        self._trainer, self._bar = trainer, bar
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
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=progress.evaluated)
            is_new = self._shown != progress.genome.key
            if is_new and isinstance(logger, TensorBoardLogger) and self._trainer.is_global_zero:
                for name, image in best_maps(progress.genome).items():
                    tag = f"search/{name}"
                    logger.experiment.add_image(tag, image, progress.evaluated, dataformats="HW")
        self._shown = progress.genome.key


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
