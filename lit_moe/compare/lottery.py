"""Lotteries: a copy of the model, dropped from and trained in rounds by the callback itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import PreTrainedModel

from lit_moe.callbacks import IterativePruning, ReportWriter
from lit_moe.callbacks.rounds import TrainingData, steps_per_round
from lit_moe.compare.options import CompareOptions, Line
from lit_moe.compare.stations import Way, budget_of
from lit_moe.compare.text import ComparedText
from lit_moe.module import MoEModule
from lit_moe.plan import KeepPlan

_TERMINATED = 128 + 15
"""Status of a process that SIGTERM ended."""


@dataclass(frozen=True)
class Station:
    """A lottery that has come to one of the ratios, with its training done.

    Attributes:
        ratio: of experts that are left.
        plan: which, in the numbering of the whole model.
        model: masked or cut; in training afterwards, so it must not be changed.
        alive: layer -> the same experts in the numbering of ``model``.
        tokens: that it was trained on so far.
    """

    ratio: float
    plan: KeepPlan
    model: PreTrainedModel
    alive: Mapping[str, tuple[int, ...]]
    tokens: int


def play(
    options: CompareOptions,
    model: str,
    line: Line,
    *,
    text: ComparedText,
    way: Way,
    on_station: Callable[[Station], None],
) -> None:
    """Load the model anew, drop and train in rounds, and call back at each ratio.

    Nothing of it reaches the caller's model. With the optimizer reset in each round, a lottery to
    a small ratio is on its way each of those to larger ones.

    Args:
        options: of the comparison.
        model: folder, hub id or ``embedded``.
        line: criterion, direction and scope.
        text: of the seed.
        way: the rounds.
        on_station: called with the model as it then is, in the order of falling ratios.

    Raises:
        LitMoEError: as the callback does, for instance for too little text to train on.
    """
    with TemporaryDirectory() as folder, _quiet(), torch.random.fork_rng():
        torch.manual_seed(text.seed)
        trainer = _trainer(Path(folder), [_pruning(options, line, way, on_station), _Notes(text)])
        module = MoEModule(
            model_name_or_path=model, dtype=options.dtype, optimizer=replace(options.optimizer)
        )
        _fit(trainer, module, text)


def check_training(options: CompareOptions, text: ComparedText, ways: Iterable[Way]) -> None:
    """Refuse lotteries that want more text than there is.

    Args:
        options: of the comparison.
        text: that lotteries are trained on.
        ways: their rounds.

    Raises:
        LitMoEError: see :func:`lit_moe.callbacks.rounds.steps_per_round`.
    """
    if "lottery" not in options.procedures:
        return
    tokens = options.text.sequence_length * options.text.batch_size
    data = TrainingData(tokens_per_step=tokens, steps_per_epoch=len(text.train_dataloader()))
    for way in ways:
        steps_per_round(options.fine_tuning, len(way.keep), data)


def _fit(trainer: Trainer, module: MoEModule, text: ComparedText) -> None:
    """Train; end the process where lightning would take SIGTERM for the end of the training."""
    try:
        trainer.fit(module, datamodule=text)
    except SIGTERMException:
        raise SystemExit(_TERMINATED) from None
    if trainer.received_sigterm:
        raise SystemExit(_TERMINATED)


def _pruning(
    options: CompareOptions, line: Line, way: Way, on_station: Callable[[Station], None]
) -> IterativePruning:
    return _StationedPruning(
        way,
        on_station,
        criterion=line.criterion,
        criterion_options={"direction": "opposite"} if line.direction == "opposite" else None,
        budget=budget_of(min(way.stations.values()), line.scope),
        unrouted=options.unrouted,
        rounds=len(way.keep),
        fine_tuning=options.fine_tuning,
    )


class _StationedPruning(IterativePruning):
    """Calls back when a round with a ratio of its own is over."""

    shows_bars = False

    def __init__(self, way: Way, on_station: Callable[[Station], None], **options: Any) -> None:
        super().__init__(**options)
        self._way, self._on_station = way, on_station

    def on_round_end(self, trainer: Trainer, module: MoEModule, number: int) -> None:
        if number in self._way.stations:
            self._on_station(
                Station(
                    self._way.stations[number],
                    plan=self.kept(module),
                    model=module.built_model,
                    alive=self.alive(module).kept,
                    tokens=self.tokens_trained(trainer),
                )
            )


class _Notes(ReportWriter):
    """The report that every run has, which nobody reads here."""

    def __init__(self, text: ComparedText) -> None:
        super().__init__(measure_quality=False, figures=False)
        self._seed = text.seed

    def on_model_built(self, trainer: Trainer, module: MoEModule) -> None:
        super().on_model_built(trainer, module)
        self.report.seed = self._seed

    def teardown(self, *_: Any, **__: Any) -> None:
        pass

    def on_exception(self, *_: Any, **__: Any) -> None:
        pass


def _trainer(folder: Path, callbacks: list[L.Callback]) -> Trainer:
    return Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
        callbacks=callbacks,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lightning's notices about devices, once per lottery."""
    names = ("lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
